"""What do the bottleneck's width, the noise and the mask ratio do to the features? A queue of runs and a page.

    python -m methods.autoencoder.study --plan            the queue, and what of it is done
    python -m methods.autoencoder.study                   run what is not done, write the page after every run
    python -m methods.autoencoder.study --grid smoke      the same in a minute, on next to no data

Every run is a process of its own with a directory of its own. Stop the queue whenever you like; the same command skips
finished result cards and continues a half-finished run from its checkpoint.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from common.cli import guarded
from common.errors import UserError
from common.files import write_whole
from common.log import read_metrics
from eval.figures import GREY, styled, tag
from eval.protocols import PROTOCOLS
from eval.report import PALETTE, duration, page, table

from .config import PRESETS

PACKAGE = __package__
METHOD = Path(__file__).parent.name
LOWSHOT = "lowshot"

QUESTIONS: dict[str, tuple[str, str, str]] = {  # name -> (title, label of the axis, what the first value 0 stands for)
    "bottleneck": ("How wide should the bottleneck be?", "width of the latent, vanilla", ""),
    "noise": ("How much noise?", "standard deviation of the noise, pixels in [0, 1]", "0: vanilla"),
    "mask_ratio": ("How much should be removed?", "share of blocks removed", "0: vanilla"),
}
BASELINES = {"raw pixels": GREY, "random init": PALETTE[1]}
MEASURES = {  # protocol (of low-shot the one that was asked for) -> title of the panel
    "knn-20-0.07": "kNN (20, .07), %",
    "linear": "linear probe, %",
    LOWSHOT: "fine-tuned, few labels, %",
}


@dataclass(frozen=True)
class Item:
    """One run: its place on the axis of a question, and the flags that make it."""

    question: str
    value: float
    seed: int
    flags: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return "-".join(f"{k.replace('_', '')}{v:g}" if not isinstance(v, str) else v for k, v in self.flags) + (
            f"-seed{self.seed}"
        )


@dataclass(frozen=True)
class Grid:
    preset: str
    widths: tuple[int, ...]
    noises: tuple[float, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    lowshot: tuple[str, ...]  # flags of the protocol

    def items(self) -> list[Item]:
        """Seed by seed, so that a queue that is stopped early has every question at fewer seeds."""
        found = []
        for seed in self.seeds:
            for width in self.widths:
                found.append(Item("bottleneck", width, seed, (("variant", "vanilla"), ("bottleneck", width))))
            for noise in self.noises:
                found.append(Item("noise", noise, seed, (("variant", "denoising"), ("noise", noise))))
            for ratio in self.ratios:
                found.append(Item("mask_ratio", ratio, seed, (("variant", "masked"), ("mask_ratio", ratio))))
        return found


GRIDS = {
    "shapes": Grid(
        "quickstart",
        (4, 16, 64, 128, 512, 1024),
        (0.1, 0.25, 0.5),
        (0.25, 0.5, 0.75),
        (0, 1, 2),
        ("--finetune.labels", "1%", "--finetune.min-steps", "400"),  # one step is all labels: 400 passes
    ),
    "smoke": Grid("smoke", (4, 128), (0.25,), (0.5,), (0,), ("--finetune.labels", "100", "--finetune.epochs", "5")),
}


@dataclass
class Arguments:
    """A resumable queue of runs over width, noise and mask ratio, and a page with a figure a question."""

    grid: Literal["shapes", "smoke"] = "shapes"
    """shapes: 12 settings at 3 seeds. smoke: 4 runs of seconds."""
    out: Path | None = None
    """Folder of the runs and the page; default runs/METHOD-study-GRID."""
    epochs: int = 0
    """Epochs of every run; 0: the preset's."""
    lowshot: bool = LOWSHOT in PROTOCOLS
    """Fine-tune each backbone on few labels too (python -m eval RUN --protocols lowshot)."""
    limit: int = 0
    """Stop after this many runs (0: all)."""
    plan: bool = False
    """Print the queue and exit."""


def flags_of(item: Item, args: Arguments) -> list[str]:
    grid = GRIDS[args.grid]
    flags = [grid.preset, "--seed", str(item.seed), "--name", item.name, "--out", str(folder(args))]
    flags += [text for key, value in item.flags for text in (f"--{key.replace('_', '-')}", str(value))]
    return flags + (["--epochs", str(args.epochs)] if args.epochs else [])


def folder(args: Arguments) -> Path:
    return args.out or Path("runs") / f"{METHOD}-study-{args.grid}"


def card_of(item: Item, args: Arguments) -> dict | None:
    """The finished run's result card, or None. Raises UserError for a card of other settings under the same name."""
    path = folder(args) / item.name / "result.json"
    if not path.exists():
        return None
    card = json.loads(path.read_text())
    wanted = {**dict(item.flags), "seed": item.seed}
    if args.epochs:
        wanted["epochs"] = args.epochs
    else:
        wanted["epochs"] = PRESETS[GRIDS[args.grid].preset][1].epochs
    wrong = [f"{k} {card['config'].get(k)}, not {v}" for k, v in wanted.items() if card["config"].get(k) != v]
    if card["preset"] != GRIDS[args.grid].preset:
        wrong.insert(0, f"preset {card['preset']}, not {GRIDS[args.grid].preset}")
    if wrong:
        raise UserError(f"{path} is of another study ({'; '.join(wrong)}): give this one its own --out")
    return card


