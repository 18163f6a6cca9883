"""Measures of a representation that need no labels. Features are [N, D]; all results are Python floats.

They describe, they do not rank: a network that maps the images to noise has a high rank and a good uniformity.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common import health
from common.data import ViewLoader
from common.views.recipe import ViewRecipe
from eval.features import forward_features, frozen
from eval.linear import evaluation_view
from eval.setup import Candidate, EvalSetup, Row, make_row

MOST_IMAGES = 10_000  # spectra of more rows cost more and say the same
ALIGNMENT_IMAGES = 2_048


def _gram(features: Tensor, rows: int = 8192) -> Tensor:
    """X^T X (or X X^T when there are fewer rows than columns) in float64."""
    if len(features) < features.shape[1]:
        x = features.double()
        return x @ x.T
    gram = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in features.split(rows):
        gram.addmm_(part.double().T, part.double())
    return gram


def singular_values(features: Tensor) -> Tensor:
    """The min(N, D) singular values of `features`, descending, float64.

    They are roots of the Gram matrix's eigenvalues, several times faster than an SVD of a tall matrix; below 1e-8 of
    the largest they are rounding, which is under float32's own resolution.
    """
    return torch.linalg.eigvalsh(_gram(features)).flip(0).clamp_min(0).sqrt()


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885, eq. 1-2): a smooth rank between 1 and min(N, D).

    p_k = sigma_k / sum_j sigma_j + eps,   RankMe = exp(-sum_k p_k ln p_k),
    with sigma the singular values of the features, which are neither centred nor normalised.
    """
    return rankme_of_spectrum(singular_values(features), eps)


