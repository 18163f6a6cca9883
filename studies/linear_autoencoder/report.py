"""What `questions.py` measured: a table and one self-contained HTML page with one figure per question."""

from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from common.files import write_atomic
from common.html import PALETTE, page, table
from eval.figures import GRAY, styled, tag


def show(results: dict, out: Path, console: Console) -> None:
    """Print the table, write the page to `out`."""
    rows = summary(results)
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="derived and measured", title_justify="left")
    for i, name in enumerate(("question", "derived", "measured")):
        printed.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    write_atomic(out, write_page(results, rows))
    console.print(f"page {out}", markup=False, soft_wrap=True)


def summary(results: dict) -> list[tuple[str, str, str]]:
    """(question, value derived or computed independently before this code, value measured here)."""
    sub, done, gaps = results["subspaces"], results["denoising"], results["completions"]
    near, steps, wide = results["conditioning"], results["unrolling"], results["identity"]

    def over(rows: list, i: int) -> str:
        values = [row[i] for row in rows]
        return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

    rows = [("PCA against the truth, largest angle (degrees)", "1.04", over([(v,) for v in sub["pca to truth"]], 0))]
    for i, keep in enumerate(sub["keeps"]):
        rows.append((f"separate, keep {keep:g}: col(B) against PCA", "0.3", over(sub["even"][keep], 0)))
        rows.append((f"separate, keep {keep:g}: row(A) against PCA", ("22", "27", "29")[i], over(sub["even"][keep], 1)))
    for keep in sub["keeps"]:
        rows.append((f"uneven rows, keep {keep:g}: col(B)", "0.6 to 0.9", over(sub["uneven"][keep], 0)))
        rows.append((f"uneven rows, keep {keep:g}: row(A)", "73 to 77", over(sub["uneven"][keep], 1)))
    rows.append(("PCA's gain on full input (dB)", "8.93", f"{done['pca']:.2f}"))
    for keep, derived, value in zip(
        done["keeps"][1:], ("8.25", "5.55", "-0.13"), done["curves"]["separate"][1:], strict=True
    ):
        rows.append((f"separate, keep {keep:g}: gain on full input (dB)", derived, f"{value:.2f}"))
    derived = {
        "even": {"separate": (".079", ".155", ".323"), "tied, PCA's B": (".018", ".032", ".110")},
        "uneven": {"separate": (".39", ".74", "1.4"), "tied, PCA's B": (".042", ".11", ".72")},
    }
    for kind, forms in derived.items():
        for form, values in forms.items():
            for i, keep in enumerate(gaps["keeps"]):
                name = f"{form}{', uneven rows' * (kind == 'uneven')}, keep {keep:g}: error in the gaps"
                rows.append((name, values[i], f"{gaps[kind][form][i]:.3f}"))
    widths = list(wide["widths"])
    denoising = wide["gains"]["denoising"]
    rows.append(("denoising at full rank: gain (dB)", "4.6", f"{denoising[widths.index(64)]:.2f}"))
    rows.append(("denoising at rank 8: gain (dB)", "9.0", f"{denoising[widths.index(8)]:.2f}"))
    known = {
        64: "1.0; .010/.011",
        32: "1.9; .023/.026",
        16: "3.4; .065/.086",
        12: "5.4; .12/.18",
        10: "7.9; .25/.53",
        9: "11; .46/2.2",
        8: "26; 2.1/94",
        6: "6.4; .45/.83",
    }
    for size, text in known.items():
        i = near["sizes"].index(size)
        median, mean = near["pinv"][i]
        measured = f"{near['condition'][i][1]:.2g}; {median:.2g}/{mean:.2g}"
        rows.append((f"tied, {size} entries seen: condition; error median/mean", text, measured))
    for d, value in ((1, "4.9"), (5, ".80"), (20, "3.9e-3"), (100, "< 1e-13")):
        error = steps["error"][steps["steps"].index(d)]
        rows.append((f"unrolled, {d} step{'s' * (d > 1)}: distance to the pseudo-inverse", value, f"{error:.2g}"))
    for name, value in results["mask dependence"].items():
        derived = "0" if name == "separate" else "> 0"
        rows.append((f"{name}: variance of the encoder over masks", derived, f"{value:.3f}"))
    for name, (encoder, decoder) in results["update coverage"].items():
        rows.append((f"{name}: dropped rows with a gradient, encoder / decoder", "0 / 1", f"{encoder:g} / {decoder:g}"))
    return rows


