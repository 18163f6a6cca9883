"""Result cards of a study, and their file in studies/results, `cards.jsonl`.

Cards of one method with the same rows are a group; what all of them have is in the file once:

{"shared": 0, "method": "simclr", "config": {"epochs": 10, ...}, "evaluations": {"protocol": ["knn-20-0.07", ...], ...}}
{"shares": 0, "run": "crop", "seed": 0, "config": {"blur": 0.5}, "evaluations": {"value": [61.2, ...]}}

The card of the second line is the first line's, with its own entries in each object. Rows (evaluations, measurements)
are columns, null where a row has no such entry. An evaluation row keeps what `ROW` names: its settings and its sentence
are those of `python -m eval`. Left out are speed, memory, and the command (`python -m studies NAME --plan` prints it).
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common.errors import UserError
from common.files import rounded, write_atomic

Card = dict[str, Any]
TABLES = ("evaluations", "measurements")
"""Fields of a card that are rows, and columns in the file."""
HEADS = ("protocol", "target", "metric", "step", "kind")
"""Entries that say what a row is of."""
ROW = ("protocol", "target", "metric", "value", "baselines")
"""Entries of an evaluation row that are in the file."""
LEFT_OUT = ("run", "seed", "settings", "images_per_second", "peak_memory_bytes")
"""Fields that the file lacks, or that begin a line."""


class Cards:
    """Result cards of a study by (run, seed)."""

    def __init__(self, cards: Mapping[tuple[str, int], Card]):
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

    def of(self, run: str) -> list[Card]:
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


# ---- the file --------------------------------------------------------------------------------------------------------


def read_cards(path: Path) -> Cards:
    """Cards of a committed `cards.jsonl`. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the study first")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shared = {line.pop("shared"): line for line in lines if "shared" in line}
    cards = [_merged(shared[line.pop("shares")], line) for line in lines if "shares" in line]
    for card in cards:
        card |= {name: _rows(card[name]) for name in TABLES if name in card}
    return Cards({(card["run"], card["seed"]): card for card in cards})


def write_cards(path: Path, cards: Cards) -> None:
    """Write the file, with six significant digits."""
    groups: dict[str, list[tuple[Card, Card]]] = {}
    for (run, seed), card in sorted(cards.cards.items()):
        rows = [{name: row[name] for name in ROW if name in row and row[name] != {}} for row in card["evaluations"]]
        small = {name: value for name, value in card.items() if name not in LEFT_OUT} | {"evaluations": rows}
        if "environment" in small:
            small["environment"] = {name: value for name, value in small["environment"].items() if name != "command"}
        heads = [[row.get(name) for name in HEADS] for table in TABLES for row in small.get(table, [])]
        small |= {table: _columns(small[table]) for table in TABLES if table in small}
        groups.setdefault(json.dumps([small["method"], heads]), []).append(({"run": run, "seed": seed}, rounded(small)))
    first, rest = [], []
    for i, group in enumerate(groups.values()):
        shared = _shared([card for _, card in group])
        first.append({"shared": i, **shared})
        rest += [{"shares": i, **key, **_own(shared, card)} for key, card in group]
    write_atomic(path, "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in (*first, *rest)))


def _shared(cards: Sequence[Card]) -> Card:
    """What all cards have; of objects, the entries that all have."""
    found: Card = {}
    for name, value in cards[0].items():
        if all(isinstance(card.get(name), dict) for card in cards):
            found[name] = _shared([card[name] for card in cards])
        elif all(name in card and card[name] == value for card in cards):
            found[name] = value
    return found


def _own(shared: Card, card: Card) -> Card:
    """What the card has besides."""
    own: Card = {}
    for name, value in card.items():
        if name not in shared:
            own[name] = value
        elif isinstance(value, dict) and (entries := _own(shared[name], value)):
            own[name] = entries
    return own


def _merged(shared: Card, own: Card) -> Card:
    objects = {name: _merged(value, own.get(name, {})) for name, value in shared.items() if isinstance(value, dict)}
    return {**shared, **own, **objects}


def _columns(rows: Sequence[Card]) -> Card:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _rows(columns: Card) -> list[Card]:
    names, entries = columns.keys(), zip(*columns.values(), strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in entries]
    return [{name: value for name, value in row.items() if value is not None or name == "value"} for row in rows]
