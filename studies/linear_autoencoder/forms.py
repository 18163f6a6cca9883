"""The three linear masked autoencoders of the lecture, in closed form and trained, on data whose truth is known.

    separate   l = A (k * x) / p,                      x^ = B l     one A for every mask                    (16.1)
    tied       l = (B~^T B~)^-1 B~^T x~,               x^ = B l     B~: the kept rows of B                  (16.2, 16.4)
    unrolled   l <- l + eta B^T (k * (x - B l)),       x^ = B l     d steps from l = 0, the residual masked (16.5)

Equation numbers: A. Sahai, CS 182/282A (UC Berkeley), lecture 16, 2022. `kept` (k) is 1 where an entry is seen and 0
where it is dropped; `keep` (p) is the probability of 1, as in the lecture and unlike torch's dropout. Rows are samples:
x [N, m], A [r, m], B [m, r]. The autoencoder's input and target is the observed x; the clean x only scores it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.rng import generator

M, RANK, COUNT, SIGMA = 64, 8, 4096, 0.3


# ---- data, masks, scores ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """clean = s U^T and observed = clean + sigma n, both [N, m] and centered by the observed mean; truth: U [m, r]."""

    clean: Tensor
    observed: Tensor
    truth: Tensor
    sigma: float

    @property
    def covariance(self) -> Tensor:
        return self.observed.T @ self.observed / len(self.observed)


def low_rank(
    seed: int, *, count: int = COUNT, m: int = M, rank: int = RANK, sigma: float = SIGMA, uneven: bool = False
) -> LowRank:
    """s ~ N(0, I_r), n ~ N(0, I_m), U orthonormal times sqrt(m / r): signal variance 1 per coordinate on average.

    uneven: the rows of U are scaled by e^N(0, 1), so that some coordinates carry much more signal than others.
    """
    g = generator(seed, "low rank")
    options = dict(generator=g, dtype=torch.float64)
    truth = torch.linalg.qr(torch.randn(m, rank, **options)).Q * math.sqrt(m / rank)
    if uneven:
        truth = truth * torch.randn(m, 1, **options).exp()
    clean = torch.randn(count, rank, **options) @ truth.T
    observed = clean + sigma * torch.randn(count, m, **options)
    mean = observed.mean(0)  # not centered, the first component would be the mean
    return LowRank(clean - mean, observed - mean, truth, sigma)


def draw_kept(count: int, m: int, keep: float | Tensor, g: torch.Generator, *, at_least: int = 0) -> Tensor:
    """Masks [count, m] of 0 and 1, entries kept independently with probability `keep` (a number or [count, 1]).

    at_least: rows that keep fewer entries are sampled again, which shifts the distribution slightly where needed.
    """
    if not 0 <= at_least <= m:
        raise UserError(f"no mask of {m} entries can keep at least {at_least} of them")
    kept = (torch.rand(count, m, generator=g, dtype=torch.float64) < keep).double()
    while len(few := (kept.sum(1) < at_least).nonzero()[:, 0]):
        chance = keep[few] if isinstance(keep, Tensor) else keep
        kept[few] = (torch.rand(len(few), m, generator=g, dtype=torch.float64) < chance).double()
    return kept


def draw_exactly(count: int, m: int, seen: int, g: torch.Generator) -> Tensor:
    """Masks [count, m] that keep exactly `seen` entries, every set equally likely."""
    ranks = torch.rand(count, m, generator=g, dtype=torch.float64).argsort(1).argsort(1)
    return (ranks < seen).double()


def angles(u: Tensor, v: Tensor) -> Tensor:
    """Principal angles in degrees between the column spaces of u [m, r] and v [m, r], largest first.

    Of subspaces, because A and B are determined up to (G A, B G^-1) only. From sines, not cosines: arccos loses half
    of the digits near 0.
    """
    u, v = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
    sines = torch.linalg.svdvals(v - u @ (u.T @ v)).clamp(max=1)
    return torch.rad2deg(sines.asin())


def gain_db(data: LowRank, estimate: Tensor) -> float:
    """10 log10 of |x - clean|^2 / |estimate - clean|^2: above 0 where the noise has become less."""
    before, after = (data.observed - data.clean).square().sum(), (estimate - data.clean).square().sum()
    return float(10 * torch.log10(before / after))


def completion_error(data: LowRank, estimate: Tensor, kept: Tensor) -> float:
    """Mean squared error on the dropped entries against the clean data."""
    dropped = 1 - kept
    return float(((estimate - data.clean).square() * dropped).sum() / dropped.sum())


def top_eigenvectors(symmetric: Tensor, r: int) -> Tensor:
    """[m, r], eigenvectors of the r largest eigenvalues."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -r:]


# ---- the three parametrizations, a batch of masks per call -----------------------------------------------------------


