"""Figure and tables of the studies in `studies/results/NAME/`, and their page, `studies/README.md` between its markers.

The answers are in `studies/NAME.md`, written by people.
"""

from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from common.files import write_atomic
from eval.card import read_card

from .cards import Cards, read_cards, write_cards
from .study import Study, Table, collect, differing, folder, items

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS = "methods"  # in `Study.borrows`: the cards in methods/*/results
BEGIN, END = "<!-- studies:begin -->", "<!-- studies:end -->"


def write_results(study: Study, place: Path, cards: Cards, *, local: bool = False) -> None:
    """`figure.webp` and `table.md` in `place`. Raises UserError where there is no card yet.

    local: with what needs the runs themselves, and other studies' cards in runs/ before the committed ones.
    """
    shown = with_borrowed(study, cards, local=local)
    if not len(shown):
        first = study.borrows[0] if study.borrows else study.name
        raise UserError(f"{study.name} has no card yet: python -m studies {first}")
    place.mkdir(parents=True, exist_ok=True)
    if local and study.after is not None:
        study.after(place, cards)
    study.draw(shown).savefig(place / "figure.webp", dpi=110, pil_kwargs={"lossless": True})
    write_atomic(place / "table.md", tables_text(study, shown))


def with_borrowed(study: Study, cards: Cards, *, local: bool = False) -> Cards:
    """The cards, with the committed ones of other studies under STUDY/RUN (`local`: those in runs/ over them), and of
    the methods' own results on shapes under methods/METHOD-PRESET."""
    from . import STUDIES

    found = dict(cards.cards)
    for name in study.borrows:
        if name == METHODS:
            for path in sorted(HERE.parent.glob("methods/*/results/*.json")):
                card = read_card(path)
                if card["data"]["name"] == "shapes":
                    found[f"{METHODS}/{card['method']}-{card['preset']}", card["seed"]] = card
            continue
        own = collect(STUDIES[name], None).cards if local else {}
        found |= {(f"{name}/{run}", seed): card for (run, seed), card in (committed_cards(name).cards | own).items()}
    return Cards(found)


def tables_text(study: Study, cards: Cards) -> str:
    return "\n".join(map(markdown, study.tables(cards))) + baseline_line(study, cards)


def markdown(table: Table) -> str:
    """The table with its title above, numbers to the right."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (table.head, *table.rows)]
    lines.insert(1, "|---|" + "---:|" * (len(table.head) - 1))
    return "\n".join([*([table.title, ""] if table.title else []), *lines]) + "\n"


def baseline_line(study: Study, cards: Cards) -> str:
    """The baselines of the probes, from the run that has them; empty where there is none."""
    first = next((run.name for run in study.runs if run.baselines and cards.of(run.name)), None)
    own = Cards({key: card for key, card in cards.cards.items() if key[0] == first})
    found: dict[str, list[str]] = {}
    for protocol, label in (("linear", "linear"), ("knn-20-0.07", "kNN (20, .07)")):
        for name, value in own.baselines(protocol).items():
            found.setdefault(name, []).append(f"{label} {value:.1f}")
    text = "; ".join(f"{name}: {', '.join(values)}" for name, values in found.items())
    return f"\nBaselines of the run {first}, %: {text}.\n" if text else ""


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
    kept = {
        (name, seed): card
        for (name, seed), card in committed_cards(study.name).cards.items()
        if name in runs and seed in study.seeds and not differing(runs[name], seed, card)
    }
    cards = Cards({**kept, **collect(study, out).cards})
    write_results(study, place, cards)
    if study.abridge is not None:
        cards = Cards({key: study.abridge(card) for key, card in cards.cards.items()})
    write_cards(place / "cards.jsonl", cards)
    for extra in folder(study, out).glob("*.webp"):
        if extra.name != "figure.webp":
            (place / extra.name).write_bytes(extra.read_bytes())
    for other in STUDIES.values():
        if study.name in other.borrows and committed(other.name).exists():
            write_results(other, RESULTS / other.name, committed_cards(other.name))
    write_page()
    return place


def write_page() -> None:
    from . import STUDIES

    write_atomic(HERE / "README.md", page(STUDIES.values()))


def page(studies: Iterable[Study]) -> str:
    """The page: what is written there outside of the markers, and between them a section for each study."""
    before, found, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise UserError(f"{HERE / 'README.md'} has no lines {BEGIN} and {END}")
    return "\n".join([before + BEGIN + "\n", *map(section, studies), END + after])


def section(study: Study) -> str:
    place = RESULTS / study.name
    head = f"## {study.title}\n\n**{study.question}**\n"
    if not (place / "cards.jsonl").exists():
        return f"{head}\nNot run yet: `make study NAME={study.name}`.\n"
    cards = read_cards(place / "cards.jsonl")
    seeds = ", ".join(map(str, cards.seeds))
    link = f"[cards.jsonl](results/{study.name}/cards.jsonl)"
    origin = f"{len(cards)} of {len(items(study))} runs, seeds {seeds}; cards in {link}"
    if not study.runs:
        others = ", ".join(name for name in study.borrows if name != METHODS)
        origin = f"No runs of its own: the cards of the studies {others}, and those of `methods/*/results`"
    figures = ["figure.webp", *sorted(p.name for p in place.glob("*.webp") if p.name != "figure.webp")]
    pictures = "\n".join(f"![{study.title}](results/{study.name}/{name})" for name in figures)
    tables = (
        f"<details><summary>All numbers</summary>\n\n{(place / 'table.md').read_text(encoding='utf-8')}\n</details>\n"
    )
    again = f"again with `make study NAME={study.name}`"
    return f"{head}\n{answer(study)}\n\n{pictures}\n\n{origin}; {again}.\n\n{tables}"


def answer(study: Study) -> str:
    """What the numbers say, and what they cannot say. Raises UserError where it is not written yet."""
    path = HERE / f"{study.name}.md"
    if not path.is_file():
        raise UserError(f"{study.name} has cards but no answer: write {path.name} next to the study")
    return path.read_text(encoding="utf-8").strip()