# ---- figures ---------------------------------------------------------------------------------------------------------


KINDS = {"even": "rows of one size", "uneven": "uneven rows"}


def _line(ax: Axes, x, y, name: str, i: int, style: str = "-", marker: str = "o") -> None:
    ax.plot(x, y, style, color=PALETTE[i], label=name, marker=marker)


@styled
def subspaces(found: dict) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    for ax, (kind, title) in zip(figure.subplots(1, 2, sharey=True), KINDS.items(), strict=True):
        for i, name in enumerate(("columns of B", "rows of A")):
            for keep in found["keeps"]:
                values = [row[i] for row in found[kind][keep]]
                ax.plot([keep] * len(values), values, ".", color=PALETTE[i], alpha=0.45)
            means = [sum(row[i] for row in found[kind][k]) / len(found[kind][k]) for k in found["keeps"]]
            _line(ax, found["keeps"], means, f"{name}, closed form", i, marker="")
            if kind == "even":
                trained = [found["trained"][k][i] for k in found["keeps"]]
                ax.plot(found["keeps"], trained, "x", color=PALETTE[i], label=f"{name}, trained", markersize=7)
        ax.set(xlabel="keep fraction", xticks=found["keeps"], title=title, yscale="log")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.axes[1].legend(*handles, loc="center")
    figure.axes[0].set_ylabel("largest angle to PCA (degrees)")
    return figure


@styled
def denoising(found: dict) -> Figure:
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.axhline(found["expected"], color=GRAY, linestyle=":", linewidth=1.2)
    ax.text(0.26, found["expected"] + 0.15, f"10 log10(m / r) = {found['expected']:.2f} dB", fontsize=8, color=GRAY)
    ax.axhline(0, color=GRAY, linewidth=0.8)
    styles = ("-", "-", "-", "--")
    for i, (name, values) in enumerate(found["curves"].items()):
        _line(ax, found["keeps"], values, name, i, styles[i])
    ax.set(xlabel="keep fraction in training (1: no mask)", ylabel="denoising gain on full input (dB)")
    ax.set_xticks(found["keeps"])
    ax.legend(loc="lower right")
    return figure


@styled
def completions(found: dict) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    for ax, (kind, title) in zip(figure.subplots(1, 2), KINDS.items(), strict=True):
        for i, (name, values) in enumerate(found[kind].items()):
            _line(ax, found["keeps"], values, name, (7, 0, 2, 3, 4)[i], marker="o" if i else "")
        if kind == "even":
            for i, (name, values) in enumerate(found["trained"].items()):
                color = PALETTE[(0, 2, 3)[i]]
                ax.plot(found["keeps"], values, "x", color=color, markersize=7, label=f"{name}, trained")
        ax.set(xlabel="keep fraction", xticks=found["keeps"], yscale="log", title=title)
        ax.legend(fontsize=7.5, ncols=2 if kind == "even" else 1, loc="lower left")
        low, high = ax.get_ylim()
        ax.set_ylim(low / (6 if kind == "even" else 2), high)
    figure.axes[0].set_ylabel("squared error in the gaps")
    return figure


