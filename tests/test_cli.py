"""The command line: presets, near matches, plan, and every mistake as one sentence with exit status 2."""

import errno
import importlib
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import tomllib
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
import torch
from PIL import Image

import methods
from common.backbones import load_backbone
from common.cli import field_docs, parse, run_cli
from common.config import ResNetConfig
from common.data import known_data
from common.errors import UserError
from common.html import duration
from common.log import read_metrics
from common.plan import estimate
from methods.dino.config import PRESETS as DINO
from methods.simclr.config import PRESETS, Config
from tests.processes import run_command

SIMCLR = "methods.simclr.train"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def fails(tmp_path):
    def run(*arguments: object, module: str = SIMCLR) -> str:
        code, text = run_command(module, *arguments, log=tmp_path / "log")
        assert code == 2, text
        assert "Traceback" not in text
        return text

    return run


def test_no_preset_lists_them_with_a_line_each(fails):
    text = fails()
    for name in ("quickstart", "smoke", "cifar10-r18", "imagenet-r50-b256"):
        assert name in text
    assert "official README" in text and "no preset given" in text


def test_presets_are_listed_without_importing_torch():
    """In a fresh process, as a user starts it: torch and timm would take seconds."""
    for method in sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg):
        for words in ([f"methods.{method}.train"], [f"methods.{method}.train", "--help"], ["methods", method]):
            command = [sys.executable, "-X", "importtime", "-m", *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert f"usage: python -m methods.{method}.train PRESET" in done.stdout, done.stderr
            assert done.returncode == (0 if "--help" in words else 2) and "smoke" in done.stdout
            imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
            assert "common.cli" in imported and not imported & {"torch", "timm", "numpy", "tyro"}, (words, imported)


def test_help_without_preset_is_no_mistake(tmp_path):
    code, text = run_command(SIMCLR, "--help", log=tmp_path / "log")
    assert code == 0 and "quickstart" in text
    code, text = run_command(SIMCLR, "cifar10-r50", "--help", log=tmp_path / "log")
    assert code == 0 and "--temperature" in text and "resnet50" in text and "Paper App. B.9" in text


def test_methods_are_listed_and_started_by_name(fails, tmp_path):
    code, text = run_command("methods.__main__", log=tmp_path / "log")
    found = {path.parent.name for path in ROOT.glob("methods/*/train.py")}
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("  ")}
    assert code == 0 and listed.keys() == found and listed["byol"] == "BYOL: Bootstrap Your Own Latent"
    flags = ("simclr", "smoke", "--max-steps", 1, "--no-eval", "--out", tmp_path)
    code, text = run_command("methods.__main__", *flags, log=tmp_path / "log")
    assert code == 0 and json.loads((tmp_path / "simclr-smoke" / "config.json").read_text())["method"] == "simclr"
    assert "did you mean simclr" in fails("simcl", module="methods.__main__")
    assert "'x' is not a preset" in fails("byol", "x", module="methods.__main__")


def test_installed_commands_exist():
    for name, entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, function = entry.split(":")
        assert name.startswith("ssl-") and callable(getattr(importlib.import_module(module), function))


def test_unknown_preset_suggests_near_ones(fails):
    text = fails("cifar-r18")
    assert "'cifar-r18' is not a preset: did you mean cifar10-r18" in text
    assert "the preset comes before '--epochs'" in fails("--epochs", "3", "smoke")


def test_unknown_flag_and_choice_suggest_valid_ones(fails):
    assert "--epochs" in fails("smoke", "--epoch", "3")
    text = fails("smoke", "--optimizer", "adam")
    assert "lars" in text and "adamw" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "./nowhere"], "there is no such path"),
        (["--data", "cifar10"], "directory of parquet files"),  # a hub name without network
        (["--batch-size", "1"], "batch"),
        (["--batch-size", "512"], "256"),
        (["--backbone", "resnet19"], "timm has no model 'resnet19'"),
        (["--micro-batch", "24"], "does not divide the 64 images"),
        (["--micro-batch", "32", "--activation-checkpointing"], "choose --micro-batch or --activation-checkpointing"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--normalize", "mnist"], "choose none or one of shapes"),
        (["--norm", "group", "--backbone", "vit_tiny_patch16_224", "--stem", "timm"], "options of ResNets"),
    ],
)
def test_mistakes_are_one_sentence(fails, arguments, sentence, tmp_path):
    text = fails("smoke", "--out", tmp_path, *arguments)
    error = next(line for line in text.splitlines() if line.startswith("error: "))
    assert sentence in error
    assert not (tmp_path / "simclr-smoke").exists()  # found before anything was written