def score(card: dict, measure: str) -> float | None:
    """Top-1 on the labels, or None where it was not measured."""
    return next((row["value"] for row in rows_of(card, measure)), None)


def rows_of(card: dict, measure: str) -> list[dict]:
    def fits(protocol: str) -> bool:  # lowshot-1%, but not linear-augmented for linear
        return protocol == measure or measure == LOWSHOT and protocol.startswith(f"{LOWSHOT}-")

    rows = [row for row in card["evaluations"] if fits(row["protocol"])]
    return [row for row in rows if row["target"] == "label" and row["metric"] == "top-1"]


def is_done(item: Item, args: Arguments) -> bool:
    card = card_of(item, args)
    return card is not None and not (args.lowshot and score(card, LOWSHOT) is None)


# ---- the queue -------------------------------------------------------------------------------------------------------


def run_queue(args: Arguments, console: Console) -> None:
    items = GRIDS[args.grid].items()
    waiting = [item for item in items if not is_done(item, args)]
    console.print(f"{len(items)} runs, {len(items) - len(waiting)} done, {len(waiting)} to do, in {folder(args)}")
    if args.limit:
        waiting = waiting[: args.limit]
    spent = []
    for number, item in enumerate(waiting, start=1):
        console.print(f"[{number}/{len(waiting)}] {item.name} ...", markup=False)
        start = time.perf_counter()
        if card_of(item, args) is None:
            execute([f"{PACKAGE}.train", *flags_of(item, args)], item, args)
        if args.lowshot:
            # The networks from random weights are the same for all runs of a seed: one run of each seed measures them.
            first = next(i for i in items if i.seed == item.seed)
            scratch = ["--finetune.scratch", "1,3" if item == first else "none"]
            execute(
                ["eval", str(folder(args) / item.name), "--protocols", LOWSHOT, *GRIDS[args.grid].lowshot, *scratch],
                item,
                args,
            )
        spent.append(time.perf_counter() - start)
        left = sum(spent) / len(spent) * (len(waiting) - number)
        card = card_of(item, args) or {}
        console.print(
            f"      kNN {score(card, 'knn-20-0.07'):.1f} %, linear {score(card, 'linear'):.1f} %, "
            f"{duration(spent[-1])}; {duration(left)} left for {len(waiting) - number}",
            markup=False,
        )
        write_results(args)
    if not waiting:
        write_results(args)
    console.print(f"page {folder(args) / 'study.html'}", markup=False)


def execute(command: list[str], item: Item, args: Arguments) -> None:
    """`python -m ...` with its output in log.txt of the run; UserError with the last lines where it fails."""
    log = folder(args) / f"{item.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode or not (folder(args) / item.name / "result.json").exists():
        last = " / ".join(log.read_text().splitlines()[-3:])
        raise UserError(f"{item.name} stopped with status {done.returncode}: {last} (all of it: {log})")


def show_plan(args: Arguments, console: Console) -> None:
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "state", "command"):
        printed.add_column(name, overflow="fold")
    for item in GRIDS[args.grid].items():
        state = "done" if is_done(item, args) else "to do"
        printed.add_row(item.name, state, f"python -m {PACKAGE}.train {' '.join(flags_of(item, args))}")
    console.print(printed)


# ---- the page --------------------------------------------------------------------------------------------------------


def points_of(question: str, args: Arguments) -> dict[float, list[tuple[dict, Path]]]:
    """value on the axis -> cards (with their directories) of the seeds that are done. 0 is vanilla at default width."""
    default = PRESETS[GRIDS[args.grid].preset][1].bottleneck
    found: dict[float, list] = {}
    for item in GRIDS[args.grid].items():
        value = item.value
        if question != "bottleneck" and item.question == "bottleneck" and value == default:
            value = 0.0
        elif item.question != question:
            continue
        card = card_of(item, args)
        if card is not None:
            found.setdefault(value, []).append((card, folder(args) / item.name))
    return dict(sorted(found.items()))


