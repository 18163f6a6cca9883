"""The loss of SimSiam (arXiv:2011.10566, eq. 2 and 4).

n: images of this process; D: width of projections z and predictions p.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def simsiam(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, stop_gradient: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """-(cos(p1, sg z2) + cos(p2, sg z1)) / 2, mean over this process's n images; p, z: [n, D], as float32 (or float64).

    The prediction of one view is pulled to the projection of the other, through which no gradient flows; with
    stop_gradient=False it flows, and everything collapses (section 4.1). Range -1 (all equal) to 1; about 0 for random
    directions. Averaged over processes, loss and gradients are those of one process with all images.
    Returns the loss and, detached, `agreement`: cos(z1, z2), what the views share without the predictor's help.
    """
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, z1, z2 = (x if x.dtype == torch.float64 else x.float() for x in (p1, p2, z1, z2))
        t1, t2 = (z1.detach(), z2.detach()) if stop_gradient else (z1, z2)
        loss = -(cosine_similarity(p1, t2).mean() + cosine_similarity(p2, t1).mean()) / 2
        return loss, {"agreement": cosine_similarity(z1.detach(), z2.detach()).mean()}
