"""What a result depends on besides its config: commit, versions, device, threads, processes; and peak memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import torchvision
from accelerate import Accelerator

ROOT = Path(__file__).parents[1]


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """The record that environment.json and the result card hold. Paths in the command are cut to their last part."""
    device = accelerator.device
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "command": " ".join(["python -m", *_module_and_flags()]),
    }


def _module_and_flags() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *(Path(a).name if os.sep in a else a for a in sys.argv[1:])]


def has_bf16() -> bool:
    """Whether the GPU computes bf16 itself, without emulation."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def git_commit() -> str:
    """The commit of the running code, or "unknown" outside git.

    Ends in "+changes" where a tracked file differs or a Python file is not tracked: a copied method, for example.
    """
    try:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        added = _git("ls-files", "--others", "--exclude-standard", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip()[:12] + ("+changes" if (changes + added).strip() else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU; on a CPU the largest resident size of the process, 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
