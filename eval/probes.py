"""Which known factors of the images a representation keeps, and which it has become invariant to.

Two complementary views: a linear probe per factor says what can be *read off* the features, the invariance profile says
how far the features *move* when one factor alone is changed.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data import Images
from common.shapes import FACTORS, OVERLAP, PAIR_FACTORS, render
from eval.features import forward_features, frozen, normalizer, standardizer
from eval.linear import (
    chosen_rate,
    linear_probe,
    probe_sentence,
    probe_settings,
    project_to_row_space,
    validation_split,
)
from eval.setup import Candidate, EvalSetup, Row, factors_of, make_row

PENALTIES = tuple(10.0**e for e in range(-4, 3))
PROFILE_IMAGES = 512
KNOWN = {**FACTORS, **PAIR_FACTORS}


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """1 - SS_residual / SS_total over all columns together, SS_total about the mean of `target`; both [N] or [N, T].

    1 is exact, 0 no better than the mean, negative worse. NaN where the target is constant.
    """
    total = (target - target.mean(0)).pow(2).sum()
    return (1 - (target - prediction).pow(2).sum() / total).item() if total > 0 else math.nan


def ridge_probes(
    train_x: Tensor,
    train_y: dict[str, Tensor],
    test_x: Tensor,
    test_y: dict[str, Tensor],
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[float, float]]:
    """{name: (R2 on test, chosen penalty)} of ridge regressions from `train_x` [N, D] to each target [N] or [N, T].

    argmin_{w, b} |x w + b - y|^2 / N + penalty |w|^2 on standardised features, in float64 and closed form; all targets
    share one factorisation per penalty. The penalty is chosen by R2 on a tenth of the training images, for each target,
    then the regression is solved again on all of them. Raises UserError for fewer than 20 images.
    """
    x = train_x.to(device, torch.float64)
    standardize = standardizer(x)
    x, test_x = project_to_row_space(standardize(x), standardize(test_x.to(device, torch.float64)))
    fit, held_out = (part.to(device) for part in validation_split(torch.zeros(len(x), dtype=torch.long), seed))
    targets = {name: y.to(device, torch.float64).reshape(len(x), -1) for name, y in train_y.items()}
    stacked = torch.cat(list(targets.values()), 1)  # [N, all columns]
    widths = [y.shape[1] for y in targets.values()]
    columns = dict(zip(targets, torch.arange(sum(widths)).split(widths), strict=True))
    gram, held_x, held_y = x.T @ x, x[held_out], stacked[held_out]
    bests: dict[str, tuple[float, float]] = {}  # name -> (validation R2, penalty)
    for penalty in sorted(penalties, reverse=True):  # on a tie, the larger one
        weight, bias = _ridge(gram - held_x.T @ held_x, x[fit], stacked[fit], penalty)
        for name, c in columns.items():
            score = r_squared(held_x @ weight[:, c] + bias[c], held_y[:, c])
            if name not in bests or score > bests[name][0]:
                bests[name] = score, penalty
    results = {}
    for penalty in {penalty for _, penalty in bests.values()}:
        weight, bias = _ridge(gram, x, stacked, penalty)
        for name, c in columns.items():
            if bests[name][1] == penalty:
                truth = test_y[name].to(device, torch.float64).reshape(len(test_x), -1)
                results[name] = r_squared(test_x @ weight[:, c] + bias[c], truth), penalty
    return {name: results[name] for name in train_y}


def _ridge(gram: Tensor, x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight [D, T], bias [T]) for x [N, D], y [N, T], given gram = x^T x. The bias is not penalised."""
    n, x_mean, y_mean = len(x), x.mean(0), y.mean(0)
    covariance = gram / n - torch.outer(x_mean, x_mean)
    covariance.diagonal().add_(penalty)
    weight = torch.cholesky_solve(x.T @ (y - y_mean) / n, torch.linalg.cholesky(covariance))
    return weight, y_mean - x_mean @ weight


def circular_target(values: Tensor, period: float) -> Tensor:
    """(cos, sin) of a circular factor [N] with the given period, [N, 2]: a regression that knows no seam."""
    angle = values.double() * (2 * math.pi / period)
    return torch.stack([angle.cos(), angle.sin()], 1)


def drawable(factors: dict[str, Tensor]) -> Tensor:
    """Bool [n]: the generator could have sampled these factors, whose laws are not independent (common.shapes).

    Every shape lies inside the image and its hue is at least a sixth of a turn from the background's; in a pair the
    circles overlap by `OVERLAP` at most and shape 1 is the upper one. Exchanging one factor alone can break these laws:
    an invisible or cut-off shape would say nothing about the factor.
    """
    pair = "hue1" in factors
    possible = torch.ones(len(factors["shape"]), dtype=torch.bool)
    for i in ("1", "2") if pair else ("",):
        half, gap = factors["size" + i] / 2, (factors["hue" + i] - factors["background_hue"]).abs() % 1.0
        for axis in ("x", "y"):
            possible &= (factors[axis + i] >= half) & (factors[axis + i] <= 1 - half)
        possible &= torch.minimum(gap, 1 - gap) >= 1 / 6 - 1e-6
    if pair:
        distance = torch.hypot(factors["x1"] - factors["x2"], factors["y1"] - factors["y2"])
        possible &= (distance >= (factors["size1"] + factors["size2"]) / 2 - OVERLAP - 1e-6) & (
            factors["y1"] <= factors["y2"]
        )
    return possible