def mean_std(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (of a sample; 0 for one) of what was measured."""
    kept = [v for v in values if v is not None]
    if not kept:
        return None
    average = sum(kept) / len(kept)
    return average, math.sqrt(sum((v - average) ** 2 for v in kept) / max(len(kept) - 1, 1))


def relative_error(directory: Path) -> float | None:
    lines = [line["relative_error"] for line in read_metrics(directory / "metrics.jsonl") if "relative_error" in line]
    return lines[-1] if lines else None


@styled
def figure_of(question: str, points: dict[float, list], args: Arguments) -> Figure:
    """A panel for each accuracy and one for the reconstruction: mean over seeds, their spread, and every seed."""
    cards = [card for found in points.values() for card, _ in found]
    panels = [m for m in MEASURES if any(score(card, m) is not None for card in cards)]
    figure = Figure(figsize=(2.9 * (len(panels) + 1), 3.1), layout="constrained")
    places = list(range(len(points)))  # equal steps: widths go by factors, and 0 has its place beside them
    for ax, panel in zip(figure.subplots(1, len(panels) + 1), [*panels, "error"], strict=True):
        means, spreads = [], []
        for place, found in zip(places, points.values(), strict=True):
            values = [relative_error(d) if panel == "error" else score(card, panel) for card, d in found]
            average = mean_std(values) or (math.nan, 0.0)
            means.append(average[0])
            spreads.append(average[1])
            ax.plot([place] * len(values), [math.nan if v is None else v for v in values], ".", color=PALETTE[0],
                    alpha=0.45)  # fmt: skip
        ax.errorbar(places, means, yerr=spreads, color=PALETTE[0], marker="o", capsize=3)
        if panel != "error":
            # Of all runs of the study: networks from random weights are fine-tuned beside one run of each seed.
            every = [card_of(item, args) for item in GRIDS[args.grid].items()]
            rows = [r for card in every if card for r in rows_of(card, panel)]
            for name in dict.fromkeys(n for r in rows for n in r["baselines"]):
                level = mean_std(r["baselines"].get(name) for r in rows)
                color = BASELINES.get(name, PALETTE[3])
                ax.axhline(level[0], color=color, linestyle="--", linewidth=1.2, label=name)
            if ax.get_legend_handles_labels()[0]:
                ax.legend()
        ax.set(title="error / mean image's" if panel == "error" else MEASURES[panel], xlabel=QUESTIONS[question][1])
        ax.xaxis.label.set_size(8.5)
        ax.set_xticks(places, [f"{v:g}" for v in points])
    return figure


def rows_of_question(question: str, points: dict[float, list]) -> tuple[tuple[str, ...], list[tuple]]:
    """(head, rows) of a question's table: a row a value, mean and (of several) deviation over seeds."""
    rows = []
    for value, found in points.items():
        cells = [mean_std(score(card, m) for card, _ in found) for m in MEASURES]
        texts = ["not run" if c is None else f"{c[0]:.2f}" + f" ± {c[1]:.2f}" * (len(found) > 1) for c in cells]
        error = mean_std(relative_error(d) for _, d in found)
        rows.append((f"{value:g}", len(found), *texts, "–" if error is None else f"{error[0]:.3f}"))
    return (QUESTIONS[question][1], "seeds", *MEASURES.values(), "error / mean image's"), rows


def write_results(args: Arguments) -> None:
    """`study.html`, and for a README the same as `study.md` with a figure of each question beside it."""
    write_whole(folder(args) / "study.html", write_page(args))
    lines = []
    for question, (title, *_) in QUESTIONS.items():
        points = points_of(question, args)
        if points:
            figure_of(question, points, args).savefig(folder(args) / f"{question}.png", dpi=110)
            head, rows = rows_of_question(question, points)
            lines += [f"**{title}**", "", *(f"| {' | '.join(map(str, row))} |" for row in (head, *rows)), ""]
            lines.insert(-len(rows) - 1, "|" + "---:|" * len(head))
    write_whole(folder(args) / "study.md", "\n".join(lines))


def write_page(args: Arguments) -> str:
    grid = GRIDS[args.grid]
    done = sum(is_done(item, args) for item in grid.items())
    seeds = ", ".join(map(str, grid.seeds))
    parts = [
        f'<header><p class="eyebrow">Study of {escape(METHOD)}, preset {escape(grid.preset)}</p>'
        f"<h1>Width, noise and mask ratio</h1><p>{done} of {len(grid.items())} runs, seeds {seeds}; bars: standard "
        "deviation over seeds; dashed: baselines.</p></header>"
    ]
    for question, (title, _, zero) in QUESTIONS.items():
        points = points_of(question, args)
        if not points:
            parts.append(f'<section><h2>{escape(title)}</h2><p class="muted">No run of it is done.</p></section>')
            continue
        head, rows = rows_of_question(question, points)
        note = f'<p class="muted">{escape(zero)}, at the default width.</p>' if zero else ""
        parts.append(f"<section><h2>{escape(title)}</h2>{note}{tag(figure_of(question, points, args), title)}"
                     f"{table(head, rows, numeric=range(1, len(head)))}</section>")  # fmt: skip
    return page(f"Study of {METHOD}", "\n".join(parts))


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog=f"python -m {PACKAGE}.study")
    if args.lowshot and LOWSHOT not in PROTOCOLS:
        raise UserError(f"the evaluation has no protocol {LOWSHOT!r}: leave it out with --no-lowshot")
    console = Console(highlight=False, soft_wrap=True)
    show_plan(args, console) if args.plan else run_queue(args, console)


if __name__ == "__main__":
    guarded(main)
