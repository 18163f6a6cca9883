"""Result cards: one JSON object per run, made, written, read and checked here.

A card holds what a number depends on (method, preset, commit, seed, data by name and content hash, budget, device,
config) and its evaluations: a row for each protocol, target and metric, with the protocol's settings and a sentence
that spells it out. In the file, settings that all rows of a protocol share are there once, under "settings".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.files import (
    NUMBER,
    OBJECT,
    TEXT,
    Kind,
    field_problems,
    integer,
    list_of,
    object_of,
    optional,
    read_json,
    write_atomic,
)
from common.html import is_finite, number
from common.run import Data, Run

FORMAT = 1
FILE = "result.json"
"""Name of the card in a run directory."""
_COUNT = integer(0, 1 << 62)
_CARD = {
    "format": integer(FORMAT, FORMAT),
    "method": TEXT,
    "preset": TEXT,
    "git_commit": TEXT,
    "seed": integer(-(1 << 63), (1 << 64) - 1),
    "data": OBJECT,
    "backbone": TEXT,
    "parameters": _COUNT,
    "epochs": NUMBER,
    "steps": _COUNT,
    "batch_size": _COUNT,
    "images_seen": _COUNT,
    "images_per_second": NUMBER,
    "wall_time_s": NUMBER,
    "peak_memory_bytes": NUMBER,
    "device": TEXT,
    "precision": TEXT,
    "warnings": list_of(TEXT),
    "data_changes": list_of(TEXT),
    "extended": list_of(TEXT),
    "initial_weights": OBJECT,
    "environment": OBJECT,
    "settings": object_of(OBJECT),
    "evaluations": list_of(OBJECT),
    "published": optional(list_of(OBJECT)),
    "compared": list_of(TEXT),
    "config": OBJECT,
    "measured": list_of(TEXT),
    "diverged": TEXT,
    "unfinished": OBJECT,
    "scored": TEXT,
    "trained_on": OBJECT,
}
_DATA = {
    "name": TEXT,
    "label_name": optional(TEXT),
    "fingerprint": TEXT,
    "train_images": _COUNT,
    "test_images": _COUNT,
    "image_size": optional(_COUNT),
    "judged_on": OBJECT,
}
_ROW = {
    "protocol": TEXT,
    "target": TEXT,
    "metric": TEXT,
    "value": optional(NUMBER),
    "settings": OBJECT,
    "text": TEXT,
    "baselines": object_of(optional(NUMBER)),
    "chosen": OBJECT,
    "details": OBJECT,
}
_PUBLISHED = {
    "value": optional(NUMBER),
    "metric": TEXT,
    "protocol": TEXT,
    "source": TEXT,
    "note": TEXT,
    "not_compared": TEXT,
}

_TRAINED_ON = {"name": TEXT, "fingerprint": TEXT, "train_images": _COUNT}
_SCORES = ("format", "seed", "backbone", "data", "device", "evaluations")  # of a card without a run
_NAMED = ("format", "method", "preset", "seed", "evaluations", "config")
_TABLE = (*_NAMED, "git_commit", "data", "backbone", "epochs", "batch_size", "images_seen", "images_per_second")

Card = dict[str, Any]
Row = dict[str, Any]


class Store(Data, Protocol):
    """Data as a card describes them."""

    name: str


# ---- making and writing ----------------------------------------------------------------------------------------------


def describe_data(
    train: Store,
    test: Store,
    *,
    label_name: str | None,
    image_size: int | None,
    name: str = "",
    pretrained_on: Store | None = None,
) -> dict[str, Any]:
    """What a card says about its data. `name`: instead of the store's; `image_size`: pixels, None of other data.

    pretrained_on: the training images where `train`, which probes are fitted on, are others: then these are described,
    and what is judged on is "judged_on".
    """
    shown = pretrained_on or train
    described: dict[str, Any] = {
        "name": name or shown.name,
        "label_name": label_name,
        "fingerprint": shown.fingerprint,
        "train_images": len(shown),
        "test_images": len(test),
        "image_size": image_size,
    }
    if pretrained_on is not None:
        judged = {"name": train.name, "fingerprint": train.fingerprint, "train_images": len(train)}
        described["judged_on"] = judged
    return described


def make_card(
    run: Run,
    *,
    data: Mapping[str, Any],
    backbone: str,
    parameters: int,
    evaluations: Sequence[Row],
    published: Sequence[Mapping[str, Any]] = (),
) -> Card:
    """The card of a finished run. `data`: of `describe_data`; `published`: numbers of papers, each with "value",
    "protocol", "source" and, where they matter, "metric" and "note"."""
    card = {
        "format": FORMAT,
        **run.facts(),
        "data": dict(data),
        "backbone": backbone,
        "parameters": parameters,
        "evaluations": list(evaluations),
        "published": list(published),
    }
    card["config"]["data"] = card["data"]["name"]  # a path says nothing elsewhere
    if card["config"].get("eval_data"):
        card["config"]["eval_data"] = card["data"]["judged_on"]["name"]
    return card


def make_scores(
    scored: str,
    run: Card | None,
    *,
    data: Mapping[str, Any],
    backbone: str,
    parameters: int,
    seed: int,
    device: str,
    evaluations: Sequence[Row],
    initial_weights: Mapping[str, Any] | None = None,
) -> Card:
    """The card of a backbone that was evaluated by itself: on other data than it was trained on, or trained elsewhere.

    scored: its name in tables; run: the card of the run that trained it, where there is one, whose budget the card
    repeats with the data it was "trained_on"; initial_weights: the file that foreign weights are from.
    """
    scores: Card = {"seed": seed, "device": device, "data": dict(data), "backbone": backbone, "parameters": parameters}
    if initial_weights:
        scores["initial_weights"] = dict(initial_weights)
    scores["evaluations"] = list(evaluations)
    if run is None:
        return {"format": FORMAT, "scored": scored, **scores}
    kept = ("method", "preset", "git_commit", "epochs", "steps", "batch_size", "images_seen", "images_per_second")
    trained_on = {name: run["data"][name] for name in _TRAINED_ON}
    of_run = {name: run[name] for name in (*kept, "config")}
    return {"format": FORMAT, "scored": scored, **of_run, **scores, "trained_on": trained_on}


def save_card(path: Path, card: Mapping[str, Any], *, shared: bool = False) -> None:
    """Write a card, whole or not at all, with a line for each field, setting and evaluation row.

    shared: settings that all rows of a protocol have in common go into one field "settings", as in the cards of this
    repository; `read_card` puts them back.
    """
    write_atomic(path, card_text(card, shared=shared))


def card_text(card: Mapping[str, Any], *, shared: bool = False) -> str:
    def text(value: object) -> str:
        match value:
            case {**items} if items:
                lines = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in items.items()]
                return "{\n  " + ",\n  ".join(lines) + "\n }"
            case [dict(), *_]:
                return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        return json.dumps(value)

    content = _with_shared_settings(card) if shared else card
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in content.items()) + "\n}\n"


def _with_shared_settings(card: Mapping[str, Any]) -> Card:
    """The card as its file has it: settings that all rows of a protocol share are in "settings", not in the rows."""
    rows = _with_own_settings(card)["evaluations"]
    shared: dict[str, dict[str, Any]] = {}
    for row in rows:
        found = shared.get(row["protocol"], row["settings"])
        shared[row["protocol"]] = {k: v for k, v in row["settings"].items() if k in found and found[k] == v}
    short = [
        {**row, "settings": {k: v for k, v in row["settings"].items() if k not in shared[row["protocol"]]}}
        for row in rows
    ]
    return {**card, "evaluations": short, "settings": shared}


def _with_own_settings(card: Mapping[str, Any]) -> Card:
    """The card as programs have it: each row has all its settings."""
    shared = card.get("settings", {})
    rows = [
        {**row, "settings": {**shared.get(row["protocol"], {}), **row.get("settings", {})}}
        for row in card["evaluations"]
    ]
    return {**{name: value for name, value in card.items() if name != "settings"}, "evaluations": rows}


def row_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a card has one row of."""
    return row["protocol"], row["target"], row["metric"]


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with the rows of `new` in place of those of the same protocol, target and metric, others appended."""
    merged = {row_key(row): row for row in old}
    merged.update({row_key(row): row for row in new})
    return list(merged.values())


def earlier_card(card: Card, path: Path) -> Card | None:
    """The card in `path`, if it is of the same run as `card`.

    A run is the same with equal method, seed, steps, settings and data: its command, given again, scores the same
    weights.
    """
    try:
        before = read_card(path)
    except UserError:
        return None
    same = ("method", "preset", "seed", "steps", "config", "data", "initial_weights")
    return None if any(json.dumps(before.get(name)) != json.dumps(card.get(name)) for name in same) else before


def unfinished(card: Card, done: Mapping[str, Sequence[str]], weights: str) -> Card:
    """`card` of an evaluation that has measured `done`: protocols by the backbone or baseline. `weights`: a hash."""
    return {**card, "unfinished": {"weights": weights, "git_commit": card["git_commit"], "done": dict(done)}}


def measured_before(before: Card | None, card: Card, weights: str) -> tuple[list[Row], dict[str, list[str]]]:
    """(rows, what they are of) that the evaluation of the card `before` had measured when it was broken off; nothing
    if it was not, or by other code or of other weights."""
    left = {} if before is None else before.get("unfinished", {})
    kinds = {"weights": TEXT, "git_commit": TEXT, "done": object_of(list_of(TEXT))}
    if before is None or field_problems(left, kinds, required=kinds):
        return [], {}
    if (left["weights"], left["git_commit"]) != (weights, card["git_commit"]):
        return [], {}
    return before["evaluations"], left["done"]


def keep_earlier_rows(card: Card, before: Card | None) -> Card:
    """`card` with the rows, and the baselines of rows, that only the card `before` of the same run has."""
    if before is None:
        return card
    baselines = {row_key(row): row.get("baselines", {}) for row in before["evaluations"]}
    rows = [
        {**row, "baselines": {**baselines.get(row_key(row), {}), **row["baselines"]}} for row in card["evaluations"]
    ]
    kept = {"measured": before["measured"]} if "measured" in before else {}
    return {**card, "evaluations": merge_rows(before["evaluations"], rows), **kept}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_card(path: Path) -> Card:
    """The card of one run. Raises UserError, in one sentence, for anything that is not a card of this format."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run is not finished")
    card = read_json(path)
    if wrong := card_problems(card, complete=False):
        raise UserError(f"{path} is no result card that this version reads: {'; '.join(wrong[:4])}")
    return _with_own_settings(card)