def invariance_profile(
    features: Callable[[Tensor], Tensor],
    factors: dict[str, Tensor],
    render: Callable[[dict[str, Tensor]], Tensor],
    possible: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> dict[str, float]:
    """How far features move when one factor changes: 0 = invariant to it, 1 = as far as between two random images.

    `features` maps uint8 images [n, 3, s, s] to [n, D]; `render` draws images from factors; `factors` are those of n
    images, in random order. Image i is paired with image i + n/2 (cyclically), for each factor f:
        distance(f) = mean over i of  1 - cos(h(i) - c, h(i with f of its partner) - c)
        profile[f]  = distance(f) / distance(all factors exchanged, that is, the partner itself)
    with c the mean feature over the n images, without which the common direction that most networks add to every
    image hides the differences. Pairs whose f is the same are left out of f's mean, and so are those whose exchange is
    not `possible` (bool [n] of a dict of factors); a factor without any pair is left out of the result. The value can
    exceed 1. NaN for all factors if the features do not depend on the image.
    """
    count = len(next(iter(factors.values())))
    partner = {name: value.roll(-(count // 2), 0) for name, value in factors.items()}
    base = features(render(factors)).double()
    centre = base.mean(0)

    def distance(changed: dict[str, Tensor], where: Tensor) -> float:
        moved = features(render({name: value[where] for name, value in changed.items()})).double()
        return (1 - F.cosine_similarity(base[where] - centre, moved - centre, dim=1)).mean().item()

    random_pairs = distance(partner, torch.ones(count, dtype=torch.bool))
    spread = (base - centre).norm(dim=1).mean().item()
    informative = spread > 1e-6 * max(centre.norm().item(), 1e-30)
    profile = {}
    for name, value in factors.items():
        changed = {**factors, name: partner[name]}
        pairs = value != partner[name]
        if possible is not None:
            pairs &= possible(changed)
        if pairs.any():
            moved = distance(changed, pairs)
            profile[name] = moved / random_pairs if informative and random_pairs > 0 else math.nan
    return profile


# ---- protocol --------------------------------------------------------------------------------------------------------


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """A probe per factor (linear for classes, ridge regression for numbers), then the invariance profile."""
    train_factors, test_factors = factors_of(setup.train), factors_of(setup.test)
    rows, train, test = {}, {}, {}
    for name in train_factors:
        factor, train_y, test_y = KNOWN[name], train_factors[name], test_factors[name]
        if factor.kind == "categorical":
            rows[name] = _categorical(setup, candidate, name)
        elif factor.kind == "circular":
            period = factor.high - factor.low
            train[name], test[name] = circular_target(train_y, period), circular_target(test_y, period)
        else:
            train[name], test[name] = train_y, test_y
    found = ridge_probes(candidate.train_x, train, candidate.test_x, test, seed=setup.seed, device=setup.device)
    for name, (value, penalty) in found.items():
        factor = KNOWN[name]
        target = f"{name!r} ({factor.text})"
        if factor.kind == "circular":
            target = f"the cosine and sine of {target}"
        settings = setup.settings(
            model="ridge regression, closed form",
            standardised=True,
            kind=factor.kind,
            penalties=list(PENALTIES),
            selection="R2 on a tenth of the training images, then solved on all",
        )
        text = (
            f"Ridge regression of {target} from standardised backbone features; penalty chosen on a tenth of the "
            f"{len(setup.train):,} training images; R2 on {len(setup.test):,} test images "
            "(1 = exact, 0 = no better than the mean)."
        )
        rows[name] = make_row("factor-linear", name, "R2", value, settings, text, chosen={"penalty": penalty})
    return [rows[name] for name in train_factors] + _invariance(setup, candidate)


def _categorical(setup: EvalSetup, candidate: Candidate, name: str) -> Row:
    factor, train_y, test_y = KNOWN[name], factors_of(setup.train)[name], factors_of(setup.test)[name]
    result = candidate.label_probe if _is_label(setup.train, name) and _is_label(setup.test, name) else None
    if result is None:
        result = linear_probe(
            candidate.train_x,
            train_y,
            candidate.test_x,
            test_y,
            num_classes=factor.n,
            seed=setup.seed,
            device=setup.device,
        )
    n, test_n = len(setup.train), len(setup.test)
    return make_row(
        "factor-linear",
        name,
        "top-1",
        result.accuracy,
        probe_settings(setup, n),
        f"Factor {name!r} ({factor.text}): {probe_sentence(setup, n, test_n)}",
        chosen=chosen_rate("learning_rate", result),
    )


def _is_label(store: Images, name: str) -> bool:
    """Whether the factor is what the store's labels hold, so that the probe of the labels gives the same number."""
    same = store.labels is not None and torch.equal(factors_of(store)[name], store.labels)
    return same and name == store.label_name


def _invariance(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    factors = {name: value[:PROFILE_IMAGES] for name, value in factors_of(setup.test).items()}
    n = len(next(iter(factors.values())))
    normalize = normalizer(setup.mean, setup.std, setup.device)

    def features(images: Tensor) -> Tensor:
        parts = images.split(setup.batch_size)
        return torch.cat([forward_features(candidate.module, normalize(part)).cpu() for part in parts])

    with frozen(candidate.module):
        profile = invariance_profile(features, factors, lambda values: render(values, setup.image_size), drawable)
    return [
        make_row(
            "invariance",
            name,
            "relative distance",
            value,
            setup.settings(images=n),
            f"Mean cosine distance of centred features between test images that differ in {name!r} alone, divided "
            f"by that between random images ({n} pairs): 0 = invariant, 1 = as different as two random images.",
        )
        for name, value in profile.items()
    ]