def test_options_of_vits_are_refused_elsewhere(fails, tmp_path):
    flags = ("--backbone", "resnet18", "--patch-size", 0, "--width", 0, "--depth", 0, "--heads", 0, "--out", tmp_path)
    for option in ("--drop-path", "--layer-scale"):
        others = [word for name in {"--drop-path", "--layer-scale"} - {option} for word in (name, 0)]
        text = fails("smoke", *flags, *others, option, 0.1, module="methods.simclr_variants.train")
        assert f"{option} applies only to ViTs" in text
    assert not (tmp_path / "simclr_variants-smoke").exists()


def test_plan_prints_sources_and_writes_nothing(tmp_path):
    words = ("smoke", "--plan", "full", "--out", tmp_path, "--temperature", 0.3)
    code, text = run_command(SIMCLR, *words, log=tmp_path / "log")
    assert code == 0, text
    for word in ("temperature", "0.3", "flag", "preset", "default", "App.", "peak learning rate", "images/s", "GiB"):
        assert word in text, word
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        (
            "simclr",
            "cifar10-r18",
            [
                "50,000 of cifar10",
                "97,000 = 1000 epochs x 97",
                "11.5 M trained",
                "6 x 1,111 MMAC x 512",
                "91.0 linear-",
            ],
        ),
        (
            "dino",
            "imagenet-vits",
            ["1,281,167 of imagenet-1k", "knn, linear, metrics, linear-augmented", "77.0"],
        ),
        ("mae", "imagenette-vits", ["9,469 of imagenette", "A100 3.8 s, 13 min", "batch_size 256"]),
        ("amdim", "stl10", ["105,000 of stl10", "94.2 linear-augmented", "split train+unlabeled"]),
        ("dim", "stl10", ["100,000 of stl10", "72.57 conv-mlp", "knn, linear, metrics"]),
    ],
)
def test_known_data_are_planned_without_them_on_a_screen(method, preset, expected, tmp_path):
    words = (preset, "--plan", "--seed", 3, "--out", tmp_path)
    code, text = run_command(f"methods.{method}.train", *words, log=tmp_path / "log", before=offline)
    assert code == 0, text
    lines, said = text.splitlines(), " ".join(text.split())
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, text
    for words in (*expected, "set by flags out", "seed 3", "Not measured"):
        assert words in said, text
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def offline() -> None:
    """Any connection ends the process."""
    sys.addaudithook(lambda event, _: os._exit(9) if event in ("socket.connect", "socket.getaddrinfo") else None)


def test_sizes_of_known_data_stand_for_no_other_data(tmp_path):
    assert known_data("stl10", "unlabeled").labels is None and known_data("cifar10", "dev") is None
    joined = known_data("stl10", "train+unlabeled", 6_000)
    assert len(joined) == 6_000 and int((joined.labels >= 0).sum()) == 5_000
    assert known_data(str(tmp_path)) is None and known_data("pairs") is None


def test_an_estimate_is_its_formula():
    text = estimate(10**9, batch_size=1000, steps=100_000, steps_per_epoch=1000)
    seconds = 6 * 1e9 * 1000 / (0.2 * 312e12)  # a step on an A100
    assert f"A100 {duration(1000 * seconds)}, {duration(100_000 * seconds)};" in text and "two CPU cores" not in text
    small = estimate(10**6, batch_size=100, steps=10**5, steps_per_epoch=1000)
    assert "H100 15.0 s, 25 min;" in small and "two CPU cores 7.9 s, 13 min." in small  # no step is shorter on a GPU


def test_every_field_has_a_docstring():
    docs = field_docs(Config)
    assert set(docs) >= set(Config.__dataclass_fields__) and all(len(d) > 10 for d in docs.values())


def folder_of_images(directory, count: int, size: int = 32, labeled: bool = True) -> None:
    for i in range(count):
        folder = directory / ("ab"[i % 2] if labeled else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (3 * i % 256, 90, 7 * i % 256)).save(folder / f"{i}.png")


def test_image_smaller_than_the_crop(fails, tmp_path):
    folder_of_images(tmp_path / "data", 80, size=16)
    text = fails("smoke", "--data", tmp_path / "data", "--out", tmp_path)
    assert "16" in text and "32" in text and "--image-size" in text


