"""What a study is: runs of existing methods, the question they answer, a figure, and a queue that can be stopped.

A study's file names its runs and draws its figure; everything else is here. A run is one command,
`python -m methods.METHOD.train PRESET --field value ...`, in a directory of its own, seed after seed, so that a queue
that is stopped early has all runs at fewer seeds. The same command skips finished cards and continues an unfinished
run from its checkpoint.
"""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from rich.console import Console

from common.errors import UserError
from common.files import rounded, write_whole
from common.run import FREE_FIELDS
from eval.report import duration

PROTOCOLS = ("knn", "linear", "metrics", "factors", "rotation")
"""What every run is scored by, unless its study says otherwise."""
ROWS = {"knn": "knn-", "metrics": "label-free", "factors": "factor-"}
"""How the names of a protocol's rows begin, where it is not the protocol's name."""
METHODS_FOLDER = Path(__file__).parents[1] / "methods"
MOST_JOBS = 8  # at a time, unless asked for: each holds the data and a network
SMALL: dict[str, object] = {"limit": 5000, "batch_size": 128, "epochs": 10, "knn_every": 0}
"""The small size: 5,000 shapes, 390 steps, about a minute a run on one core. A run's own fields override these."""


@dataclass(frozen=True)
class Run:
    """One setting of one method; every seed of it is a run directory."""

    name: str
    method: str
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    preset: str = "quickstart"
    baselines: bool = False
    """Score raw pixels and random weights beside this run: one run is enough where all have the same network."""

    def config(self, seed: int):
        """The method's config with the fields applied. Raises UserError for a method, preset or field unknown to it."""
        if not (METHODS_FOLDER / self.method / "config.py").exists():
            raise UserError(f"run {self.name}: there is no methods/{self.method}")
        presets = importlib.import_module(f"methods.{self.method}.config").PRESETS
        if self.preset not in presets:
            raise UserError(f"run {self.name}: {self.method} has no preset {self.preset}")
        default = presets[self.preset][1]
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


@dataclass(frozen=True)
class Study:
    """A question and how it is answered. `draw(cards)` is the figure, `rows(cards)` (head, rows) of the table."""

    name: str
    title: str
    question: str
    runs: tuple[Run, ...]
    draw: Callable[["Cards"], Figure]
    rows: Callable[["Cards"], tuple[tuple[str, ...], list[tuple]]]
    answer: str
    """A few sentences, written after the runs: what the numbers say, and what they cannot say."""
    full: str
    """What would change at full size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    protocols: tuple[str, ...] = PROTOCOLS
    measure: Callable[[Path, dict], list[dict]] | None = None
    """Called with the directory and the card of each finished run (`studies/measure.py`): more rows for the card."""
    borrows: tuple[str, ...] = ()
    """Other studies whose cards this one reads too, under the name STUDY/RUN; "methods": the methods' own cards."""
    after: Callable[[Path, "Cards"], None] | None = None
    """Called with the study's folder when cards have come: what needs the runs themselves and not only their cards."""
    may_diverge: bool = False
    """A run whose loss is not finite is an answer (a card without rows, "diverged": the sentence), not a failure."""


class Cards:
    """Result cards of a study by (run, seed)."""

    def __init__(self, cards: Mapping[tuple[str, int], dict]):
        self.cards = dict(cards)

    def __len__(self) -> int:
        return len(self.cards)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.cards})

    def baselines(self, protocol: str, target: str = "label", metric: str = "") -> dict[str, float]:
        """name -> mean of the baseline over the cards that have it."""
        found: dict[str, list[float]] = {}
        for card in self.cards.values():
            for row in card["evaluations"]:
                if (row["protocol"], row["target"]) == (protocol, target) and metric in ("", row["metric"]):
                    for name, value in row.get("baselines", {}).items():
                        found.setdefault(name, []).append(value)
        return {name: fmean(values) for name, values in found.items()}

    def of(self, run: str) -> list[dict]:
        return [self.cards[run, seed] for seed in self.seeds if (run, seed) in self.cards]

    def values(self, run: str, protocol: str, target: str = "label", metric: str = "") -> list[float]:
        """The row's value of every seed that has it."""
        found = []
        for card in self.of(run):
            rows = [r for r in card["evaluations"] if (r["protocol"], r["target"]) == (protocol, target)]
            found += [r["value"] for r in rows if metric in ("", r["metric"])]
        return found

    def text(self, run: str, protocol: str, target: str = "label", metric: str = "", form: str = ".1f") -> str:
        """Mean and sample standard deviation over seeds, as a table shows them."""
        values = self.values(run, protocol, target, metric)
        if not values:
            return "not run" if not self.of(run) else "–"
        spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
        return f"{fmean(values):z{form}}{spread}"  # z: no negative zero


