"""Which measure without labels ranks networks as the linear probe does? No runs of its own: the cards of the others,
and of the methods' own results on shapes."""

import json
from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.html import PALETTE
from common.rng import generator
from eval.figures import GRAY, styled

from .cards import Cards
from .study import Study, Table, settings

# name -> (its row of a card, what is said to be better, a number that is then higher)
MEASURES: dict[str, tuple[tuple[str, str, str], str, Callable[[float], float]]] = {
    "rotation prediction, %": (("rotation", "rotation", "top-1"), "higher", lambda v: v),
    "RankMe": (("label-free", "features", "RankMe"), "higher", lambda v: v),
    "alpha-ReQ": (("label-free", "features", "alpha-ReQ"), "nearer to 1", lambda v: -abs(v - 1)),
    "uniformity": (("label-free", "features", "uniformity"), "lower", lambda v: -v),
    "alignment": (("label-free", "features", "alignment"), "lower", lambda v: -v),
}
BORROWED = ("projector", "augmentation", "scale", "stability", "decoder", "methods")
LINEAR = ("linear", "label", "top-1")
DRAWS = 2000


def ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties share their mean."""
    return (x[:, None] > x).double().sum(1) + ((x[:, None] == x).double().sum(1) - 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of the two does not vary."""
    a, b = (ranks(torch.tensor(v, dtype=torch.float64)) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()))


def bootstrapped(groups: Sequence[Sequence[tuple[float, float]]], statistic: Callable) -> tuple[float, float]:
    """95 % interval of `statistic(x, y)`: settings are drawn with replacement, all seeds of one together."""
    stream, found = generator("bootstrap"), []
    for _ in range(DRAWS):
        drawn = torch.randint(len(groups), (len(groups),), generator=stream).tolist()
        pairs = [pair for i in drawn for pair in groups[i]]
        found.append(statistic(*zip(*pairs, strict=True)))
    values = torch.tensor(found, dtype=torch.float64)
    values = values[~values.isnan()]
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def pairs_of(cards: Cards, row: tuple[str, str, str], *, study: str = "") -> dict[str, list[tuple[float, float]]]:
    """run -> (measure, linear accuracy) of each seed. Runs on other data than plain shapes are left out, and so is the
    same run where a second study has it too. Over all studies, only cards that have every measure: all then rank the
    same runs."""
    needed = {LINEAR, row} | {r for r, *_ in MEASURES.values() if not study}
    found: dict[str, list[tuple[float, float]]] = {}
    seen: set[str] = set()
    for run in sorted({name for name, _ in cards.cards}):
        if study not in ("", run.split("/")[0]) or "/textured" in run:
            continue
        for card in cards.of(run):
            values = {(r["protocol"], r["target"], r["metric"]): r["value"] for r in card["evaluations"]}
            same = json.dumps([card["method"], settings(card["method"], card["config"])], sort_keys=True)
            if needed <= values.keys() and same not in seen:
                seen.add(same)
                found.setdefault(run, []).append((values[row], values[LINEAR]))
    return found


def correlation(cards: Cards, name: str, study: str = "") -> tuple[float, float, float] | None:
    """(Spearman's correlation of how good the measure says a run is with its linear accuracy, low, high); None below
    five settings."""
    row, _, better = MEASURES[name]
    groups = [[(better(x), y) for x, y in group] for group in pairs_of(cards, row, study=study).values()]
    if len(groups) < 5:
        return None
    pairs = [pair for group in groups for pair in group]
    return spearman(*zip(*pairs, strict=True)), *bootstrapped(groups, spearman)


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for ax, (name, (row, *_)) in zip(axes, MEASURES.items(), strict=True):
        for study, color in zip(BORROWED, PALETTE, strict=False):
            pairs = [pair for group in pairs_of(cards, row, study=study).values() for pair in group]
            if not pairs:
                continue
            ax.plot([x for x, _ in pairs], [y for _, y in pairs], ".", color=color, label=study, alpha=0.7)
        found = correlation(cards, name)
        interval = "" if found is None else "\n{:.2f} [{:.2f}, {:.2f}]".format(*found)
        ax.set_title(f"{name}{interval}", fontsize=9)
    axes[0].set_ylabel("linear probe, %", color=GRAY)
    axes[1].legend(fontsize=7)
    caption = (
        "above each: Spearman's correlation with the linear probe, 95 % interval, over the runs that have all five"
    )
    figure.supxlabel(caption, fontsize=8, color=GRAY)
    return figure


def tables(cards: Cards) -> list[Table]:
    present = [study for study in BORROWED if any(run.startswith(f"{study}/") for run, _ in cards.cards)]
    head = ("Spearman with the linear probe, better is", "runs with all five", *present)
    found = []
    for name, (_, better, _) in MEASURES.items():
        cells = []
        for study in ("", *present):
            value = correlation(cards, name, study)
            cells.append("too few runs" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value))
        found.append((f"{name.removesuffix(', %')}, {better}", *cells))
    return [Table(head, found)]


STUDY = Study(
    name="label-free",
    title="Evaluation without labels",
    question="Which measure that needs no labels ranks runs as the linear probe does?",
    runs=(),
    draw=draw,
    tables=tables,
    borrows=BORROWED,
)
