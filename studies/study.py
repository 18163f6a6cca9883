"""What a study is: runs of existing methods, the question they answer, a figure, and a queue that can be stopped.

A study's file names its runs and draws its figure; everything else is here. A run is one command,
`python -m methods.METHOD.train PRESET --field value ...`, in a directory of its own, seed after seed, so that a queue
that is stopped early has all runs at fewer seeds. The same command skips finished cards and continues an unfinished
run from its checkpoint. Nothing outlives a queue, and two of them never share a folder.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from common.config import RESUMABLE_FIELDS
from common.errors import UserError
from common.files import rounded, write_atomic
from common.html import duration
from common.sources import GENERATED
from eval.card import FILE
from methods import preset_of

from .cards import Cards

PROTOCOLS = ("knn", "linear", "metrics", "factors", "rotation")
"""What every run is scored by, unless its study has its own list."""
ROWS = {"knn": "knn-", "metrics": "label-free", "factors": "factor-"}
"""How the names of a protocol's rows begin, where it is not the protocol's name."""
MOST_JOBS = 8  # at a time, unless asked for: each holds the data and a network
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# On Linux a run ends with its queue, even if that is killed by SIGKILL: the kernel then sends the run SIGTERM (option 1
# of prctl, PR_SET_PDEATHSIG, lasts through exec).
END_WITH_QUEUE = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
if os.getppid() != int(sys.argv[1]):
    sys.exit("the queue has ended")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""
SMALL: dict[str, object] = {"limit": 5000, "batch_size": 128, "epochs": 10, "knn_every": 0}
"""The small size: 5,000 shapes, 390 steps, about a minute a run on one core. A run's own fields override these."""


@dataclass(frozen=True)
class Run:
    """One setting of one method; every seed of it is a run directory."""

    name: str
    method: str
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    preset: str = "shapes"
    baselines: bool = False
    """Score raw pixels and random weights beside this run: one run is enough where all have the same network."""

    def config(self, seed: int):
        """The method's config with the fields applied. Raises UserError for a method, preset or field unknown to it."""
        try:
            default = preset_of(self.method, self.preset)
        except UserError as error:
            raise UserError(f"run {self.name}: {error}") from None
        unknown = [name for name in self.fields if not hasattr(default, name)]
        if unknown:
            raise UserError(f"{self.method} has no field {', '.join(unknown)}")
        return dataclasses.replace(default, **self.fields, seed=seed)

    def flags(self, seed: int) -> list[str]:
        """What follows `python -m`: module, preset, and the fields that differ from the preset's."""
        words = [f"methods.{self.method}.train", self.preset, "--seed", str(seed)]
        for name, value in self.fields.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