def separate_encode(a: Tensor, x: Tensor, kept: Tensor, keep: float = 1.0) -> Tensor:
    """Equation 16.1 with dropped entries set to 0 and the rest scaled by 1 / keep: [N, r]. keep = 1 at inference."""
    return (kept * x / keep) @ a.T


def gram(b: Tensor, kept: Tensor) -> Tensor:
    """B~^T B~ for every mask, [N, r, r]. diag(k) B instead of picked rows, since masks keep different numbers."""
    outer = (b[:, :, None] * b[:, None, :]).flatten(1)  # [m, r * r]: one matrix product serves all masks
    return (kept @ outer).unflatten(1, (b.shape[1], b.shape[1]))


def tied_encode(b: Tensor, x: Tensor, kept: Tensor, ridge: float = 0.0) -> Tensor:
    """Equation 16.4, l = (B~^T B~)^-1 B~^T x~: [N, r]; no 1 / keep. Float64, because the condition number is squared.

    ridge: solve with B~^T B~ + ridge * (trace / r) I instead, which is never singular: for training. 0: pseudo-inverse,
    of minimal norm where a mask keeps fewer than r independent rows (equation 16.2's other case included).
    """
    g, target = gram(b, kept), ((kept * x) @ b)[..., None]
    if not ridge:
        return (torch.linalg.pinv(g, hermitian=True, rtol=1e-13) @ target)[..., 0]
    scale = g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(b.shape[1], dtype=b.dtype)
    return torch.linalg.solve(g + ridge * scale * eye, target)[..., 0]


def unrolled_encode(b: Tensor, x: Tensor, kept: Tensor, eta: float | Tensor, steps: int) -> Tensor:
    """Equation 16.5: `steps` gradient steps from 0, [N, r]. The residual at a gap is 0; clamping the input instead
    would leave -(B l) there and pull the latent towards reproducing zeros."""
    latent = x.new_zeros(len(x), b.shape[1])
    for _ in range(steps):
        latent = latent + eta * (kept * (x - latent @ b.T)) @ b
    return latent


def unrolled_closed_form(b: Tensor, x: Tensor, kept: Tensor, eta: float, steps: int) -> Tensor:
    """The same as one spectral filter: l_d = (B~^T B~)^+ (I - (I - eta B~^T B~)^d) B~^T x~, [N, r]."""
    value, vector = torch.linalg.eigh(gram(b, kept))  # [N, r], [N, r, r]
    value = value.clamp(min=0)
    factor = torch.where(value > 1e-13 * value.amax(1, keepdim=True), (1 - (1 - eta * value) ** steps) / value, 0.0)
    target = ((kept * x) @ b)[..., None]
    return (vector @ (factor[..., None] * (vector.mT @ target)))[..., 0]


def spectral_factor(s: Tensor, eta: float, steps: int) -> Tensor:
    """phi_d(s) = 1 - (1 - eta s^2)^d: the share of a direction with singular value s that d steps reconstruct."""
    return 1 - (1 - eta * s.square()) ** steps


def stable_eta(b: Tensor) -> float:
    """1 / s_max^2: half of the largest rate that converges, for every mask, as dropping rows lowers s_max."""
    return float(1 / torch.linalg.matrix_norm(b, 2).square())


def conditional_mean(covariance: Tensor, x: Tensor, kept: Tensor, target: Tensor | None = None) -> Tensor:
    """E[y | kept entries of x] of a centered Gaussian, [N, m]: T_{:,K} S_{K,K}^-1 x_K.

    target: covariance of y with x, [m, m]; default S itself, so y = x, and kept entries come back unchanged: that is
    the tied form with r >= m and B B^T = S.
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    inner = kept[:, :, None] * covariance * kept[:, None, :] + (1 - kept)[:, :, None] * eye
    solved = torch.linalg.solve(inner, (kept * x)[..., None])[..., 0]
    return (kept * solved) @ (covariance if target is None else target).T


# ---- closed-form optima ----------------------------------------------------------------------------------------------


def separate_optimum(covariance: Tensor, keep: float, r: int) -> tuple[Tensor, Tensor]:
    """(A [r, m], B [m, r]) that minimize E|x - B A (k * x) / p|^2 over masks and data, B orthonormal.

    B A = P_r W with W = S (S + c diag S)^-1, c = (1 - p) / p, and P_r the top eigenvectors of S (S + c diag S)^-1 S:
    masking is ridge regression whose penalty is c times each coordinate's variance. keep = 1: PCA.
    """
    ridge = covariance + (1 - keep) / keep * covariance.diagonal().diag()
    w = torch.linalg.solve(ridge, covariance).T
    b = top_eigenvectors(w @ covariance, r)
    return b.T @ w, b


def separate_loss(w: Tensor, covariance: Tensor, keep: float) -> float:
    """E|x - W (k * x) / p|^2 / m in closed form."""
    ridge = covariance + (1 - keep) / keep * covariance.diagonal().diag()
    return float((covariance - 2 * w @ covariance + w @ ridge @ w.T).trace() / len(w))


def denoising_optimum(covariance: Tensor, noise: float, r: int) -> Tensor:
    """W [m, m] of rank r for input x + N(0, noise) and target x: PCA's directions, gains v / (v + noise) (Wiener)."""
    value, vector = torch.linalg.eigh(covariance)
    value, vector = value[-r:], vector[:, -r:]
    return vector * (value / (value + noise)) @ vector.T


