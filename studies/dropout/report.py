"""The page of a study: the claim, each hypothesis with its figure, and the verdict of `verdict.py`."""

import math
from html import escape

import matplotlib
from matplotlib.figure import Figure

from common.html import PALETTE, page, table
from eval.figures import STYLE, styled, tag
from methods.dropout_ssl.config import ARMS

from ..study import Table
from .verdict import CONDITIONS, CORE, NAMES, SUMMARY, Condition, Results, bootstrap, interval, verdict

TITLE = "Is dropout a contrastive objective?"
CLAIM = (
    "With dropout or VAE noise before or inside the encoder, a record meets the network under another mask in every "
    "epoch.",
    "All these masked copies are pulled to one label, so their representations must come to agree: m1 ≈ m2 ≈ … ≈ mn.",
    "That is what a self-supervised objective does with two views, the label standing where SwAV has its coded "
    "prototype.",
    "So supervised training with noise already minimizes an auxiliary self-supervised loss, without extra computation.",
    "Instead of many epochs one may put several masked copies into one batch, and VAE noise may replace dropout.",
)

# ---- figures ---------------------------------------------------------------------------------------------------------


def colors(arms: tuple[str, ...]) -> dict[str, str]:
    """A0, A1 and A2 look the same in all figures; the others only differ within one."""
    ordered = [*CORE, *(a for a in arms if a not in CORE)]
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(ordered)}


def new_figure(columns: int, width: float = 3.4, height: float = 2.9):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def curves(
    results: Results, labels: int, measures: tuple[str, ...], arms: tuple[str, ...], kind: str = "held-out"
) -> str:
    """One panel per measure: mean over seeds against optimizer steps, 95 % interval shaded."""
    figure, axes = new_figure(len(measures))
    shades = colors(arms)
    for ax, measure in zip(axes, measures, strict=True):
        for arm in (a for a in arms if a in results.variants):
            by_seed = list(results.curve(arm, labels, measure, kind).values())
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
        ax.set_xlabel("optimizer steps")
    if axes[0].lines:
        axes[0].legend()
    return tag(figure, f"{', '.join(measures)} against steps, {labels} labels")


def differences(results: Results, labels: int, arm: str, other: str, measures: tuple[str, ...]) -> str:
    """Paired differences with their 95 % interval, each in its own panel, and every seed as a dot."""
    figure, axes = new_figure(len(measures), width=1.75, height=2.6)
    for ax, measure in zip(axes, measures, strict=True):
        values = results.pairs(Condition(arm, measure, other, "+"), labels)
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


def terms(results: Results, labels: int) -> str:
    """The masked cross-entropy at the end, as its two exact parts."""
    figure, (ax,) = new_figure(1, width=6.5)
    arms = [v for v in results.variants if results.value(v, labels, "ce_geo")]
    for key, shade, bottom in (("ce_geo", PALETTE[0], None), ("consistency", PALETTE[1], "ce_geo")):
        height = [interval(list(results.value(a, labels, key).values()))[0] for a in arms]
        below = [interval(list(results.value(a, labels, bottom).values()))[0] for a in arms] if bottom else None
        ax.bar(arms, height, bottom=below, color=shade, label=NAMES[key])
    ax.tick_params(axis="x", labelrotation=60 if len(arms) > 6 else 0)
    ax.set_title("held-out cross-entropy under masks, in its two parts")
    if ax.has_data():
        ax.legend()
    return tag(figure, "parts of the cross-entropy")


@styled
def summary(results: Results) -> Figure:
    """The claim in one figure: A1 minus A0 and A1 minus A2 by number of labels, 95 % intervals, paired by seed."""
    figure = Figure(figsize=(2.3 * len(SUMMARY), 2.9), layout="constrained")
    for ax, measure in zip(figure.subplots(1, len(SUMMARY)), SUMMARY, strict=True):
        for shift, (other, shade) in zip((-0.1, 0.1), (("A0", PALETTE[0]), ("A2", PALETTE[1])), strict=True):
            found = [results.pairs(Condition("A1", measure, other, "+"), n) for n in results.budgets]
            for place, values in enumerate(found):
                if len(values) > 1:
                    mean, low, high = interval(values)
                    bar = [[mean - low], [high - mean]]
                    ax.errorbar([place + shift], [mean], yerr=bar, marker="o", capsize=3, color=shade)
                ax.plot([place + shift] * len(values), values, ".", color=shade, alpha=0.4, markersize=4)
            ax.plot([], [], "o", color=shade, label=f"A1 − {other}")
        ax.axhline(0, color="#1e2429", linewidth=0.8)
        ax.set_xticks(range(len(results.budgets)), [f"{n:,}" if n else "all" for n in results.budgets])
        ax.set_xlim(-0.5, len(results.budgets) - 0.5)
        ax.set_title(NAMES[measure].split(":")[0], fontsize=9)
    figure.axes[0].legend()
    figure.supxlabel("labeled records", fontsize=9)
    return figure