@styled
def identity(found: dict) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(found["widths"]))
    for i, (name, values) in enumerate(found["gains"].items()):
        _line(left, places, values, name, i)
    left.set(xlabel="width of the latent (input: 64, pattern: 8)", title="the optimum")
    left.set_ylabel("gain on full input (dB)")
    left.set_xticks(list(places), [str(w) for w in found["widths"]])
    left.axhline(0, color=GRAY, linewidth=0.8)
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 0.08))
    for i, (name, points) in enumerate(found["training"].items()):
        style = "-" if ":" not in name else ":" if "seen" in name else "--"
        _line(right, [p[0] for p in points], [p[1] for p in points], name, min(i, 2), style, marker="")
    right.axhline(0, color=GRAY, linewidth=0.8)
    right.set(xlabel="training step", title="unrolled, 3 steps, latent of 64, in training")
    right.legend(loc="lower right", fontsize=7.5)
    return figure


@styled
def conditioning(found: dict) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, median, high = zip(*found["condition"], strict=True)
    left.fill_between(found["sizes"], low, high, color=PALETTE[0], alpha=0.2, linewidth=0)
    _line(left, found["sizes"], median, "median; band: 10 to 90 % of the masks", 0)
    left.set(xscale="log", yscale="log", ylabel="condition number of the kept rows", title="condition")
    for i, name in enumerate(("pinv", "ridge 0.001", "ridge 0.01")):
        _line(right, found["sizes"], [v[0] for v in found[name]], f"{name}, median", i)
        _line(right, found["sizes"], [v[1] for v in found[name]], f"{name}, mean", i, "--", marker="")
    right.set(xscale="log", yscale="log", ylabel="squared error of the reconstruction", title="error")
    for ax in (left, right):
        ax.axvline(8, color=GRAY, linestyle=":", linewidth=1.2)
        ax.set_xlabel("entries seen (dotted: r = 8)")
        ax.set_xticks([4, 6, 8, 12, 16, 32, 64], ["4", "6", "8", "12", "16", "32", "64"])
        ax.minorticks_off()
        ax.legend()
    return figure


@styled
def unrolling(found: dict) -> Figure:
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    _line(first, found["steps"], [max(e, 1e-16) for e in found["error"]], "", 0)
    first.set(xscale="log", yscale="log", xlabel="steps", title="distance to the pseudo-inverse")
    for i, (d, values) in enumerate(found["filter"].items()):
        _line(second, found["s"], values, f"{d}", i, marker="")
    second.set(xlabel="singular value / largest", title="share that is reconstructed")
    second.legend(title="steps")
    _line(third, found["wide steps"], found["gains"], "", 2)
    third.axhline(0, color=GRAY, linewidth=0.8)
    third.set(xscale="log", xlabel="steps", title="gain (dB), latent of 64")
    return figure


@styled
def flags(found: dict) -> Figure:
    figure = Figure(figsize=(5.8, 3.6), layout="constrained")
    ax = figure.subplots()
    styles = ("-", "-", "-", "--", "-")
    for i, (name, values) in enumerate(found["errors"].items()):
        label = f"network, {name}" if name.startswith("x") else name
        _line(ax, found["keeps"], values, label, i, styles[i])
    ax.set(xlabel="keep fraction at test (training: all from 0.2 to 0.9)", yscale="log")
    ax.set_ylabel("squared error in the gaps")
    ax.legend()
    return figure


