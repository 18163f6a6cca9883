"""The page of a study: the claim, each hypothesis with its figure, and a verdict for the weak and the strong form.

What counts as support is written down (sheet 7.2, 7.3): the `CONDITIONS` below. Those on A0, A1 and A2 are the sheet's,
older than any run; those on A4 and A5 and the fewest seeds were settled after a smoke run. A condition holds when
the 95 % interval of its paired difference lies on the right side of zero, fails when it lies on the other side, and is
open otherwise. Nothing on this page is chosen by looking at results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

import matplotlib
import torch
from matplotlib.figure import Figure

from common.rng import generator
from eval.figures import STYLE, styled, tag
from eval.report import PALETTE, page, table

from .config import ARMS

# Student's t, 97.5 %, by degrees of freedom from 1 on.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)

TITLE = "Is dropout a contrastive objective?"
CLAIM = (
    "With dropout or VAE noise before or inside the encoder, a record meets the network under another mask in every "
    "epoch.",
    "All these masked copies are pulled to one label, so their representations must come to agree: m1 ≈ m2 ≈ … ≈ mn.",
    "That is what a self-supervised objective does with two views, the label standing where SwAV has its coded "
    "prototype.",
    "So supervised training with noise already minimises an auxiliary self-supervised loss, without extra computation.",
    "Instead of many epochs one may put several masked copies into one batch, and VAE noise may replace dropout.",
)
NAMES = {
    "V": "V: share of the variance of h that masks make",
    "g_inst": "g_inst: same record − same class, cosine",
    "g_cls": "g_cls: same class − other class, cosine",
    "s_same": "s_same: same record, two masks, cosine",
    "s_cls": "s_cls: same class, cosine",
    "alignment": "alignment: squared distance of two masks",
    "nt_xent_all_0.5": "NT-Xent / chance, all negatives",
    "nt_xent_other_0.5": "NT-Xent / chance, other classes",
    "nt_xent_same_0.5": "NT-Xent / chance, same class",
    "consistency": "consistency: E KL(p_geo ‖ p_m)",
    "ce_geo": "cross-entropy of p_geo",
    "rank": "effective rank of h",
    "gradient_nt_xent": "cos(∇ labels, ∇ NT-Xent)",
    "gradient_alignment": "cos(∇ labels, ∇ alignment)",
    "accuracy": "test accuracy, %",
    "sigma": "sigma of the VAE layer",
}
SUMMARY = ("V", "g_inst", "nt_xent_same_0.5", "consistency", "accuracy")
START = "its start"
TENTH = "a tenth of its start"
FEWEST = "the gap with most labels"


@dataclass(frozen=True)
class Condition:
    """`arm`'s value of `measure` at the end minus `other`'s is above zero ("+"), below ("-"), not above ("not +") or
    neither ("=").

    other: an arm; START or TENTH, the same run before training; "", zero; FEWEST, for which it is the gap A1 - A0 with
    the fewest labels minus that with the most.
    """

    arm: str
    measure: str
    other: str
    sign: str
    kind: str = "held-out"

    def sentence(self) -> str:
        name = NAMES[self.measure].split(":")[0]
        if self.other == FEWEST:
            return f"A1 − A0, {name}: larger with the fewest labels than with the most"
        against = {START: "before training", "": "0", TENTH: TENTH}.get(self.other, f"in {self.other}")
        said = {"+": "higher than", "-": "lower than", "not +": "not higher than", "=": "the same as"}[self.sign]
        return f"{self.arm}: {name} {said} {against}"


def against(measure: str, sign: str, *others: str) -> list[Condition]:
    return [Condition("A1", measure, other, sign) for other in others]


CONDITIONS: dict[str, tuple[str, list[Condition]]] = {
    "weak": (
        "Weak form: the noise makes predictions consistent, and classes contrast",
        [*against("consistency", "-", "A0", "A2"), *against("nt_xent_other_0.5", "-", START, "A0")],
    ),
    "strong": (
        "Strong form: instance-level contrast. Two masks of a record are closer than two records of its class",
        [*against("g_inst", "+", START, "A0", "A2"), *against("nt_xent_same_0.5", "-", START, "A0", "A2")],
    ),
    "H1": (
        "H1. Representations of a record under different masks converge",
        [*against("V", "-", START, "A0", "A2", "A9"), *against("g_inst", "+", START, "A0", "A2", "A9")],
    ),
    "H2": (
        "H2. The labels' loss lowers a self-supervised loss that nobody optimises",
        [
            *against("nt_xent_all_0.5", "-", START, "A0"),
            *against("nt_xent_same_0.5", "-", START, "A0"),
            *against("alignment", "-", START, "A0"),
            *against("gradient_nt_xent", "+", ""),
            *against("gradient_alignment", "+", ""),
        ],
    ),
    "H3": (
        "H3. Zipped masks in one batch do what many epochs do",
        [Condition("A6", m, "A1", "=") for m in ("V", "g_inst", "accuracy")],
    ),
    "H4": (
        "H4. Gaussian or VAE noise can replace dropout",
        [
            *(Condition(arm, m, "A0", s) for arm in ("A3", "A4") for m, s in (("V", "-"), ("g_inst", "+"))),
            Condition("A4", "sigma", TENTH, "+", kind="own"),
        ],
    ),
    "H5": (
        "H5. A free lunch: the gain of dropout is largest with few labels, an explicit loss adds little",
        [*against("accuracy", "+", "A0", "A2", FEWEST), Condition("A5", "accuracy", "A1", "not +")],
    ),
}


@dataclass(frozen=True)
class Study:
    """Result cards by (variant, labels, seed)."""

    method: str
    grid: str
    about: str
    variants: tuple[str, ...]
    budgets: tuple[int, ...]
    cards: dict[tuple[str, int, int], dict]
    planned: int

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, _, seed in self.cards})

    def curve(self, variant: str, labels: int, measure: str, kind: str = "held-out") -> dict[int, dict[int, float]]:
        """seed -> {step: value}."""
        found = {}
        for seed in self.seeds:
            card = self.cards.get((variant, labels, seed))
            if card is not None:
                lines = [m for m in card["measurements"] if m["kind"] == kind and measure in m]
                found[seed] = {m["step"]: m[measure] for m in lines}
        return {seed: curve for seed, curve in found.items() if curve}

    def value(self, variant: str, labels: int, measure: str, kind: str = "held-out", *, first: bool = False,
              step: int | None = None) -> dict[int, float]:  # fmt: skip
        """seed -> the value at the end (or before training, or after `step`); accuracy is of the whole test set."""
        if measure == "accuracy" and not first and step is None:
            cards = {seed: self.cards.get((variant, labels, seed)) for seed in self.seeds}
            return {seed: card["evaluations"][0]["value"] for seed, card in cards.items() if card}
        curves = self.curve(variant, labels, measure, kind)
        if measure.startswith("gradient"):  # the sign matters on the way, not at the end, where gradients vanish
            return {seed: sum(c.values()) / len(c) for seed, c in curves.items()}
        if step is not None:
            return {seed: c[step] for seed, c in curves.items() if step in c}
        return {seed: c[(min if first else max)(c)] for seed, c in curves.items()}

    def pairs(self, condition: Condition, labels: int) -> list[float]:
        """Differences, paired by seed."""
        mine = self.value(condition.arm, labels, condition.measure, condition.kind)
        if condition.other == "":
            return list(mine.values())
        if condition.other == FEWEST:
            return self._shrinking(condition.measure)
        if condition.other in (START, TENTH):
            theirs = self.value(condition.arm, labels, condition.measure, condition.kind, first=True)
            theirs = {seed: v * (0.1 if condition.other == TENTH else 1) for seed, v in theirs.items()}
        else:
            theirs = self.value(condition.other, labels, condition.measure, condition.kind)
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]

    def _shrinking(self, measure: str) -> list[float]:
        budgets = sorted(self.budgets, key=lambda n: n or math.inf)
        if len(budgets) == 1:
            return []
        gaps = []
        for labels in (budgets[0], budgets[-1]):
            a, b = (self.value(arm, labels, measure) for arm in ("A1", "A0"))
            gaps.append({seed: a[seed] - b[seed] for seed in a if seed in b})
        return [gaps[0][seed] - gaps[1][seed] for seed in gaps[0] if seed in gaps[1]]


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval. One value has none: (value, -inf, inf)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = T[min(n - 1, len(T)) - 1] * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def bootstrap(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The sheet's paired bootstrap, 95 %: percentiles of the mean of resampled differences."""
    x = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(x), (draws, len(x)), generator=generator("bootstrap"))
    low, high = x[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def judge(condition: Condition, values: list[float]) -> str:
    """holds, fails, open, or not run."""
    if not values:
        return "not run"
    _, low, high = interval(values)
    if condition.sign in ("=", "not +"):  # a wide interval must not pass for equality: three seeds at least
        differs = low > 0 or (high < 0 and condition.sign == "=")
        return "fails" if differs else "holds" if len(values) >= 3 else "open"
    low, high = (low, high) if condition.sign == "+" else (-high, -low)
    return "holds" if low > 0 else "fails" if high < 0 else "open"


def verdict(study: Study, name: str, labels: int) -> tuple[str, list[tuple[Condition, list[float], str]]]:
    """(supported, refuted or undecided; each condition with its differences and what became of it)."""
    found = [(c, values, judge(c, values)) for c in CONDITIONS[name][1] for values in [study.pairs(c, labels)]]
    states = [state for *_, state in found if state != "not run"]
    if not states:
        return "not run", found
    return "refuted" if "fails" in states else "undecided" if "open" in states else "supported", found


# ---- figures ---------------------------------------------------------------------------------------------------------


def colors(arms: tuple[str, ...]) -> dict[str, str]:
    """A0, A1 and A2 look the same in all figures; the others only differ within one."""
    core = ("A0", "A1", "A2")
    ordered = [*core, *(a for a in arms if a not in core)]
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(ordered)}