def accuracies(results: Results) -> str:
    """Accuracy against the number of labels."""
    figure, (ax,) = new_figure(1, width=5)
    arms = tuple(a for a in ("A0", "A1", "A2", "A5", "A5r", "A7") if a in results.variants)
    shades = colors(arms)
    for arm in arms:
        values = {n: results.value(arm, n, "accuracy") for n in results.budgets}
        found = {str(n or "all"): interval(list(v.values())) for n, v in values.items() if v}
        error = [f[0] - f[1] if math.isfinite(f[1]) else 0 for f in found.values()]
        means = [f[0] for f in found.values()]
        ax.errorbar(list(found), means, yerr=error, marker="o", capsize=3, color=shades[arm], label=arm)
    ax.set(title="test accuracy, %", xlabel="labeled records")
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


def results_rows(results: Results, labels: int) -> tuple[tuple[str, ...], list[tuple]]:
    """(head, rows): a row a variant, mean and 95 % half-width over seeds, at the end, on held-out records."""
    measures = (
        "accuracy",
        "V",
        "g_inst",
        "g_cls",
        "nt_xent_all_0.5",
        "nt_xent_same_0.5",
        "alignment",
        "consistency",
        "rank",
    )
    rows = []
    for variant in results.variants:
        cells = []
        for measure in measures:
            values = list(results.value(variant, labels, measure).values())
            mean, low, _ = interval(values) if values else (math.nan, math.nan, 0)
            half = f" ± {mean - low:.2g}" if len(values) > 1 else ""
            cells.append(f"{mean:.4g}{half}" if values else "not run")
        rows.append((variant, len(results.value(variant, labels, "accuracy")), *cells))
    return ("arm", "seeds", *(NAMES[m].split(":")[0] for m in measures)), rows


def budget_name(labels: int) -> str:
    return f"{labels:,} labels" if labels else "all labels"


def tables(results: Results) -> list[Table]:
    """Verdicts, what dropout and its second mask do, and all arms at the end."""
    budgets = [budget_name(n) for n in results.budgets]
    verdicts = [(CONDITIONS[name][0], *(verdict(results, name, n)[0] for n in results.budgets)) for name in CONDITIONS]
    pairs = []
    for measure in SUMMARY:
        for other in ("A0", "A2"):
            values = [results.pairs(Condition("A1", measure, other, "+"), n) for n in results.budgets]
            pairs.append((f"{NAMES[measure].split(':')[0]}, A1 − {other}", *map(show, values)))
    return [
        Table(("verdict", *budgets), verdicts),
        Table(("difference, 95 % interval", *budgets), pairs),
        *(Table(*results_rows(results, n), f"All arms at the end, {budget_name(n)}:") for n in results.budgets),
    ]


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def text(*sentences: str) -> str:
    return "".join(f"<p>{escape(s)}</p>" for s in sentences)


def headline(results: Results) -> str:
    rows = [(CONDITIONS[name][0], *(verdict(results, name, n)[0] for n in results.budgets)) for name in CONDITIONS]
    rule = (
        "Supported: every condition that was run holds, its paired 95 % interval lying entirely on the right side of "
        "zero. Refuted: one of them lies entirely on the wrong side. Undecided: anything else, as when few seeds leave "
        "intervals wide. The rule and the conditions on A0, A1 and A2 were fixed before any run, those on A4 and A5 "
        "and the fewest seeds after a smoke run; the primary measures are g_inst and NT-Xent with same-class "
        "negatives, on held-out records."
    )
    caption = (
        "A1 minus A0 (what dropout does) and A1 minus A2 (what its second mask does), 95 % intervals; dots: seeds."
    )
    figure = tag(summary(results), "A1 minus A0 and A1 minus A2 by labels") + f'<p class="muted">{caption}</p>'
    verdicts = table(("", *map(budget_name, results.budgets)), rows)
    return section("Verdict", verdicts, deciding(results), figure, text(rule))


def deciding(results: Results) -> str:
    """A list: what fails, or is open, where a hypothesis is not supported."""
    lines = []
    for name in CONDITIONS:
        for labels in results.budgets:
            state, found = verdict(results, name, labels)
            wanted = {"refuted": "fails", "undecided": "open"}.get(state)
            names = [condition.sentence() for condition, _, became in found if became == wanted]
            if names:
                line = f"{name}, {budget_name(labels)}, {state}: {wanted}: {'; '.join(names)}"
                lines.append(f"<li>{escape(line)}</li>")
    return f"<details><summary>What decides</summary><ul>{''.join(lines)}</ul></details>" if lines else ""


PROVABLE = (
    "With M masks the expected cross-entropy is the cross-entropy of the geometric mean of the predictions plus a "
    "consistency term without labels (for two masks the Bhattacharyya distance), which the tests check to 1e-10; "
    "the squared loss contains the pairwise invariance loss with weight one. So agreement of predictions is implicit "
    "in the loss.",
    "Not implied: agreement of the hidden features where the classifier does not look, and repulsion between records "
    "of one class. Training pulls all records of a class together with or without noise, so a high cosine of two masks "
    "proves nothing by itself; that is why A0, A2 and the same-class gap are here.",
)


