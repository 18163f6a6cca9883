"""I-JEPA's targets and loss (arXiv:2301.08243, section 3): features of the target blocks, predicted patch by patch.

n images of L patches, each with M target blocks of T patches; D: the encoder's width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.vit import take


@torch.no_grad()
def normalised(tokens: Tensor) -> Tensor:
    """The target encoder's output [n, L, D] with mean 0 and variance 1 over the D features of every patch, float32
    (float64 stays): a LayerNorm without weights (code train.py), so that no scale can shrink to make the loss small."""
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    with torch.autocast(tokens.device.type, enabled=False):
        return F.layer_norm(tokens, tokens.shape[-1:])


def blocks_of(tokens: Tensor, targets: Tensor) -> Tensor:
    """Features [n, L, D] of the whole image at the patches `targets` [n, M, T] of its blocks: [n, M, T, D]."""
    return take(tokens, targets.flatten(1)).unflatten(1, targets.shape[1:])


def prediction_error(predictions: Tensor, goals: Tensor, kind: str) -> Tensor:
    """The loss: predictions [n, M, T, D] against goals of that shape, which get no gradient; scalar, float32.

    "smooth-l1": |e| - 1/2 beyond 1, e^2 / 2 below, averaged over everything (code train.py).
    "l2": squared distance, the paper's equation 1 divided by T D: its mean over the M blocks of a sum over patches and
    features has the same direction, and AdamW's steps do not depend on a constant factor.
    All images have equally many target patches, so the mean over ranks is the loss of the whole batch.
    """
    goals = goals.detach()
    with torch.autocast(goals.device.type, enabled=False):
        predictions = predictions.to(goals.dtype)
        return F.smooth_l1_loss(predictions, goals) if kind == "smooth-l1" else F.mse_loss(predictions, goals)


@torch.no_grad()
def health(predictions: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """relative_error: squared error of the predictions over that of the best answer which ignores the image, the mean
    of the batch at the same place. target_std: spread of the targets over images at one place, 1 at most, 0: collapse.

    tokens: `normalised`, of the whole images [n, L, D].
    """
    spread = tokens.var(0, correction=0).mean(-1)  # [L], over images
    error = (predictions.to(tokens.dtype) - blocks_of(tokens, targets)).square().mean()
    return {"relative_error": error / spread[targets].mean().clamp_min(1e-12), "target_std": spread.mean().sqrt()}