def load_cards(paths: Iterable[Path]) -> list[tuple[Path, Card]]:
    """Read and check result cards. Raises UserError that names every broken card and what is wrong with it."""
    cards, broken = [], []
    for path in paths:
        try:
            card = read_json(path)
        except UserError as error:
            broken.append(str(error))
            continue
        if wrong := card_problems(card, complete=True):
            broken.append(f"{path}: {'; '.join(wrong)}")
        else:
            cards.append((path, _with_a_name(_with_own_settings(card))))
    if broken:
        lines = "\n  ".join(broken)
        what = "a broken result card" if len(broken) == 1 else f"{len(broken)} broken result cards"
        raise UserError(f"{what}: evaluate the run again, remove the file, or name only the cards you want:\n  {lines}")
    return cards


def trained_elsewhere(card: Mapping[str, Any]) -> bool:
    """Whether the card is of weights that no run of ours made: their budget is not known."""
    return "epochs" not in card


def _with_a_name(card: Card) -> Card:
    """The card with what a table asks for, where weights were trained elsewhere."""
    if not trained_elsewhere(card):
        return card
    name = card.get("scored") or card["backbone"] + (", pretrained" if card.get("pretrained") else "")
    return {"method": name, "preset": "", "git_commit": "unknown", "config": {}, **card}


