"""Compare methods under one preset: run what is missing, then one table, the learning curves and one page.

python -m studies.compare --methods simclr byol dino --preset cifar10-cpu --seeds 3
python -m studies.compare --methods simclr --preset shapes --vary temperature=.1,.2,.5

Every run is a method's own command with its own evaluation. Stop it at will: the same command skips the runs that are
finished and continues the one that was stopped.
"""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import tyro
from matplotlib.figure import Figure
from rich.console import Console

from common.cli import parse, run_cli
from common.errors import UserError
from common.files import rounded, write_atomic
from common.html import PALETTE
from common.log import read_metrics
from eval.card import FILE, Card, load_cards, read_card, save_card
from eval.compare import build, comparable, html, markdown, select, unmatched_published
from eval.figures import styled, tag
from methods import presets_of

from .cards import Cards
from .study import Queue, Run, Runs, collect, commands, directory_name, items


@dataclass
class Arguments:
    """What to compare."""

    methods: tuple[str, ...]
    """Directories of methods/."""
    preset: str = "quickstart"
    """Preset that all of them have."""
    seeds: int = 1
    """Seeds of each setting: 0, 1, ..."""
    vary: tuple[str, ...] = ()
    """Settings, FIELD=VALUE,VALUE: every combination is a run. Methods without the field ignore it."""
    data: str = ""
    """The data from another source, e.g. a folder of parquet files; default: the preset's."""
    data_name: str = ""
    """Name of that data in the cards; default: that of the folder."""
    out: Path | None = None
    """Folder of the runs; default runs/compare-PRESET."""
    jobs: int = 0
    """Runs at a time, each with its share of the cores; 0: one for each core, eight at most."""
    plan: bool = False
    """Print the commands and exit."""
    publish: Path | None = None
    """Folder of the methods, `methods`: write each card to METHOD/results in it, as committed cards are stored."""


# ---- the runs --------------------------------------------------------------------------------------------------------


def runs_of(args: Arguments) -> Runs:
    """What the queue works off. Raises UserError for a method, preset or field that does not exist; a value that the
    method's command line refuses exits with its message and status 2."""
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}: it must be at least 1")
    source: dict[str, object] = {"data": args.data, "data_name": args.data_name} if args.data else {}
    varied = [_values(text) for text in args.vary]
    runs = []
    for method in dict.fromkeys(args.methods):
        config = Run(method, method, preset=args.preset).config(0)
        fields = [(name, values) for name, values in varied if hasattr(config, name)]
        for chosen in itertools.product(*(values for _, values in fields)):
            values = {name: text for (name, _), text in zip(fields, chosen, strict=True)}
            label = "".join(f"-{name}{text}" for name, text in values.items() if len(dict(fields)[name]) > 1)
            read = {name: _read(method, args.preset, name, text) for name, text in values.items()}
            runs.append(Run(method + label.replace(" ", "_"), method, read | source, args.preset, baselines=True))
    for name, _ in varied:
        if not any(name in run.fields for run in runs):
            raise UserError(f"--vary {name}: none of {', '.join(args.methods)} has this field")
    return Runs(name=f"compare-{args.preset}", runs=tuple(runs), seeds=tuple(range(args.seeds)), protocols=())


