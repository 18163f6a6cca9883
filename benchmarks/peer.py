"""Our methods beside lightly's: accuracy after equal epochs and images per second, with one thread, in turns.

    pip install --no-deps lightly lightly-utils lightning-utilities
    python -m benchmarks.peer --update-readme README.md              # all six, 5 epochs of the 10,000 `pairs`
    python -m benchmarks.peer --methods simclr --epochs 1 --limit 512 --out peer.json
    python -m benchmarks.peer --show                                 # the table of the last results again

Ours is the method's train.py itself with its `quickstart` config, continued epoch by epoch. lightly's
(https://github.com/lightly-ai/lightly, MIT) are the losses, heads and transforms of `benchmarks.lightly_methods` in the
loop that its documentation shows. After an epoch of ours comes an epoch of lightly's, in one process with one thread.

Equal:
- images, batch size, epochs and steps; all settings of the loss; depth and widths of the heads;
- the backbone (timm, built from the description that our run exports), its initial weights, float32;
- kind, probability and strength of the augmentations (DINO: bicubic crops on both sides, the only ones lightly has);
- the optimizer, its groups of parameters and, at every step, their hyperparameters, which are recorded from our run;
- the schedule of moving averages, and which network is scored (BYOL: online; DINO: teacher);
- the evaluation: the backbone is exported, loaded and scored by `eval.protocols.evaluate`.

Not equal, as it is part of what is compared:
- the data path: ours makes the views of a batch at once from a uint8 tensor; lightly's transforms take one PIL image at
  a time (decoded beforehand) in a DataLoader, in turns without workers and with two, which are processes of their own
  and gain only where cores are free; starting them counts;
- the order of the images, and the random numbers of the views;
- initial weights of the heads, biases of a few layers (lightly's prototypes and last layers have some);
- BatchNorm: lightly passes view by view; our SimCLR, SwAV and DINO pass all views of one size at once;
- moving averages: lightly's before the step, ours after it; lightly's DINO teacher starts with another head;
- ours uses channels_last, and its train.py writes metrics and checks health (checkpoints are not in the time).
"""

import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset

from benchmarks.arguments import check
from common import rng
from common.backbones import create_backbone, export_backbone
from common.cli import run_cli
from common.config import RESUMABLE_FIELDS
from common.data import Images, open_data
from common.errors import UserError
from common.files import write_atomic
from common.log import read_metrics
from common.optim import LARC
from eval.compare import update_between_markers
from eval.load import load
from eval.protocols import evaluate
from methods import preset_of

if TYPE_CHECKING:
    from benchmarks.lightly_methods import Peer

