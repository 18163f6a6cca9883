"""Figure, table and page of the studies: `studies/results/NAME/` and `studies/README.md`."""

import json
from pathlib import Path

from common.errors import UserError
from common.files import write_whole

from .study import Cards, Study, collect, folder, items, read_cards, write_cards

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS = "methods"  # in `Study.borrows`: the cards in methods/*/results
HEAD = """# Studies

Questions that decide whether self-supervised learning works in practice, each answered by one small study: a table of
runs of the methods in `methods/`, three seeds, one figure. A study trains nothing by itself: every run is a command
that `python -m studies NAME --plan` prints.

    python -m studies                    # the studies, and how far each is
    make study NAME=augmentation         # run what is not done, draw the figure; stop it and go on at will
    python -m studies augmentation --from-cards          # the figure again, from the committed cards

Runs are small on purpose (5,000 `shapes`, ten epochs, a ResNet of 4 MMAC, about a minute each on a core), so that a
study takes two cores half an hour at most; a study that differs says so. A point is the mean over seeds, its bar the
standard deviation, faint dots are the seeds: with three of them a difference of one bar is no finding. Probes are those
of `python -m eval`, on frozen features. What is known of full size stands under each study.

Out of scope: beam search, video, GANs, restricted Boltzmann machines.
"""

def write_results(study: Study, place: Path, cards: Cards, *, runs_are_here: bool = False) -> None:
    """`cards.jsonl`, `figure.png` and `table.md` in `place`. Raises UserError where there is no card yet."""
    shown = with_borrowed(study, cards, local=runs_are_here)
    if not len(shown):
        first = study.borrows[0] if study.borrows else study.name
        raise UserError(f"{study.name} has no card yet: python -m studies {first}")
    place.mkdir(parents=True, exist_ok=True)
    write_cards(place / "cards.jsonl", cards)
    if runs_are_here and study.after is not None:
        study.after(place, cards)
    study.draw(shown).savefig(place / "figure.png", dpi=110)
    write_whole(place / "table.md", table(study, shown))


def with_borrowed(study: Study, cards: Cards, *, local: bool = False) -> Cards:
    """The cards, with the committed ones of other studies under STUDY/RUN (`local`: those in runs/ before them), and of
    the methods' own results on shapes under methods/METHOD-PRESET."""
    found = dict(cards.cards)
    for name in study.borrows:
        if name == METHODS:
            for path in sorted(HERE.parent.glob("methods/*/results/*.json")):
                card = json.loads(path.read_text())
                if card["data"]["name"] == "shapes":
                    found[f"{METHODS}/{card['method']}-{card['preset']}", card["seed"]] = card
            continue
        own = Path("runs") / f"study-{name}" / "cards.jsonl"
        path = own if local and own.exists() else RESULTS / name / "cards.jsonl"
        if path.exists():
            found |= {(f"{name}/{run}", seed): card for (run, seed), card in read_cards(path).cards.items()}
    return Cards(found)


def table(study: Study, cards: Cards) -> str:
    head, rows = study.rows(cards)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def publish(study: Study, out: Path | None) -> Path:
    """Copy what a finished study leaves to `studies/results/NAME`, and write the page anew."""
    place = RESULTS / study.name
    place.mkdir(parents=True, exist_ok=True)
    write_results(study, place, collect(study, out))
    for extra in folder(study, out).glob("*.png"):
        if extra.name != "figure.png":
            (place / extra.name).write_bytes(extra.read_bytes())
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
    return "\n".join(parts)
