"""Is dropout a contrastive objective? Arms x label budgets x seeds of methods/dropout_ssl, and a verdict on the claim.

The conditions of each hypothesis are in verdict.py, figures, tables and the page in report.py.
"""

from methods.dropout_ssl.config import ARMS

from ..cards import Cards
from ..study import Run, Study
from . import report
from .verdict import Results, abridged

# variant -> (arm, fields that differ from the preset's)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in ARMS},
    "A4-beta0.01": ("A4", {"beta": 1e-2}),
    "A5-lambda1": ("A5", {"lambd": 1.0}),
    "A6-K4": ("A6", {"copies": 4}),
    **{f"A1-p{p:g}": ("A1", {"p": p}) for p in (0.1, 0.3, 0.5)},
}
RATES = tuple(v for v in VARIANTS if v.startswith("A1-p"))
ALL = tuple(v for v in VARIANTS if v not in RATES)
OF_TABLES = tuple(v for v in ALL if v not in ("A1s", "A1p", "A8"))  # those are for images
CORE = ("A0", "A1", "A2", "A5")


def run_name(variant: str, labels: int) -> str:
    return f"{variant}-n{labels or 'all'}"


def study(
    data: str,
    about: str,
    preset: str,
    variants: tuple[str, ...],
    *,
    seeds: int,
    budgets: tuple[int, ...],
    fields: dict[str, object] | None = None,
) -> Study:
    """`budgets`: numbers of labeled records (0: all); `fields`: of all runs, where they differ from the preset's."""
    settings = {name: {"arm": arm, **own, **(fields or {})} for name, (arm, own) in VARIANTS.items()}
    keys = {run_name(variant, labels): (variant, labels) for labels in budgets for variant in variants}
    runs = tuple(Run(name, "dropout_ssl", {**settings[v], "labels": n}, preset) for name, (v, n) in keys.items())

    def results(cards: Cards) -> Results:
        found = {(*keys[run], seed): card for (run, seed), card in cards.cards.items()}
        return Results(about, variants, budgets, found, len(runs) * seeds)

    return Study(
        name=f"dropout-{data}",
        title=f"Dropout as a contrastive objective: {about}",
        question="Under dropout a record meets the network with another mask in every epoch. Do its representations "
        "converge, as under a contrastive loss, and is it the second mask that makes them?",
        runs=runs,
        draw=lambda cards: report.summary(results(cards)),
        tables=lambda cards: report.tables(results(cards)),
        report=lambda cards: report.write_page(results(cards)),
        seeds=tuple(range(seeds)),
        protocols=(),
        abridge=abridged,
    )


STUDIES = (
    study("diamonds", "diamonds, all arms", "tabular", OF_TABLES, seeds=5, budgets=(250, 1000, 4000)),
    study("cifar10", "CIFAR-10, 4 MMAC network", "cifar10-cpu", CORE, seeds=3, budgets=(250, 4000)),
    study("shapes", "shapes, two seeds", "quickstart", CORE[:3], seeds=2, budgets=(1000,), fields={"measured": 256}),
    study("table", "a generated table, all arms", "table", OF_TABLES, seeds=5, budgets=(250, 1000, 4000)),
    study(
        "cifar10-r18",
        "CIFAR-10, ResNet-18",
        "cifar10-r18",
        CORE,
        seeds=5,
        budgets=(250, 4000),
        fields={"steps": 3000},
    ),
    study(
        "cifar10-r18-all",
        "CIFAR-10, ResNet-18, all arms and dropout rates",
        "cifar10-r18",
        (*ALL, *RATES),
        seeds=5,
        budgets=(250, 1000, 4000, 0),
    ),
)