# ---- cards -----------------------------------------------------------------------------------------------------------


def finished_card(directory: Path) -> dict:
    """The card of a run directory. Raises UserError where there is none."""
    path = directory / "result.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run is not finished")
    return json.loads(path.read_text())


def folder(study: Study, out: Path | None) -> Path:
    return out or Path("runs") / f"study-{study.name}"


def items(study: Study, seeds: int = 0) -> list[tuple[Run, int]]:
    return [(run, seed) for seed in study.seeds[: seeds or None] for run in study.runs]


def directory_name(run: Run, seed: int) -> str:
    return f"{run.name}-seed{seed}"


def commands(study: Study, run: Run, seed: int, out: Path | None) -> list[list[str]]:
    """What follows `python -m` for one run: training with its evaluation, then what the study measures."""
    place, name = folder(study, out), directory_name(run, seed)
    train = [*run.flags(seed), "--out", str(place), "--name", name, "--eval-protocols", *study.protocols]
    if not run.baselines:
        train.append("--no-eval-baselines")
    return [train, ["studies.measure", study.name, str(place / name)]] if study.measure else [train]


def card_of(study: Study, run: Run, seed: int, out: Path | None) -> dict | None:
    """The finished run's card, or None: there is none, or it lacks what the study scores by. Raises UserError for a
    card of other settings under the same name."""
    path = folder(study, out) / directory_name(run, seed) / "result.json"
    if not path.exists():
        return None
    card = json.loads(path.read_text())
    wrong = differing(run, seed, card)
    if wrong:
        raise UserError(f"{path} is of other settings ({'; '.join(wrong[:4])}): remove it, or give another --out")
    return card if "diverged" in card or scored(study, card) else None


def scored(study: Study, card: dict) -> bool:
    """Whether the card has rows of all the study's protocols, and what the study measures besides."""
    names = [row["protocol"] for row in card["evaluations"]]
    found = (any(name.startswith(ROWS.get(protocol, protocol)) for name in names) for protocol in study.protocols)
    return all(found) and (study.measure is None or measured_by(study) in card.get("measured", []))


def measured_by(study: Study) -> str:
    """The mark in a card that the study's own measure has been there."""
    return f"studies.{study.name}"


def differing(run: Run, seed: int, card: dict) -> list[str]:
    """The card's settings that are not the run's."""
    if card["method"] != run.method:
        return [f"method {card['method']}, not {run.method}"]
    wanted, had = (settings(run.method, config) for config in (dataclasses.asdict(run.config(seed)), card["config"]))
    return [f"{name} {had[name]}, not {value}" for name, value in wanted.items() if had[name] != value]


def settings(method: str, config: Mapping[str, object]) -> dict[str, object]:
    """What decides a run's numbers, as JSON has it: the config, where a field younger than a card has its default."""
    default = importlib.import_module(f"methods.{method}.config").Config()
    known = json.loads(json.dumps({**dataclasses.asdict(default), **config}))
    return {name: value for name, value in known.items() if name not in FREE_FIELDS}


def collect(study: Study, out: Path | None) -> Cards:
    found = {(run.name, seed): card_of(study, run, seed, out) for run, seed in items(study)}
    return Cards({key: card for key, card in found.items() if card is not None})


