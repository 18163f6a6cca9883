"""What a training step costs besides its forward and backward passes, measured inside `train.py` itself.

    python -m benchmarks.step                                  # every method, 4 MMAC network of quickstart
    python -m benchmarks.step --methods byol --preset cifar10-r18 --steps 200      # on a GPU

Runs the real script of each method on embedded data with clocks around its parts, no copy of its loop. "Bare" is the
floor: networks (a teacher's forward pass included), loss and backward pass of the same crops. "Loss" is the loss with
its backward pass, until gradients reach the networks' outputs. Medians over the steps.
"""

import importlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import wraps
from statistics import median
from types import ModuleType
from unittest.mock import patch

import torch
import tyro
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.arguments import check
from common.cli import run_cli
from common.data import ViewLoader
from common.run import Run
from methods import preset_of

OWN = ("ema_update", "sinkhorn", "update_center")  # what a method does besides networks, loss and optimizer
WARM = 5  # steps not counted


@dataclass
class Arguments:
    methods: tuple[str, ...] = ("simclr", "barlow", "byol", "simsiam", "swav", "dino", "cpc", "dim", "amdim")
    """Directories under methods/."""
    preset: str = "quickstart"
    """A preset that all of them have, on `shapes` instead of its data."""
    steps: int = 60
    """Steps a method."""
    threads: int = 2
    """Intra-op threads on a CPU."""


class Clock:
    """Seconds of each part in each step. Parts do not nest; a GPU is waited for at every mark."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.marked = 0.0

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def part(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            if self.steps:
                self.steps[-1][name] += self.now() - start
            return result

        return timed

    def loss(self, function: Callable) -> Callable:
        """The part "loss", and a mark when the backward pass has come back to its arguments."""
        timed = self.part("loss", function)

        @wraps(function)
        def marked(*args, **kwargs):
            return timed(*self.watched(args), **kwargs)

        return marked

    def watched(self, value: object) -> object:
        """The same, with a mark at each tensor's gradient. A hook runs when its node's turn comes, and turns go by age,
        so each tensor gets a new node: otherwise networks younger than the tensor would be counted too."""
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value = value.view_as(value)
            value.register_hook(self.mark)
        elif isinstance(value, dict):
            value = {name: self.watched(part) for name, part in value.items()}
        elif type(value) in (list, tuple):
            value = type(value)(self.watched(part) for part in value)
        return value

    def mark(self, _gradient: torch.Tensor) -> None:
        self.marked = self.now()

    def backward(self, function: Callable) -> Callable:
        """The part "backward", less what of it is the loss's."""

        @wraps(function)
        def timed(*args, **kwargs):
            start = self.marked = self.now()
            result = function(*args, **kwargs)
            if self.steps:
                self.steps[-1]["loss"] += self.marked - start
                self.steps[-1]["backward"] += self.now() - self.marked
            return result

        return timed

    def steps_of(self, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            for step in function(*args, **kwargs):
                self.steps.append(defaultdict(float))
                start = self.now()
                yield step
                self.steps[-1]["whole"] = self.now() - start

        return timed


def loss_functions(train: ModuleType) -> list[str]:
    """Names in train.py that come from the method's loss.py and are no part of `OWN`."""
    home = train.__name__.replace(".train", ".loss")
    functions = {name: value for name, value in vars(train).items() if getattr(value, "__module__", "") == home}
    return [name for name, value in functions.items() if not isinstance(value, type) and name not in OWN]


def measure(method: str, args: Arguments, folder: str) -> dict[str, float]:
    """Median seconds of each part of a step, and of the complete step."""
    train = importlib.import_module(f"methods.{method}.train")
    cfg = replace(
        train.PRESETS[args.preset][1],
        data="shapes",
        out=folder,
        eval=False,
        knn_every=0,
        max_steps=args.steps,
        save_every=10**9,
        resume="never",
    )
    clock = Clock()
    with ExitStack() as stack:
        for name in loss_functions(train):
            stack.enter_context(patch.object(train, name, clock.loss(getattr(train, name))))
        for name in OWN:
            if hasattr(train, name):
                stack.enter_context(patch.object(train, name, clock.part(name, getattr(train, name))))
        for owner, name, part in (
            (ViewLoader, "__call__", "views"),
            (torch.optim.Optimizer, "zero_grad", "optimizer"),
            (Run, "log", "log"),
        ):
            stack.enter_context(patch.object(owner, name, clock.part(part, getattr(owner, name))))
        stack.enter_context(patch.object(Accelerator, "backward", clock.backward(Accelerator.backward)))
        stack.enter_context(patch.object(Run, "steps", clock.steps_of(Run.steps)))
        starts: list[float] = []
        before = register_optimizer_step_pre_hook(lambda *_: starts.append(clock.now()))

        def after(*_) -> None:
            clock.steps[-1]["optimizer"] += clock.now() - starts.pop()

        behind = register_optimizer_step_post_hook(after)
        try:
            train.main(args.preset, cfg)
        finally:
            before.remove()
            behind.remove()
    counted = clock.steps[WARM:]
    names = dict.fromkeys(name for step in counted for name in step)
    return {name: median(step[name] for step in counted) for name in names}


def main(args: Arguments) -> None:
    check(args, {"steps": WARM + 1})
    torch.set_num_threads(args.threads)
    rows = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(method, args, folder)
        batch = preset_of(method, args.preset).batch_size
        whole = seconds.pop("whole")
        networks = whole - sum(seconds.values()) + seconds.pop("backward")
        shares = {"networks": networks} | seconds
        bare = (networks + seconds["loss"]) / whole
        own = sum(seconds.get(name, 0.0) for name in OWN) / whole
        detail = ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in shares.items())
        rows.append(
            f"{method:<8} {batch / whole:7,.0f} images/s   bare {bare:.2f} of the step   loss "
            f"{100 * seconds['loss'] / whole:.1f} %   own {100 * own:.1f} %"
        )
        rows.append(f"{'':<8} {detail}")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    print(f"\n{args.preset}, {where}; own: {', '.join(OWN)}")
    print("\n".join(rows))


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, description=__doc__)))
