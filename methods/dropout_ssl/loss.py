"""Losses and the exact decompositions of the supervised loss under noise, as pure functions.

B: records of the global batch, n = B / processes; M: masks of a sample; K: classes; h: features; log_p:
log-probabilities.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common.distributed import all_gather, rank


def nt_xent(h1: Tensor, h2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, arXiv:2002.05709, eq. 1): mean over this process's 2n rows, candidates from all processes.

    h1, h2: [n, D], two masked copies of the same records in the same order; normalized here, in float32 (float64
    stays). Chance level: ln(2B - 1). The mean over processes, and of the gradients, is one process's with 2B rows.
    """
    n = len(h1)
    with torch.autocast(h1.device.type, enabled=False):
        z = torch.cat([h1, h2])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)  # [2n, D]
        scores = z @ all_gather(z).T / temperature  # [2n, 2B]; rank 0's copies 1, rank 0's copies 2, rank 1's ...
        own = rank() * 2 * n + torch.arange(2 * n, device=z.device)
        partner = rank() * 2 * n + (torch.arange(2 * n, device=z.device) + n) % (2 * n)
        scores = scores.scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(scores, partner)


def r_drop(logits1: Tensor, logits2: Tensor) -> Tensor:
    """R-Drop's second term (arXiv:2106.14448, eq. 3): (KL(p1 || p2) + KL(p2 || p1)) / 2, mean over n rows of [n, K].

    The official snippet sums over rows but averages the cross-entropy, so its weight depends on the batch; here both
    are means.
    """
    log_p1, log_p2 = (F.log_softmax(z if z.dtype == torch.float64 else z.float(), dim=1) for z in (logits1, logits2))
    return 0.5 * ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(1).mean()


def alignment(h1: Tensor, h2: Tensor) -> Tensor:
    """Mean squared distance of the normalized copies [n, D] (Wang & Isola 2020, eq. 1); a label-free loss."""
    return (F.normalize(h1, dim=1) - F.normalize(h2, dim=1)).square().sum(1).mean()


# ---- what the supervised loss contains ------------------------------------------------------------------------------


def entropy_split(log_p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p_geo(y), E_m KL(p_geo || p_m)); their sum is E_m -log p_m(y).

    p_geo is the normalized geometric mean of the M predictions, so the second part, the consistency of the predictions,
    is -log sum_k exp(E_m log p_m(k)) and does not depend on labels. log_p: [M, N, K], y: long [N]; each part [N].
    """
    mean = log_p.mean(0)  # [N, K]
    consistency = -mean.logsumexp(-1)
    return -mean.gather(-1, y[:, None])[:, 0] - consistency, consistency


def bhattacharyya(log_p1: Tensor, log_p2: Tensor) -> Tensor:
    """-log sum_k sqrt(p1 p2), [N] from two [N, K]: the consistency of `entropy_split` for two masks, exactly."""
    return -(0.5 * (log_p1 + log_p2)).logsumexp(-1)