def read_cards(path: Path) -> Cards:
    """Cards of a committed `cards.jsonl`. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the study first")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return Cards({(line["run"], line["seed"]): line for line in lines})


def write_cards(path: Path, cards: Cards) -> None:
    """One line a card, without what all rows say alike: a row's settings and sentence are those of `python -m eval`."""
    lines = []
    for (run, seed), card in sorted(cards.cards.items()):
        rows = [{k: v for k, v in row.items() if k not in ("settings", "text", "baselines") or k == "baselines" and v}
                for row in card["evaluations"]]  # fmt: skip
        lines.append({"run": run, **card, "seed": seed, "evaluations": rows})
    write_whole(path, "".join(f"{json.dumps(rounded(line))}\n" for line in lines))


# ---- the queue -------------------------------------------------------------------------------------------------------


class Queue:
    """Runs what is not done, `jobs` at a time, each with its share of the cores.

    SIGTERM and Ctrl-C reach the runs, which save a checkpoint; the next queue continues them.
    """

    def __init__(self, study: Study, out: Path | None, console: Console, jobs: int = 0):
        self.study, self.out, self.console = study, out, console
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = max(1, min(jobs or MOST_JOBS, cores))
        share = {"OMP_NUM_THREADS": str(cores // self.jobs), "OMP_WAIT_POLICY": "PASSIVE"}
        self.environment = {**os.environ, **share}
        self.lock, self.running, self.stopped = threading.Lock(), set(), False
        self.error: Exception | None = None
        self.done, self.total = 0, 0

    def run(self, *, seeds: int = 0, limit: int = 0) -> None:
        """Raises UserError where a run fails; no other is begun then."""
        every = items(self.study, seeds)
        waiting = [item for item in every if card_of(self.study, *item, self.out) is None]
        place = folder(self.study, self.out)
        self.console.print(f"{self.study.name}: {len(every)} runs, {len(every) - len(waiting)} done, in {place}",
                           markup=False)  # fmt: skip
        waiting = waiting[: limit or None]
        self.done, self.total, self.start = 0, len(waiting), time.perf_counter()
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self._work, waiting))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopped:
            self.console.print("stopped by a signal; the same command continues")
            raise SystemExit(0)
        if self.error:
            raise self.error

    def _stop(self, *_) -> None:
        self.stopped = True
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
            self.console.print(f"[{self.done}/{self.total}] {name}: {duration(now - began)}; {duration(left)} left",
                               markup=False)  # fmt: skip

    def _execute(self, run: Run, seed: int) -> None:
        """Train, evaluate and measure one run, its output in NAME.log."""
        place, name = folder(self.study, self.out), directory_name(run, seed)
        place.mkdir(parents=True, exist_ok=True)
        for words in commands(self.study, run, seed, self.out):
            code = self._call(words, place / f"{name}.log")
            if self.stopped:
                return
            if code:
                last = ((place / f"{name}.log").read_text().splitlines() or ["no output"])[-1]
                if self.study.may_diverge and code == 2 and "the loss is " in last:
                    self._write_diverged(run, seed, last.removeprefix("error: ").split(";")[0])
                    return
                raise UserError(f"{name} stopped with status {code}: {last} (all: {place / f'{name}.log'})")
        if card_of(self.study, run, seed, self.out) is None:
            wanted = ", ".join(self.study.protocols)
            raise UserError(f"{name} ended without a card that has all of {wanted}: see {place / f'{name}.log'}")

    def _call(self, words: list[str], log: Path) -> int:
        with log.open("a") as file:
            process = subprocess.Popen([sys.executable, "-m", *words], stdout=file, stderr=subprocess.STDOUT,
                                       env=self.environment, start_new_session=True)  # fmt: skip
            self.running.add(process)
            if self.stopped:  # the signal came while the process was made
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def _write_diverged(self, run: Run, seed: int, sentence: str) -> None:
        config = json.loads(json.dumps(dataclasses.asdict(run.config(seed))))
        card = {"format": 1, "method": run.method, "preset": run.preset, "seed": seed, "config": config,
                "evaluations": [], "diverged": sentence}  # fmt: skip
        path = folder(self.study, self.out) / directory_name(run, seed) / "result.json"
        write_whole(path, json.dumps(card, indent=1) + "\n")