def rankme_of_spectrum(sigma: Tensor, eps: float = 1e-7) -> float:
    """RankMe of singular values `sigma`. All zero (a dead network) counts as rank 0."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    p = sigma / total + eps
    return math.exp(-(p * p.log()).sum().item())


def rank_of_spectrum(sigma: Tensor, largest_dimension: int) -> float:
    """Numerical rank of singular values `sigma` of a float32 matrix whose larger dimension is given."""
    return float((sigma > sigma.max() * largest_dimension * torch.finfo(torch.float32).eps).sum())


def alpha_req(features: Tensor, first: int = 4, last: int = 100) -> float:
    """alpha-ReQ (Agrawal et al. 2022, NeurIPS): the decay of the covariance's eigenvalues, lambda_j ~ j^-alpha.

    alpha is minus the slope of ln(lambda_j) over ln(j), by least squares with weights 1/j (Stringer et al. 2019) over
    the ranks j = first..last of the *centred* features' spectrum. The paper's text does not fix the range; 4..100 is
    what its released code passes for CIFAR and STL-10. Near 1 is good by the paper; a large alpha means that few
    directions carry everything. NaN when fewer than two eigenvalues in the range are above rounding.
    """
    eigenvalues = torch.linalg.eigvalsh(_gram(features - features.mean(0))).flip(0)
    return alpha_of_spectrum(eigenvalues, first, last)


def alpha_of_spectrum(eigenvalues: Tensor, first: int = 4, last: int = 100) -> float:
    """The exponent of `alpha_req` for `eigenvalues` (descending). Those below 1e-12 of the largest are left out."""
    j = torch.arange(1, len(eigenvalues) + 1, dtype=torch.float64, device=eigenvalues.device)
    keep = (j >= first) & (j <= last) & (eigenvalues > 1e-12 * eigenvalues.max())
    if int(keep.sum()) < 2:
        return math.nan
    x, y, w = j[keep].log(), eigenvalues[keep].double().log(), 1 / j[keep]
    x_mean, y_mean = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    return -((w * (x - x_mean) * (y - y_mean)).sum() / (w * (x - x_mean) ** 2).sum()).item()


def feature_std(features: Tensor) -> float:
    """SimSiam's collapse signal (Chen & He 2021, arXiv:2011.10566, section 4.1), times sqrt(D).

    The standard deviation over images of each dimension of the L2-normalised features, averaged over dimensions, times
    sqrt(D): about 1 for directions spread evenly over the sphere, 0 when all images map to one direction.
    """
    return health.feature_std(features, alone=True).item()


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """Alignment (Wang & Isola 2020, arXiv:2005.10242, eq. 1): E ||f(x) - f(y)||^power over positive pairs.

    `first` and `second` [N, D] are the features of two views of the same N images, L2-normalised here. 0 is perfect.
    """
    gap = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return gap.norm(dim=1).pow(power).mean().item()


def uniformity(features: Tensor, t: float = 2.0, chunk: int = 2048) -> float:
    """Uniformity (Wang & Isola 2020, eq. 2): ln E exp(-t ||f(x) - f(y)||^2) over all pairs of different images.

    Features [N, D], N >= 2, L2-normalised here. 0 is collapse, -4 the bound of t = 2; lower is more uniform.
    """
    x = F.normalize(features.float(), dim=1)
    total = 0.0
    for start in range(0, len(x), chunk):
        squared = (2 - 2 * x[start : start + chunk] @ x.T).clamp_min(0)
        # An image's distance to itself is 0 up to rounding; exp(-t * 0) = 1 is taken out exactly by zeroing it first.
        squared[torch.arange(len(squared)), torch.arange(start, start + len(squared))] = 0
        total += (-t * squared).exp().sum(dtype=torch.float64).item() - len(squared)
    return math.log(total / (len(x) * (len(x) - 1)))


# ---- protocol --------------------------------------------------------------------------------------------------------


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """All of these, of up to `MOST_IMAGES` test images."""
    x = candidate.test_x
    if len(x) > MOST_IMAGES:
        x = x[torch.linspace(0, len(x) - 1, MOST_IMAGES).long()]
    x = x.to(setup.device)
    sigma = singular_values(x)
    n, d = x.shape
    where = f"of the features of {n:,} test images ({setup.geometry})"

    def row(metric: str, value: float, text: str, **settings: object) -> Row:
        return make_row(
            "label-free", "features", metric, value, setup.settings(images=n, dimensions=d, **settings), text
        )

    return [
        row(
            "RankMe",
            rankme_of_spectrum(sigma),
            f"RankMe (Garrido et al. 2023, eps 1e-7) {where}, not centred.",
            eps=1e-7,
        ),
        row(
            "rank",
            rank_of_spectrum(sigma, max(n, d)),
            f"Numerical rank {where}: singular values above max(N, D) * eps(float32) * the largest.",
        ),
        row(
            "alpha-ReQ",
            alpha_req(x),
            f"alpha-ReQ (Agrawal et al. 2022) {where}: power-law exponent of the "
            "covariance spectrum, ranks 4 to 100, weights 1/j.",
            ranks=[4, 100],
        ),
        row(
            "feature std",
            feature_std(x),
            f"SimSiam's collapse signal {where}: standard deviation of the "
            "L2-normalised features, averaged over dimensions, times sqrt(D); 1 = spread evenly, 0 = collapsed.",
        ),
        row(
            "uniformity",
            uniformity(x) if n > 1 else math.nan,
            f"Uniformity (Wang & Isola 2020, t = 2) {where}; 0 = collapsed, -4 = even.",
            t=2,
        ),
        _alignment_row(setup, candidate, row),
    ]


def _alignment_row(setup: EvalSetup, candidate: Candidate, row: Callable[..., Row]) -> Row:
    """From two random crops and flips of some test images, the same for every method; NaN where images are too few or
    too small."""
    if len(setup.test) < 2 or setup.test.side < setup.image_size:  # no crop of that size without enlarging
        return row("alignment", math.nan, "")
    view = evaluation_view(setup.image_size, setup.mean, setup.std, smallest_area=0.2)
    batch_size = min(setup.batch_size, len(setup.test), ALIGNMENT_IMAGES)
    loader = ViewLoader(
        setup.test,
        ViewRecipe([view, view]),
        batch_size=batch_size,
        seed=setup.seed,
        device=setup.device,
        workers=setup.workers,
    )
    steps = min(loader.steps_per_epoch, max(1, ALIGNMENT_IMAGES // batch_size))
    with frozen(candidate.module):
        pairs = [[forward_features(candidate.module, view) for view in loader(step).views] for step in range(steps)]
    first, second = (torch.cat(part) for part in zip(*pairs, strict=True))
    n = steps * batch_size
    text = (
        f"Alignment (Wang & Isola 2020, power 2) of two random resized crops (20 to 100 % of the area) and flips "
        f"of {n:,} test images; 0 = the same direction, 2 = unrelated."
    )
    views = "random resized crop (area 0.2 to 1), flip"
    return row("alignment", alignment(first, second), text, views=views, pairs=n)