def _values(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    if not values:
        raise UserError(f"--vary {text}: write FIELD=VALUE,VALUE")
    return name.replace("-", "_"), values.split(",")


def _read(method: str, preset: str, name: str, text: str) -> object:
    """The field's value as the method's own command line reads it: "0.1", "true", or ".2 1" for several numbers."""
    flag = name.replace("_", "-")
    presets = presets_of(method)
    words = [f"--{flag}", *text.split()]
    if isinstance(getattr(presets[preset][1], name), bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"--vary {name}: {text!r} is neither true nor false")
        words = [f"--{flag}" if text.lower() == "true" else f"--no-{flag}"]
    return getattr(parse(presets, f"python -m methods.{method}.train", [preset, *words])[1], name)


# ---- what comes out --------------------------------------------------------------------------------------------------


@styled
def curves(study: Runs, place: Path) -> Figure | None:
    """Accuracy of the online kNN over training, mean over seeds; None where no run has it."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    for number, run in enumerate(study.runs):
        by_epoch: dict[float, list[float]] = {}
        for seed in study.seeds:
            directory = place / directory_name(run, seed)
            for epoch, accuracy in online_accuracy(directory):
                by_epoch.setdefault(epoch, []).append(accuracy)
        if by_epoch:
            epochs = sorted(by_epoch)
            style = "-" if number < len(PALETTE) else "--"
            color = PALETTE[number % len(PALETTE)]
            ax.plot(epochs, [fmean(by_epoch[e]) for e in epochs], style, marker=".", color=color, label=run.name)
    if not ax.lines:
        return None
    ax.set(xlabel="epoch", ylabel="kNN, %", title="Accuracy of the online kNN during training")
    ax.legend(ncols=2)
    return figure


def online_accuracy(directory: Path) -> list[tuple[float, float]]:
    """(epoch, kNN accuracy in percent) of a run's online evaluations."""
    lines = read_metrics(directory / "metrics.jsonl")
    steps = {line["step"]: line["epoch"] for line in lines if "epoch" in line}
    rate = max((epoch / step for step, epoch in steps.items()), default=0.0)  # epochs a step
    return [(line["step"] * rate, line["accuracy"]) for line in lines if line.get("kind") == "online_knn"]


def write_page(study: Runs, place: Path, cards: Cards) -> str:
    """Write compare.md, compare.html and, where runs have online kNN, curves.png; returns the table as Markdown."""
    names = [directory_name(run, seed) for run, seed in items(study) if (run.name, seed) in cards.cards]
    loaded = load_cards([place / name / FILE for name in names])
    groups = comparable(select(loaded))
    made, left = build(groups), unmatched_published(loaded, groups)
    text, figure = markdown(made, left), curves(study, place)
    picture = ""
    if figure is not None:
        figure.savefig(place / "curves.png", dpi=130)
        picture = f"<section><h2>During training</h2>{tag(figure, 'accuracy of the online kNN by epoch')}</section>"
    write_atomic(place / "compare.md", text)
    write_atomic(place / "compare.html", html(made, left, picture))
    return text


def publish(study: Runs, place: Path, methods: Path) -> list[Path]:
    """Write the finished runs' cards to METHOD/results/PRESET-seedN.json, with six significant digits and without
    repeated settings. Returns the files. Raises UserError for a run of code that was not committed."""
    cards = [(run, seed, read_card(place / directory_name(run, seed) / FILE)) for run, seed in items(study)]
    for run, seed, card in cards:
        if not re.fullmatch("[0-9a-f]{12}", commit := card["git_commit"]):
            raise UserError(f"{directory_name(run, seed)} is a run of {commit}: commit the code, and run it again")
    written = []
    for run, seed, card in cards:
        name = f"{run.preset}{run.name.removeprefix(run.method)}-seed{seed}.json"
        written.append(methods / run.method / "results" / name)
        save_card(written[-1], cast(Card, rounded(card)), shared=True)
    return written


def run(args: Arguments) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    study = runs_of(args)
    place = args.out or Path("runs") / study.name
    if args.plan:
        for item, seed in items(study):
            for words in commands(study, item, seed, place):
                console.print(f"python -m {shlex.join(words)}", markup=False)
        return
    Queue(study, place, console, args.jobs).run()
    print(write_page(study, place, collect(study, place)))
    console.print(f"page {place / 'compare.html'}", markup=False)
    if args.publish is not None:
        for path in publish(study, place, args.publish):
            console.print(f"card {path}", markup=False)


def main(argv: Sequence[str] | None = None) -> None:
    run(tyro.cli(Arguments, args=argv, prog="python -m studies.compare", description=__doc__))


if __name__ == "__main__":
    run_cli(main)