def card_problems(card: Mapping[str, Any], *, complete: bool) -> list[str]:
    """What is wrong with a card, one phrase each; empty if nothing is.

    complete: whether all fields must be there that a table shows, or only those that identify the run.
    """
    if card.get("format") != FORMAT:
        return [f"format is {card.get('format', 'missing')}, this version reads {FORMAT}"]
    needed_here: Iterable[str] = (*_TABLE, "device") if complete else _NAMED
    if complete and "method" not in card and ("scored" in card or "pretrained" in card):
        needed_here = _SCORES
    wrong = field_problems(card, _CARD, required=needed_here, others=True)
    parts: list[tuple[str, Any, Mapping[str, Kind], Iterable[str]]] = []
    if isinstance(card.get("data"), dict):
        parts.append(("data", card["data"], _DATA, _DATA.keys() - {"judged_on"} if complete else ()))
    if isinstance(card.get("trained_on"), dict):
        parts.append(("trained_on", card["trained_on"], _TRAINED_ON, _TRAINED_ON))
    rows, published = card.get("evaluations"), card.get("published")
    required = ("protocol", "target", "metric", "value", *(("settings", "text", "baselines") if complete else ()))
    for i, row in enumerate(rows if isinstance(rows, list) else ()):
        parts.append((f"evaluations[{i}]", row, _ROW, required))
    for i, entry in enumerate(published if isinstance(published, list) else ()):
        parts.append((f"published[{i}]", entry, _PUBLISHED, ("value", "protocol", "source")))
    for name, part, kinds, needed in parts:
        if isinstance(part, dict):
            wrong += [f"{name}.{problem}" for problem in field_problems(part, kinds, required=needed, others=True)]
    return wrong


