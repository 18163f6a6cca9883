"""A queue of runs, arms x label budgets x seeds, and one page with the verdict.

    python -m methods.dropout_ssl.study --grid quick --plan      the queue, and what of it is done
    python -m methods.dropout_ssl.study --grid tabular           run what is not done; the page is written on the way
    python -m methods.dropout_ssl.study --grid cifar10 --data PATH --data-name "CIFAR-10 (JPEG)"
    python -m methods.dropout_ssl.study --grid tabular --cards methods/dropout_ssl/results/tabular/cards.jsonl --out x
                                                                 the page again, from the committed cards

Every run has a directory of its own. Stop the queue whenever you like, with a kill or Ctrl-C: the same command skips
finished result cards and continues a half-finished run from its checkpoint.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from common.cli import guarded
from common.errors import UserError
from common.files import rounded, write_whole
from eval.report import duration

from .config import ARMS, PRESETS, Config
from .report import Study, markdown, summary, write_page

PACKAGE = __package__
METHOD = Path(__file__).parent.name

# variant -> (arm, fields that differ from the preset's). The strengths are those of the sheet, 7.3.
VARIANTS: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in ARMS},
    "A4-beta0.01": ("A4", {"beta": 1e-2}),
    "A5-lambda1": ("A5", {"lambd": 1.0}),
    "A6-K4": ("A6", {"copies": 4}),
    **{f"A1-p{p:g}": ("A1", {"p": p}) for p in (0.1, 0.3, 0.5)},
}
CORE = ("A0", "A1", "A2", "A5")
IMAGES_ONLY = ("A1s", "A1p", "A8")
SWEEP = tuple(v for v in VARIANTS if v.startswith("A1-p"))
ALL = tuple(v for v in VARIANTS if v not in SWEEP)


@dataclass(frozen=True)
class Grid:
    about: str
    preset: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]  # labelled records; 0: all
    fields: tuple[tuple[str, object], ...] = ()  # that differ from the preset's


TABULAR_ARMS = tuple(v for v in ALL if v not in IMAGES_ONLY)
GRIDS = {
    "smoke": Grid("a drawn table, 40 steps: what the tests run", "table", ("A0", "A1", "A2"), (0, 1), (200,),
                  (("steps", 40), ("measured", 128), ("masks", 3), ("save_every", 20))),
    "quick": Grid("embedded shapes: minutes", "shapes", ("A0", "A1", "A2"), (0, 1), (1000,), (("measured", 256),)),
    "table": Grid("a drawn table, all arms", "table", TABULAR_ARMS, tuple(range(5)), (250, 1000, 4000)),
    "tabular": Grid("diamonds, all arms", "tabular", TABULAR_ARMS, tuple(range(5)), (250, 1000, 4000)),
    "cifar10": Grid("CIFAR-10, 4 MMAC network", "cifar10-cpu", CORE, tuple(range(3)), (250, 4000)),
    "gpu": Grid("CIFAR-10, ResNet-18, with a GPU", "cifar10-r18", CORE, tuple(range(5)), (250, 4000),
                (("steps", 3000),)),
    "full": Grid("CIFAR-10, ResNet-18, all arms and dropout rates", "cifar10-r18", (*ALL, *SWEEP), tuple(range(5)),
                 (250, 1000, 4000, 0)),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One run."""

    variant: str
    labels: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-n{self.labels or 'all'}-seed{self.seed}"


@dataclass
class Arguments:
    """A resumable queue of runs over arms, label budgets and seeds, and a page with a verdict."""

    grid: Literal["smoke", "quick", "table", "tabular", "cifar10", "gpu", "full"] = "quick"
    """quick: A0, A1, A2, two seeds. tabular, cifar10: the CPU study. gpu: the same arms on ResNet-18. full: all."""
    out: Path | None = None
    """Folder of the runs and the page; default runs/METHOD-study-GRID."""
    data: str = ""
    """Another source of the same data, e.g. a folder of parquet files; default: the preset's."""
    data_name: str = ""
    """Name of the data in the cards; default: that of the hub or the folder."""
    seeds: int = 0
    """Only the first so many seeds (0: all)."""
    limit: int = 0
    """Stop after this many runs (0: all)."""
    cards: Path | None = None
    """Run nothing: write the page of these cards, one a line, as a study leaves them in cards.jsonl."""
    plan: bool = False
    """Print the queue and exit."""


def items(args: Arguments) -> list[Item]:
    """Seed by seed, so that a queue that is stopped early has all arms at fewer seeds: pairs, not holes."""
    grid = GRIDS[args.grid]
    seeds = grid.seeds[: args.seeds or None]
    return [Item(v, n, seed) for seed in seeds for n in grid.budgets for v in grid.variants]


def folder(args: Arguments) -> Path:
    return args.out or Path("runs") / f"{METHOD}-study-{args.grid}"


def config_of(item: Item, args: Arguments) -> Config:
    grid = GRIDS[args.grid]
    arm, fields = VARIANTS[item.variant]
    given = {"data": args.data} if args.data else {}
    place = dict(out=str(folder(args)), name=item.name, data_name=args.data_name)
    own = dict(arm=arm, labels=item.labels, seed=item.seed)
    return replace(PRESETS[grid.preset][1], **dict(grid.fields), **fields, **given, **own, **place)


