"""What Windows and Macs lack, taken away here: the rest of such a machine nobody simulates."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# No module resource, no fcntl, no SIGHUP, no fork, text files in a local encoding unless it is named, and an Apple GPU,
# on which float64 does not exist.
ELSEWHERE = """
import functools, importlib, multiprocessing, pkgutil, runpy, signal, sys, warnings

sys.modules["resource"] = sys.modules["fcntl"] = None
del signal.SIGHUP
multiprocessing.set_start_method("spawn")
warnings.simplefilter("ignore")
import torch

torch.backends.mps.is_available = torch.backends.mps.is_built = functools.cache(lambda: True)
import common, eval, methods, studies

for package in (common, eval, methods, studies):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
warnings.filterwarnings("error", category=EncodingWarning, module=r"(common|eval|methods|studies)\\.")
sys.argv[0] = "methods.simclr.train"
runpy.run_module("methods.simclr.train", run_name="__main__", alter_sys=True)
"""


def test_what_other_machines_lack_is_not_needed(tmp_path):
    words = ["smoke", "--out", tmp_path, "--limit", 80, "--batch-size", 32, "--epochs", 1, "--save-every", 1]
    words += ["--eval-protocols", "knn", "metrics", "--no-eval-baselines"]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", ELSEWHERE, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "simclr-smoke" / "result.json").read_text(encoding="utf-8"))
    assert card["peak_memory_bytes"] == 0 and card["device"].startswith("CPU")
    assert {row["protocol"] for row in card["evaluations"]} >= {"knn-20-0.07", "label-free"}
