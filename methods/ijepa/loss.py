"""I-JEPA's targets and loss (arXiv:2301.08243, section 3): features of the target blocks, predicted patch by patch.

n images of L patches, each with M target blocks of T patches; D: the encoder's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.distributed import all_reduce, world_size
from common.vit import take


@torch.no_grad()
def normalize(tokens: Tensor) -> Tensor:
    """The target encoder's output [n, L, D] with mean 0 and variance 1 over the D features of every patch, float32
    (float64 stays): a LayerNorm without weights (code train.py), so that no scale can shrink to make the loss small."""
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    with torch.autocast(tokens.device.type, enabled=False):
        return F.layer_norm(tokens, tokens.shape[-1:])


def blocks_of(tokens: Tensor, targets: Tensor) -> Tensor:
    """Features [n, L, D] of the full image at the patches `targets` [n, M, T] of its blocks: [n, M, T, D]."""
    return take(tokens, targets.flatten(1)).unflatten(1, targets.shape[1:])


def prediction_error(predictions: Tensor, goals: Tensor, kind: str) -> Tensor:
    """The loss: predictions [n, M, T, D] against goals of that shape, which get no gradient; scalar, float32.

    "smooth-l1": |e| - 1/2 beyond 1, e^2 / 2 below, averaged over everything (code train.py).
    "l2": squared distance, the paper's equation 1 divided by T D: its mean over the M blocks of a sum over patches and
    features has the same direction, and AdamW's steps do not depend on a constant factor.
    All images have equally many target patches, so the mean over processes is the loss of the global batch.
    """
    goals = goals.detach()
    with torch.autocast(goals.device.type, enabled=False):
        predictions = predictions.to(goals.dtype)
        return F.smooth_l1_loss(predictions, goals) if kind == "smooth-l1" else F.mse_loss(predictions, goals)


@torch.no_grad()
def moments(predictions: Tensor, goals: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `signals` needs of a micro-batch: the mean squared error, and the sums over its images of `goals`, the
    `normalize`d tokens [m, L, D], and of their squares, [L, D] each."""
    error = (predictions.to(goals.dtype) - blocks_of(goals, targets)).square().mean()
    return error, goals.sum(0), goals.square().sum(0)


@torch.no_grad()
def signals(parts: Sequence[tuple[Tensor, Tensor, Tensor]], targets: Tensor) -> dict[str, Tensor]:
    """relative_error: squared error of the predictions over that of the best answer which ignores the image, the mean
    of the batch at the same patch. target_std: spread of the targets over images at one patch, 1 at most, 0: collapse.

    parts: `moments` of each micro-batch, all equally large; targets [n, M, T] of this process. The spread is over the
    images of all processes.
    """
    error, total, squares = (all_reduce(torch.stack(values).sum(0)) for values in zip(*parts, strict=True))
    n = len(targets) * world_size()
    spread = (squares / n - (total / n).square()).clamp_min(0).mean(-1)  # [L], over images
    of_targets = all_reduce(spread[targets].mean())
    relative = error / len(parts) / of_targets.clamp_min(1e-12)
    return {"relative_error": relative, "target_std": spread.mean().sqrt()}