def new_figure(columns: int, width: float = 3.4, height: float = 2.9):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def curves(study: Study, labels: int, measures: tuple[str, ...], arms: tuple[str, ...], kind: str = "held-out") -> str:
    """A panel a measure: mean over seeds against optimiser steps, 95 % interval shaded."""
    figure, axes = new_figure(len(measures))
    shades = colors(arms)
    for ax, measure in zip(axes, measures, strict=True):
        for arm in (a for a in arms if a in study.variants):
            by_seed = list(study.curve(arm, labels, measure, kind).values())
            if not by_seed:
                continue
            steps = sorted(set.intersection(*(set(c) for c in by_seed)))
            found = [interval([c[s] for c in by_seed]) for s in steps]
            ax.plot(steps, [f[0] for f in found], marker=".", color=shades[arm], label=arm)
            if len(by_seed) > 1:
                low, high = [f[1] for f in found], [f[2] for f in found]
                ax.fill_between(steps, low, high, color=shades[arm], alpha=0.15, linewidth=0)
        if ax.lines:  # intervals of two seeds are 13 deviations wide: scale by the means
            means = [y for line in ax.lines for y in line.get_ydata()]
            pad = 0.35 * (max(means) - min(means)) + 1e-9
            ax.set_ylim(min(means) - pad, max(means) + pad)
        ax.set_xscale("symlog", linthresh=2)
        ax.set_xlim(left=0)
        ax.set_title(NAMES[measure].split(":")[0])
        ax.set_xlabel("optimiser steps")
    if axes[0].lines:
        axes[0].legend()
    return tag(figure, f"{', '.join(measures)} against steps, {labels} labels")


