"""Studies: questions about self-supervised learning, answered with runs of the methods of this repository.

    python -m studies                        the studies, and how far each is
    python -m studies augmentation           run what is not done, then draw; stop it and start it again at will
    python -m studies augmentation --plan    the commands
    python -m studies augmentation --from-cards     draw again from the committed cards
    python -m studies augmentation --publish        write cards, figure and table to studies/results and the page
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from common.cli import guarded
from common.errors import UserError

from . import STUDIES
from .page import committed, committed_cards, publish, write_results
from .study import Queue, Study, card_of, collect, commands, folder, items, read_cards


@dataclass
class Arguments:
    """Run a study, or without a name list them."""

    name: tyro.conf.Positional[str] = ""
    """Name of the study; none: list them."""
    out: Path | None = None
    """Folder of the runs; default runs/study-NAME."""
    seeds: int = 0
    """Only the first so many seeds (0: all)."""
    jobs: int = 0
    """Runs at a time, each with its share of the cores; 0: one for each core, eight at most."""
    limit: int = 0
    """Stop after this many runs (0: all)."""
    plan: bool = False
    """Print the commands and exit."""
    from_cards: bool = False
    """Run nothing: draw figure and table from the cards in studies/results."""
    publish: bool = False
    """Run nothing: put the new cards among those in studies/results, draw figure and table there, write the page."""


def show_list(console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("study", "question", "runs", "done here", "cards committed"):
        table.add_column(name, overflow="fold")
    for study in STUDIES.values():
        lines = str(len(committed_cards(study.name)))
        try:
            done = str(len(collect(study, None)))
        except UserError:
            done = "other settings"
        table.add_row(study.name, study.question, str(len(items(study))), done, lines)
    console.print(table)
    console.print("run one: python -m studies NAME")


def show_plan(study: Study, args: Arguments, console: Console) -> None:
    for run, seed in items(study, args.seeds):
        state = "done " if card_of(study, run, seed, args.out) else "to do"
        for words in commands(study, run, seed, args.out):
            console.print(f"{state}  python -m {shlex.join(words)}", markup=False)


def run(args: Arguments) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not args.name:
        show_list(console)
        return
    if args.name not in STUDIES:
        raise UserError(f"{args.name!r} is no study: studies are {', '.join(STUDIES)}")
    study = STUDIES[args.name]
    if args.plan:
        show_plan(study, args, console)
        return
    place = folder(study, args.out)
    if args.from_cards:
        write_results(study, place, read_cards(committed(study.name)))
    elif args.publish:
        console.print(f"written to {publish(study, args.out)}", markup=False)
        return
    else:
        Queue(study, args.out, console, args.jobs).run(seeds=args.seeds, limit=args.limit)
        write_results(study, place, collect(study, args.out), local=True)
    console.print(f"figure {place / 'figure.png'}\ntable  {place / 'table.md'}", markup=False)


def main(argv: list[str] | None = None) -> None:
    run(tyro.cli(Arguments, args=argv, prog="python -m studies", description=__doc__))


if __name__ == "__main__":
    guarded(main)
