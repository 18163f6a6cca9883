"""Tables of all result cards, side by side where they may be: `python -m eval.compare [PATHS...]`.

Published SSL numbers share their names and not their protocols, so a table here holds only results of the same data,
the same protocol with the same settings, and the same budget (backbone, epochs, images seen). Whatever differs in one
of these goes to a table of its own, and `--one-table` refuses instead and names the fields. Runs of one configuration
that differ in nothing but the seed become one row: mean, sample standard deviation, number of seeds.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from common.cli import guarded
from common.errors import UserError
from common.files import write_whole
from eval.report import bar_chart, higher_is_better, is_percent, number, page, published_for

FORMAT = 1
DEFAULT = ("methods/*/results/*.json", "runs/*/result.json")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
REQUIRED = ("method", "preset", "git_commit", "seed", "data", "backbone", "epochs", "batch_size", "images_seen",
            "images_per_second", "device", "evaluations", "config")
REQUIRED_DATA = ("name", "label_name", "fingerprint", "train_images", "test_images", "image_size")
REQUIRED_ROW = ("protocol", "target", "metric", "value", "settings", "text", "baselines")


@dataclass(frozen=True)
class Result:
    """One evaluation row of one card."""

    path: Path
    card: dict = field(repr=False)
    row: dict = field(repr=False)


@dataclass
class Line:
    """One row of a table: the seeds of one configuration."""

    results: list[Result]
    variant: str = ""

    @property
    def card(self) -> dict:
        return self.results[0].card

    @property
    def values(self) -> list[float]:
        return [_float(r.row["value"]) for r in self.results]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 and math.isfinite(self.mean) else None

    @property
    def name(self) -> str:
        return f"{self.card['preset']} ({self.variant})" if self.variant else self.card["preset"]


# ---------------------------------------------------------------------------------------------------------------- cards


def find_cards(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The card files that `paths` name: a file, a run directory, or a directory of cards or runs; none: the defaults.

    Raises UserError for a path that does not exist or holds no card.
    """
    if not paths:
        found = sorted(Path(p) for pattern in DEFAULT for p in glob(pattern))
        if not found:
            raise UserError(f"no result card found in {' or '.join(DEFAULT)}: run a method first, or name files or "
                            "run directories")
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


def load_cards(paths: Iterable[Path]) -> list[tuple[Path, dict]]:
    """Read and check result cards. Raises UserError that names every broken card and what is wrong with it."""
    cards, broken = [], []
    for path in paths:
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            broken.append(f"{path}: not readable as JSON ({error})")
            continue
        wrong = _problems(card)
        if wrong:
            broken.append(f"{path}: {'; '.join(wrong)}")
        else:
            cards.append((path, card))
    if broken:
        lines = "\n  ".join(broken)
        what = "a broken result card" if len(broken) == 1 else f"{len(broken)} broken result cards"
        raise UserError(f"{what}: evaluate the run again, remove the file, or name only the cards you want:\n  {lines}")
    return cards


