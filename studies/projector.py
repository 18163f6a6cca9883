"""The projector of SimCLR, Barlow Twins and BYOL: depth, width, none at all; and where to cut it off.

"Guillotine": features may be taken after any layer of the projector (Bordes et al. 2022, arXiv:2206.13378).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import checkpoint
from common.data import open_data
from common.errors import UserError
from common.html import PALETTE
from eval.features import extract_features
from eval.figures import styled
from eval.linear import linear_probe
from eval.load import load
from eval.metrics import rankme

from .cards import Cards
from .figures import baseline_lines, legend, points
from .study import SMALL, Run, Study, Table

DEPTHS = ("none", "linear", "2", "3")
METHODS = ("simclr", "barlow", "byol")
WIDTHS = {"simclr": (16, 128, 512), "barlow": (16, 128, 512)}
BARLOW = {"none": (), "linear": (128,), "2": (64, 128), "3": (64, 64, 128)}


def of_depth(method: str, depth: str) -> Run:
    layers = {"projector_layers": DEPTHS.index(depth)} if method != "barlow" else {"projector": BARLOW[depth]}
    return Run(f"{method}-{depth}", method, {**SMALL, **layers}, baselines=(method, depth) == ("simclr", "2"))


def of_width(method: str, width: int) -> Run:
    if width == 128:  # the preset's
        return of_depth(method, "2")
    head = {"projector_dim": width} if method == "simclr" else {"projector": (64, width)}
    return Run(f"{method}-2-wide{width}", method, {**SMALL, **head})


SUBVECTOR = Run("simclr-subvector", "simclr_variants", SMALL, "directclr")
RUNS = (
    *(of_depth(method, depth) for method in METHODS for depth in DEPTHS),
    *(of_width(method, width) for method in WIDTHS for width in WIDTHS[method] if width != 128),
    SUBVECTOR,
)


# ---- after each layer ------------------------------------------------------------------------------------------------


def layers_of(projector: nn.Sequential) -> Iterator[tuple[str, nn.Sequential]]:
    """(name, what leads there from the features): after each ReLU, and the output, which the loss sees."""
    ends = [i + 1 for i, part in enumerate(projector) if isinstance(part, nn.ReLU)]
    for number, end in enumerate(ends, start=1):
        yield f"hidden {number}", projector[:end]
    if len(projector):
        yield "output", projector


def trained_projector(directory: Path, method: str) -> nn.Sequential:
    """The projector of a finished run, from its last checkpoint, in eval mode."""
    found = checkpoint.load_newest(directory / "checkpoints")
    if found is None:
        raise UserError(f"{directory} has no checkpoint, which holds the projector")
    prefix = {"byol": "encoder.projector."}.get(method, "projector.")
    weights = found[1]["stateful"]["model"]
    tensors = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    parts: dict[int, nn.Module] = {}
    for name, tensor in tensors.items():
        number, kind = name.split(".")
        if kind == "weight" and tensor.ndim == 2:
            parts[int(number)] = nn.Linear(*reversed(tensor.shape), bias=f"{number}.bias" in tensors)
        elif kind == "running_mean":
            parts[int(number)] = nn.BatchNorm1d(len(tensor))
    projector = nn.Sequential(*(parts.get(i, nn.ReLU()) for i in range(max(parts, default=-1) + 1)))
    projector.load_state_dict(tensors)
    return projector.eval()


@torch.no_grad()
def through(layers: nn.Sequential, features: Tensor) -> Tensor:
    return torch.cat([layers(part) for part in features.split(4096)])


def measure(directory: Path, card: dict) -> list[dict]:
    """A linear probe and RankMe after every layer of the run's projector."""
    config = card["config"]
    backbone, spec = load(directory)
    train = open_data(config["data"], "train", limit=config["limit"] or None, image_size=spec.image_size)
    test = open_data(config["data"], "test", image_size=spec.image_size)
    x, test_x = (
        extract_features(backbone, store, image_size=spec.image_size, mean=spec.mean, std=spec.std)
        for store in (train, test)
    )
    rows = []
    for layer, leading in layers_of(trained_projector(directory, card["method"])):
        z, test_z = through(leading, x), through(leading, test_x)
        probe = linear_probe(
            z, train.labels, test_z, test.labels, num_classes=len(train.class_names), seed=card["seed"]
        )
        row = {"target": layer, "settings": {"dimensions": z.shape[1]}, "baselines": {}}
        text = f"As linear, on the projector's layer {layer!r}, {z.shape[1]} numbers."
        rows.append({**row, "protocol": "guillotine", "metric": "top-1", "value": probe.accuracy, "text": text})
        text = f"RankMe of the projector's layer {layer!r} on test images."
        rows.append({**row, "protocol": "guillotine", "metric": "RankMe", "value": rankme(test_z), "text": text})
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    depth, rank, width, cut = figure.subplots(1, 4)
    for method, color in zip(METHODS, PALETTE, strict=False):
        names = [f"{method}-{d}" for d in DEPTHS]
        points(depth, range(4), [cards.values(n, "linear") for n in names], color=color, label=method)
        points(rank, range(4), [cards.values(n, "label-free", "features", "RankMe") for n in names], color=color)
        if method in WIDTHS:
            wide = [of_width(method, w).name for w in WIDTHS[method]]
            points(width, range(len(wide)), [cards.values(n, "linear") for n in wide], color=color)
        name, places = f"{method}-3", ("hidden 1", "hidden 2", "output")
        after = [cards.values(name, "linear"), *(cards.values(name, "guillotine", p, "top-1") for p in places)]
        points(cut, range(4), after, color=color)
    points(depth, [0.2], [cards.values(SUBVECTOR.name, "linear")], color=PALETTE[3], label="16 features of 64")
    points(rank, [0.2], [cards.values(SUBVECTOR.name, "label-free", "features", "RankMe")], color=PALETTE[3])
    for ax in (depth, width, cut):
        baseline_lines(ax, cards, "linear")
    for ax, title in ((depth, "features: linear probe, %"), (rank, "features: RankMe, of 64")):
        ax.set_xticks(range(4), DEPTHS)
        ax.set(title=title, xlabel="layers of the projector")
    width.set_xticks(range(3), ["16", "128", "512"])
    width.set(title="features: linear probe, %", xlabel="width of the output, 2 layers")
    cut.set_xticks(range(4), ["features", "hidden 1", "hidden 2", "output"])
    cut.set(title="linear probe after each layer, %", xlabel="of a projector with 3 layers")
    legend(depth, fontsize=7)
    return figure


def tables(cards: Cards) -> list[Table]:
    head = ("run", "linear, %", "RankMe", "linear on the output, %", "RankMe of it", "kNN (20, .07), %")
    rows = [
        (
            run.name,
            cards.text(run.name, "linear"),
            cards.text(run.name, "label-free", "features", "RankMe"),
            cards.text(run.name, "guillotine", "output", "top-1"),
            cards.text(run.name, "guillotine", "output", "RankMe"),
            cards.text(run.name, "knn-20-0.07"),
        )
        for run in RUNS
    ]
    return [Table(head, rows)]


STUDY = Study(
    name="projector",
    title="The projector",
    question="Does the method need a projector, how deep and how wide, and after which layer should features be taken?",
    runs=RUNS,
    draw=draw,
    tables=tables,
    measure=measure,
)