def card_of(item: Item, args: Arguments) -> dict | None:
    """The finished run's result card, or None. Raises UserError for a card of other settings under the same name."""
    path = folder(args) / item.name / "result.json"
    if not path.exists():
        return None
    card, cfg = json.loads(path.read_text()), config_of(item, args)
    names = [f for f in ("arm", "labels", "seed", "steps", "p", "beta", "lambd", "copies", "backbone", "norm")]
    wrong = [f"{f} {card['config'].get(f)}, not {getattr(cfg, f)}" for f in names
             if card["config"].get(f) != getattr(cfg, f)]  # fmt: skip
    if wrong:
        raise UserError(f"{path} is of another study ({'; '.join(wrong)}): give this one its own --out")
    return card


# ---- the queue -------------------------------------------------------------------------------------------------------


def run_study(args: Arguments) -> None:
    """Run what is not done; with `plan` only say what that is. Raises UserError on more than one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study is one process after another: start it without torchrun or accelerate launch")
    console = Console(highlight=False, soft_wrap=True)
    if args.cards is not None:
        write_results(args)
        console.print(f"page {folder(args) / 'study.html'}", markup=False)
        return
    waiting = [item for item in items(args) if card_of(item, args) is None]
    total = len(items(args))
    about = GRIDS[args.grid].about
    console.print(f"{args.grid}: {about}; {total} runs, {total - len(waiting)} done, in {folder(args)}", markup=False)
    if args.plan:
        show_plan(args, console)
        return
    waiting = waiting[: args.limit or None]
    spent: list[float] = []
    written = time.perf_counter()
    for number, item in enumerate(waiting, start=1):
        start = time.perf_counter()
        execute(item, args)
        spent.append(time.perf_counter() - start)
        left = sum(spent) / len(spent) * (len(waiting) - number)
        card = card_of(item, args) or {}
        console.print(f"[{number}/{len(waiting)}] {item.name}: {card['evaluations'][0]['value']:.2f} % on test, "
                      f"{duration(spent[-1])}; {duration(left)} left", markup=False)  # fmt: skip
        if time.perf_counter() - written > 120:  # the figures take seconds, many runs no more
            write_results(args)
            written = time.perf_counter()
    write_results(args)
    console.print(f"page {folder(args) / 'study.html'}", markup=False)


def execute(item: Item, args: Arguments) -> None:
    """One run in this process, its output in NAME.log; a fresh interpreter each would cost more than a small run."""
    from .train import main  # which imports this module for its quickstart

    log = folder(args) / f"{item.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file):
            main(GRIDS[args.grid].preset, config_of(item, args))
    except UserError as error:
        raise UserError(f"run {item.name}: {error}") from error


def show_plan(args: Arguments, console: Console) -> None:
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "state", "what"):
        printed.add_column(name, overflow="fold")
    seconds = []
    for item in items(args):
        card = card_of(item, args)
        seconds += [card["wall_time_s"]] if card else []
        arm, fields = VARIANTS[item.variant]
        told = "".join(f", {k} {v:g}" for k, v in fields.items())
        printed.add_row(item.name, "done" if card else "to do", ARMS[arm].about + told)
    console.print(printed)
    if seconds:
        left = (len(items(args)) - len(seconds)) * sum(seconds) / len(seconds)
        console.print(f"about {duration(left)} of training left, measurements not counted")


def collect(args: Arguments) -> Study:
    """The finished runs' cards; of `args.cards` those that belong to the grid. Raises UserError where none does."""
    grid = GRIDS[args.grid]
    if args.cards is None:
        cards = [(i, card) for i in items(args) if (card := card_of(i, args)) is not None]
        found = {(i.variant, i.labels, i.seed): rounded(card) for i, card in cards}  # as cards.jsonl has them
    else:
        if not args.cards.is_file():
            raise UserError(f"--cards {args.cards} is not a file")
        named = {item.name: item for item in items(args)}
        lines = [json.loads(line) for line in args.cards.read_text().splitlines()]
        kept = [(named[line["run"]], line) for line in lines if line["run"] in named]
        found = {(i.variant, i.labels, i.seed): card for i, card in kept}
        if not found:
            raise UserError(f"no card of {args.cards} is of the grid {args.grid}")
    return Study(METHOD, args.grid, grid.about, grid.variants, grid.budgets, found, len(items(args)))


def write_results(args: Arguments) -> None:
    """`study.html`; for a README `study.md` and `summary.png`; and the cards of all runs in one file, `cards.jsonl`."""
    study = collect(args)
    write_whole(folder(args) / "study.html", write_page(study))
    write_whole(folder(args) / "study.md", markdown(study))
    summary(study).savefig(folder(args) / "summary.png", dpi=110)
    lines = [{"run": Item(*key).name, **card} for key, card in study.cards.items()]
    write_whole(folder(args) / "cards.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))


def main(argv: list[str] | None = None) -> None:
    run_study(tyro.cli(Arguments, args=argv, prog=f"python -m {PACKAGE}.study"))


if __name__ == "__main__":
    guarded(main)
