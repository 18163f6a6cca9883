"""Which augmentations, alone and in pairs, make SimCLR encode the shape, and what each makes it discard."""

from statistics import fmean

from matplotlib.figure import Figure

from common.html import PALETTE
from eval.figures import styled

from .cards import Cards
from .figures import baseline_lines, legend, matrix, points
from .study import SMALL, Run, Study, Table

OFF = {"crop_scale": (1.0, 1.0), "color_strength": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0}
ON: dict[str, dict[str, object]] = {
    "crop": {"crop_scale": (0.3, 1.0)},
    "colour": {"color_strength": 0.5, "hue": 0.5},
    "grey": {"grayscale": 0.5},
    "blur": {"blur": 0.5},
}
NAMES = tuple(ON)
STRIPES = ("colour", "colour, stripes", "crop+colour", "crop+colour, stripes")
FACTORS = ("hue", "background_hue", "size", "x", "y", "rotation")


def cell(*names: str) -> str:
    return "+".join(name for name in NAMES if name in names) or "flip"


def views(*names: str) -> dict[str, object]:
    return {**OFF, **{k: v for name in names for k, v in ON[name].items()}}


PAIRS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
CELLS = [(), *((name,) for name in NAMES), *PAIRS, NAMES]
STRIPED = {"textured": ("crop", "colour"), "textured-colour": ("colour",)}
RUNS = (
    *(Run(cell(*c), "simclr", {**SMALL, **views(*c)}, baselines=c == ()) for c in CELLS),
    # Stripes that both views share distinguish images more easily than the shape does.
    *(
        Run(name, "simclr", {**SMALL, **views(*c), "data": "shapes-textured"}, baselines=name == "textured")
        for name, c in STRIPED.items()
    ),
)


def mean(cards: Cards, run: str, *row: str) -> float | None:
    values = cards.values(run, *row)
    return fmean(values) if values else None


@styled
def draw(cards: Cards) -> Figure:
    figure = Figure(figsize=(12.5, 4.3), layout="constrained")
    pairs, factors, shared = figure.subplots(1, 3, width_ratios=(1.1, 1.5, 0.8))
    grid = [[mean(cards, cell(a, b), "linear") for b in NAMES] for a in NAMES]
    matrix(pairs, NAMES, NAMES, grid, low=10, high=80)
    pairs.set_title("linear probe on the shape, %")
    pairs.set_xlabel(
        "diagonal: alone. All four: "
        f"{mean(cards, cell(*NAMES), 'linear') or float('nan'):.0f}, flip alone: "
        f"{mean(cards, cell(), 'linear') or float('nan'):.0f}",
        fontsize=8.5,
    )
    rows = [cell(*c) for c in CELLS]
    r2 = [[mean(cards, run, "factor-linear", f, "R2") for f in FACTORS] for run in rows]
    matrix(factors, rows, FACTORS, r2, low=0, high=1, form="{:.2f}")
    factors.set_title("what the features still say: R2 of each factor")
    order = [run for name, views in reversed(STRIPED.items()) for run in (cell(*views), name)]
    for protocol, label, color in (("linear", "linear", PALETTE[0]), ("knn-20-0.07", "kNN", PALETTE[1])):
        values = [cards.values(run, protocol) for run in order]
        points(shared, range(len(order)), values, color=color, label=label, line=False)
    only = Cards({key: card for key, card in cards.cards.items() if key[0] in STRIPED})
    baseline_lines(shared, only, "linear")
    shared.set_xticks(range(len(order)), STRIPES, rotation=30, ha="right")
    shared.set_title("shared stripes: the shape, %")
    legend(shared)
    return figure


def tables(cards: Cards) -> list[Table]:
    head = ("views", "linear, %", "kNN (20, .07), %", *(f"R2 {f.replace('_', ' ')}" for f in FACTORS), "RankMe")
    rows = [
        (
            run.name,
            cards.text(run.name, "linear"),
            cards.text(run.name, "knn-20-0.07"),
            *(cards.text(run.name, "factor-linear", f, "R2", ".2f") for f in FACTORS),
            cards.text(run.name, "label-free", "features", "RankMe"),
        )
        for run in RUNS
    ]
    return [Table(head, rows)]


STUDY = Study(
    name="augmentation",
    title="Augmentations, alone and in pairs",
    question="Which augmentations does SimCLR need to see what an image shows, and what does each make it forget?",
    runs=RUNS,
    draw=draw,
    tables=tables,
)
