"""Figure, table and page of the studies: `studies/results/NAME/` and `studies/README.md`."""

import json
from pathlib import Path

from common.errors import UserError
from common.files import write_whole

from .study import Cards, Study, collect, differing, folder, items, read_cards, write_cards

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS = "methods"  # in `Study.borrows`: the cards in methods/*/results
HEAD = """# Studies

Questions that decide whether self-supervised learning works in practice, each answered by one small study: a table of
runs of the methods in `methods/`, three seeds, one figure. A study trains nothing by itself: every run is one command,
or two, that `python -m studies NAME --plan` prints.

    python -m studies                    # the studies, and how far each is
    make study NAME=augmentation         # run what is not done, draw the figure; stop it and go on at will
    python -m studies augmentation --from-cards          # the figure again, from the committed cards

Runs are small on purpose (5,000 `shapes`, ten epochs, a ResNet of 4 MMAC, about a minute each on a core), so that a
study takes two cores half an hour (`decoder`, with twelve methods, three quarters). Numbers are means over seeds with
their standard deviation (in curves the bar; faint dots are the seeds): with three of them a difference of one deviation
is no finding. What is known of full size stands under each study.

Words: *linear* and *kNN (20, .07)* are the probes of `python -m eval` on frozen features: which of ten shapes an image
shows, chance 10 %. *R2* of a factor (hue, place, size ...): how much of it a linear probe reads, 1 all, 0 nothing.
*RankMe*: how many directions the features use, of 64. *Random init*, or random weights: the same network untrained.

Out of scope: beam search, video, GANs, restricted Boltzmann machines.
"""
TAIL = """## A study of your own

Copy the file whose question is nearest, name its `STUDY` in `studies/__init__.py`, and look at `python -m studies NAME
--plan`. A study is

- `runs`: `Run(name, method, fields, preset)`, where `fields` are the method's own (`{**SMALL, "temperature": 0.5}`);
  one run with `baselines=True` brings raw pixels and random weights;
- `draw(cards)`, the figure, and `rows(cards)`, the table: `cards.values(run, protocol, target, metric)` has the value
  of every seed, `cards.text(...)` mean and deviation. Both must cope with missing cards, since a queue may stop early;
- if needed `protocols` (what a run is scored by), `measure` (more rows for a card, from its run), `after` (a picture
  that needs the runs themselves), `borrows` (cards of other studies), `may_diverge`;
- `answer`, written last, from the table, and `full`: what would change at full size.

`python -m studies NAME --publish` puts cards, figure and table under `studies/results/NAME` and writes this page; do it
again after a change of `answer`. `tests/test_studies.py` checks that cards, tables and page agree.
"""


def write_results(study: Study, place: Path, cards: Cards, *, local: bool = False) -> None:
    """`figure.png` and `table.md` in `place`; `local`: with what needs the runs themselves, and other studies' cards in
    runs/ before the committed ones. Raises UserError where there is no card yet."""
    shown = with_borrowed(study, cards, local=local)
    if not len(shown):
        first = study.borrows[0] if study.borrows else study.name
        raise UserError(f"{study.name} has no card yet: python -m studies {first}")
    place.mkdir(parents=True, exist_ok=True)
    if local and study.after is not None:
        study.after(place, cards)
    study.draw(shown).savefig(place / "figure.png", dpi=110)
    write_whole(place / "table.md", table(study, shown))


def with_borrowed(study: Study, cards: Cards, *, local: bool = False) -> Cards:
    """The cards, with the committed ones of other studies under STUDY/RUN (`local`: those in runs/ over them), and of
    the methods' own results on shapes under methods/METHOD-PRESET."""
    from . import STUDIES

    found = dict(cards.cards)
    for name in study.borrows:
        if name == METHODS:
            for path in sorted(HERE.parent.glob("methods/*/results/*.json")):
                card = json.loads(path.read_text())
                if card["data"]["name"] == "shapes":
                    found[f"{METHODS}/{card['method']}-{card['preset']}", card["seed"]] = card
            continue
        own = collect(STUDIES[name], None).cards if local else {}
        found |= {(f"{name}/{run}", seed): card for (run, seed), card in (committed_cards(name).cards | own).items()}
    return Cards(found)


