"""Shuffled BatchNorm (MoCo, arXiv:1911.05722, section 3.3), the same on any number of processes.

On eight GPUs each BatchNorm takes the statistics of an eighth of the batch. A query and its positive key would be
normalized together with the same other images, while the keys of the queue were normalized with others: the statistics
alone would then tell the positive. So the keys' images change places before they are encoded, and back afterwards.
Here the eighths are groups of rows, which one process can hold as well as eight.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from common import rng
from common.distributed import SyncBatchNorm, all_gather, all_reduce, rank, replace_batchnorm, world_size
from common.transfer import to_device


class GroupedBatchNorm(SyncBatchNorm):
    """BatchNorm over each of `groups` equal parts of this process's rows; weights and state_dict keys do not change.

    The running averages move by the mean of the groups' statistics over all processes, so that they do not depend on
    how the groups are distributed.
    """

    def __init__(self, norm: nn.Module, groups: int):
        super().__init__(norm)
        self.groups = groups

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return super()._normalized(x)
        means, variances = torch.zeros(2, self.groups, x.shape[1], dtype=self.running_mean.dtype, device=x.device)
        rows = [
            batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)  # 1.0: mean <- the part's
            for part, mean, variance in zip(x.chunk(self.groups), means, variances, strict=True)
        ]
        if self.track_running_stats:
            mean, variance = all_reduce(torch.stack([means.mean(0), variances.mean(0)])) / world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return torch.cat(rows)


def group_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """`module` with every BatchNorm taking its statistics over `groups` parts of this process's rows."""
    return replace_batchnorm(module, lambda norm: GroupedBatchNorm(norm, groups))


@torch.no_grad()
def encode_shuffled(encoder: nn.Module, images: Tensor, *key: int | str) -> Tensor:
    """Projections [B, D] of the images [n, 3, S, S] of all processes, in their order, encoded in a random one.

    encoder: images -> their projections, [1, n, D]. The order is a function of `key`: every process encodes its part of
    the same permutation of the global batch.
    """
    n, batch = len(images), len(images) * world_size()
    order = to_device(torch.randperm(batch, generator=rng.generator(*key)), images.device)
    own = all_gather(images)[order[rank() * n : (rank() + 1) * n]]
    (z,) = encoder(own.contiguous(memory_format=torch.channels_last))  # [n, D], row i is image order[rank n + i]
    return all_gather(z)[order.argsort()]