ROOT = Path(__file__).parents[1]
METHODS = ("simclr", "barlow", "byol", "simsiam", "swav", "dino")
NAMES = {"simclr": "SimCLR", "barlow": "Barlow Twins", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV"}
PRESET = "quickstart"
SCORES = ("knn-20-0.07", "linear")
WORKERS = (0, 2)  # of lightly's DataLoader, in turn
BEGIN, END = "<!-- peer:begin -->", "<!-- peer:end -->"
INSTALL = "pip install --no-deps lightly lightly-utils lightning-utilities"


@dataclass
class Arguments:
    methods: tuple[str, ...] = METHODS
    """Methods to compare; results of others are kept in the file."""
    epochs: int = 5
    """Length of the runs; schedules end with it."""
    limit: int = 0
    """Training images (0: all)."""
    seed: int = 0
    """Seed of both sides."""
    out: Path = Path("benchmarks/results/peer.json")
    """File of results, written after each method."""
    show: bool = False
    """Print the table of `out` and measure nothing."""
    update_readme: str = ""
    """Page whose table is replaced by that of `out`."""


class Ours:
    """The real train.py, an epoch a call: each continues from the checkpoint of the one before."""

    def __init__(self, method: str, cfg: Any):
        self.train, self.cfg = importlib.import_module(f"methods.{method}.train"), cfg
        self.directory = Path(cfg.out) / cfg.name
        self.optimizer: type[Optimizer] | None = None
        self.hyperparameters: list[list[dict]] = []  # of each step and parameter group

    def epoch(self, number: int, steps: int) -> float:
        """Train epoch `number` of `steps` steps; images per second by metrics.jsonl."""
        with self.recorded():
            self.train.main(PRESET, replace(self.cfg, max_steps=(number + 1) * steps))
        lines = [line for line in read_metrics(self.directory / "metrics.jsonl") if "seconds" in line]
        before = max((line["seconds"] for line in lines if line["step"] <= number * steps), default=0.0)
        return steps * self.cfg.batch_size / (lines[-1]["seconds"] - before)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the optimizer's class and, before each of its steps, the hyperparameters of its groups."""

        def note(optimizer: Optimizer, *_: object) -> None:
            if isinstance(optimizer, LARC):
                raise UserError("LARC keeps a setting outside of its groups: lightly's side could not copy it")
            self.optimizer = type(optimizer)
            groups = optimizer.param_groups
            self.hyperparameters.append([{k: v for k, v in g.items() if k not in ("params", "names")} for g in groups])

        hook = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()


class Theirs:
    """lightly's method in the loop of its documentation."""

    def __init__(self, peer: "Peer", cfg: Any, ours: Ours, train: Images):
        self.peer, self.cfg, self.ours = peer.train(), cfg, ours
        groups = [{"params": group["params"]} for group in peer.groups()]
        if len(groups) != len(ours.hyperparameters[0]):
            raise UserError(f"our optimizer has {len(ours.hyperparameters[0])} groups, lightly's side {len(groups)}")
        self.optimizer = ours.optimizer(groups, lr=0.0)
        data = PilImages(train.images, peer.transform())
        self.loaders = [
            DataLoader(data, cfg.batch_size, shuffle=True, drop_last=True, num_workers=workers) for workers in WORKERS
        ]

    def epoch(self, number: int) -> tuple[int, float, float]:
        """(workers, images per second, share of the time spent waiting for views)."""
        seed = rng.generator(self.cfg.seed, "peer", number).initial_seed()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # lightly draws blur and solarization from it
        loader = self.loaders[number % len(WORKERS)]
        waited, start = 0.0, time.perf_counter()
        batches = iter(loader)
        for step in range(number * len(loader), (number + 1) * len(loader)):
            asked = time.perf_counter()
            views = next(batches)
            waited += time.perf_counter() - asked
            for group, values in zip(self.optimizer.param_groups, self.ours.hyperparameters[step], strict=True):
                group.update(values)
            loss = self.peer.loss(views, step, number)
            loss.backward()
            self.peer.after_backward(number)
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if not bool(loss.isfinite().all()):
            raise UserError(f"lightly's loss is not finite in epoch {number + 1}")
        return loader.num_workers, len(loader) * self.cfg.batch_size / seconds, waited / seconds


class PilImages(Dataset):
    """Decoded images as PIL has them, each transformed when it is asked for."""

    def __init__(self, images: Tensor, transform: Any):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(self.images[i])


def score(directory: Path, train: Images, test: Images, seed: int) -> list[dict]:
    """kNN and linear probe of an exported backbone, rows as in a result card."""
    backbone, spec = load(directory)
    return evaluate(
        backbone,
        train,
        test,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        protocols=("knn", "linear"),
        seed=seed,
        baselines=False,
    ).rows


def initial_backbone(spec: Any, seed: int) -> nn.Module:
    """The backbone as our train.py begins with it: the session seeds torch right before it is made."""
    torch.manual_seed(seed)
    return create_backbone(spec)


def compare(method: str, args: Arguments, folder: Path) -> dict[str, Any]:
    """Train and score both sides."""
    from benchmarks.lightly_methods import METHODS as PEERS

    preset = preset_of(method, PRESET)
    cfg = replace(
        preset,
        epochs=args.epochs,
        limit=args.limit,
        seed=args.seed,
        interpolation="bicubic" if method == "dino" else preset.interpolation,
        precision="no",
        out=str(folder),
        name=method,
        knn_every=0,
        save_every=10**9,  # at the end of each epoch only
        eval=False,
    )
    train, test = (
        open_data(cfg.data, split, limit=limit, image_size=cfg.image_size)
        for split, limit in (("train", cfg.limit or None), ("test", None))
    )
    steps = len(train) // cfg.batch_size
    ours, theirs = Ours(method, cfg), None
    measured: list[dict[str, Any]] = []
    for number in range(cfg.epochs):
        rate = ours.epoch(number, steps)
        if theirs is None:
            spec = load(ours.directory)[1]
            peer = PEERS[method](initial_backbone(spec, cfg.seed), cfg, cfg.epochs * steps)
            theirs = Theirs(peer, cfg, ours, train)
        workers, peer_rate, waiting = theirs.epoch(number)
        measured.append({"ours": rate, "lightly": peer_rate, "workers": workers, "waiting": waiting})
        print(f"{method} epoch {number + 1}: ours {rate:.0f}, lightly {peer_rate:.0f} images/s, {workers} workers")
    exported = folder / f"{method}-lightly"
    export_backbone(exported, peer.scored(), spec)
    return {
        "method": method,
        "epochs": cfg.epochs,
        "train_images": len(train),
        "seed": cfg.seed,
        "data": train.name,
        "lightly": importlib.import_module("lightly").__version__,
        "environment": json.loads((ours.directory / "environment.json").read_text(encoding="utf-8")),
        "config": {name: value for name, value in cfg.record().items() if name not in RESUMABLE_FIELDS},
        "epochs_measured": measured,
        "evaluations": {
            "ours": score(ours.directory, train, test, cfg.seed),
            "lightly": score(exported, train, test, cfg.seed),
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """Results as Markdown, and what they were measured on."""
    lines = [
        "| method | kNN ours | kNN lightly | linear ours | linear lightly | images/s ours | "
        "lightly, no worker | lightly, 2 workers | of it waiting for views, no worker |",
        "|---|" + "---:|" * 8,
    ]
    for result in results:
        sides = result["evaluations"]
        scores = [
            f"{row['value']:.1f}"
            for protocol in SCORES
            for side in ("ours", "lightly")
            for row in sides[side]
            if row["protocol"] == protocol
        ]
        epochs = result["epochs_measured"]
        rates = [median(epoch["ours"] for epoch in epochs)]
        rates += [by_workers(epochs, "lightly", workers) for workers in WORKERS]
        waiting = by_workers(epochs, "waiting", 0)
        speeds = ["–" if rate is None else f"{rate:,.0f}" for rate in rates]
        name = NAMES.get(result["method"], result["method"].upper())
        lines.append(f"| {' | '.join([name, *scores, *speeds, f'{100 * waiting:.0f} %'])} |")
    notes = dict.fromkeys(
        f"{r['epochs']} epochs of {r['train_images']:,} images of `{r['data']}`, seed {r['seed']}, lightly "
        f"{r['lightly']}, {r['environment']['device']}"
        for r in results
    )
    return "\n".join(lines) + "\n\nMeasured: " + "; ".join(notes) + ".\n"


def by_workers(epochs: list[dict[str, Any]], name: str, workers: int) -> float | None:
    """Median of the epochs with so many workers, None without any."""
    values = [epoch[name] for epoch in epochs if epoch["workers"] == workers]
    return median(values) if values else None


def main(args: Arguments) -> None:
    if unknown := set(args.methods) - set(METHODS):
        raise UserError(f"no counterpart of {', '.join(sorted(unknown))}: choose among {', '.join(METHODS)}")
    check(args, {"limit": 0, "seed": 0})
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    if not args.show:
        try:
            import benchmarks.lightly_methods  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f"this comparison needs the package {error.name}: {INSTALL}") from None
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                result = compare(method, args, Path(folder))
            results = [r for r in results if r["method"] != method] + [result]
            results.sort(key=lambda r: METHODS.index(r["method"]))
            write_atomic(args.out, json.dumps(results, indent=1) + "\n")
    if not results:
        raise UserError(f"{args.out} does not exist: measure first, without --show")
    print("\n" + table(results))
    if args.update_readme:
        update_between_markers(Path(args.update_readme), table(results), begin=BEGIN, end=END)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, description=__doc__)))