def table(study: Study, cards: Cards) -> str:
    head, rows = study.rows(cards)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines) + "\n" + baseline_line(study, cards)


def baseline_line(study: Study, cards: Cards) -> str:
    """The baselines of the probes, from the run that has them; empty where there is none."""
    first = next((run.name for run in study.runs if run.baselines and cards.of(run.name)), None)
    own = Cards({key: card for key, card in cards.cards.items() if key[0] == first})
    found: dict[str, list[str]] = {}
    for protocol, label in (("linear", "linear"), ("knn-20-0.07", "kNN (20, .07)")):
        for name, value in own.baselines(protocol).items():
            found.setdefault(name, []).append(f"{label} {value:.1f}")
    told = "; ".join(f"{name}: {', '.join(values)}" for name, values in found.items())
    return f"\nBaselines of the run {first}, %: {told}.\n" if told else ""


def committed(name: str) -> Path:
    return RESULTS / name / "cards.jsonl"


def committed_cards(name: str) -> Cards:
    """The study's cards in `studies/results`; none where it was never published."""
    return read_cards(committed(name)) if committed(name).exists() else Cards({})


def publish(study: Study, out: Path | None) -> Path:
    """Copy what a study left to `studies/results/NAME` and write the page anew. Committed cards of runs that are not
    here stay, unless the study now has other settings: so with no run at all this draws and writes what is committed.
    Studies that borrow these cards are drawn again.
    """
    from . import STUDIES

    place = RESULTS / study.name
    place.mkdir(parents=True, exist_ok=True)
    runs = {run.name: run for run in study.runs}
    kept = {(name, seed): card for (name, seed), card in committed_cards(study.name).cards.items()
            if name in runs and seed in study.seeds and not differing(runs[name], seed, card)}  # fmt: skip
    cards = Cards({**kept, **collect(study, out).cards})
    write_results(study, place, cards)
    write_cards(place / "cards.jsonl", cards)
    for extra in folder(study, out).glob("*.png"):
        if extra.name != "figure.png":
            (place / extra.name).write_bytes(extra.read_bytes())
    for other in STUDIES.values():
        if study.name in other.borrows and committed(other.name).exists():
            write_results(other, RESULTS / other.name, committed_cards(other.name))
    write_page()
    return place


def write_page() -> None:
    from . import STUDIES

    write_whole(HERE / "README.md", page(STUDIES.values()))


def page(studies) -> str:
    """The page, from what stands in `studies/results`."""
    parts = [HEAD]
    for study in studies:
        place = RESULTS / study.name
        parts.append(f"## {study.title}\n\n**{study.question}**\n")
        if not (place / "cards.jsonl").exists():
            parts.append(f"Not run yet: `make study NAME={study.name}`.\n")
            continue
        cards = read_cards(place / "cards.jsonl")
        seeds = ", ".join(map(str, cards.seeds))
        link = f"[cards.jsonl](results/{study.name}/cards.jsonl)"
        origin = f"{len(cards)} of {len(items(study))} runs, seeds {seeds}; cards in {link}"
        if not study.runs:
            others = ", ".join(name for name in study.borrows if name != METHODS)
            origin = f"No runs of its own: the cards of the studies {others}, and those of `methods/*/results`"
        figures = ["figure.png", *sorted(p.name for p in place.glob("*.png") if p.name != "figure.png")]
        pictures = "\n".join(f"![{study.title}](results/{study.name}/{name})" for name in figures)
        parts.append(f"{study.answer}\n\n{pictures}\n\n{origin}; again with "
                     f"`make study NAME={study.name}`. At full size: {study.full}\n")
        body = (place / "table.md").read_text()
        parts.append(f"<details><summary>All numbers</summary>\n\n{body}\n</details>\n")
    return "\n".join([*parts, TAIL])
