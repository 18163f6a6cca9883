"""BYOL's regression loss (arXiv:2006.07733, eq. 2). p: online predictions; z: the target's projections."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.health import feature_std


def regression(p: Tensor, z: Tensor) -> Tensor:
    """Mean over rows of |p / |p| - z / |z||^2 = 2 - 2 cos(p, z); p, z: [n, D]. No gradient goes into z."""
    # Norms below 1e-6 count as 1e-6: the official code takes rsqrt(max(sum of squares, 1e-12)).
    p, z = normalize(p, dim=1, eps=1e-6), normalize(z.detach(), dim=1, eps=1e-6)
    return (2 - 2 * (p * z).sum(1)).mean()


def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Both directions added: the prediction from view 1 meets the target of view 2, and the other way round.

    p1, p2, z1, z2: [n, D], row i of each is image i; computed in float32 (float64 stays). Between 0 and 8, about 4 for
    unrelated directions. Returns the loss and its detached parts: `agreement` (mean cosine of prediction and target;
    loss = 4 - 4 agreement), `target_std` and `prediction_std` (1: spread evenly over the sphere, 0: one direction).
    A mean over this process's rows: averaged over processes, loss and gradients are those of one process with all rows.
    """
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, z1, z2 = (x if x.dtype == torch.float64 else x.float() for x in (p1, p2, z1, z2))
        loss = regression(p1, z2) + regression(p2, z1)
    parts = {
        "agreement": 1 - loss.detach() / 4,
        "target_std": (feature_std(z1.detach()) + feature_std(z2.detach())) / 2,
        "prediction_std": (feature_std(p1.detach()) + feature_std(p2.detach())) / 2,
    }
    return loss, parts