def differences(study: Study, labels: int, arm: str, other: str, measures: tuple[str, ...]) -> str:
    """Paired differences with their 95 % interval, each in its own panel, and every seed as a dot."""
    figure, axes = new_figure(len(measures), width=1.75, height=2.6)
    for ax, measure in zip(axes, measures, strict=True):
        values = study.pairs(Condition(arm, measure, other, "+"), labels)
        if values:
            mean, low, high = interval(values)
            if len(values) > 1:
                ax.errorbar([0], [mean], yerr=[[mean - low], [high - mean]], marker="o", capsize=4, color=PALETTE[0])
            ax.plot([0.25] * len(values), values, ".", color="#8a9299")
        ax.axhline(0, color="#1e2429", linewidth=0.8)
        ax.set_xlim(-0.6, 0.6)
        ax.set_xticks([])
        ax.set_title(NAMES[measure].split(":")[0], fontsize=8)
        ax.tick_params(labelsize=7)
    return tag(figure, f"{arm} minus {other}, {labels} labels")


def terms(study: Study, labels: int) -> str:
    """The masked cross-entropy at the end, as its two exact parts."""
    figure, (ax,) = new_figure(1, width=6.5)
    arms = [v for v in study.variants if study.value(v, labels, "ce_geo")]
    for key, shade, bottom in (("ce_geo", PALETTE[0], None), ("consistency", PALETTE[1], "ce_geo")):
        height = [interval(list(study.value(a, labels, key).values()))[0] for a in arms]
        below = [interval(list(study.value(a, labels, bottom).values()))[0] for a in arms] if bottom else None
        ax.bar(arms, height, bottom=below, color=shade, label=NAMES[key])
    ax.tick_params(axis="x", labelrotation=60 if len(arms) > 6 else 0)
    ax.set_title("held-out cross-entropy under masks, in its two parts")
    if ax.has_data():
        ax.legend()
    return tag(figure, "parts of the cross-entropy")