# ---- questions -------------------------------------------------------------------------------------------------------


def higher_is_better(metric: str) -> bool:
    """Whether a metric is an accuracy or an R2; the label-free ones have no simple direction."""
    return metric.lower().startswith(("top", "acc", "r2", "r²"))


def published_for(row: Mapping[str, Any], card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The card's published numbers that may be listed next to an evaluation row: those of the very same protocol.

    The metric must agree where the entry names one, and published numbers are about the labels, never about a factor.
    None where the run was not the one that was published ("not_compared").
    """
    if row["target"] not in ("label", card["data"].get("label_name")):
        return []
    return [
        p
        for p in card.get("published") or []
        if p.get("protocol") == row["protocol"]
        and p.get("metric", "top-1" if row["metric"] == "top-5" else row["metric"]) == row["metric"]
        and not p.get("not_compared")
    ]


def compared(card: Mapping[str, Any]) -> list[str]:
    """A line for each published number that is comparable with a row of the card: theirs, ours and the gap."""
    lines = []
    for row in card.get("evaluations") or []:
        for entry in published_for(row, card) if is_finite(row["value"]) else ():
            if is_finite(entry["value"]):
                theirs, ours = (number(value, row["metric"]) for value in (entry["value"], row["value"]))
                who = "paper" if entry["source"].startswith("arXiv:") else "published"
                source = "; ".join(filter(None, (entry["source"], entry.get("note"))))
                gap = f"{row['value'] - entry['value']:+.2f}"
                lines.append(f"{row['protocol']}, {row['metric']}: {who} {theirs}, ours {ours}, gap {gap} ({source})")
    return lines


def with_comparison(card: Card) -> Card:
    """The card with what `compared` says of it now, under "compared"; without the field where it says nothing."""
    others = {name: value for name, value in card.items() if name != "compared"}
    return {**others, "compared": lines} if (lines := compared(card)) else others


def headline_row(card: Mapping[str, Any]) -> Row | None:
    """The evaluation row that represents the run: kNN (20, .07) on the labels, otherwise the next best kind."""
    rows = [r for r in card.get("evaluations") or [] if higher_is_better(r["metric"])]
    labeled = [r for r in rows if r["target"] in ("label", card["data"].get("label_name"))]
    for start in ("knn-20-0.07", "knn", "linear", ""):
        for row in labeled or rows:
            if row["protocol"].startswith(start):
                return row
    return None
