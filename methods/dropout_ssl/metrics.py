"""What is measured of a network under noise. Pure functions.

h: [M, N, D] features of N records under M masks each; log_p: [M, N, K]; y: long [N]. Everything about directions is of
features minus the mean over records and masks: otherwise all cosines are near 1 for any network.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eval import metrics as shared

from .loss import bhattacharyya, entropy_split


def centered(h: Tensor) -> Tensor:
    return h - h.mean((0, 1))


def similarity_of_pairs(h: Tensor, y: Tensor) -> dict[str, float]:
    """V, s_same, s_cls, s_oth and the gaps g_inst = s_same - s_cls, g_cls = s_cls - s_oth.

    V: E_i tr Var_m h / tr Var h, the share of the variance that the masks make. s_same: mean cosine of two masks of a
    record; s_cls: of different records of a class; s_oth: of records of different classes.
    """
    masks, n, _ = h.shape
    spread = h.double().var(0, correction=1).sum(1).mean()
    total = h.double().reshape(masks * n, -1).var(0, correction=0).sum()
    sums = F.normalize(centered(h.double()), dim=2).sum(0)  # [N, D]: sums of unit vectors make sums of cosines
    squares = sums.square().sum(1)
    counts = torch.bincount(y).double()
    by_class = torch.zeros(len(counts), h.shape[2], dtype=torch.float64, device=h.device).index_add_(0, y, sums)
    in_class = by_class.square().sum()
    same = (squares - masks).mean() / (masks * (masks - 1))
    cls = (in_class - squares.sum()) / (masks**2 * (counts.square().sum() - n))
    oth = (sums.sum(0).square().sum() - in_class) / (masks**2 * (n**2 - counts.square().sum()))
    found = {"V": spread / total, "s_same": same, "s_cls": cls, "s_oth": oth, "g_inst": same - cls, "g_cls": cls - oth}
    return {name: float(value) for name, value in found.items()}


def contrast(h: Tensor, y: Tensor, temperature: float) -> dict[str, float]:
    """NT-Xent of two masks (the first two of h), without a projector, by the negatives that are allowed.

    Mean over 2N rows, divided by ln(1 + negatives) of the row, the level of chance: all negatives (ln(2N - 1)), those
    of other classes, those of the row's own class. A row without such negatives is left out.
    """
    z = F.normalize(centered(h[:2]).float(), dim=2).flatten(0, 1)  # [2N, D]
    n, labels = h.shape[1], y.repeat(2)
    place = torch.arange(2 * n, device=h.device)
    partner = (place + n) % (2 * n)
    scores = z @ z.T / temperature
    negative = (place[:, None] != place) & (partner[:, None] != place)
    same = labels[:, None] == labels
    positive = scores[place, partner]
    found = {}
    for name, allowed in (("all", negative), ("other", negative & ~same), ("same", negative & same)):
        count = allowed.sum(1)
        denominator = torch.logaddexp(positive, scores.masked_fill(~allowed, -math.inf).logsumexp(1))
        kept = count > 0
        relative = (denominator - positive)[kept] / (1 + count[kept]).double().log()
        found[f"nt_xent_{name}_{temperature:g}"] = float(relative.mean())
    return found


def geometry(h: Tensor) -> dict[str, float]:
    """Alignment of two masks, uniformity of one, effective rank of the covariance (means over masks taken)."""
    x = centered(h).float()
    found = {"alignment": shared.alignment(x[0], x[1]), "uniformity": shared.uniformity(x[0])}
    return {**found, "rank": shared.rankme(x.mean(0))}


def output_terms(log_p: Tensor, y: Tensor) -> dict[str, float]:
    """The masked cross-entropy and its exact parts, the Bhattacharyya distance and the symmetric KL of the
    first two masks, and the accuracy under a mask in percent."""
    log_p = log_p.double()
    geo, consistency = entropy_split(log_p, y)
    p = log_p.exp()
    kl = ((p[0] - p[1]) * (log_p[0] - log_p[1])).sum(-1)
    return {
        "ce": float((geo + consistency).mean()),
        "ce_geo": float(geo.mean()),
        "consistency": float(consistency.mean()),
        "bhattacharyya": float(bhattacharyya(log_p[0], log_p[1]).mean()),
        "symmetric_kl": float(kl.mean()),
        "masked_accuracy": 100 * float((log_p.argmax(-1) == y).double().mean()),
    }


def prototypes(h: Tensor, log_p: Tensor, weight: Tensor, y: Tensor) -> dict[str, float]:
    """Do two masks choose the same prototype? Classifier rows `weight` [K, D] stand for SwAV's prototypes.

    agreement: same argmax; soft_agreement: sum_k p p'; swapped: cross-entropy of one mask's p under the other's;
    codes: agreement of the Sinkhorn codes (epsilon .05, 3 iterations) of two masks; codes_label: their mass on the
    record's label.
    """
    p = log_p[:2].exp()
    z, rows = F.normalize(h[:2].float(), dim=2), F.normalize(weight.float(), dim=1)
    codes = [sinkhorn(scores @ rows.T) for scores in z]
    return {
        "agreement": float((log_p[0].argmax(1) == log_p[1].argmax(1)).double().mean()),
        "soft_agreement": float((p[0] * p[1]).sum(1).mean()),
        "swapped": float(-(p[0] * log_p[1]).sum(1).mean()),
        "codes": float((codes[0].argmax(1) == codes[1].argmax(1)).double().mean()),
        "codes_label": float(codes[0].gather(1, y[:, None]).mean()),
    }


def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes [N, K] of scores [N, K]: rows sum to 1, columns nearly equal (SwAV, arXiv:2006.09882, eq. 3)."""
    q = ((scores.double() - scores.max()) / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * q.shape[0]).float()


def cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA (Kornblith et al. 2019) of features [N, D] and [N, D'] of the same records: 1 up to a rotation."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-30))


def calibration_error(log_p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of [N, K], in [0, 1]: 15 equal bins of confidence."""
    confidence, chosen = log_p.double().exp().max(1)
    right = (chosen == y).double()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=y.device).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(y))


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """Cosine of two gradients, each a list of tensors; 0 where one of them vanishes."""
    dot = sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
    norms = [math.sqrt(float(sum(x.double().square().sum() for x in g))) for g in (a, b)]
    return float(dot) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