@styled
def summary(study: Study) -> Figure:
    """The claim in one figure: A1 minus A0 and A1 minus A2 by number of labels, 95 % intervals, paired by seed."""
    figure = Figure(figsize=(2.3 * len(SUMMARY), 2.9), layout="constrained")
    for ax, measure in zip(figure.subplots(1, len(SUMMARY)), SUMMARY, strict=True):
        for shift, (other, shade) in zip((-0.1, 0.1), (("A0", PALETTE[0]), ("A2", PALETTE[1])), strict=True):
            found = [study.pairs(Condition("A1", measure, other, "+"), n) for n in study.budgets]
            for place, values in enumerate(found):
                if len(values) > 1:
                    mean, low, high = interval(values)
                    bar = [[mean - low], [high - mean]]
                    ax.errorbar([place + shift], [mean], yerr=bar, marker="o", capsize=3, color=shade)
                ax.plot([place + shift] * len(values), values, ".", color=shade, alpha=0.4, markersize=4)
            ax.plot([], [], "o", color=shade, label=f"A1 − {other}")
        ax.axhline(0, color="#1e2429", linewidth=0.8)
        ax.set_xticks(range(len(study.budgets)), [f"{n:,}" if n else "all" for n in study.budgets])
        ax.set_xlim(-0.5, len(study.budgets) - 0.5)
        ax.set_title(NAMES[measure].split(":")[0], fontsize=9)
    figure.axes[0].legend()
    figure.supxlabel("labelled records", fontsize=9)
    return figure


def accuracies(study: Study) -> str:
    """Accuracy against the number of labels."""
    figure, (ax,) = new_figure(1, width=5)
    arms = tuple(a for a in ("A0", "A1", "A2", "A5", "A5r", "A7") if a in study.variants)
    shades = colors(arms)
    for arm in arms:
        values = {n: study.value(arm, n, "accuracy") for n in study.budgets}
        found = {str(n or "all"): interval(list(v.values())) for n, v in values.items() if v}
        error = [f[0] - f[1] if math.isfinite(f[1]) else 0 for f in found.values()]
        means = [f[0] for f in found.values()]
        ax.errorbar(list(found), means, yerr=error, marker="o", capsize=3, color=shades[arm], label=arm)
    ax.set(title="test accuracy, %", xlabel="labelled records")
    if ax.has_data():
        ax.legend()
    return tag(figure, "accuracy against labels")


# ---- the page --------------------------------------------------------------------------------------------------------


def show(values: list[float]) -> str:
    if not values:
        return "not run"
    mean, low, high = interval(values)
    return f"{mean:+.4g} [{low:+.3g}, {high:+.3g}]" if len(values) > 1 else f"{mean:+.4g} (one seed)"


def condition_table(found: list[tuple[Condition, list[float], str]]) -> str:
    rows = []
    for condition, values, state in found:
        drawn = "–" if len(values) < 2 else "[{:+.3g}, {:+.3g}]".format(*bootstrap(values))
        rows.append((condition.sentence(), show(values), drawn, len(values), state))
    head = ("condition", "difference, 95 % interval (t)", "bootstrap", "seeds", "")
    return table(head, rows, numeric=(1, 2, 3))


def results_rows(study: Study, labels: int) -> tuple[tuple[str, ...], list[tuple]]:
    """(head, rows): a row a variant, mean and 95 % half-width over seeds, at the end, on held-out records."""
    measures = ("accuracy", "V", "g_inst", "g_cls", "nt_xent_all_0.5", "nt_xent_same_0.5", "alignment", "consistency",
                "rank")  # fmt: skip
    rows = []
    for variant in study.variants:
        cells = []
        for measure in measures:
            values = list(study.value(variant, labels, measure).values())
            mean, low, _ = interval(values) if values else (math.nan, math.nan, 0)
            half = f" ± {mean - low:.2g}" if len(values) > 1 else ""
            cells.append(f"{mean:.4g}{half}" if values else "not run")
        rows.append((variant, len(study.value(variant, labels, "accuracy")), *cells))
    return ("arm", "seeds", *(NAMES[m].split(":")[0] for m in measures)), rows


