"""Tables of all result cards: `python -m eval.compare [PATHS...]`.

Published SSL numbers share their names but not their protocols, so numbers are compared only where data, protocol with
its settings, and budget (backbone, epochs, images seen) agree. Each data set is a table: a row per configuration, a
column per protocol, a block of rows per budget, the baselines below. Data or settings that differ in any other way
go to a separate table; with `--one-table` they are refused and the fields are named. Runs of one configuration that
differ only in the seed become one row: mean and sample standard deviation.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from common.cli import run_cli
from common.errors import UserError
from common.files import write_atomic
from common.html import bar_chart, is_percent, number, page
from eval.card import Card, Row, higher_is_better, load_cards, published_for, row_key, trained_elsewhere

DEFAULT = ("methods/*/results/*.json", "runs/*/result.json")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DATA_FIELDS = ("data", "data fingerprint", "image size", "train images", "test images", "label")
BUDGET_FIELDS = ("backbone", "epochs", "images seen", "trained on")
MOST_COLUMNS = 6  # protocols in a table
ELSEWHERE = "weights from elsewhere"


Measure = tuple[str, str, str]
"""Protocol, target and metric: what a column is of."""


@dataclass(frozen=True)
class Result:
    """One evaluation row of one card."""

    path: Path
    card: Card = field(repr=False)
    row: Row = field(repr=False)


def measure_of(result: Result) -> Measure:
    return row_key(result.row)


@dataclass
class Line:
    """One row of a table: the seeds of one configuration, by all protocols."""

    results: list[Result]
    variant: str = ""

    @property
    def card(self) -> Card:
        return self.results[0].card

    @property
    def cards(self) -> list[Card]:
        """Each card once."""
        return list({_canonical(r.card): r.card for r in self.results}.values())

    @property
    def name(self) -> str:
        return f"{self.card['preset']} ({self.variant})" if self.variant else self.card["preset"]

    def by(self, measure: Measure) -> list[Result]:
        return [r for r in self.results if measure_of(r) == measure]

    def mean(self, measure: Measure) -> float:
        """NaN where no seed has it."""
        values = [_float(r.row["value"]) for r in self.by(measure)]
        return fmean(values) if values else math.nan

    def std(self, measure: Measure) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        values = [_float(r.row["value"]) for r in self.by(measure)]
        return stdev(values) if len(values) > 1 and math.isfinite(fmean(values)) else None


# ---- cards -----------------------------------------------------------------------------------------------------------


def find_cards(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The card files that `paths` name: a file, a run directory, or a directory of cards or runs; none: the defaults.

    Raises UserError for a path that does not exist or holds no card.
    """
    if not paths:
        found = sorted(Path(p) for pattern in DEFAULT for p in glob(pattern))
        if not found:
            raise UserError(
                f"no result card found in {' or '.join(DEFAULT)}: run a method first, or name files or run directories"
            )
        return found
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            own = path / "result.json"
            cards = [own] if own.exists() else sorted([*path.glob("*/result.json"), *path.glob("*.json")])
            if not cards:
                raise UserError(f"{path} holds no result card: it has no result.json, no */result.json and no *.json")
            found += cards
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: name a result card, a run directory or a directory of them")
    return list(dict.fromkeys(found))


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _canonical(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---- comparability ---------------------------------------------------------------------------------------------------


def signature(result: Result) -> dict[str, str]:
    """Everything that must agree before two values may share a table, as field -> canonical text.

    Dropping the last incomplete batch of an epoch does not change the budget: images seen that differ from epochs x
    training images by less than one batch per epoch count as equal to it.
    """
    card, row, data = result.card, result.row, result.card["data"]
    fields = {
        "data": data["name"],
        "data fingerprint": data["fingerprint"],
        "image size": data["image_size"],
        "train images": data["train_images"],
        "test images": data["test_images"],
        "label": data["label_name"],
        **({"judged on": data["judged_on"]} if "judged_on" in data else {}),
        "protocol": row["protocol"],
        "target": row["target"],
        "metric": row["metric"],
        **{f"settings.{key}": value for key, value in row["settings"].items()},
        "backbone": card["backbone"],
    }
    if trained_elsewhere(card):  # one block of them all: neither budgets nor networks are compared
        fields |= {"backbone": "any", "epochs": "not known", "images seen": "not known", "trained on": "not known"}
    else:
        seen = "all of each epoch but an incomplete batch" if _sees_all(card) else card["images_seen"]
        trained_on = card.get("trained_on") or {"name": "the same data"}
        fields |= {"epochs": f"{card['epochs']:g}", "images seen": seen, "trained on": trained_on}
    return {key: _canonical(value) for key, value in fields.items()}


def _sees_all(card: Card) -> bool:
    whole = card["epochs"] * (card.get("trained_on") or card["data"])["train_images"]
    return whole - card["epochs"] * card["batch_size"] < card["images_seen"] <= whole + 0.5  # epochs may be rounded


def differences(results: Sequence[Result]) -> dict[str, dict[str, list[Path]]]:
    """The fields in which results must agree and do not: field -> value -> the files that have it."""
    signatures = [signature(r) for r in results]
    found: dict[str, dict[str, list[Path]]] = {}
    for name in dict.fromkeys(key for s in signatures for key in s):
        values: dict[str, list[Path]] = {}
        for result, s in zip(results, signatures, strict=True):
            files = values.setdefault(s.get(name, "not set"), [])
            if result.path not in files:
                files.append(result.path)
        if len(values) > 1:
            found[name] = values
    return found


def select(cards: Sequence[tuple[Path, Card]], metric: Sequence[str] = (), target: str = "label") -> list[Result]:
    """The evaluation rows to show: of the named protocols, otherwise all accuracies, on `target` ("all": every target).

    "label" also matches a target with the name of the card's labels. A metric may be a protocol's id, or "id/metric"
    for one of several values, or "all". Raises UserError that lists the existing rows if none matches.
    """
    found = []
    for path, card in cards:
        for row in card["evaluations"]:
            names = {row["protocol"], f"{row['protocol']}/{row['metric']}", "all"}
            aims = {row["target"], "all"}
            if row["target"] == card["data"]["label_name"] or row["protocol"] == "label-free":
                aims.add("label")  # label-free measures have no target to choose
            if not metric and (not higher_is_better(row["metric"]) or row["protocol"] == "factor-linear"):
                continue
            if target in aims and (not metric or names & set(metric)):
                found.append(Result(path, card, row))
    if not found:
        there = sorted({f"{r['protocol']} (target {r['target']})" for _, card in cards for r in card["evaluations"]})
        raise UserError(
            f"no result with metric {' or '.join(metric) or 'top-1'} and target {target}; the cards have "
            f"{', '.join(there) or 'no evaluations at all'}"
        )
    if metric and "all" not in metric:
        for name in metric:
            if not any(name in (r.row["protocol"], f"{r.row['protocol']}/{r.row['metric']}") for r in found):
                raise UserError(
                    f"no card has the protocol {name}; there are "
                    + ", ".join(sorted({row["protocol"] for _, c in cards for row in c["evaluations"]}))
                )
    return found


def comparable(results: Sequence[Result]) -> list[list[Result]]:
    """Results in comparable groups, ordered by data, target, protocol, backbone and epochs."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(sorted(signature(result).items())), []).append(result)

    def order(group: list[Result]) -> tuple:
        card, row = group[0].card, group[0].row
        return (
            card["data"]["name"],
            row["target"] != "label",
            trained_elsewhere(card),
            _canonical(card["backbone"]),
            card.get("epochs", 0),
            row["protocol"],
            row["metric"],
            str(row["target"]),
            str(group[0].path),
        )

    return sorted(groups.values(), key=order)


def one_table(results: Sequence[Result]) -> list[list[Result]]:
    """All results as one group, or a UserError that names what differs: field, values, files."""
    apart = differences(results)
    if apart:
        lines = []
        for name, values in apart.items():
            lines.append(f"{name}:")
            lines += [f"  {value}  in {', '.join(map(str, files))}" for value, files in values.items()]
        hint = " Choose one protocol with --metric." if {"protocol", "metric"} & apart.keys() else ""
        raise UserError(
            f"these results are not comparable, so they cannot share one table.{hint} They differ in\n  "
            + "\n  ".join(lines)
        )
    return [list(results)]


def aggregate(results: Sequence[Result]) -> list[Line]:
    """The rows of one budget: seeds of the same method, preset and configuration together, best mean first.

    A copy of a card is counted once. Where a configuration has two different results of one seed, they are not seeds of
    one experiment: its rows are split by commit, and if necessary by file, with a note.
    """
    buckets: dict[tuple[str, str], dict[str, dict[str, Result]]] = {}
    for result in results:
        config = {k: v for k, v in result.card["config"].items() if k != "seed"}
        kinds = buckets.setdefault((result.card["method"], result.card["preset"]), {})
        same = kinds.setdefault(_canonical(config), {})
        same.setdefault(_canonical(result.card) + _canonical(result.row), result)
    lines = []
    for kinds in buckets.values():
        configs = [json.loads(text) for text in kinds]
        changed = [
            k
            for k in dict.fromkeys(k for c in configs for k in c)
            if len({_canonical(c.get(k, "not set")) for c in configs}) > 1
        ]
        for config, same in zip(configs, kinds.values(), strict=True):
            variant = ", ".join(f"{k}={_canonical(config.get(k, 'not set'))}" for k in changed)
            lines += _split(list(same.values()), variant)
    first = measure_of(results[0])

    def order(line: Line) -> tuple:
        mean = line.mean(first)
        score = (-mean if math.isfinite(mean) else math.inf) if higher_is_better(first[2]) else 0.0
        return (score, line.card["method"], line.name)

    return sorted(lines, key=order)


def _split(results: list[Result], variant: str) -> list[Line]:
    """The rows of one configuration: one if every seed occurs once, otherwise one a commit, otherwise one a file."""
    for key in (lambda r: "", lambda r: f"commit {r.card['git_commit']}", lambda r: r.path.as_posix()):
        parts: dict[str, list[Result]] = {}
        for result in results:
            parts.setdefault(key(result), []).append(result)
        lines = [Line(part, ", ".join(filter(None, (variant, name)))) for name, part in parts.items()]
        if all(len({card["seed"] for card in line.cards}) == len(line.cards) for line in lines):
            break
    return lines


# ---- output ----------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A row of a table: its cells, and which of them are the best of their block."""

    cells: list[str]
    best: set[int] = field(default_factory=set)


@dataclass
class Block:
    """Rows that may be compared, under their budget."""

    title: str
    entries: list[Entry]
    lines: list[Line] = field(repr=False)
    """What the first entries show; baselines follow."""


@dataclass
class Table:
    """A finished table of one data set: texts only, ready for Markdown and HTML."""

    title: str
    head: list[str]
    blocks: list[Block]
    baselines: list[Entry]
    notes: list[str]
    measures: dict[Measure, str] = field(repr=False)
    """Each measure and the head of its column."""

    @property
    def rows(self) -> list[list[str]]:
        """The rows of runs, block after block."""
        return [entry.cells for block in self.blocks for entry in block.entries[: len(block.lines)]]


def build(groups: Sequence[Sequence[Result]]) -> list[Table]:
    """The tables of comparable groups: one for each data set, and more where a protocol has several settings or there
    are more protocols than fit a page."""
    made: list[list[Sequence[Result]]] = []
    for group in groups:
        for parts in made:
            measures = {measure_of(part[0]) for part in (*parts, group)}
            if len(measures) <= MOST_COLUMNS and all(_share_a_table(group[0], part[0]) for part in parts):
                parts.append(group)
                break
        else:
            made.append([group])
    return [_table(parts, made[:i]) for i, parts in enumerate(made)]


def _share_a_table(result: Result, other: Result) -> bool:
    apart = differences([result, other]).keys()
    same_measure = measure_of(result) == measure_of(other)
    return not apart & set(DATA_FIELDS) and (not same_measure or apart <= set(BUDGET_FIELDS))


def _table(parts: Sequence[Sequence[Result]], earlier: Sequence[Sequence[Sequence[Result]]]) -> Table:
    results = [result for part in parts for result in part]
    measures = _heads(results)
    networks = _short_names(_canonical(r.card["backbone"]) for r in results)
    budgets: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        budgets.setdefault(tuple(signature(result)[name] for name in BUDGET_FIELDS), []).append(result)
    notes = Notes()
    anchored = {m for m in measures if any(published_for(r.row, r.card) for r in results if measure_of(r) == m)}
    by_budget = [(block, aggregate(block)) for block in budgets.values()]
    devices = {_devices(line.cards) for _, lines in by_budget for line in lines if not trained_elsewhere(line.card)}
    presets = {line.name for _, lines in by_budget for line in lines}
    data = results[0].card["data"]
    speed = "images/s" if data["image_size"] else "samples/s"  # of a recording
    columns: dict[Measure, int] = {}
    head = ["method", "preset"] if len(presets) > 1 else ["method"]
    for measure, name in measures.items():
        columns[measure] = len(head)
        head += [name, "published"] if measure in anchored else [name]
    blocks = []
    for block, lines in by_budget:
        entries = []
        for line in lines:
            cells = [line.card["method"], line.name] if len(presets) > 1 else [line.card["method"]]
            for measure in measures:
                cells.append(_value(line, measure))
                if measure in anchored:
                    cells.append(_published(line, measure, notes))
            rate = ""
            if not trained_elsewhere(line.card):
                rate = f"{fmean(card['images_per_second'] for card in line.cards):.0f}"
                rate += notes.mark(f"{speed} on {_devices(line.cards)}") if len(devices) > 1 else ""
            entries.append(Entry([*cells, str(len(line.cards)), rate]))
        for measure, column in columns.items():
            _mark_best(entries, lines, measure, column)
        if len(networks) > 1:
            entries += _baselines(block, columns, len(head))
        blocks.append(Block(_budget(block[0], networks), entries, lines))
    size = f", {data['image_size']} px" if data["image_size"] else ""
    title = [
        f"{data['name']}{size}",
        *(presets - {""} if len(presets) == 1 else ()),
        *(b.title for b in blocks if len(blocks) == 1),
    ]
    below = [
        f"{name}: {next(r.row['text'] for r in results if measure_of(r) == m)}"
        for m, name in measures.items()
        if m[2] != "top-5" or (*m[:2], "top-1") not in measures  # whose text is the same
    ]
    named = [f"{short}: {full}" if len(networks) > 1 else full for full, short in networks.items()]
    below.append(f"Network{'s' if len(named) > 1 else ''}: {'; '.join(named)}.")
    if len(devices) == 1:
        below[-1] += f" {speed.capitalize()} on {devices.pop()}."
    if len(blocks) > 1:
        below.append("Rows under one heading have the same budget; only they are compared.")
    if any(trained_elsewhere(r.card) for r in results):
        below.append(f"{ELSEWHERE.capitalize()}: their budgets, networks and images are not the same, and not known.")
    return Table(
        title=", ".join(title) + _what(results, measures),
        head=[*head, "seeds", speed],
        blocks=blocks,
        baselines=_baselines(results, columns, len(head)) if len(networks) == 1 else [],
        notes=[*below, *notes.texts, *_not_mixed(parts, earlier)],
        measures=measures,
    )


class Notes:
    """Numbered notes below a table."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def mark(self, text: str) -> str:
        """The mark of a new or existing note."""
        if text not in self.found:
            self.found.append(text)
        return f" [{self.found.index(text) + 1}]"

    @property
    def texts(self) -> list[str]:
        return [f"[{i}] {text}" for i, text in enumerate(self.found, start=1)]


def _heads(results: Sequence[Result]) -> dict[Measure, str]:
    """Each measure and the head of its column: the protocol's name, with a target or metric that is not the usual."""
    heads: dict[Measure, str] = {}
    for result in results:
        protocol, target, metric = measure = measure_of(result)
        words = [
            protocol,
            *([] if target in ("label", "features") else [target]),
            *([] if metric == "top-1" else [metric]),
        ]
        heads[measure] = " ".join(words)
    first = {measure[:2]: place for place, measure in reversed(list(enumerate(heads)))}
    return {measure: heads[measure] for measure in sorted(heads, key=lambda m: first[m[:2]])}  # top-5 beside top-1


def _what(results: Sequence[Result], measures: Iterable[Measure]) -> str:
    """The part of a title that names what most columns are of."""
    label = results[0].card["data"]["label_name"]
    if not any(metric == "top-1" and target in ("label", label) for _, target, metric in measures):
        return ""
    return f": top-1 on {label} (%)"


def _short_names(backbones: Iterable[str]) -> dict[str, str]:
    """Each backbone's description and its first word, numbered where two have the same."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(backbones):
        short = text.split(",")[0]
        count = sum(name.split(" (")[0] == short for name in found.values())
        found[text] = f"{short} ({count + 1})" if count else short
    return found


def _budget(result: Result, networks: Mapping[str, str]) -> str:
    card = result.card
    if trained_elsewhere(card):
        return ELSEWHERE
    words = [f"{card['epochs']:g} epochs" + (f" on {card['trained_on']['name']}" if "trained_on" in card else "")]
    if not _sees_all(card):
        words.append(f"{card['images_seen']:,} images seen")
    if len(networks) > 1:
        words.append(networks[_canonical(card["backbone"])])
    return ", ".join(words)


def _devices(cards: Iterable[Card]) -> str:
    return " / ".join(dict.fromkeys(str(card["device"]) for card in cards))


def _value(line: Line, measure: Measure) -> str:
    found, std = line.by(measure), line.std(measure)
    if not found:
        return "–"
    text = number(line.mean(measure), measure[2]) + (f" ± {number(std, measure[2])}" if std is not None else "")
    return text if len(found) == len(line.cards) else f"{text} (of {len(found)})"


def _published(line: Line, measure: Measure, notes: Notes) -> str:
    shown = []
    entries = {_canonical(p): p for r in line.by(measure) for p in published_for(r.row, r.card)}
    for entry in entries.values():
        mark = notes.mark(str(entry["source"]) + (f"; {entry['note']}" if entry.get("note") else ""))
        gap = line.mean(measure) - _float(entry["value"])
        delta = f", ours {gap:+.2f}" if math.isfinite(gap) else ""
        shown.append(f"{number(entry['value'], measure[2])}{mark}{delta}")
    return "; ".join(shown) or "–"


def _mark_best(entries: Sequence[Entry], lines: Sequence[Line], measure: Measure, column: int) -> None:
    """Of several rows with a value, those that print the best mean; where no direction is better, none."""
    means = {i: m for i, line in enumerate(lines) if math.isfinite(m := line.mean(measure))}
    if len(means) > 1 and higher_is_better(measure[2]):
        top = number(max(means.values()), measure[2])
        for i, mean in means.items():
            if number(mean, measure[2]) == top:
                entries[i].best.add(column)


def _baselines(results: Sequence[Result], columns: Mapping[Measure, int], width: int) -> list[Entry]:
    """A row for each baseline: its value, or the range of its values where runs drew other random weights."""
    entries = []
    for baseline in dict.fromkeys(name for r in results for name in r.row["baselines"]):
        cells = [baseline, *[""] * (width - 1)]
        for measure, column in columns.items():
            found = [_float(r.row["baselines"].get(baseline)) for r in results if measure_of(r) == measure]
            found = [v for v in found if math.isfinite(v)]
            ends = dict.fromkeys(number(v, measure[2]) for v in (min(found), max(found))) if found else ["–"]
            cells[column] = " to ".join(ends)
        entries.append(Entry([*cells, "", ""]))
    return entries


def _not_mixed(parts: Sequence[Sequence[Result]], earlier: Sequence[Sequence[Sequence[Result]]]) -> list[str]:
    """For tables before this one with the same protocol on data of the same name: what keeps the two apart."""
    notes = []
    for i, others in enumerate(earlier, start=1):
        pairs = [
            (other[0], part[0])
            for part in parts
            for other in others
            if measure_of(other[0]) == measure_of(part[0])
            and other[0].card["data"]["name"] == part[0].card["data"]["name"]
        ]
        if pairs:
            apart = differences(pairs[0])
            values = (f"{name} {' against '.join(reversed(list(values)))}" for name, values in apart.items())
            notes.append(f"Not mixed with table {i}: {'; '.join(values)}")
    return notes


def unmatched_published(cards: Sequence[tuple[Path, Card]], groups: Sequence[Sequence[Result]]) -> list[str]:
    """Published numbers that are next to no result, of another protocol or another run: listed, with the reason."""
    shown = {(r.path, _canonical(p)) for group in groups for r in group for p in published_for(r.row, r.card)}
    return list(
        dict.fromkeys(
            f"{card['method']} {card['preset']}: {p['value']} by protocol {p['protocol']} ({p['source']})"
            + (f"; this run: {p['not_compared']}" if p.get("not_compared") else "")
            for path, card in cards
            for p in card.get("published") or []
            if (path, _canonical(p)) not in shown
        )
    )


def markdown(made: Sequence[Table], left: Sequence[str]) -> str:
    """The tables as Markdown; card text is escaped, so that it can neither break a row nor become HTML."""
    parts = []
    for i, t in enumerate(made, start=1):
        rows = [[_md(name) for name in t.head]]
        for block in t.blocks:
            if len(t.blocks) > 1:
                rows.append([f"**{_md(block.title)}**", *[""] * (len(t.head) - 1)])
            for entry in block.entries:
                rows.append([f"**{_md(c)}**" if k in entry.best else _md(c) for k, c in enumerate(entry.cells)])
        if len(t.blocks) > 1 and t.baselines:
            rows.append(["**baselines**", *[""] * (len(t.head) - 1)])
        rows += [[_md(cell) for cell in entry.cells] for entry in t.baselines]
        widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(t.head))]
        numeric = [name not in ("method", "preset", "published") for name in t.head]
        lines = [
            "| "
            + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
            + " |"
            for row in rows
        ]
        rule = ["-" * (w + 1) + ":" if n else "-" * (w + 2) for w, n in zip(widths, numeric, strict=True)]
        lines.insert(1, "|" + "|".join(rule) + "|")
        notes = [line for note in t.notes for line in ("", _md(note))]
        parts.append("\n".join([f"**{i}. {_md(t.title)}**", "", *lines, *notes]))
    if left:
        parts.append(
            "Published numbers without a result of the same protocol here, so not compared: "
            + "; ".join(map(_md, left))
            + "."
        )
    return "\n\n".join(parts) + "\n"


def show(made: Sequence[Table], left: Sequence[str], console: Console) -> None:
    """Print the tables for people: the best of each block bold; a table that is too wide in several parts."""
    for i, t in enumerate(made, start=1):
        console.print(Text(f"{i}. {t.title}", style="bold"))
        for columns in _parts(t, console.width):
            console.print(_rich(t, columns))
        for note in t.notes:
            console.print(Text(note, style="italic"), "")
    if left:
        console.print("Published numbers without a result of the same protocol here, so not compared:")
        for entry in left:
            console.print(Text(f"- {entry}"))


def _parts(t: Table, width: int) -> list[list[int]]:
    """The columns of each part of a table, so that it fits `width` characters: rows' names in every part."""
    entries = [*(e for block in t.blocks for e in block.entries), *t.baselines]
    widths = [max(len(h), *(len(e.cells[k]) for e in entries)) + 2 for k, h in enumerate(t.head)]
    names = [k for k, head in enumerate(t.head) if head in ("method", "preset")]
    parts = [list(names)]
    for k in range(len(names), len(t.head)):
        if len(parts[-1]) > len(names) and sum(widths[j] for j in parts[-1]) + widths[k] > width:
            parts.append(list(names))
        parts[-1].append(k)
    return parts


def _rich(t: Table, columns: Sequence[int]) -> rich_table.Table:
    shown = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k in columns:
        text = t.head[k] in ("method", "preset", "published")
        shown.add_column(Text(t.head[k]), justify="left" if text else "right", overflow="fold")
    blocks = [*t.blocks, *([Block("baselines", t.baselines, [])] if t.baselines else [])]
    for block in blocks:
        if len(t.blocks) > 1:
            shown.add_row(Text(block.title, style="italic"))
        for e in block.entries:
            shown.add_row(*(Text(e.cells[k], style="bold" if k in e.best else "") for k in columns))
        shown.add_section()
    return shown


def _md(text: str) -> str:
    text = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)


