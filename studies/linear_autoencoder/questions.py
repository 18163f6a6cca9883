"""The lecture's linear masked autoencoders (`forms.py`), measured: one function per question, plain numbers out.

python -m studies linear-autoencoder [--out FILE] [--quick]      all questions: a table and one HTML page
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.rng import generator

from .forms import (
    COUNT,
    RANK,
    SIGMA,
    LowRank,
    M,
    Network,
    Separate,
    Tied,
    Unrolled,
    angles,
    completion_error,
    conditional_mean,
    denoising_optimum,
    draw_exactly,
    draw_kept,
    gain_db,
    low_rank,
    separate_encode,
    separate_loss,
    separate_optimum,
    spectral_factor,
    stable_eta,
    tied_encode,
    top_eigenvectors,
    train,
    unrolled_closed_form,
    unrolled_encode,
)
from .report import show

NAME = "linear-autoencoder"
TITLE = "The lecture's linear autoencoders, in closed form"
KEEPS = (0.75, 0.5, 0.25)
WIDTHS = (4, 8, 16, 64, 96)
EXTRA_NOISE = SIGMA**2  # variance of the denoising autoencoder's own noise
SEEN_AT_LEAST = RANK + 4  # masks of the tied form: B~^T B~ is close to singular below (see `conditioning`)


def subspaces(seeds: range, steps: int) -> dict:
    """Whose subspace is learned? Largest angles in degrees of col(B) and row(A) to PCA's, per keep, all seeds; trained:
    (A, B) by Adam on the first seed. Also PCA's angle to the truth."""
    found = {"keeps": KEEPS, "even": {}, "uneven": {}, "trained": {}, "pca to truth": []}
    for name, uneven in (("even", False), ("uneven", True)):
        for keep in KEEPS:
            rows = []
            for seed in seeds:
                data = low_rank(seed, uneven=uneven)
                pca = top_eigenvectors(data.covariance, RANK)
                a, b = separate_optimum(data.covariance, keep, RANK)
                rows.append((float(angles(b, pca)[0]), float(angles(a.T, pca)[0])))
                if keep == KEEPS[0] and not uneven:
                    found["pca to truth"].append(float(angles(pca, data.truth)[0]))
            found[name][keep] = rows
    data = low_rank(seeds[0])
    pca = top_eigenvectors(data.covariance, RANK)
    for keep in KEEPS:
        model = train(Separate(M, RANK, generator(0, "A, B")), data, keep=keep, steps=steps)
        a, b = model.a.detach(), model.b.detach()
        best = separate_optimum(data.covariance, keep, RANK)
        excess = separate_loss(b @ a, data.covariance, keep) / separate_loss(best[1] @ best[0], data.covariance, keep)
        found["trained"][keep] = (float(angles(b, pca)[0]), float(angles(a.T, pca)[0]), excess)
    return found


def denoising(seeds: range) -> dict:
    """How much noise goes, on full input, by the keep fraction of training: gains in dB, mean over seeds."""
    found: dict = {"keeps": (1.0, *KEEPS), "pca": [], "expected": 10 * math.log10(M / RANK)}
    curves: dict[str, list] = {"separate": [], "separate, rescaled": [], "tied": [], "unrolled, 5 steps": []}
    for keep in found["keeps"]:
        values = {name: [] for name in curves}
        for seed in seeds:
            data = low_rank(seed)
            a, b = separate_optimum(data.covariance, keep, RANK)
            estimate = data.observed @ (b @ a).T
            # One number refitted on the observed data takes the shrinkage back; the tilt of A stays.
            scale = (estimate * data.observed).sum() / estimate.square().sum()
            pca = top_eigenvectors(data.covariance, RANK)
            full = torch.ones(1, M, dtype=torch.float64)
            eta = 0.5 * stable_eta(pca)
            unrolled = unrolled_encode(pca, data.observed, full, eta, 5) @ pca.T
            values["separate"].append(gain_db(data, estimate))
            values["separate, rescaled"].append(gain_db(data, scale * estimate))
            values["tied"].append(gain_db(data, tied_encode(pca, data.observed, full) @ pca.T))
            values["unrolled, 5 steps"].append(gain_db(data, unrolled))
        for name, numbers in values.items():
            curves[name].append(sum(numbers) / len(numbers))
    return {**found, "curves": curves, "pca": curves["tied"][0]}


