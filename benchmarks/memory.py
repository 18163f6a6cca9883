"""Time and memory of SimCLR's three ways to a large batch: neither option, --activation-checkpointing, --micro-batch.

    python -m benchmarks.memory                                    # 4 MMAC network, batch 2048
    python -m benchmarks.memory --preset cifar10-r18 --batch-size 8192 --micro-batch 512       # on a GPU

Each way runs in a separate process, because the peak of a process never falls. On a CPU it is the growth of the
resident set from before the first step; on a GPU the allocator's peak.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Literal

import torch
import tyro

from benchmarks.arguments import check
from common.backbones import create_backbone
from common.cli import run_cli
from common.environment import peak_memory
from common.memory import checkpoint_blocks, grad_cache_backward
from methods import preset_of
from methods.simclr.train import SimCLR, compute_loss, contrast


@dataclass
class Arguments:
    preset: str = "quickstart"
    """Preset of SimCLR: its network and image size."""
    batch_size: int = 2048
    """Images."""
    micro_batch: int = 256
    """Images of one micro-batch."""
    steps: int = 3
    """Timed steps after one to warm up."""
    threads: int = 2
    """Intra-op threads on a CPU."""
    way: Literal["all", "none", "activation-checkpointing", "micro-batch"] = "all"
    """One way, in this process; all: each in a separate process."""


def measure(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = preset_of("simclr", args.preset)
    model = SimCLR(create_backbone(cfg.resnet_spec(norm=cfg.norm)), cfg.projector_dim, cfg.norm)
    model = model.to(device, memory_format=torch.channels_last)
    if args.way == "activation-checkpointing":
        checkpoint_blocks(model.backbone)
    shape = (args.batch_size, 3, cfg.image_size, cfg.image_size)
    views = [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]

    def step() -> float:
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        if args.way == "micro-batch":
            loss, _ = grad_cache_backward(
                model, views, partial(contrast, cfg=cfg), args.micro_batch, backward=torch.Tensor.backward
            )
        else:
            loss, _ = compute_loss(model, views, cfg)
            loss.backward()
        loss.item()
        return time.perf_counter() - start

    with torch.no_grad():
        model(views[0][:64])  # libraries load now, not during the measurement
    before = peak_memory(device)
    step()
    seconds = median(step() for _ in range(args.steps))
    grown = (peak_memory(device) - before) / 2**20
    print(
        f"{args.way:<26} {args.batch_size / seconds:8.0f} images/s {seconds:8.2f} s a step {grown:10.0f} MiB",
        flush=True,
    )


def main(args: Arguments) -> None:
    check(args)
    replace(preset_of("simclr", args.preset), micro_batch=args.micro_batch).check_micro_batch(args.batch_size)
    if args.way != "all":
        return measure(args)
    print(f"{args.preset}, batch {args.batch_size} x 2 views, micro-batches of {args.micro_batch}")
    for way in ("none", "activation-checkpointing", "micro-batch"):
        subprocess.run([sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--way", way], check=True)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, description=__doc__)))