def html(made: Sequence[Table], left: Sequence[str], extra: str = "") -> str:
    """One self-contained page: each table, and for each of its protocols a chart of means and standard deviations.

    `extra`: HTML sections after the tables.
    """
    parts = [
        '<header><p class="eyebrow">Self-supervised pretraining</p><h1>Results</h1><p>A table is a data set. '
        "Values are of the last step: mean ± sample standard deviation over seeds where there are several.</p><nav>"
    ]
    parts += [f'<a href="#t{i}">{i}. {escape(t.title)}</a>' for i, t in enumerate(made, start=1)]
    parts.append("</nav></header>")
    for i, t in enumerate(made, start=1):
        head = "".join(f'<th scope="col">{escape(h)}</th>' for h in t.head)
        body = ""
        for block in [*t.blocks, *([Block("baselines", t.baselines, [])] if t.baselines else [])]:
            if len(t.blocks) > 1:
                body += (
                    f'<tr class="protocol"><th scope="rowgroup" colspan="{len(t.head)}"><b>{escape(block.title)}</b>'
                )
                body += "</th></tr>"
            body += "".join(map(_html_row, block.entries))
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in t.notes)
        charts = "".join(_chart(t, measure) for measure in t.measures)
        parts.append(
            f'<section id="t{i}"><h2>{i}. {escape(t.title)}</h2>'
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}'
            f'</tbody></table></div>{notes}<div class="charts wide">{charts}</div></section>'
        )
    parts.append(extra)
    if left:
        entries = "".join(f"<li>{escape(entry)}</li>" for entry in left)
        parts.append(
            "<section><h2>Not compared</h2><p>Published numbers without a result of the same protocol here."
            f"</p><ul>{entries}</ul></section>"
        )
    return page("Results", "\n".join(parts))


