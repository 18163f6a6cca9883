"""MAE's targets and loss (arXiv:2111.06377, section 3): pixels of the masked patches, normalized patch by patch.

N images of L patches; p: side of a patch in pixels; P = 3 p^2 numbers a patch; mask: [N, L], True where removed.
"""

import torch
from einops import rearrange
from torch import Tensor

EPSILON = 1e-6


def patchify(images: Tensor, p: int) -> Tensor:
    """[N, 3, H, W] -> [N, L, P], patches row by row, the numbers of one in the order (row, column, channel)."""
    return rearrange(images, "n c (rows p) (columns q) -> n (rows columns) (p q c)", p=p, q=p)


def unpatchify(patches: Tensor, p: int, rows: int) -> Tensor:
    """The inverse of `patchify`: [N, L, P] of a grid with `rows` rows -> [N, 3, H, W]."""
    return rearrange(patches, "n (rows columns) (p q c) -> n c (rows p) (columns q)", rows=rows, p=p, q=p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + 1e-6) over the P numbers of each patch, [N, L, 1] each; the variance is the unbiased one
    (code: torch's default; at p = 2 the biased one is 9 % smaller)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True, correction=1) + EPSILON).sqrt()


def make_targets(images: Tensor, p: int, norm_pix: bool) -> Tensor:
    """Prediction targets, [N, L, P] in float32 (float64 stays): pixels, or with `norm_pix` each patch shifted to mean 0
    and variance 1. To see normalized predictions as pixels, multiply by and add the `patch_statistics` of the image."""
    patches = patchify(images if images.dtype == torch.float64 else images.float(), p)
    if norm_pix:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    return patches


def masked_error(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The loss: mean squared error over the P numbers of a patch, averaged over the removed patches; scalar, float32.

    Each image has the same number of removed patches, so the mean over processes is the loss of the global batch.
    """
    with torch.autocast(targets.device.type, enabled=False):
        error = (predictions.to(targets.dtype) - targets).square().mean(-1)  # [N, L]
        return (error * mask).sum() / mask.sum()


def visible_mean_error(targets: Tensor, mask: Tensor) -> Tensor:
    """`masked_error` of the best constant a network could give without looking at structure: for every removed patch
    each channel's mean over the image's visible patches (of the targets, so about 0 with norm_pix)."""
    colors = targets.unflatten(-1, (-1, 3))  # [N, L, p^2, 3]
    seen = (~mask).to(targets.dtype)[:, :, None, None]
    mean = (colors * seen).sum((1, 2), keepdim=True) / (seen.sum((1, 2), keepdim=True) * colors.shape[2])
    return masked_error(mean.expand_as(colors).flatten(-2), targets, mask)
