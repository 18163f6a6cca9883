"""Batch size, temperature, the rule for the learning rate, and gradient caching, at the same number of epochs."""

import math

from matplotlib.figure import Figure

from common.html import PALETTE
from eval.figures import styled

from .cards import Cards
from .figures import baseline_lines, legend, points
from .study import SMALL, Run, Study, Table

BATCHES = (32, 128, 512)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
MICRO = 64
# The square-root rule meets the linear one (2.0 per 256) at a batch of 128.
SQRT = {"lr_scaling": "sqrt", "base_lr": round(1 / math.sqrt(128), 6)}


def simclr(name: str, **fields) -> Run:
    return Run(f"simclr-{name}", "simclr", {**SMALL, **fields}, baselines=name == "linear-128")


RUNS = (
    *(simclr(f"linear-{b}", batch_size=b) for b in BATCHES),
    *(simclr(f"sqrt-{b}", batch_size=b, **SQRT) for b in BATCHES if b != 128),
    simclr("cached-512", batch_size=512, micro_batch=MICRO),
    *(simclr(f"temperature-{t:g}", temperature=t) for t in TEMPERATURES if t != 0.2),
    *(Run(f"{m}-linear-{b}", m, {**SMALL, "batch_size": b}) for m in ("barlow", "byol") for b in BATCHES),
)


def of_batch(rule: str, batch: int) -> str:
    return "simclr-linear-128" if rule == "simclr-sqrt" and batch == 128 else f"{rule}-{batch}"


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    simclr_ax, others, temperature = figure.subplots(1, 3)
    for (rule, label), color in zip(
        (("simclr-linear", "rate x B"), ("simclr-sqrt", "rate x sqrt B")), PALETTE, strict=False
    ):
        values = [cards.values(of_batch(rule, b), "linear") for b in BATCHES]
        points(simclr_ax, range(3), values, color=color, label=label)
    points(
        simclr_ax,
        [2.15],
        [cards.values("simclr-cached-512", "linear")],
        color=PALETTE[2],
        label=f"cached, {MICRO} at once",
    )
    for method, color in (("barlow", PALETTE[3]), ("byol", PALETTE[4])):
        points(
            others,
            range(3),
            [cards.values(f"{method}-linear-{b}", "linear") for b in BATCHES],
            color=color,
            label=method,
        )
    names = ["simclr-linear-128" if t == 0.2 else f"simclr-temperature-{t:g}" for t in TEMPERATURES]
    points(temperature, range(len(names)), [cards.values(n, "linear") for n in names], color=PALETTE[0])
    for ax, title in ((simclr_ax, "SimCLR: linear probe, %"), (others, "Barlow Twins, BYOL: linear probe, %")):
        ax.set_xticks(range(3), map(str, BATCHES))
        ax.set(title=title, xlabel="batch, ten epochs each")
    temperature.set_xticks(range(len(TEMPERATURES)), [f"{t:g}" for t in TEMPERATURES])
    temperature.set(title="SimCLR: linear probe, %", xlabel="temperature, batch 128")
    for ax in figure.axes:
        baseline_lines(ax, cards, "linear")
        legend(ax, fontsize=7.5)
    return figure


def tables(cards: Cards) -> list[Table]:
    head = ("run", "linear, %", "kNN (20, .07), %", "RankMe")
    rows = [
        (
            run.name,
            cards.text(run.name, "linear"),
            cards.text(run.name, "knn-20-0.07"),
            cards.text(run.name, "label-free", "features", "RankMe"),
        )
        for run in RUNS
    ]
    return [Table(head, rows)]


STUDY = Study(
    name="scale",
    title="Batch size, temperature, learning-rate rule",
    question="At a fixed number of epochs, what do the batch, the rule that scales the rate with it, and the "
    "temperature do; and does gradient caching give the large batch's result?",
    runs=RUNS,
    draw=draw,
    tables=tables,
)