# ---- trained versions ------------------------------------------------------------------------------------------------


class Separate(nn.Module):
    """A and B apart. Input: x with gaps at 0, scaled by 1 / keep in training by the caller."""

    def __init__(self, m: int, r: int, g: torch.Generator):
        super().__init__()
        self.a = nn.Parameter(torch.randn(r, m, generator=g, dtype=torch.float64) / m**0.5)
        self.b = nn.Parameter(torch.randn(m, r, generator=g, dtype=torch.float64) / m**0.5)

    def forward(self, x: Tensor, kept: Tensor, keep: float = 1.0) -> Tensor:
        return separate_encode(self.a, x, kept, keep) @ self.b.T


class Tied(nn.Module):
    """B alone, for r < m. `settle` after each step keeps B orthonormal: the loss is the same for every B G, so the
    condition number of B would drift without bound."""

    def __init__(self, m: int, r: int, g: torch.Generator, ridge: float = 1e-3):
        super().__init__()
        if r >= m:
            raise UserError(f"the tied autoencoder needs a latent narrower than its input: {r} of {m} is the identity")
        self.b = nn.Parameter(torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64)).Q)
        self.ridge = ridge

    def forward(self, x: Tensor, kept: Tensor, keep: float = 1.0) -> Tensor:
        return tied_encode(self.b, x, kept, self.ridge) @ self.b.T

    @torch.no_grad()
    def settle(self) -> None:
        q, r = torch.linalg.qr(self.b)
        self.b.copy_(q * r.diagonal().sign())  # without the sign, columns could flip under Adam's averages


class Unrolled(nn.Module):
    """B and a rate; eta = 2 sigmoid(a) / |B|^2, which cannot diverge."""

    def __init__(self, m: int, r: int, g: torch.Generator, steps: int = 5):
        super().__init__()
        self.b = nn.Parameter(torch.randn(m, r, generator=g, dtype=torch.float64) / m**0.5)
        self.a = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.steps = steps

    @property
    def eta(self) -> Tensor:
        return 2 * self.a.sigmoid() / torch.linalg.matrix_norm(self.b, 2).square()

    def forward(self, x: Tensor, kept: Tensor, keep: float = 1.0) -> Tensor:
        return unrolled_encode(self.b, x, kept, self.eta, self.steps) @ self.b.T


class Network(nn.Module):
    """A two-layer network on k * x, or with `flags` on [k * x, k]: only then can it distinguish a zero from a gap."""

    def __init__(self, m: int, hidden: int, g: torch.Generator, *, flags: bool):
        super().__init__()
        self.flags = flags
        self.layers = nn.Sequential(nn.Linear(m * (1 + flags), hidden), nn.ReLU(), nn.Linear(hidden, m))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=g) - 1) / (p.shape[-1] ** 0.5) * (p.ndim > 1))

    def forward(self, x: Tensor, kept: Tensor, keep: float = 1.0) -> Tensor:
        seen = kept * x
        return self.layers((torch.cat([seen, kept], 1) if self.flags else seen).float()).double()


def train(
    model: nn.Module,
    data: LowRank,
    *,
    keep: float | tuple[float, float] = 1.0,
    noise: float = 0.0,
    at_least: int = 0,
    steps: int = 3000,
    batch: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    each: Callable[[int, nn.Module], None] | None = None,
    every: int = 100,
) -> nn.Module:
    """Adam with a cosine rate on |x - model(k * (x + n))|^2 over all entries, dropped ones included: without them the
    dropped rows of B would get no gradient at all.

    keep: probability of an entry to be kept, or (low, high) for one sampled per sample. noise: variance of n.
    each(step, model) is called before every `every`-th step. Masks are a pure function of (seed, step).
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x = data.observed
    for step in range(steps):
        if each and step % every == 0:
            each(step, model)
        g = generator(seed, "linear", step)
        rows = torch.randint(len(x), (batch,), generator=g)
        chance = keep
        if isinstance(keep, tuple):
            chance = keep[0] + (keep[1] - keep[0]) * torch.rand(batch, 1, generator=g, dtype=torch.float64)
        kept = draw_kept(batch, x.shape[1], chance, g, at_least=at_least)
        noisy = x[rows] + noise**0.5 * torch.randn(batch, x.shape[1], generator=g, dtype=torch.float64)
        loss = F.mse_loss(model(noisy, kept, 1.0 if isinstance(keep, tuple) else keep), x[rows])
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model, Tied):
            model.settle()
    return model