def write_page(results: dict, rows: list[tuple[str, str, str]]) -> str:
    """The HTML document."""
    sub, wide, marked = results["subspaces"], results["identity"], results["flags"]
    excess = max(value[2] for value in sub["trained"].values())
    last = {name: points[-1][1] for name, points in wide["training"].items()}
    best = {name: max(points, key=lambda p: p[1]) for name, points in wide["training"].items()}
    peaks = [
        f"{n} peaks at {best[n][1]:.1f} dB (step {best[n][0]}) and ends at {last[n]:.1f} dB"
        for n in last
        if ":" not in n
    ]
    blind, flagged = (marked["errors"][name] for name in ("x", "x and flags"))
    gap = marked["zero or gap"]
    sections = [
        (
            "Whose subspace is learned?",
            subspaces(sub),
            "The columns of B span PCA's subspace. The rows of A do not: masking is ridge regression on each "
            "coordinate, with a penalty of (1 - p) / p times its variance, so A turns away from coordinates that "
            f"would cost much. Crosses: trained with Adam; their loss is at most {100 * (excess - 1):.2f} % above the "
            "optimum's.",
        ),
        (
            "How much noise goes?",
            denoising(results["denoising"]),
            "With full input. Separate matrices tuned to masked input shrink what they see in full (the 1 / p of "
            "training is absent at inference); rescaling by one fitted number takes part of it back. The tied form "
            "does not know how it was masked in training. Five unrolled steps at half the stable rate are nearly the "
            "pseudo-inverse.",
        ),
        (
            "What is put into the gaps?",
            completions(results["completions"]),
            "Error on dropped entries against the clean data. One matrix for all masks cannot know which neighbors "
            "are missing; the tied and the unrolled form use the kept rows only and come close to the conditional "
            "mean of the true Gaussian. Masks that keep fewer than r + 4 entries are left out, for all of them. "
            "Crosses: trained.",
        ),
        (
            "When does the identity win?",
            identity(wide),
            "Left: the optimum of each task. A vanilla autoencoder with a latent as wide as its input copies (0 dB); "
            "noise or masks keep a gain. Right: the unrolled form with 64 latents in training: "
            + "; ".join(peaks)
            + ". A few steps purify only while the small singular values of B are small, and a vanilla loss does not "
            "keep them so: stop early, or add noise or masks. A form trained on masked input must not meet full input "
            "as it is: with all rows B^T B is 1 / p times as large, the steps overshoot, and the rate must be "
            "multiplied by p.",
        ),
        (
            "How badly conditioned is the tied form?",
            conditioning(results["conditioning"]),
            "With as many entries seen as latents, some mask nearly always meets a set of rows that is close to "
            "singular: the mean error is far above the median. Below r the pseudo-inverse is safe again, because it "
            "has no small singular value left to divide by. A ridge of a hundredth of the mean eigenvalue removes "
            "the peak.",
        ),
        (
            "What do unrolled steps do?",
            unrolling(results["unrolling"]),
            "d steps reconstruct the share 1 - (1 - eta s^2)^d of a direction with singular value s: early stopping "
            "is a soft threshold, and many steps are the pseudo-inverse. Right: with a latent as wide as the input, "
            "B the root of the covariance, one step purifies and many steps return the noise.",
        ),
        (
            "A zero or a gap?",
            flags(marked),
            "A network that gets k * x cannot distinguish a visible zero from a removed entry: the change of "
            f"its output when a zero becomes a gap is {gap['x']:.2g}, with flags {gap['x and flags']:.2g}. For one "
            "linear map flags are a bias per mask and worth nothing on centered data. For a network of one hidden "
            f"layer they change the error from {blind[0]:.3f} to {flagged[0]:.3f} at keep {marked['keeps'][0]:g} and "
            f"from {blind[-1]:.3f} to {flagged[-1]:.3f} at keep {marked['keeps'][-1]:g}.",
        ),
    ]
    parts = [
        '<header><p class="eyebrow">Lecture 16: autoencoders and masks, measured</p>'
        "<h1>Linear masked autoencoders</h1><p>64 observed coordinates, a pattern of 8 dimensions with unit "
        f"variance a coordinate, noise of 0.3; 4096 samples; {results['seeds']} data sets behind each closed "
        "form; "
        f"{results['training steps']} Adam steps behind each trained model.</p></header>"
    ]
    for title, figure, text in sections:
        parts.append(f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{tag(figure, title)}</section>")
    caption = "Derived: computed independently, before this code was written, on other draws."
    numbers = table(("question", "derived", "measured"), rows, numeric=(1, 2), caption=caption)
    parts.append(f"<section><h2>Numbers</h2>{numbers}</section>")
    return page("Linear masked autoencoders", "\n".join(parts))
