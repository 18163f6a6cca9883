"""What do the bottleneck's width, the noise and the mask ratio do to an autoencoder's features?"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from common.data import open_data
from common.html import PALETTE
from common.log import read_metrics
from eval.figures import styled
from eval.finetune.recipe import Recipe
from eval.load import load, random_init
from eval.protocols import evaluate

from .cards import Cards
from .figures import baseline_lines, legend, points
from .study import Run, Study, Table

FEW = Recipe(labels=("1%",), min_steps=400)  # one step takes all labels: 400 passes
MEASURES = {  # title -> (row of the card, digits)
    "kNN (20, .07), %": (("knn-20-0.07", "label", "top-1"), ".2f"),
    "linear probe, %": (("linear", "label", "top-1"), ".2f"),
    "fine-tuned, few labels, %": (("lowshot-1%", "label", "top-1"), ".2f"),
    "error / mean image's": (("reconstruction", "pixels", "relative error"), ".3f"),
}


def vanilla(width: int) -> Run:
    fields = {"variant": "vanilla", "bottleneck": width, "epochs": 10}
    return Run(f"vanilla-bottleneck{width}", "autoencoder", fields, baselines=width == 4)


def denoising(noise: float) -> Run:
    fields = {"variant": "denoising", "noise": noise, "epochs": 10}
    return Run(f"denoising-noise{noise:g}", "autoencoder", fields)


def masked(ratio: float) -> Run:
    fields = {"variant": "masked", "mask_ratio": ratio, "epochs": 10}
    return Run(f"masked-maskratio{ratio:g}", "autoencoder", fields)


@dataclass(frozen=True)
class Axis:
    """One question: settings of one field. The value 0 stands for vanilla at the preset's width."""

    title: str
    label: str
    runs: dict[float, Run]


AXES = (
    Axis(
        "How wide should the bottleneck be?",
        "width of the latent, vanilla",
        {width: vanilla(width) for width in (4, 16, 64, 128, 512, 1024)},
    ),
    Axis(
        "How much noise?",
        "standard deviation of the noise, pixels in [0, 1]",
        {0: vanilla(128), **{noise: denoising(noise) for noise in (0.1, 0.25, 0.5)}},
    ),
    Axis(
        "How much should be removed?",
        "share of blocks removed",
        {0: vanilla(128), **{ratio: masked(ratio) for ratio in (0.25, 0.5, 0.75)}},
    ),
)


def measure(directory: Path, card: dict) -> list[dict]:
    """Fine-tune the backbone on few labels (random weights too for the run with the baselines), and read the last
    reconstruction error from the log."""
    backbone, spec = load(directory)
    config = card["config"]
    train = open_data(config["data"], "train", limit=config["limit"] or None, image_size=spec.image_size)
    test = open_data(config["data"], "test", image_size=spec.image_size)
    rows = evaluate(
        backbone,
        train,
        test,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        protocols=("lowshot",),
        random_init=random_init(spec, card["seed"]),
        seed=card["seed"],
        recipe=FEW,
        baselines=any(row["baselines"] for row in card["evaluations"]),
    ).rows
    errors = [line["relative_error"] for line in read_metrics(directory / "metrics.jsonl") if "relative_error" in line]
    text = "Squared error of the training batches at the end, divided by that of the mean image; 0: perfect."
    row = {"protocol": "reconstruction", "target": "pixels", "metric": "relative error", "value": errors[-1]}
    return [*rows, {**row, "text": text, "settings": {}, "baselines": {}}]


@styled
def draw(cards: Cards) -> Figure:
    """A row for each question: accuracies and the reconstruction error."""
    figure = Figure(figsize=(2.9 * len(MEASURES), 3.1 * len(AXES)), layout="constrained")
    for axis, row in zip(AXES, figure.subplots(len(AXES), len(MEASURES)), strict=True):
        places = range(len(axis.runs))  # equal steps: widths go by factors
        for ax, (title, (key, _)) in zip(row, MEASURES.items(), strict=True):
            points(ax, places, [cards.values(run.name, *key) for run in axis.runs.values()], color=PALETTE[0])
            baseline_lines(ax, cards, *key)
            ax.set(title=title, xlabel=axis.label)
            ax.xaxis.label.set_size(7.5)
            ax.set_xticks(places, [f"{value:g}" for value in axis.runs])
            legend(ax)
    return figure


def tables(cards: Cards) -> list[Table]:
    found = []
    for axis in AXES:
        rows = [
            (
                f"{value:g}",
                len(cards.of(run.name)),
                *(cards.text(run.name, *key, form=form) for key, form in MEASURES.values()),
            )
            for value, run in axis.runs.items()
        ]
        found.append(Table((axis.label, "seeds", *MEASURES), rows, f"**{axis.title}**"))
    return found


STUDY = Study(
    name="autoencoder",
    title="Autoencoders: width, noise, mask ratio",
    question="What do the width of the bottleneck, the noise and the share of removed blocks do to the features?",
    runs=tuple({run.name: run for axis in AXES for run in axis.runs.values()}.values()),
    draw=draw,
    tables=tables,
    protocols=("knn", "linear", "metrics", "factors"),
    measure=measure,
)
