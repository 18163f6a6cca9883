"""What two views share most easily is learned first: features over the course of training, on three kinds of images.

One shape on a plain background; the same on stripes, which both views share; and two shapes of one kind, each with a
hue, size and place of its own. Probes read the checkpoints of a run.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common import checkpoint
from common.data import open_data
from common.html import PALETTE
from eval.features import extract_features
from eval.figures import styled
from eval.linear import linear_probe
from eval.load import load, random_init
from eval.probes import circular_target, ridge_probes

from .cards import Cards
from .figures import legend
from .study import Run, Study, Table

METHODS = ("simclr", "byol", "simsiam")
IMAGES = {"shapes": "one shape", "shapes-textured": "one shape, stripes", "pairs": "two shapes"}
EPOCHS = (0, 1, 2, 4, 8, 12)
FACTORS = ("hue difference", "background hue", "position", "size")
KIND = "kind of shape"
PREFIX = {"simclr": "backbone.", "byol": "encoder.backbone.", "simsiam": "backbone."}
LENGTH = {"epochs": EPOCHS[-1], "save_every": 39, "keep": EPOCHS[-1], "knn_every": 0}  # 39 steps an epoch


def run_of(method: str, images: str) -> Run:
    data = {"data": images, "normalize": images}
    return Run(f"{method}-{images}", method, {**data, **LENGTH}, "shapes", baselines=method == METHODS[0])


RUNS = tuple(run_of(method, images) for images in IMAGES for method in METHODS)


# ---- what each checkpoint's features hold ----------------------------------------------------------------------------


def targets(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ridge regressions read, [N, T] each; of two shapes, the numbers of both are one target."""
    ends = ("1", "2") if "hue1" in factors else ("",)
    background = factors["background_hue"]
    return {
        "hue difference": torch.cat([circular_target(factors[f"hue{i}"] - background, 1.0) for i in ends], 1),
        "background hue": circular_target(background, 1.0),
        "position": torch.stack([factors[axis + i] for i in ends for axis in "xy"], 1),
        "size": torch.stack([factors[f"size{i}"] for i in ends], 1),
    }


def measure(directory: Path, card: dict) -> list[dict]:
    """A linear probe of the kind and a ridge regression of each target, from the features after each of `EPOCHS`."""
    backbone, spec = load(directory)
    data, size = card["config"]["data"], spec.image_size
    train = open_data(data, "train", limit=card["config"]["limit"] or None, image_size=size)
    test = open_data(data, "test", image_size=size)
    per_epoch = round(card["steps"] / card["epochs"])
    rows = []
    for epoch in EPOCHS:
        if epoch:
            weights = checkpoint.load(directory / "checkpoints", epoch * per_epoch)["stateful"]["model"]
            prefix = PREFIX[card["method"]]
            backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            network = backbone
        else:
            network = random_init(spec, card["seed"])
        x, test_x = (
            extract_features(network, store, image_size=size, mean=spec.mean, std=spec.std) for store in (train, test)
        )
        classes = len(train.class_names)
        probe = linear_probe(x, train.labels, test_x, test.labels, num_classes=classes, seed=card["seed"])
        found = ridge_probes(x, targets(train.factors), test_x, targets(test.factors), seed=card["seed"])
        after = f"after {epoch} epochs"
        row = {"protocol": "first", "settings": {"epoch": epoch}, "baselines": {}}
        text = f"As linear, on the features {after}."
        rows.append({**row, "target": KIND, "metric": f"top-1 {after}", "value": probe.accuracy, "text": text})
        text = f"As factor-linear, on the features {after}."
        rows += [
            {**row, "target": name, "metric": f"R2 {after}", "value": value, "text": text}
            for name, (value, _) in found.items()
        ]
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------


def curve(ax: Axes, cards: Cards, run: str, target: str, metric: str, *, color: str, scale: float = 1.0) -> None:
    found = [(e, cards.values(run, "first", target, f"{metric} after {e} epochs")) for e in EPOCHS]
    shown = [(epoch, [v * scale for v in values]) for epoch, values in found if values]
    if shown:
        epochs = [epoch for epoch, _ in shown]
        style = "-" if target == KIND else "--"
        ax.plot(epochs, [fmean(v) for _, v in shown], style, marker=".", color=color, label=target)
        ax.fill_between(epochs, [min(v) for _, v in shown], [max(v) for _, v in shown], color=color, alpha=0.12)


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(10.5, 8.4), layout="constrained")
    grid = figure.subplots(len(METHODS), len(IMAGES), sharex=True, sharey=True)
    for row, method in zip(grid, METHODS, strict=True):
        for ax, (images, title) in zip(row, IMAGES.items(), strict=True):
            run = f"{method}-{images}"
            curve(ax, cards, run, KIND, "top-1", color=PALETTE[0], scale=0.01)
            for factor, color in zip(FACTORS, PALETTE[1:], strict=False):
                curve(ax, cards, run, factor, "R2", color=color)
            ax.set_ylim(-0.05, 1.05)
            if method == METHODS[0]:
                ax.set_title(title)
            if method == METHODS[-1]:
                ax.set_xlabel("epoch")
        row[0].set_ylabel(f"{method}: accuracy (kind), R2 (others)")
    legend(grid[0][-1], fontsize=8)
    return figure


def tables(cards: Cards) -> list[Table]:
    made = []
    for images, title in IMAGES.items():
        rows = [
            (
                method,
                epoch,
                cards.text(f"{method}-{images}", "first", KIND, f"top-1 after {epoch} epochs"),
                *(
                    cards.text(f"{method}-{images}", "first", name, f"R2 after {epoch} epochs", ".2f")
                    for name in FACTORS
                ),
            )
            for method in METHODS
            for epoch in EPOCHS
        ]
        made.append(Table(("method", "epoch", f"{KIND}, %", *(f"R2 {name}" for name in FACTORS)), rows, f"{title}:"))
    return made


STUDY = Study(
    name="first",
    title="What two views share most easily is learned first",
    question="In which order do features come to hold the kind of a shape, its place, its size and its colors?",
    runs=RUNS,
    draw=draw,
    tables=tables,
    protocols=("knn", "linear"),
    measure=measure,
)
