"""The loss of Barlow Twins (arXiv:2103.03230, eq. 1 and 2) over the global batch.

B: global batch in images; n = B / processes; D: width of the projections.
"""

import torch
from torch import Tensor

from common.distributed import all_reduce, world_size


def cross_correlation(z1: Tensor, z2: Tensor, eps: float = 1e-5) -> Tensor:
    """C [D, D] between the two views' projections [n, D], over all B rows of all processes, in float32 (float64 stays).

    Each column is normalized with the mean and the biased variance of the global batch: a BatchNorm without scale,
    shift and running averages. C_ij correlates dimension i of view 1 with dimension j of view 2; it is not symmetric.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack([z1, z2])
        z = z if z.dtype == torch.float64 else z.float()  # [2, n, D]
        batch = z.shape[1] * world_size()
        # Mean first, then centered squares: their sum does not lose the variance to cancellation.
        z = z - all_reduce(z.sum(1, keepdim=True)) / batch
        z = z * (all_reduce(z.square().sum(1, keepdim=True)) / batch + eps).rsqrt()
        return all_reduce(z[0].T @ z[1]) / batch


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, of projections [n, D] as they leave the projector.

    Every process computes the loss of the global batch. The reductions carry gradients (their backward pass sums over
    processes), so averaged over processes loss and gradients are those of one process with B rows. The official
    in-place all-reduce carries none: its gradient is 1 / processes of this one.
    Returns the loss and its detached parts: `on_diagonal` (mean C_ii), `off_diagonal` (root mean square of the other
    C_ij), `invariance` and `redundancy` (the two terms; loss = invariance + redundancy).
    """
    c = cross_correlation(z1, z2)
    with torch.autocast(c.device.type, enabled=False):
        diagonal = c.diagonal()
        invariance = (1 - diagonal).square().sum()
        off_diagonal = c.square().sum() - diagonal.square().sum()
        redundancy = lambd * off_diagonal
        pairs = max(len(c) * (len(c) - 1), 1)
        parts = {
            "on_diagonal": diagonal.mean(),
            "off_diagonal": (off_diagonal.clamp_min(0) / pairs).sqrt(),
            "invariance": invariance,
            "redundancy": redundancy,
        }
        return invariance + redundancy, {name: value.detach() for name, value in parts.items()}
