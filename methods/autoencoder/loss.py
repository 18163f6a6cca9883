"""Squared error of the reconstruction, and what the mean image would have reached."""

import torch
from torch import Tensor

from common.distributed import all_reduce, world_size


def reconstruction_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error over the process's pixels, and parts without gradient; float32 at least.

    pred, target: [n, 3, s, s]; mask: [n, 1, s, s], where given only its ones count (MAE's choice; the lecture's target
    is all of x). Every sample must have as many of them, then the processes' mean is the global batch's.
    mean_image: the same error of the mean over the global batch, what a decoder reaches that ignores its input.
    relative_error: loss / mean_image, 1 = nothing learned, 0 = perfect.
    """
    pred, target = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (pred, target))
    loss = _mean((pred - target).square(), mask)
    with torch.no_grad():
        average = all_reduce(target.sum(0)) / (len(target) * world_size())
        mean_image = all_reduce(_mean((target - average).square(), mask)) / world_size()
        parts = {"mean_image": mean_image, "relative_error": loss.detach() / mean_image}
    return loss, parts


def _mean(squares: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return squares.mean()
    return (squares * mask).sum() / (mask.sum() * squares.shape[1])
