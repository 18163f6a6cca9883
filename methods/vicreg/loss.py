"""The loss of VICReg (arXiv:2105.04906, Algorithm 1) over the global batch.

B: global batch in images; n = B / processes; D: width of the projections.
"""

import torch
from torch import Tensor

from common.distributed import all_reduce, world_size


def covariance(z: Tensor) -> Tensor:
    """Unbiased covariance [D, D] of the projections [n, D] over all B rows of all processes; B is at least 2."""
    batch = len(z) * world_size()
    z = z - all_reduce(z.sum(0)) / batch
    return all_reduce(z.T @ z) / (batch - 1)


def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    eps: float = 1e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Invariance, variance and covariance of two views' projections [n, D], in float32 (float64 stays).

        s = mean over images and dimensions of (z1 - z2)^2
        v = mean over views and dimensions of max(0, 1 - sqrt(C_jj + eps))
        c = sum over views of the sum of C_ij^2, i != j, divided by D
        loss = invariance_weight * s + variance_weight * v + covariance_weight * c

    with C the covariance matrix of one view. As in the official code, v is a mean over the two views and c a sum.
    Every process computes the loss of the global batch, and the reductions carry gradients: averaged over processes,
    loss and gradients are those of one process with B rows.
    Returns the loss and, detached, `invariance` (s), `variance` (v), `covariance` (c), `std` (mean standard deviation
    of a dimension), `agreement` (1 - s / 2 mean variance: 1 for equal views, 0 for unrelated ones) and `redundancy`
    (root mean square of C_ij, i != j, over the mean variance: 1 if all dimensions are the same).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (z if z.dtype == torch.float64 else z.float() for z in (z1, z2))
        dimensions, batch = z1.shape[1], len(z1) * world_size()
        invariance = all_reduce((z1 - z2).square().sum()) / (batch * dimensions)
        matrices = covariance(z1), covariance(z2)
        variances = torch.stack([c.diagonal() for c in matrices])  # [2, D]
        std = (variances + eps).sqrt()
        variance = (1 - std).relu().mean()
        off_diagonal = sum(c.square().sum() for c in matrices) - variances.square().sum()
        covariance_term = off_diagonal / dimensions
        loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance_term

        spread = variances.mean().clamp_min(1e-12)
        pairs = max(2 * dimensions * (dimensions - 1), 1)
        parts = {
            "invariance": invariance,
            "variance": variance,
            "covariance": covariance_term,
            "std": std.mean(),
            "agreement": 1 - invariance / (2 * spread),
            "redundancy": (off_diagonal.clamp_min(0) / pairs).sqrt() / spread,
        }
        return loss, {name: value.detach() for name, value in parts.items()}