def test_corrupt_image_and_empty_folder_are_named(fails, tmp_path):
    folder_of_images(tmp_path / "data", 80)
    (tmp_path / "data" / "a" / "40.png").write_bytes(b"not an image")
    assert "40.png" in fails("smoke", "--data", tmp_path / "data", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty" in fails("smoke", "--data", tmp_path / "empty", "--out", tmp_path)


def test_unlabeled_images_train_and_say_what_cannot_be_measured(tmp_path, fails):
    folder_of_images(tmp_path / "data", 100, labeled=False)
    arguments = ("smoke", "--data", tmp_path / "data", "--out", tmp_path, "--epochs", 2)
    code, text = run_command(SIMCLR, *arguments, log=tmp_path / "log")
    assert code == 0, text
    assert "knn is skipped" in text and "have no labels" in text
    card = json.loads((tmp_path / "simclr-smoke" / "result.json").read_text())
    assert {row["protocol"] for row in card["evaluations"]} == {"label-free"}
    text = fails(tmp_path / "simclr-smoke", "--protocols", "knn", module="eval.__main__")
    assert "have no labels, which knn needs" in text


def test_bf16_stays_near_float32(tmp_path):
    """Losses of a run in bfloat16 autocast on a CPU: within 3 % of float32 in every window, at a low rate."""
    losses = {}
    for precision in ("no", "bf16"):
        arguments = ("smoke", "--no-eval", "--base-lr", 0.01, "--precision", precision, "--out", tmp_path / precision)
        code, text = run_command(SIMCLR, *arguments, log=tmp_path / "log")
        assert code == 0, text
        lines = read_metrics(tmp_path / precision / "simclr-smoke" / "metrics.jsonl")
        losses[precision] = [line["loss"] for line in lines if "loss" in line]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.03)


def test_micro_batches_say_what_batchnorm_does(tmp_path):
    arguments = ("smoke", "--no-eval", "--max-steps", 2, "--micro-batch", 16, "--out")
    code, text = run_command(SIMCLR, *arguments, tmp_path / "batch", log=tmp_path / "log")
    assert code == 0 and "statistics are taken over 16 images" in text
    code, text = run_command(SIMCLR, *arguments, tmp_path / "group", "--norm", "group", log=tmp_path / "log")
    assert code == 0 and "statistics are taken" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_program_in_one_sentence(number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: os.kill(os.getpid(), number) or time.sleep(1))
    assert end.value.code == 128 + number and signal.getsignal(number) == before
    assert capfd.readouterr().err.startswith("stopped by ")


def test_a_warmup_as_long_as_the_run_is_noted(tmp_path):
    words = (SIMCLR, "smoke", "--no-eval", "--max-steps", 1, "--out", tmp_path)
    code, text = run_command(*words, "--epochs", 3, "--warmup-epochs", 3, log=tmp_path / "log")
    assert code == 0 and "warm-up of 3 epochs is as long as the run of 3" in text, text
    code, text = run_command(*words, "--epochs", 3, "--warmup-epochs", 1, "--name", "b", log=tmp_path / "log")
    assert code == 0 and "warm-up" not in text


# ---- another backbone than the preset's ------------------------------------------------------------------------------


def test_another_backbone_leaves_out_what_was_for_the_presets_own(capsys):
    def parsed(*words: str, presets=PRESETS) -> tuple[Config, str]:
        return parse(presets, "train", list(words))[1], capsys.readouterr().err

    cfg, note = parsed("smoke", "--backbone", "convnext_atto")
    assert (cfg.stem, cfg.layers, cfg.channels, cfg.stem_width) == ("timm", (), (), 64)
    names = "stem, layers, channels, stem-width"
    assert note == f"NOTE --backbone convnext_atto leaves out what the preset set for resnet18: {names}\n"
    cfg, note = parsed("smoke", "--backbone=resnet34")  # the stem belongs to the size of the images
    assert (cfg.stem, cfg.layers, cfg.channels, cfg.stem_width) == ("cifar", (), (), 64) and "stem," not in note
    cfg, note = parsed("cifar10-r18", "--backbone", "resnet50")
    assert cfg.stem == "cifar" and not note
    cfg, _ = parsed("smoke", "--backbone", "convnext_atto", "--stem", "cifar")  # a flag is never left out
    with pytest.raises(UserError, match="stem are options of ResNets; convnext_atto has none"):
        cfg.resnet_spec()
    cfg, note = parsed("imagenet-vits-100", "--backbone", "resnet50", presets=DINO)
    assert cfg.drop_path == 0 and "drop-path" in note
    cfg, _ = parsed("imagenet-vits-100", "--backbone", "vit_base_patch16_224", presets=DINO)
    assert cfg.drop_path == 0.1
    assert parsed("smoke")[0] == PRESETS["smoke"][1] and parsed("smoke", "--backbone", "resnet18")[1] == ""


NETWORKS = ("mobilenetv3_small_050", "test_convnext", "test_mambaout", "test_vit", "levit_128s", "ghostnet_050")
CONVOLUTIONAL = sorted(
    m.name
    for m in pkgutil.iter_modules(methods.__path__)
    if m.ispkg and issubclass(importlib.import_module(f"methods.{m.name}.config").Config, ResNetConfig)
)