class Table(NamedTuple):
    head: tuple[str, ...]
    rows: Sequence[tuple]
    title: str = ""
    """A line above the table, in markdown."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a `Queue` works off: runs, their seeds, and what each is scored by."""

    name: str
    runs: tuple[Run, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    protocols: tuple[str, ...] = PROTOCOLS
    """What every run is scored by; none: the method's own evaluation."""
    measure: Callable[[Path, dict], list[dict]] | None = None
    """Called with the directory and the card of each finished run (`studies/measure.py`): more rows for the card."""
    may_diverge: bool = False
    """A run whose loss is not finite is an answer (a card without rows, "diverged": the sentence), not a failure."""


@dataclass(frozen=True, kw_only=True)
class Study(Runs):
    """A question and how it is answered. The answer itself, written after the runs, is in studies/NAME.md."""

    title: str
    question: str
    draw: Callable[[Cards], Figure]
    tables: Callable[[Cards], Sequence[Table]]
    report: Callable[[Cards], str] | None = None
    """An HTML page of the study's own, report.html beside the figure."""
    borrows: tuple[str, ...] = ()
    """Other studies whose cards this one reads too, under the name STUDY/RUN; "methods": the methods' own cards."""
    after: Callable[[Path, Cards], None] | None = None
    """Called with the study's folder when cards have come: what needs the runs themselves and not only their cards."""
    abridge: Callable[[dict], dict] | None = None
    """What of a card goes into `studies/results`, if not all of it."""


def with_data(study: Study, data: str, name: str) -> Study:
    """The study on the same data from another source, e.g. a folder of parquet files; `name`: its name in the cards.

    Raises UserError where the study's data are drawn by the code.
    """
    if not study.runs or any(run.config(0).data in GENERATED for run in study.runs):
        raise UserError(f"{study.name} generates its data: it takes no --data")
    source = {"data": data, "data_name": name}
    return dataclasses.replace(
        study, runs=tuple(dataclasses.replace(run, fields={**run.fields, **source}) for run in study.runs)
    )


# ---- cards -----------------------------------------------------------------------------------------------------------


def folder(study: Runs, out: Path | None) -> Path:
    return out or Path("runs") / f"study-{study.name}"


def items(study: Runs, seeds: int = 0) -> list[tuple[Run, int]]:
    return [(run, seed) for seed in study.seeds[: seeds or None] for run in study.runs]


def directory_name(run: Run, seed: int) -> str:
    return f"{run.name}-seed{seed}"


def commands(study: Runs, run: Run, seed: int, out: Path | None) -> list[list[str]]:
    """What follows `python -m` for one run: training with its evaluation, then what the study measures."""
    place, name = folder(study, out), directory_name(run, seed)
    train = [*run.flags(seed), "--out", str(place), "--name", name]
    if study.protocols:
        train += ["--eval-protocols", *study.protocols, *([] if run.baselines else ["--no-eval-baselines"])]
    return [train, ["studies.measure", study.name, str(place / name)]] if study.measure else [train]


def card_of(study: Runs, run: Run, seed: int, out: Path | None) -> dict | None:
    """The finished run's card, or None: there is none, or it lacks what the study scores by. Raises UserError for a
    card of other settings under the same name."""
    path = folder(study, out) / directory_name(run, seed) / FILE
    if not path.exists():
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    wrong = differing(run, seed, card)
    if wrong:
        raise UserError(f"{path} has other settings ({'; '.join(wrong[:4])}): remove it, or give another --out")
    return card if "diverged" in card or scored(study, card) else None


def scored(study: Runs, card: dict) -> bool:
    """Whether the card has rows of all the study's protocols, and what the study measures besides."""
    names = [row["protocol"] for row in card["evaluations"]]
    found = (any(name.startswith(ROWS.get(protocol, protocol)) for name in names) for protocol in study.protocols)
    return all(found) and (study.measure is None or measured_by(study) in card.get("measured", []))


def measured_by(study: Runs) -> str:
    """The mark in a card that the study's own measure has been there."""
    return f"studies.{study.name}"


def differing(run: Run, seed: int, card: dict) -> list[str]:
    """The card's settings that are not the run's."""
    if card["method"] != run.method:
        return [f"method {card['method']}, not {run.method}"]
    wanted, had = (settings(run.method, config) for config in (dataclasses.asdict(run.config(seed)), card["config"]))
    if wanted["data"] not in GENERATED:  # may come from any source, under any name
        had["data"] = wanted["data"]
    return [f"{name} {had[name]}, not {value}" for name, value in wanted.items() if had[name] != value]


def settings(method: str, config: Mapping[str, object]) -> dict[str, object]:
    """What decides a run's numbers, as JSON has it: the config, where a field that a card lacks has its default."""
    default = dataclasses.asdict(importlib.import_module(f"methods.{method}.config").Config())
    known = json.loads(json.dumps({**default, **config}))
    return {name: value for name, value in known.items() if name not in RESUMABLE_FIELDS}


def collect(study: Runs, out: Path | None) -> Cards:
    """The finished runs' cards, with the digits that a committed card has."""
    found = {(run.name, seed): card_of(study, run, seed, out) for run, seed in items(study)}
    return Cards({key: rounded(card) for key, card in found.items() if card is not None})


# ---- the queue -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(place: Path) -> Iterator[int | None]:
    """Hold `place`/queue.lock and yield its descriptor. Processes that inherit it hold the lock too, so it lasts as
    long as the queue or any of its runs. Raises UserError where another queue holds it."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / "queue.lock"
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is locked
        yield None
        return
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8").strip()
            raise UserError(
                f"{place} is in use by process {holder}, another queue, or by runs that it has left: "
                "wait for them, or stop them"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


class Queue:
    """Runs what is not done, `jobs` at a time, each with its share of the cores.

    SIGTERM, SIGHUP and Ctrl-C end the runs, which save a checkpoint first; the next queue continues them.
    """

    def __init__(self, study: Runs, out: Path | None, console: Console, jobs: int = 0):
        self.study, self.out, self.console = study, out, console
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = max(1, min(jobs or MOST_JOBS, cores))
        share = {"OMP_NUM_THREADS": str(cores // self.jobs), "OMP_WAIT_POLICY": "PASSIVE"}
        self.environment = {**os.environ, **share}
        self.lock, self.running, self.stopped = threading.Lock(), set(), 0
        self.error: Exception | None = None
        self.done, self.total = 0, 0

    def run(self, *, seeds: int = 0, limit: int = 0) -> None:
        """Raises UserError where a run fails (no other is begun then), or where another queue is at work in the same
        folder; SystemExit with 128 plus its number after a signal."""
        with locked(folder(self.study, self.out)) as self.lock_file:
            self._run(seeds, limit)

    def _run(self, seeds: int, limit: int) -> None:
        every = items(self.study, seeds)
        waiting = [item for item in every if card_of(self.study, *item, self.out) is None]
        place = folder(self.study, self.out)
        self.console.print(
            f"{self.study.name}: {len(every)} runs, {len(every) - len(waiting)} done, in {place}", markup=False
        )
        waiting = waiting[: limit or None]
        self.done, self.total, self.start = 0, len(waiting), time.perf_counter()
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as nohup ignores one
        previous = {number: signal.signal(number, self._stop) for number in heard}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self._work, waiting))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopped:
            self.console.print("stopped by a signal; the same command continues")
            raise SystemExit(128 + self.stopped)
        if self.error:
            raise self.error

    def _stop(self, number: int, *_) -> None:
        self.stopped = number
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)

    def _work(self, item: tuple[Run, int]) -> None:
        if self.stopped or self.error:
            return
        began, name = time.perf_counter(), directory_name(*item)
        try:
            self._execute(*item)
        except Exception as error:  # no run is begun after it, and it is raised when the others have ended
            self.error = self.error or error
            return
        if self.stopped:
            return
        with self.lock:
            self.done += 1
            now = time.perf_counter()
            left = (now - self.start) / self.done * (self.total - self.done)
            self.console.print(
                f"[{self.done}/{self.total}] {name}: {duration(now - began)}; {duration(left)} left", markup=False
            )

    def _execute(self, run: Run, seed: int) -> None:
        """Train, evaluate and measure one run, its output in NAME.log."""
        place, name = folder(self.study, self.out), directory_name(run, seed)
        place.mkdir(parents=True, exist_ok=True)
        for words in commands(self.study, run, seed, self.out):
            code = self._call(words, place / f"{name}.log")
            if self.stopped:
                return
            if code:
                last = ((place / f"{name}.log").read_text(encoding="utf-8").splitlines() or ["no output"])[-1]
                if self.study.may_diverge and code == 2 and "the loss is " in last:
                    self._write_diverged(run, seed, last.removeprefix("error: ").split(";")[0])
                    return
                raise UserError(f"{name} stopped with status {code}: {last} (all: {place / f'{name}.log'})")
        if card_of(self.study, run, seed, self.out) is None:
            wanted = ", ".join(self.study.protocols)
            raise UserError(f"{name} ended without a card that has all of {wanted}: see {place / f'{name}.log'}")

    def _call(self, words: list[str], log: Path) -> int:
        start = ["-c", END_WITH_QUEUE, str(os.getpid())] if sys.platform == "linux" else ["-m"]
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *start, *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                **({} if self.lock_file is None else {"pass_fds": (self.lock_file,)}),
            )
            self.running.add(process)
            if self.stopped:  # the signal came while the process was made
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def _write_diverged(self, run: Run, seed: int, sentence: str) -> None:
        config = json.loads(json.dumps(dataclasses.asdict(run.config(seed))))
        card = {
            "format": 1,
            "method": run.method,
            "preset": run.preset,
            "seed": seed,
            "config": config,
            "evaluations": [],
            "diverged": sentence,
        }
        path = folder(self.study, self.out) / directory_name(run, seed) / FILE
        write_atomic(path, json.dumps(card, indent=1) + "\n")
