"""Cheap signals of collapse as 0-d tensors: for the training step, where reading a number would stall the device."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.distributed import all_reduce, world_size


def feature_std(features: Tensor, *, alone: bool = False) -> Tensor:
    """SimSiam's collapse signal (arXiv:2011.10566, section 4.1) times sqrt(D), of features [n, D] of each process.

    Standard deviation over the rows of all processes of each dimension of the L2-normalized features, averaged over
    dimensions: about 1 for directions spread evenly over the sphere, 0 when all rows point one way. All processes must
    call it, with equally many rows, unless `alone`.
    """
    features = features.detach()
    x = normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    if alone or world_size() == 1:
        std = x.std(0, correction=0)
    else:
        rows = len(x) * world_size()
        centered = x - all_reduce(x.sum(0)) / rows
        std = (all_reduce(centered.square().sum(0)) / rows).sqrt()
    return std.mean() * x.shape[1] ** 0.5
