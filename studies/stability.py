"""SimCLR with a small ViT at a learning rate that is too high: which stability trick saves the run?"""

from statistics import fmean

from matplotlib.figure import Figure

from common.html import PALETTE
from eval.figures import GRAY, styled

from .cards import Cards
from .figures import BASELINES, legend
from .study import SMALL, Run, Study, Table

BASE = {**SMALL, "warmup_epochs": 0.0}
GOOD_RATE, HIGH_RATE = 1e-3, 1e-2
TRICKS: dict[str, dict[str, object]] = {
    "no trick": {},
    "warm-up, 2 epochs": {"warmup_epochs": 2.0},
    "clip at 1": {"clip": 1.0},
    "LayerScale 0.1": {"layer_scale": 0.1},
    "QK-norm": {"qk_norm": True},
    "frozen patch projection": {"frozen_patch_projection": True},
    "fixed positions": {"sincos_positions": True},
    "stochastic depth 0.1": {"drop_path": 0.1},
    "layer decay 0.65": {"layer_decay": 0.65},
    "LayerNorm in the projector": {"norm": "group"},
    "warm-up, clip, LayerScale": {"warmup_epochs": 2.0, "clip": 1.0, "layer_scale": 0.1},
}
MEASURES = {
    "linear probe on the shape, %": ("linear", "label", "top-1"),
    "RankMe, of 64": ("label-free", "features", "RankMe"),
    "feature std (0: collapsed)": ("label-free", "features", "feature std"),
}


def run_of(trick: str, rate: float) -> Run:
    fields, high = {**BASE, **TRICKS[trick], "base_lr": rate}, rate == HIGH_RATE
    name = trick.lower().replace(",", "").replace(" ", "-")
    name += "-high" if high else "-good"
    return Run(name, "simclr_variants", fields, "quickstart", baselines=name == "no-trick-good")


HIGH = {trick: run_of(trick, HIGH_RATE) for trick in TRICKS}
GOOD = run_of("no trick", GOOD_RATE)


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    labels = [f"no trick, rate {GOOD_RATE:g}", *(f"{trick}, rate {HIGH_RATE:g}" for trick in TRICKS)]
    places = list(range(len(labels)))[::-1]
    for ax, (title, row) in zip(axes, MEASURES.items(), strict=True):
        for place, run in zip(places, (GOOD, *HIGH.values()), strict=True):
            color = GRAY if run is GOOD else PALETTE[0]
            values = cards.values(run.name, *row)
            ax.plot(values, [place] * len(values), ".", color=color, alpha=0.5)
            if values:
                ax.plot([fmean(values)], [place], "o", color=color)
            dead = sum("diverged" in card for card in cards.of(run.name))
            if dead:
                ax.annotate(
                    f"{dead} diverged", (0.99, place), xycoords=("axes fraction", "data"), ha="right", fontsize=7.5
                )
        for name, value in cards.baselines(*row).items():
            if name != "raw pixels" or row[0] == "linear":  # of whose 3,072 numbers the rank is another scale
                ax.axvline(value, color=BASELINES[name], linestyle="--", linewidth=1.1, label=name)
        ax.set_title(title)
        legend(ax, fontsize=7.5)
    axes[0].set_yticks(places, labels)
    return figure


def tables(cards: Cards) -> list[Table]:
    head = ("run", "rate", *MEASURES, "diverged")
    found = []
    for trick, run, rate in (("no trick", GOOD, GOOD_RATE), *((t, r, HIGH_RATE) for t, r in HIGH.items())):
        texts = [cards.text(run.name, *row, form=".1f" if i < 2 else ".2f") for i, row in enumerate(MEASURES.values())]
        dead, every = sum("diverged" in card for card in cards.of(run.name)), len(cards.of(run.name))
        found.append((trick, f"{rate:g}", *texts, f"{dead} of {every}"))
    return [Table(head, found)]


STUDY = Study(
    name="stability",
    title="Stability of ViTs",
    question="Under a learning rate that is too high, which of the known tricks keeps a small ViT learning?",
    runs=(GOOD, *HIGH.values()),
    draw=draw,
    tables=tables,
    protocols=("knn", "linear", "metrics", "rotation"),
    may_diverge=True,
)