def single_pass(results: Results, labels: int) -> str:
    """A10 next to A1 as long as A10 has seen every record at most once."""
    curves_of = results.curve("A10", labels, "V")
    if not curves_of:
        return ""
    epochs = {
        m["step"]: m["step"] * card["epochs"] / card["steps"]
        for (v, n, _), card in results.cards.items()
        if (v, n) == ("A10", labels)
        for m in card["measurements"]
    }
    step = max(s for s, e in epochs.items() if e <= 1 + 1e-9)
    rows = []
    for measure in ("V", "g_inst", "nt_xent_same_0.5", "consistency"):
        a, b = (results.value(v, labels, measure, step=step) for v in ("A1", "A10"))
        rows.append((NAMES[measure], show([a[s] - b[s] for s in a if s in b])))
    sentence = f"After {step} steps A10 has met no record twice, A1 has repeated its {budget_name(labels)} many times."
    return f"<h3>One pass (A10)</h3>{text(sentence)}{table(('', 'A1 − A10, 95 % interval'), rows, numeric=(1,))}"


def write_page(results: Results) -> str:
    """The complete page, one part per label budget."""
    claim = "<ol>" + "".join(f"<li>{escape(s)}</li>" for s in CLAIM) + "</ol>"
    seeds = ", ".join(map(str, results.seeds)) or "none"
    parts = [
        f'<header><p class="eyebrow">{escape(results.about)}</p>'
        f"<h1>{TITLE}</h1>"
        f"<p>{len(results.cards)} of {results.planned} runs, seeds {seeds}.</p></header>",
        section("The claim, in five sentences", claim),
        section("What is certain without a run", text(*PROVABLE)),
    ]
    if not results.cards:
        parts.append(section("Verdict", text("No run is done.")))
        return page(TITLE, "\n".join(parts))
    parts.append(headline(results))
    control = ("V", "g_inst", "nt_xent_same_0.5", "nt_xent_all_0.5", "consistency", "accuracy")
    for labels in results.budgets:
        body = {name: verdict(results, name, labels) for name in CONDITIONS}

        def hypothesis(name: str, *figures: str, body=body, labels=labels) -> str:
            state, found = body[name]
            return section(f"{CONDITIONS[name][0]} ({budget_name(labels)}): {state}", *figures, condition_table(found))

        parts += [
            section(
                f"The key control: A2 next to A1 ({budget_name(labels)})",
                text(
                    "A2 has A1's noise, but a record keeps its mask in all epochs: never two masks of one record. "
                    "What the claim is about can only be in the difference A1 − A2. Gray dots: seeds."
                ),
                differences(results, labels, "A1", "A2", control),
                curves(results, labels, ("V", "g_inst", "nt_xent_same_0.5"), ("A1", "A2")),
            ),
            hypothesis("weak", terms(results, labels)),
            hypothesis("strong", curves(results, labels, ("g_inst", "nt_xent_same_0.5"), ("A0", "A1", "A2"))),
            hypothesis(
                "H1",
                curves(results, labels, ("V", "g_inst", "g_cls"), ("A0", "A1", "A2", "A9")),
                single_pass(results, labels),
            ),
            hypothesis(
                "H2",
                curves(
                    results, labels, ("nt_xent_all_0.5", "nt_xent_other_0.5", "nt_xent_same_0.5"), ("A0", "A1", "A2")
                ),
                curves(results, labels, ("alignment", "gradient_nt_xent", "gradient_alignment"), ("A0", "A1", "A2")),
            ),
            hypothesis("H3", curves(results, labels, ("V", "g_inst"), ("A1", "A6", "A6-K4")))
            if "A6" in results.variants
            else "",
            hypothesis(
                "H4",
                curves(results, labels, ("V", "g_inst"), ("A0", "A1", "A3", "A3a", "A4", "A4x")),
                curves(results, labels, ("sigma",), ("A4", "A4-beta0.01", "A4x"), "own"),
            )
            if "A4" in results.variants
            else "",
            hypothesis("H5", accuracies(results)),
        ]
        head, rows = results_rows(results, labels)
        shown = table(head, rows, numeric=range(1, len(head)))
        parts.append(section(f"All arms at the end ({budget_name(labels)}), held-out records, common noise", shown))
    arms = [(name, arm.about) for name, arm in ARMS.items() if any(v.split("-")[0] == name for v in results.variants)]
    parts.append(section("The arms", table(("", ""), arms)))
    parts.append(
        section(
            "How it was measured",
            text(
                "Evaluation mode, only the noise on: element dropout of the input, the same for all arms (sigma: the "
                "arm's own), masks that depend on the record alone. Cosines: of features minus their mean. NT-Xent: "
                "temperature 0.5, divided by its level of chance. Intervals: Student's t over seeds, paired; the "
                "bootstrap is listed next to it; for so few seeds it is too narrow, and it decides nothing. No "
                "interval is corrected for their number."
            ),
        )
    )
    return page(TITLE, "\n".join(parts))
