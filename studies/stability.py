"""SimCLR with a small ViT at a learning rate that is too high: which stability trick saves the run?"""

from statistics import fmean

from matplotlib.figure import Figure

from eval.figures import GREY, styled
from eval.report import PALETTE

from .figures import BASELINES, legend
from .study import SMALL, Cards, Run, Study

BASE = {**SMALL, "warmup_epochs": 0.0}
GOOD_RATE, HIGH_RATE = 1e-3, 3e-2
TRICKS: dict[str, dict[str, object]] = {
    "no trick": {},
    "warm-up, 2 epochs": {"warmup_epochs": 2.0},
    "clip at 1": {"clip": 1.0},
    "LayerScale 0.1": {"layer_scale": 0.1},
    "QK-norm": {"qk_norm": True},
    "frozen patch projection": {"frozen_patch_projection": True},
    "fixed positions": {"sincos_positions": True},
    "layer decay 0.65": {"layer_decay": 0.65},
    "LayerNorm in the projector": {"norm": "group"},
    "warm-up, clip, LayerScale": {"warmup_epochs": 2.0, "clip": 1.0, "layer_scale": 0.1},
}


def run_of(trick: str, rate: float) -> Run:
    fields, high = {**BASE, **TRICKS[trick], "base_lr": rate}, rate == HIGH_RATE
    name = trick.lower().replace(",", "").replace(" ", "-")
    name += "-high" if high else "-good"
    return Run(name, "simclr", fields, "shapes-vit", baselines=name == "no-trick-good")


HIGH = [run_of(trick, HIGH_RATE) for trick in TRICKS]
GOOD = [run_of(trick, GOOD_RATE) for trick in TRICKS]


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(TRICKS)))[::-1]
    for ax, measure in ((left, "linear"), (right, "RankMe")):
        for runs, color, label in ((GOOD, GREY, f"rate {GOOD_RATE:g}"), (HIGH, PALETTE[0], f"rate {HIGH_RATE:g}")):
            row = ("linear",) if measure == "linear" else ("label-free", "features", "RankMe")
            for place, run in zip(places, runs, strict=True):
                values = cards.values(run.name, *row)
                ax.plot(values, [place] * len(values), ".", color=color, alpha=0.5)
                if values:
                    ax.plot([fmean(values)], [place], "o", color=color, label=label if place == places[0] else None)
                dead = sum("diverged" in card for card in cards.of(run.name))
                if dead and measure == "linear":
                    ax.annotate(f"{dead} diverged", (0.99, place), xycoords=("axes fraction", "data"), ha="right",
                                fontsize=7.5, color=color)  # fmt: skip
    for name, value in cards.baselines("linear").items():
        left.axvline(value, color=BASELINES[name], linestyle="--", linewidth=1.1, label=name)
    left.set_yticks(places, TRICKS)
    left.set_title("linear probe on the figure, %")
    right.set_title("RankMe, of 64")
    legend(left, fontsize=7.5)
    return figure


def rows(cards: Cards) -> tuple[tuple[str, ...], list[tuple]]:
    head = ("trick", f"linear, rate {GOOD_RATE:g}", f"linear, rate {HIGH_RATE:g}", "RankMe at it", "feature std at it",
            "diverged")  # fmt: skip
    found = []
    for trick, good, high in zip(TRICKS, GOOD, HIGH, strict=True):
        dead, every = sum("diverged" in card for card in cards.of(high.name)), len(cards.of(high.name))
        metrics = [cards.text(high.name, "label-free", "features", m, form)
                   for m, form in (("RankMe", ".1f"), ("feature std", ".2f"))]  # fmt: skip
        texts = [cards.text(run.name, "linear") for run in (good, high)]
        found.append((trick, *texts, *metrics, f"{dead} of {every}"))
    return head, found


STUDY = Study(
    name="stability",
    title="Stability of ViTs",
    question="Under a learning rate that is too high, which of the known tricks keeps a small ViT learning?",
    runs=(*HIGH, *GOOD),
    draw=draw,
    rows=rows,
    answer="",
    full="MoCo-v3 (arXiv:2104.02057) saw dips of training accuracy in ViT-B at batches from 4096 on, whose origin was "
    "the patch projection: frozen, the dips went. A ViT of four blocks has no such depth.",
    protocols=("knn", "linear", "metrics"),
    may_diverge=True,
)