def budget_name(labels: int) -> str:
    return f"{labels:,} labels" if labels else "all labels"


def markdown(study: Study) -> str:
    """For a README: verdicts, what dropout and its second mask do, and all arms at the end."""
    budgets = [budget_name(n) for n in study.budgets]
    verdicts = [(CONDITIONS[name][0], *(verdict(study, name, n)[0] for n in study.budgets)) for name in CONDITIONS]
    pairs = []
    for measure in SUMMARY:
        for other in ("A0", "A2"):
            values = [study.pairs(Condition("A1", measure, other, "+"), n) for n in study.budgets]
            pairs.append((f"{NAMES[measure].split(':')[0]}, A1 − {other}", *map(show, values)))
    seeds = ", ".join(map(str, study.seeds))
    lines = [f"**{study.about}**: {len(study.cards)} of {study.planned} runs, seeds {seeds}", ""]
    lines += [*grid(("verdict", *budgets), verdicts), "", *grid(("difference, 95 % interval", *budgets), pairs), ""]
    for labels in study.budgets:
        lines += [f"All arms at the end, {budget_name(labels)}:", "", *grid(*results_rows(study, labels)), ""]
    return "\n".join(lines)


def grid(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a markdown table, numbers to the right."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]]


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def text(*sentences: str) -> str:
    return "".join(f"<p>{escape(s)}</p>" for s in sentences)


def headline(study: Study) -> str:
    rows = [(CONDITIONS[name][0], *(verdict(study, name, n)[0] for n in study.budgets)) for name in CONDITIONS]
    rule = (
        "Supported: every condition that was run holds, its paired 95 % interval lying wholly on the right side of "
        "zero. Refuted: one of them lies wholly on the wrong side. Undecided: anything else, as when few seeds leave "
        "intervals wide. The rule and the conditions on A0, A1 and A2 were fixed before any run, those on A4 and A5 "
        "and the fewest seeds after a smoke run; the primary measures are g_inst and NT-Xent with same-class "
        "negatives, on held-out records."
    )
    told = "A1 minus A0 (what dropout does) and A1 minus A2 (what its second mask does), 95 % intervals; dots: seeds."
    figure = tag(summary(study), "A1 minus A0 and A1 minus A2 by labels") + f'<p class="muted">{told}</p>'
    verdicts = table(("", *map(budget_name, study.budgets)), rows)
    return section("Verdict", verdicts, deciding(study), figure, text(rule))


def deciding(study: Study) -> str:
    """A list: what fails, or is open, where a hypothesis is not supported."""
    lines = []
    for name in CONDITIONS:
        for labels in study.budgets:
            state, found = verdict(study, name, labels)
            wanted = {"refuted": "fails", "undecided": "open"}.get(state)
            names = [condition.sentence() for condition, _, became in found if became == wanted]
            if names:
                told = f"{name}, {budget_name(labels)}, {state}: {wanted}: {'; '.join(names)}"
                lines.append(f"<li>{escape(told)}</li>")
    return f'<details><summary>What decides</summary><ul>{"".join(lines)}</ul></details>' if lines else ""


PROVABLE = (
    "With M masks the expected cross-entropy is the cross-entropy of the geometric mean of the predictions plus a "
    "consistency term that knows no label (for two masks the Bhattacharyya distance); the squared loss contains the "
    "pairwise invariance loss with weight one. The tests check this to 1e-10. So agreement of predictions is implicit "
    "in the loss.",
    "Not implied: agreement of the hidden features where the classifier does not look, and repulsion between records "
    "of one class. Training pulls all records of a class together with or without noise, so a high cosine of two masks "
    "proves nothing by itself; that is why A0, A2 and the same-class gap are here.",
)


def single_pass(study: Study, labels: int) -> str:
    """A10 beside A1 where A10 has seen every record once at most."""
    curves_of = study.curve("A10", labels, "V")
    if not curves_of:
        return ""
    epochs = {m["step"]: m["epoch"] for (v, n, _), card in study.cards.items() if (v, n) == ("A10", labels)
              for m in card["measurements"]}  # fmt: skip
    step = max(s for s, e in epochs.items() if e <= 1 + 1e-9)
    rows = []
    for measure in ("V", "g_inst", "nt_xent_same_0.5", "consistency"):
        a, b = (study.value(v, labels, measure, step=step) for v in ("A1", "A10"))
        rows.append((NAMES[measure], show([a[s] - b[s] for s in a if s in b])))
    told = f"After {step} steps A10 has met no record twice, A1 has repeated its {budget_name(labels)} many times."
    return f"<h3>One pass (A10)</h3>{text(told)}{table(('', 'A1 − A10, 95 % interval'), rows, numeric=(1,))}"


def write_page(study: Study) -> str:
    """The whole page, one part a label budget."""
    claim = "<ol>" + "".join(f"<li>{escape(s)}</li>" for s in CLAIM) + "</ol>"
    seeds = ", ".join(map(str, study.seeds)) or "none"
    parts = [
        f'<header><p class="eyebrow">{escape(study.method)}, grid {escape(study.grid)}: {escape(study.about)}</p>'
        f"<h1>{TITLE}</h1>"
        f"<p>{len(study.cards)} of {study.planned} runs, seeds {seeds}.</p></header>",
        section("The claim, in five sentences", claim),
        section("What is certain without a run", text(*PROVABLE)),
    ]
    if not study.cards:
        parts.append(section("Verdict", text("No run is done.")))
        return page(TITLE, "\n".join(parts))
    parts.append(headline(study))
    control = ("V", "g_inst", "nt_xent_same_0.5", "nt_xent_all_0.5", "consistency", "accuracy")
    for labels in study.budgets:
        body = {name: verdict(study, name, labels) for name in CONDITIONS}

        def hypothesis(name: str, *figures: str, body=body, labels=labels) -> str:
            state, found = body[name]
            return section(f"{CONDITIONS[name][0]} ({budget_name(labels)}): {state}", *figures, condition_table(found))

        parts += [
            section(
                f"The key control: A2 beside A1 ({budget_name(labels)})",
                text("A2 has A1's noise, but a record keeps its mask in all epochs: never two masks of one record. "
                     "What the claim is about can only be in the difference A1 − A2. Grey dots: seeds."),
                differences(study, labels, "A1", "A2", control),
                curves(study, labels, ("V", "g_inst", "nt_xent_same_0.5"), ("A1", "A2")),
            ),
            hypothesis("weak", terms(study, labels)),
            hypothesis("strong", curves(study, labels, ("g_inst", "nt_xent_same_0.5"), ("A0", "A1", "A2"))),
            hypothesis("H1", curves(study, labels, ("V", "g_inst", "g_cls"), ("A0", "A1", "A2", "A9")),
                       single_pass(study, labels)),
            hypothesis("H2", curves(study, labels, ("nt_xent_all_0.5", "nt_xent_other_0.5", "nt_xent_same_0.5"),
                                    ("A0", "A1", "A2")),
                       curves(study, labels, ("alignment", "gradient_nt_xent", "gradient_alignment"),
                              ("A0", "A1", "A2"))),
            hypothesis("H3", curves(study, labels, ("V", "g_inst"), ("A1", "A6", "A6-K4"))) if "A6" in study.variants
            else "",
            hypothesis("H4", curves(study, labels, ("V", "g_inst"), ("A0", "A1", "A3", "A3a", "A4", "A4x")),
                       curves(study, labels, ("sigma",), ("A4", "A4-beta0.01", "A4x"), "own"))
            if "A4" in study.variants else "",
            hypothesis("H5", accuracies(study)),
        ]  # fmt: skip
        head, rows = results_rows(study, labels)
        shown = table(head, rows, numeric=range(1, len(head)))
        parts.append(section(f"All arms at the end ({budget_name(labels)}), held-out records, common noise", shown))
    arms = [(name, arm.about) for name, arm in ARMS.items() if any(v.split("-")[0] == name for v in study.variants)]
    parts.append(section("The arms", table(("", ""), arms)))
    parts.append(section("How it was measured", text(
        "Evaluation mode, only the noise on: element dropout of the input, the same for all arms (sigma: the arm's "
        "own), masks that depend on the record alone. Cosines: of features minus their mean. NT-Xent: temperature 0.5, "
        "divided by its level of chance. Intervals: Student's t over seeds, paired; the bootstrap of the sheet beside "
        "it, which is too narrow for so few seeds and decides nothing. No interval is corrected for their number."
    )))  # fmt: skip
    return page(TITLE, "\n".join(parts))
