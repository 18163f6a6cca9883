"""What the figures of studies share: points with their seeds, baselines as dashed lines, matrices with numbers."""

from collections.abc import Sequence
from statistics import fmean, stdev

from matplotlib.axes import Axes

from common.html import PALETTE
from eval.figures import GRAY

from .cards import Cards

BASELINES = {"raw pixels": GRAY, "random init": "#b8860b"}


def points(
    ax: Axes,
    places: Sequence[float],
    values: Sequence[Sequence[float]],
    *,
    color: str,
    label: str = "",
    line: bool = True,
) -> None:
    """Mean over seeds with its standard deviation, every seed as a faint dot; a position without values is left out."""
    shown = [(place, found) for place, found in zip(places, values, strict=True) if found]
    for place, found in shown:
        ax.plot([place] * len(found), found, ".", color=color, alpha=0.4, markersize=4)
    if shown:
        means = [fmean(found) for _, found in shown]
        spread = [stdev(found) if len(found) > 1 else 0.0 for _, found in shown]
        style = "-" if line else "none"
        ax.errorbar(
            [p for p, _ in shown],
            means,
            yerr=spread,
            color=color,
            marker="o",
            linestyle=style,
            capsize=2.5,
            label=label or None,
        )


def baseline_lines(ax: Axes, cards: Cards, protocol: str, target: str = "label", metric: str = "") -> None:
    for name, value in cards.baselines(protocol, target, metric).items():
        ax.axhline(value, color=BASELINES.get(name, PALETTE[3]), linestyle="--", linewidth=1.1, label=name)


def matrix(
    ax: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    low: float,
    high: float,
    form: str = "{:.0f}",
) -> None:
    """A heat map with its numbers; None stays white."""
    drawn = [[float("nan") if v is None else v for v in row] for row in values]
    ax.imshow(drawn, cmap="YlGnBu", vmin=low, vmax=high, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.spines[:].set_visible(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                dark = (value - low) / (high - low) > 0.6
                ax.text(
                    j, i, form.format(value), ha="center", va="center", color="white" if dark else "#1e2429", fontsize=8
                )


def legend(ax: Axes, **options) -> None:
    """A legend where there is something to name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**options)