def completions(seeds: range, steps: int, count: int = 1024) -> dict:
    """What is put into the gaps: mean squared error on dropped entries against the clean data, per keep fraction."""
    names = ("mean", "separate", "tied, PCA's B", "unrolled, 20 steps", "conditional mean")
    found = {"keeps": KEEPS, "even": {n: [] for n in names}, "uneven": {n: [] for n in names}, "trained": {}}
    for kind, uneven in (("even", False), ("uneven", True)):
        for keep in KEEPS:
            rows = []
            for seed in seeds:
                data = low_rank(seed, uneven=uneven)
                rows.append(completions_of(data, keep, generator(seed, "completion", str(keep)), count))
            for i, name in enumerate(names):
                found[kind][name].append(sum(row[i] for row in rows) / len(rows))
    data = low_rank(seeds[0])
    for keep in KEEPS:
        kept = draw_kept(COUNT, M, keep, generator(0, "completion of the trained"), at_least=SEEN_AT_LEAST)
        models = {
            "separate": train(Separate(M, RANK, generator(0, "A, B")), data, keep=keep, steps=steps),
            "tied": train(Tied(M, RANK, generator(0, "B")), data, keep=keep, at_least=SEEN_AT_LEAST, steps=steps // 3),
            "unrolled": train(Unrolled(M, RANK, generator(0, "B"), 8), data, keep=keep, steps=steps),
        }
        with torch.no_grad():
            for name, model in models.items():
                error = completion_error(data, model(data.observed, kept, keep), kept)
                found["trained"].setdefault(name, []).append(error)
    return found


def completions_of(data: LowRank, keep: float, g: torch.Generator, count: int) -> tuple[float, ...]:
    """Errors of: the mean, separate's optimum, tied and unrolled with PCA's B, the true conditional mean.

    Masks that keep fewer than r + 4 entries are left out, for all of them alike.
    """
    part = LowRank(data.clean[:count], data.observed[:count], data.truth, data.sigma)
    kept, x = draw_kept(count, M, keep, g, at_least=SEEN_AT_LEAST), part.observed
    a, b = separate_optimum(data.covariance, keep, RANK)
    pca = top_eigenvectors(data.covariance, RANK)
    signal = data.truth @ data.truth.T
    eye = torch.eye(M, dtype=torch.float64)
    estimates = (
        torch.zeros_like(x),
        separate_encode(a, x, kept, keep) @ b.T,
        tied_encode(pca, x, kept) @ pca.T,
        unrolled_encode(pca, x, kept, stable_eta(pca), 20) @ pca.T,
        conditional_mean(signal + data.sigma**2 * eye, x, kept, signal),
    )
    return tuple(completion_error(part, e, kept) for e in estimates)


def identity_failure(seed: int, steps: int) -> dict:
    """What a wide latent does: gain on full input in dB by the latent's width, for each task's optimum; and, trained
    with a latent as wide as the input, the gain of the unrolled form during training. The one trained on masks is
    scored on full input, on full input with its rate times keep, and on the seen entries of masked input."""
    data = low_rank(seed)
    s = data.covariance
    maps: dict[str, list] = {"vanilla": [], "denoising": [], "masked, keep 0.5": [], "unrolled, 1 step": []}
    for r in WIDTHS:
        r = min(r, M)  # more columns than rows add nothing to D E
        pca = top_eigenvectors(s, r)
        value, vector = torch.linalg.eigh(s)
        root = vector[:, -r:] * value[-r:].sqrt()  # B with large singular values on the pattern, small ones elsewhere
        a, b = separate_optimum(s, 0.5, r)
        maps["vanilla"].append(pca @ pca.T)
        maps["denoising"].append(denoising_optimum(s, EXTRA_NOISE, r))
        maps["masked, keep 0.5"].append(b @ a)
        maps["unrolled, 1 step"].append(stable_eta(root) * root @ root.T)
    gains = {name: [gain_db(data, data.observed @ w.T) for w in ws] for name, ws in maps.items()}
    curves: dict[str, list] = {}
    full = torch.ones(1, M, dtype=torch.float64)
    kept = draw_kept(COUNT, M, 0.5, generator(seed, "identity"))
    for name, task in (("vanilla", {}), ("denoising", {"noise": EXTRA_NOISE}), ("masked, keep 0.5", {"keep": 0.5})):

        @torch.no_grad()
        def watch(step: int, model: nn.Module, name: str = name) -> None:
            def add(kind: str, estimate: Tensor, mask: Tensor = full) -> None:
                shown = LowRank(mask * data.clean, mask * data.observed, data.truth, data.sigma)
                curves.setdefault(kind, []).append((step, gain_db(shown, mask * estimate)))

            add(name, model(data.observed, full))
            if "keep" in name:
                add(f"{name}: seen entries of masked input", model(data.observed, kept), kept)
                # B^T B of all rows is 1 / keep times that of the kept ones: the same steps need a smaller rate.
                latent = unrolled_encode(model.b, data.observed, full, 0.5 * model.eta, model.steps)
                add(f"{name}: rate times keep", latent @ model.b.T)

        model = train(Unrolled(M, M, generator(0, "B"), 3), data, steps=steps, each=watch, every=50, **task)
        watch(steps, model)
    return {"widths": WIDTHS, "gains": gains, "training": curves}


def conditioning(seed: int, masks: int = 200) -> dict:
    """Near |K| = r: condition number of B~ over masks of exactly |K| entries, and the reconstruction's error against
    the clean data (median and mean over masks) with the pseudo-inverse and with a ridge of 1e-3 and of 1e-2."""
    data = low_rank(seed)
    pca = top_eigenvectors(data.covariance, RANK)
    sizes = (64, 48, 32, 24, 16, 14, 12, 11, 10, 9, 8, 7, 6, 5, 4)
    found: dict = {"sizes": sizes, "condition": [], "pinv": [], "ridge 0.001": [], "ridge 0.01": []}
    for seen in sizes:
        kept = draw_exactly(masks, M, seen, generator(seed, "conditioning", seen))
        values = torch.linalg.svdvals(kept[:, :, None] * pca)[:, : min(seen, RANK)]  # of the rank there can be
        condition = values[:, 0] / values[:, -1]
        found["condition"].append([float(condition.quantile(q)) for q in (0.1, 0.5, 0.9)])
        x, clean = data.observed[:masks], data.clean[:masks]
        for name, ridge in (("pinv", 0.0), ("ridge 0.001", 1e-3), ("ridge 0.01", 1e-2)):
            error = (tied_encode(pca, x, kept, ridge) @ pca.T - clean).square().mean(1)
            found[name].append((float(error.median()), float(error.mean())))
    return found


def unrolling(seed: int) -> dict:
    """Steps against the pseudo-inverse: mean |l_d - l| for one half mask whose kept rows have condition 1.9 and its own
    rate 1 / s_max^2, the filter, and the gain by steps when the latent is as wide as the input (B = S^1/2: large
    singular values on the pattern)."""
    data = low_rank(seed)
    pca = top_eigenvectors(data.covariance, RANK)
    masks = draw_exactly(64, M, 32, generator(seed, "unrolling"))
    values = torch.linalg.svdvals(masks[:, :, None] * pca)
    chosen = int((values[:, 0] / values[:, -1] - 1.9).abs().argmin())
    kept, x = masks[chosen : chosen + 1], data.observed[:256]
    exact, eta, steps = tied_encode(pca, x, kept), float(values[chosen, 0] ** -2), (1, 2, 3, 5, 10, 20, 50, 100)
    error = [float((unrolled_encode(pca, x, kept, eta, d) - exact).norm(dim=1).mean()) for d in steps]
    value, vector = torch.linalg.eigh(data.covariance)
    root = vector * value.sqrt()
    full = torch.ones(1, M, dtype=torch.float64)
    wide_steps = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
    rate = stable_eta(root)
    gains = [gain_db(data, unrolled_closed_form(root, data.observed, full, rate, d) @ root.T) for d in wide_steps]
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    filters = {d: spectral_factor(s, 1.0, d).tolist() for d in (1, 2, 5, 20, 100)}
    wide = {"wide steps": wide_steps, "gains": gains}
    return {"steps": steps, "error": error, **wide, "s": s.tolist(), "filter": filters}


def flags(seed: int, steps: int) -> dict:
    """Does it help to mark which entries are gaps? Completion error of two-layer networks on k * x and on [k * x, k],
    trained with keep fractions from 0.2 to 0.9, next to the linear optimum on [k * x, k]."""
    data = low_rank(seed)
    choices = {"x": False, "x and flags": True}
    models = {name: Network(M, 256, generator(0, "network"), flags=flag) for name, flag in choices.items()}
    for model in models.values():
        train(model, data, keep=(0.2, 0.9), steps=steps, lr=2e-3)
    one = torch.ones(COUNT, 1, dtype=torch.float64)
    inputs = {
        "linear, one map": lambda k: k * data.observed,
        "linear, one map, flags": lambda k: torch.cat([k * data.observed, k, one], 1),
    }
    names = (*models, *inputs, "tied, PCA's B")
    keeps = (0.25, 0.4, 0.5, 0.6, 0.75, 0.85)
    found: dict = {"keeps": keeps, "errors": {name: [] for name in names}}
    g = generator(seed, "flags")
    chance = 0.2 + 0.7 * torch.rand(COUNT, 1, generator=g, dtype=torch.float64)
    fit = draw_kept(COUNT, M, chance, g)
    linear = {name: torch.linalg.lstsq(make(fit), data.observed).solution for name, make in inputs.items()}
    pca = top_eigenvectors(data.covariance, RANK)
    with torch.no_grad():
        for keep in keeps:
            kept = draw_kept(COUNT, M, keep, g, at_least=SEEN_AT_LEAST)
            estimates = {name: model(data.observed, kept) for name, model in models.items()}
            estimates |= {name: make(kept) @ linear[name] for name, make in inputs.items()}
            estimates["tied, PCA's B"] = tied_encode(pca, data.observed, kept) @ pca.T
            for name, estimate in estimates.items():
                found["errors"][name].append(completion_error(data, estimate, kept))
    zero, full = data.observed[:1].clone(), torch.ones(1, M, dtype=torch.float64)
    zero[0, 0] = 0.0  # entry 0 is a zero: seen, and then not
    gap = full.clone()
    gap[0, 0] = 0.0
    with torch.no_grad():
        changes = {name: float((model(zero, full) - model(zero, gap)).abs().max()) for name, model in models.items()}
    return {**found, "zero or gap": changes}


def mask_dependence(seed: int, masks: int = 64) -> dict:
    """Variance over masks of the encoder that a kept entry meets, relative to its size: 0 where it is one for all."""
    data = low_rank(seed)
    pca = top_eigenvectors(data.covariance, RANK)
    a, _ = separate_optimum(data.covariance, 0.5, RANK)
    kept = draw_kept(masks, M, 0.5, generator(seed, "dependence"), at_least=SEEN_AT_LEAST)
    unit = torch.eye(M, dtype=torch.float64)
    encoders: dict[str, list] = {"separate": [], "tied": [], "unrolled": []}
    for k in kept:
        rows = k.expand(M, M)
        encoders["separate"].append(separate_encode(a, unit, rows, 0.5))
        encoders["tied"].append(tied_encode(pca, unit, rows))
        encoders["unrolled"].append(unrolled_encode(pca, unit, rows, stable_eta(pca), 5))
    found = {}
    for name, each in encoders.items():
        e, seen = torch.stack(each), kept[:, :, None]  # [masks, m, r]; only where the entry was kept
        mean = (e * seen).sum(0) / seen.sum(0)
        found[name] = float(((e - mean).square() * seen).sum() / (mean.square() * seen).sum())
    return found


def update_coverage(batch: int = 1, keep: float = 0.5) -> dict:
    """Share of the dropped coordinates whose parameters get a gradient, (in the encoder, in the decoder): the lecture's
    "rows of masked entries have no update" is about the encoder."""
    data = low_rank(0, count=max(batch, 64))
    x, kept = data.observed[:batch], draw_kept(batch, M, keep, generator(0, "coverage"), at_least=SEEN_AT_LEAST)
    dropped = kept.sum(0) == 0
    found = {}
    for name in ("separate", "tied", "unrolled"):
        g = generator(0, "B")
        encoder, decoder = (torch.randn(M, RANK, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
        latent = {
            "separate": lambda e=encoder: separate_encode(e.T, x, kept, keep),
            "tied": lambda e=encoder: tied_encode(e, x, kept, 1e-3),
            "unrolled": lambda e=encoder: unrolled_encode(e, x, kept, 0.01, 5),
        }[name]()
        F.mse_loss(latent @ decoder.T, x).backward()
        found[name] = tuple(float((p.grad[dropped].abs().sum(1) > 0).double().mean()) for p in (encoder, decoder))
    return found


def measure_all(seeds: int = 5, steps: int = 3000, log: Callable[[str], None] = print) -> dict:
    """All questions, in the order of the page. Pure in (seeds, steps)."""
    questions: dict[str, Callable[[], dict]] = {
        "subspaces": lambda: subspaces(range(seeds), steps),
        "denoising": lambda: denoising(range(seeds)),
        "completions": lambda: completions(range(seeds), steps),
        "identity": lambda: identity_failure(0, steps),
        "conditioning": lambda: conditioning(0),
        "unrolling": lambda: unrolling(0),
        "flags": lambda: flags(0, steps),
        "mask dependence": lambda: mask_dependence(0),
        "update coverage": update_coverage,
    }
    results: dict = {"seeds": seeds, "training steps": steps}
    for i, (name, run) in enumerate(questions.items(), start=1):
        start = time.perf_counter()
        results[name] = run()
        log(f"{i}/{len(questions)}  {name:<16} {time.perf_counter() - start:6.1f} s")
    return results


@dataclass
class Arguments:
    """Measure the lecture's linear autoencoders: print a table and write one HTML page."""

    out: Path = Path("runs") / f"{NAME}.html"
    """The page."""
    seeds: int = 5
    """Data sets for each closed-form number."""
    steps: int = 3000
    """Adam steps for each trained model."""
    quick: bool = False
    """One seed and 300 steps, to see the page in seconds."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog=f"python -m studies {NAME}")
    if args.seeds < 1 or args.steps < 1:
        raise UserError("--seeds and --steps must be at least 1")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small products: a second thread only waits
    try:
        seeds, steps = (1, 300) if args.quick else (args.seeds, args.steps)
        results = measure_all(seeds, steps, log=console.print)
    finally:
        torch.set_num_threads(threads)
    show(results, args.out, console)
