"""Studies: questions about self-supervised learning, answered with runs of the methods of this repository.

python -m studies                        the studies, and how far each is
python -m studies augmentation           run what is missing, then draw; stop and restart at any time
python -m studies augmentation --plan    the commands
python -m studies augmentation --from-cards     draw again from the committed cards
python -m studies augmentation --publish        write cards, figure and table to studies/results and the page
python -m studies linear-autoencoder     closed forms, no runs: minutes
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from common.cli import run_cli
from common.errors import UserError
from common.files import write_atomic

from . import STUDIES
from .cards import read_cards
from .linear_autoencoder import questions as linear
from .page import committed, committed_cards, publish, write_results
from .study import Queue, Study, card_of, collect, commands, folder, items, with_data


@dataclass
class Arguments:
    """Run a study, or without a name list them."""

    name: tyro.conf.Positional[str] = ""
    """Name of the study; none: list them."""
    out: Path | None = None
    """Folder of the runs; default runs/study-NAME."""
    data: str = ""
    """Another source of the same data, e.g. a folder of parquet files; default: the study's."""
    data_name: str = ""
    """Name of that data in the cards; default: the folder's name."""
    seeds: int = 0
    """Run only this many seeds (0: all)."""
    jobs: int = 0
    """Concurrent runs, each with its share of the cores; 0: one per core, at most eight."""
    limit: int = 0
    """Stop after this many runs (0: all)."""
    plan: bool = False
    """Print the commands and exit."""
    from_cards: bool = False
    """Run nothing: draw the figure and table from the cards in studies/results."""
    publish: bool = False
    """Run nothing: add the new cards to studies/results, draw the figure and table there, and write the page."""


def show_list(console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("study", "title", "runs", "done here", "cards committed"):
        table.add_column(name, overflow="fold")
    for study in STUDIES.values():
        lines = str(len(committed_cards(study.name)))
        try:
            done = str(len(collect(study, None)))
        except UserError:
            done = "other settings"
        table.add_row(study.name, study.title, str(len(items(study))), done, lines)
    table.add_row(linear.NAME, linear.TITLE, "–", "–", "–")
    console.print(table)
    console.print("run one: python -m studies NAME")


def show_plan(study: Study, args: Arguments, console: Console) -> None:
    for run, seed in items(study, args.seeds):
        state = "done " if card_of(study, run, seed, args.out) else "to do"
        for words in commands(study, run, seed, args.out):
            console.print(f"{state}  python -m {shlex.join(words)}", markup=False)


def run(args: Arguments) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not args.name:
        show_list(console)
        return
    if args.name not in STUDIES:
        raise UserError(f"{args.name!r} is not a study: choose from {', '.join(STUDIES)}, {linear.NAME}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start a study without torchrun or accelerate launch: its runs are separate processes")
    study = STUDIES[args.name]
    if args.data:
        study = with_data(study, args.data, args.data_name)
    if args.plan:
        show_plan(study, args, console)
        return
    place = folder(study, args.out)
    if args.publish:
        console.print(f"written to {publish(study, args.out)}", markup=False)
        return
    if args.from_cards:
        cards = read_cards(committed(study.name))
    else:
        Queue(study, args.out, console, args.jobs).run(seeds=args.seeds, limit=args.limit)
        cards = collect(study, args.out)
    write_results(study, place, cards, local=not args.from_cards)
    console.print(f"figure {place / 'figure.webp'}\ntable  {place / 'table.md'}", markup=False)
    if study.report is not None:
        write_atomic(place / "report.html", study.report(cards))
        console.print(f"report {place / 'report.html'}", markup=False)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [linear.NAME]:
        return linear.main(argv[1:])
    run(tyro.cli(Arguments, args=argv, prog="python -m studies", description=__doc__))


if __name__ == "__main__":
    run_cli(main)