@pytest.mark.parametrize(("method", "name"), list(zip(CONVOLUTIONAL, itertools.cycle(NETWORKS), strict=False)))
def test_any_backbone_trains_by_its_name_alone(method, name, tmp_path):
    smoke = importlib.import_module(f"methods.{method}.config").PRESETS["smoke"][1]
    if getattr(smoke, "local_views", 0):  # of 16 px, which not all of them take
        name = "mobilenetv3_small_050"
    words = ("smoke", "--backbone", name, "--limit", 64, "--batch-size", 32, "--max-steps", 1, "--no-eval")
    code, text = run_command(f"methods.{method}.train", *words, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0 and f"NOTE --backbone {name} leaves out" in text, text
    backbone, spec = load_backbone(tmp_path / f"{method}-smoke")
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.num_features) and spec.name == name


# ---- names, places, terminals ----------------------------------------------------------------------------------------


def closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")


def ascii_terminal() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--name", ".."), "--name .. is a path"),
        (("--name", "/tmp/x"), "--name /tmp/x is a path"),
        (("--name", "a\nb"), r"--name 'a\nb' holds characters that cannot be printed"),
        (("--name", "x" * 300), "--name xxxxxxxxxxxxxxxxxxxx... is longer than 200 bytes"),
        (("--out", "{file}"), "cannot make the directory"),
        (("--out", "/proc/x"), "cannot make the directory /proc/x/simclr-smoke (No such file or directory)"),
        (("--name", "foreign"), "foreign is not a run's directory, and its config.json would be replaced"),
        (("--name", "theirs"), "theirs is not a run's directory, and its tensorboard would be replaced"),
    ],
)
def test_names_and_places_that_cannot_be_used(words, sentence, fails, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "theirs" / "tensorboard").mkdir(parents=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "vit"}')
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(file=tmp_path / "file") for word in words]
    text = fails("smoke", "--limit", 64, "--batch-size", 32, "--no-eval", "--out", tmp_path, *words)
    assert f"error: {sentence}" in text.replace(f"{tmp_path}/", "") and text.count("error") == 1
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "log") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(fails, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    assert "Permission denied" in fails("smoke", "--no-eval", "--out", tmp_path / "runs")


def test_a_path_without_permission_is_one_sentence(capfd):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: raise_(PermissionError(errno.EACCES, "Permission denied", "runs/a/config.json")))
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith("error: cannot use runs/a/config.json (Permission denied): check the path")
    with pytest.raises(FileNotFoundError):  # a fault of ours stays visible
        run_cli(lambda: raise_(FileNotFoundError(errno.ENOENT, "No such file", "x")))


def raise_(error: Exception) -> None:
    raise error


def test_a_closed_pipe_ends_a_program_without_traceback(tmp_path):
    code, text = run_command(SIMCLR, "smoke", "--help", log=tmp_path / "log", before=closed_pipe)
    assert (code, text) == (1, "stopped: nobody reads the output any more\n")


def test_names_that_look_like_markup_on_an_ascii_terminal(tmp_path):
    name, data = "r[b]", tmp_path / "bäume[/b]"
    folder_of_images(data, 100)
    words = ("smoke", "--epochs", 2, "--data", data, "--data-name", "x[/b]ü\udce4", "--out", tmp_path, "--name", name)
    code, text = run_command(SIMCLR, *words, "--plan", log=tmp_path / "log", before=ascii_terminal)
    assert code == 0 and "b\\xe4ume[/b]" in "".join(text.split()), text
    words += ("--eval-protocols", "knn", "--no-eval-baselines")
    code, text = run_command(SIMCLR, *words, log=tmp_path / "log", before=ascii_terminal)
    assert code == 0 and "on x[/b]\\xfc\\udce4" in text and "result card" in text, text
    assert "x[/b]ü?" in (tmp_path / name / "report.html").read_text()


def show_the_workspace_at_exit() -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    Finalize(None, lambda: print("workspace", os.environ.get("CUBLAS_WORKSPACE_CONFIG"), flush=True), exitpriority=0)


def test_deterministic_runs_set_what_cublas_reads(tmp_path):
    words = ("smoke", "--limit", 64, "--batch-size", 32, "--max-steps", 1, "--no-eval", "--out", tmp_path)
    for flags, expected in (((), "None"), (("--deterministic", "--name", "b"), ":4096:8")):
        code, text = run_command(SIMCLR, *words, *flags, log=tmp_path / "log", before=show_the_workspace_at_exit)
        assert code == 0 and f"workspace {expected}" in text, text