def _problems(card: object) -> list[str]:
    if not isinstance(card, dict):
        return ["not a JSON object"]
    if card.get("format") != FORMAT:
        return [f"format is {card.get('format', 'missing')}, this version reads {FORMAT}"]
    wrong = [f"{key} is missing" for key in REQUIRED if key not in card]
    if "data" in card:
        data = card["data"]
        wrong += [f"data.{key} is missing" for key in REQUIRED_DATA if key not in data] if isinstance(data, dict) \
            else ["data is not an object"]
    if not isinstance(card.get("config", {}), dict):
        wrong.append("config is not an object")
    rows = card.get("evaluations", [])
    if not isinstance(rows, list):
        return [*wrong, "evaluations is not a list"]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            wrong.append(f"evaluations[{i}] is not an object")
            continue
        wrong += [f"evaluations[{i}].{key} is missing" for key in REQUIRED_ROW if key not in row]
        if not isinstance(row.get("value", 0.0), int | float | None):
            wrong.append(f"evaluations[{i}].value is {row['value']!r}, not a number")
        wrong += [f"evaluations[{i}].{key} is not an object" for key in ("settings", "baselines")
                  if not isinstance(row.get(key, {}), dict)]
    for i, entry in enumerate(card.get("published") or []):
        wrong += [f"published[{i}].{key} is missing" for key in ("value", "protocol", "source") if key not in entry]
    return wrong


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _canonical(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ------------------------------------------------------------------------------------------------------- comparability


def signature(result: Result) -> dict[str, str]:
    """Everything that must agree before two values may share a table, as field -> canonical text.

    Dropping the last incomplete batch of an epoch is no difference in budget: images seen that differ from epochs x
    training images by less than one batch an epoch count as the whole of it.
    """
    card, row, data = result.card, result.row, result.card["data"]
    whole = card["epochs"] * data["train_images"]
    seen = card["images_seen"]
    full = whole - card["epochs"] * card["batch_size"] < seen <= whole + 0.5  # epochs may be a rounded fraction
    fields = {
        "data": data["name"], "data fingerprint": data["fingerprint"], "image size": data["image_size"],
        "train images": data["train_images"], "test images": data["test_images"], "label": data["label_name"],
        "protocol": row["protocol"], "target": row["target"], "metric": row["metric"],
        **{f"settings.{key}": value for key, value in row["settings"].items()},
        "backbone": card["backbone"], "epochs": f"{card['epochs']:g}",
        "images seen": "all of each epoch but an incomplete batch" if full else seen,
    }
    return {key: _canonical(value) for key, value in fields.items()}


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


def select(cards: Sequence[tuple[Path, dict]], metric: Sequence[str] = (), target: str = "label") -> list[Result]:
    """The evaluation rows to show: of the named protocols, else all accuracies, on `target` ("all": every target).

    "label" also means a target that is called like the card's labels. A metric may be a protocol's id, or "id/metric"
    for one of several values, or "all". Raises UserError that lists what there is when nothing fits.
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
        raise UserError(f"no result with metric {' or '.join(metric) or 'top-1'} and target {target}; the cards have "
                        f"{', '.join(there) or 'no evaluations at all'}")
    if metric and "all" not in metric:
        for name in metric:
            if not any(name in (r.row["protocol"], f"{r.row['protocol']}/{r.row['metric']}") for r in found):
                raise UserError(f"no card has the protocol {name}; there are "
                                + ", ".join(sorted({row["protocol"] for _, c in cards for row in c["evaluations"]})))
    return found


def tables(results: Sequence[Result]) -> list[list[Result]]:
    """Results in comparable groups, ordered by data, target, protocol, backbone and epochs."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(sorted(signature(result).items())), []).append(result)

    def order(group: list[Result]) -> tuple:
        card, row = group[0].card, group[0].row
        return (card["data"]["name"], row["target"] != "label", _canonical(card["backbone"]), card["epochs"],
                row["protocol"], row["metric"], str(row["target"]), str(group[0].path))

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
        raise UserError(f"these results are not comparable, so they cannot share one table.{hint} They differ in\n  "
                        + "\n  ".join(lines))
    return [list(results)]


def aggregate(group: Sequence[Result]) -> list[Line]:
    """The lines of one table: seeds of the same method, preset and configuration together, best mean first.

    A copy of a card is counted once. Where a configuration has two different results of one seed, they are not seeds of
    one experiment: its lines are split by commit, and if that is not enough by file, and say so.
    """
    buckets: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in group:
        config = {k: v for k, v in result.card["config"].items() if k != "seed"}
        kinds = buckets.setdefault((result.card["method"], result.card["preset"]), {})
        same = kinds.setdefault(_canonical(config), [])
        if all(_without_path(result) != _without_path(other) for other in same):
            same.append(result)
    lines = []
    for kinds in buckets.values():
        configs = [json.loads(text) for text in kinds]
        changed = [k for k in dict.fromkeys(k for c in configs for k in c)
                   if len({_canonical(c.get(k, "not set")) for c in configs}) > 1]
        for config, same in zip(configs, kinds.values(), strict=True):
            variant = ", ".join(f"{k}={_canonical(config.get(k, 'not set'))}" for k in changed)
            lines += _split(same, variant)
    down = higher_is_better(group[0].row["metric"])

    def order(line: Line) -> tuple:
        score = -line.mean if down and math.isfinite(line.mean) else math.inf if down else 0.0
        return (score, line.card["method"], line.name)

    return sorted(lines, key=order)


def _without_path(result: Result) -> tuple[str, str]:
    return _canonical(result.card), _canonical(result.row)


def _split(results: list[Result], variant: str) -> list[Line]:
    """The lines of one configuration: one if every seed occurs once, else one a commit, else one a file."""
    for key in (lambda r: "", lambda r: f"commit {r.card['git_commit']}", lambda r: r.path.as_posix()):
        parts: dict[str, list[Result]] = {}
        for result in results:
            parts.setdefault(key(result), []).append(result)
        if all(len({r.card["seed"] for r in part}) == len(part) for part in parts.values()):
            break
    return [Line(part, ", ".join(filter(None, (variant, name)))) for name, part in parts.items()]


# --------------------------------------------------------------------------------------------------------------- output


@dataclass
class Table:
    """A finished table: texts only, ready for Markdown and HTML."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    lines: list[Line] = field(repr=False)


def build(groups: Sequence[Sequence[Result]]) -> list[Table]:
    """The tables of comparable groups, in the order given."""
    return [_table(group, groups[:i]) for i, group in enumerate(groups)]


def _table(group: Sequence[Result], earlier: Sequence[Sequence[Result]]) -> Table:
    lines = aggregate(group)
    card, row = group[0].card, group[0].row
    data, metric = card["data"], row["metric"]
    target = data["label_name"] if row["target"] == "label" else row["target"]
    size = f"{data['image_size']} px, " if data["image_size"] else ""  # none of a recording
    title = (f"{data['name']}, {size}{_canonical(card['backbone'])}, {card['epochs']:g} epochs: "
             f"{metric} on {target}, {row['protocol']}")
    baselines = list(dict.fromkeys(name for r in group for name in r.row["baselines"]))
    unit = " (%)" if is_percent(metric) else ""
    head = ["method", "preset", metric + unit, "seeds", "images/s" if size else "samples/s", "device", *baselines]
    anchored = any(published_for(r.row, r.card) for r in group)
    rows, notes = [], []
    for line in lines:
        value = number(line.mean, metric) + (f" ± {number(line.std, metric)}" if line.std is not None else "")
        cells = [line.card["method"], line.name, value,
                 str(len(line.results)), f"{fmean(r.card['images_per_second'] for r in line.results):.0f}",
                 " / ".join(dict.fromkeys(str(r.card["device"]) for r in line.results))]
        for name in baselines:
            found = [_float(r.row["baselines"].get(name)) for r in line.results]
            found = [v for v in found if math.isfinite(v)]
            cells.append(number(fmean(found), metric) if found else "–")
        if anchored:
            shown = []
            entries = {_canonical(p): p for r in line.results for p in published_for(r.row, r.card)}
            for entry in entries.values():
                note = str(entry["source"]) + (f"; {entry['note']}" if entry.get("note") else "")
                if note not in notes:
                    notes.append(note)
                gap = line.mean - _float(entry["value"])
                delta = f", ours {gap:+.2f}" if math.isfinite(gap) else ""
                shown.append(f"{number(entry['value'], metric)} [{notes.index(note) + 1}]{delta}")
            cells.append("; ".join(shown) or "–")
        rows.append([str(cell) for cell in cells])
    if anchored:
        head.append("published")
    notes = [f"[{i + 1}] {note}" for i, note in enumerate(notes)]
    for i, other in enumerate(earlier):
        first = other[0]
        if (first.card["data"]["name"], first.row["protocol"], first.row["target"], metric) == \
                (data["name"], row["protocol"], row["target"], first.row["metric"]):
            apart = differences([first, group[0]])
            notes.append(f"Not mixed with table {i + 1}: " + "; ".join(
                f"{name} {' against '.join(reversed(list(values)))}" for name, values in apart.items()))
    return Table(title, row["text"], head, rows, notes, lines)


def orphans(cards: Sequence[tuple[Path, dict]], groups: Sequence[Sequence[Result]]) -> list[str]:
    """Published numbers whose protocol none of the shown results of their card has: named, never put beside one."""
    shown = {(r.path, _canonical(p)) for group in groups for r in group for p in published_for(r.row, r.card)}
    return list(dict.fromkeys(
        f"{card['method']} {card['preset']}: {p['value']} by protocol {p['protocol']} ({p['source']})"
        for path, card in cards for p in card.get("published") or [] if (path, _canonical(p)) not in shown))


def markdown(made: Sequence[Table], left: Sequence[str]) -> str:
    """The tables as Markdown; card text is escaped, so that it can neither break a row nor become HTML."""
    parts = []
    for i, t in enumerate(made):
        numeric = {name for name in t.head if name not in ("method", "preset", "device", "published")}
        lines = [f"**{i + 1}. {_md(t.title)}**", "", _md(t.text), "",
                 "| " + " | ".join(map(_md, t.head)) + " |",
                 "|" + "|".join("---:" if name in numeric else "---" for name in t.head) + "|"]
        lines += ["| " + " | ".join(map(_md, row)) + " |" for row in t.rows]
        lines += [line for note in t.notes for line in ("", _md(note))]
        parts.append("\n".join(lines))
    if left:
        parts.append("Published numbers without a result of the same protocol here, so not compared: "
                     + "; ".join(map(_md, left)) + ".")
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    text = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)


def html(made: Sequence[Table], left: Sequence[str]) -> str:
    """One self-contained page: each table with a chart of its means and standard deviations."""
    parts = ['<header><p class="eyebrow">Self-supervised pretraining</p><h1>Results</h1><p>A table holds only results '
             "of the same data, protocol and budget. Values are of the last step: mean ± sample standard deviation "
             "over seeds where there are several.</p><nav>"]
    parts += [f'<a href="#t{i + 1}">{i + 1}. {escape(t.title)}</a>' for i, t in enumerate(made)]
    parts.append("</nav></header>")
    for i, t in enumerate(made):
        metric = t.lines[0].results[0].row["metric"]
        items = [{"name": f"{x.card['method']} {x.name}", "value": x.mean, "std": x.std} for x in t.lines]
        first = t.lines[0].results[0].row["baselines"]
        items += [{"name": name, "value": value, "weak": True} for name, value in first.items()]
        chart = bar_chart(items, metric=metric, high=100.0 if is_percent(metric) else None, alt=t.title)
        head = "".join(f'<th scope="col">{escape(h)}</th>' for h in t.head)
        body = "".join("<tr>" + f'<th scope="row">{escape(row[0])}</th>' + "".join(
            f'<td{" class=ours" if j == 2 else ""}>{escape(cell)}</td>' for j, cell in enumerate(row) if j) + "</tr>"
            for row in t.rows)
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in t.notes)
        parts.append(f'<section id="t{i + 1}"><h2>{i + 1}. {escape(t.title)}</h2><p class="muted">{escape(t.text)}</p>'
                     f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}'
                     f"</tbody></table></div>{notes}{chart}</section>")
    if left:
        entries = "".join(f"<li>{escape(entry)}</li>" for entry in left)
        parts.append("<section><h2>Not compared</h2><p>Published numbers without a result of the same protocol here."
                     f"</p><ul>{entries}</ul></section>")
    return page("Results", "\n".join(parts))


def update_between_markers(path: Path, text: str) -> bool:
    """Replace what stands between the two markers in `path` by `text`; True if the file changed.

    Raises UserError when the file or one of the markers is missing, doubled or in the wrong order.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: name the file that holds {BEGIN} and {END}")
    before = path.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise UserError(f"{path} must hold {BEGIN} once and {END} once after it: put them where the tables shall stand")
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}"
    if after != before:
        write_whole(path, after)
    return after != before


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help=f"cards, run directories or directories of them (default: {DEFAULT})")
    parser.add_argument("--metric", action="append", default=[], metavar="ID",
                        help="protocol to show, e.g. knn-20-0.07 or label-free/RankMe, repeatable, or all "
                             "(default: every accuracy on the labels)")
    parser.add_argument("--target", default="label", help="label, a factor's name or all (default: label)")
    parser.add_argument("--one-table", action="store_true", help="fail, naming what differs, unless all fit one table")
    parser.add_argument("--out-md", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--out-html", type=Path, metavar="FILE", help="write one HTML page")
    parser.add_argument("--update-readme", type=Path, metavar="FILE",
                        help=f"replace the text between {BEGIN} and {END}")
    args = parser.parse_args(argv)
    cards = load_cards(find_cards(args.paths))
    results = select(cards, args.metric, args.target)
    without = [str(path) for path, _ in cards if all(r.path != path for r in results)]
    if without and args.one_table:
        raise UserError(f"these cards have no such result, so one table cannot hold them all: {', '.join(without)}")
    groups = one_table(results) if args.one_table else tables(results)
    made, left = build(groups), orphans(cards, groups)
    text = markdown(made, left)
    print(text, end="")
    for path in without:
        print(f"not shown: {path} has no such result")
    if args.out_md:
        write_whole(args.out_md, text)
    if args.out_html:
        write_whole(args.out_html, html(made, left))
    if args.update_readme:
        changed = update_between_markers(args.update_readme, text)
        print(f"{args.update_readme} {'updated' if changed else 'was up to date'}")


if __name__ == "__main__":
    guarded(main)