def _html_row(entry: Entry) -> str:
    first, *cells = entry.cells
    return (
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{' class=ours' if k in entry.best else ''}>{escape(c)}</td>" for k, c in enumerate(cells, 1))
        + "</tr>"
    )


def _chart(table: Table, measure: Measure) -> str:
    metric, items, baselines = measure[2], [], {}
    for block in table.blocks:
        budget = f", {block.title}" if len(table.blocks) > 1 else ""
        for line in block.lines:
            if found := line.by(measure):
                name = f"{line.card['method']} {line.name}{budget}"
                items.append({"name": name, "value": line.mean(measure), "std": line.std(measure)})
                baselines.update(found[0].row["baselines"])
    items += [{"name": name, "value": value, "weak": True} for name, value in baselines.items()]
    name = table.measures[measure]
    chart = bar_chart(items, metric=metric, high=100.0 if is_percent(metric) else None, alt=f"{table.title}, {name}")
    return f'<figure class="chart"><figcaption><b>{escape(name)}</b></figcaption>{chart}</figure>'


def update_between_markers(path: Path, text: str, *, begin: str = BEGIN, end: str = END) -> bool:
    """Replace what is between the two markers in `path` by `text`; True if the file changed.

    Raises UserError when the file or one of the markers is missing, doubled or in the wrong order.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: name a file that contains {begin} and {end}")
    before = path.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise UserError(f"{path} must contain {begin} once and {end} once after it, where the tables belong")
    head, rest = before.split(begin)
    after = f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}"
    if after != before:
        write_atomic(path, after)
    return after != before


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", help=f"cards, run directories or directories of them (default: {DEFAULT})")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="ID",
        help="protocol to show, e.g. knn-20-0.07 or label-free/RankMe, repeatable, or all "
        "(default: every accuracy on the labels)",
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME", help="data sets to show, by their names, repeatable"
    )
    parser.add_argument("--target", default="label", help="label, a factor's name or all (default: label)")
    parser.add_argument("--one-table", action="store_true", help="fail, naming what differs, unless all fit one table")
    parser.add_argument("--out-md", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--out-html", type=Path, metavar="FILE", help="write one HTML page")
    parser.add_argument(
        "--update-readme", type=Path, metavar="FILE", help=f"replace the text between {BEGIN} and {END}"
    )
    args = parser.parse_args(argv)
    cards = load_cards(find_cards(args.paths))
    if args.data:
        names = sorted({card["data"]["name"] for _, card in cards})
        cards = [(path, card) for path, card in cards if card["data"]["name"] in args.data]
        if unknown := set(args.data) - {card["data"]["name"] for _, card in cards}:
            raise UserError(f"no card is of {' or '.join(sorted(unknown))}: these are of {', '.join(names)}")
    results = select(cards, args.metric, args.target)
    without = [str(path) for path, _ in cards if all(r.path != path for r in results)]
    if without and args.one_table:
        raise UserError(f"these cards have no such result, so one table cannot hold them all: {', '.join(without)}")
    groups = one_table(results) if args.one_table else comparable(results)
    made, left = build(groups), unmatched_published(cards, groups)
    text = markdown(made, left)
    if sys.stdout.isatty():
        show(made, left, Console(highlight=False))
    else:
        print(text, end="")
    for path in without:
        print(f"not shown: {path} has no such result")
    if args.out_md:
        write_atomic(args.out_md, text)
    if args.out_html:
        write_atomic(args.out_html, html(made, left))
    if args.update_readme:
        changed = update_between_markers(args.update_readme, text)
        print(f"{args.update_readme} {'updated' if changed else 'was up to date'}")


if __name__ == "__main__":
    run_cli(main)
