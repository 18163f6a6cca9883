"""Gaussian blur, each sample with its own sigma, with reflected borders."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _half_kernel(sigma: Tensor, radius: int) -> Tensor:
    """Gaussian weights [n, radius + 1] of the distances 0, 1 ... radius for sigma [n, 1]; the full kernel sums to 1."""
    distance = torch.arange(radius + 1, device=sigma.device, dtype=torch.float32)
    weights = (-0.5 * (distance / sigma) ** 2).exp()
    return weights / (2 * weights.sum(-1, keepdim=True) - weights[:, :1])


def blur_by_conv(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur x [n, 3, s, s] with sigma [n, 1] by two depthwise convolutions, for CPUs."""
    n, _, size, _ = x.shape
    half = _half_kernel(sigma, radius)
    kernel = torch.cat((half.flip(1), half[:, 1:]), 1).repeat_interleave(3, 0)[:, None]
    x = F.pad(x.reshape(1, 3 * n, size, size), (radius,) * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, :, None], groups=3 * n)
    return F.conv2d(x, kernel[..., None], groups=3 * n).view(n, 3, size, size)


@lru_cache(maxsize=1024)
def reflections(size: int, radius: int, device: torch.device) -> Tensor:
    """[radius + 1, size * size]: entry (d, i, j) counts the taps at distance d from output pixel i that fall on input
    pixel j once the border is reflected; a half kernel times this is the blur's matrix."""
    counts = torch.zeros(radius + 1, size, size)
    rows = torch.arange(size)
    for offset in range(-radius, radius + 1):
        column = (rows + offset).abs()
        column = (size - 1) - ((size - 1) - column).abs()
        counts[abs(offset), rows, column] += 1
    return counts.flatten(1).to(device)


def blur_by_matmul(x: Tensor, apply: Tensor, sigma: Tensor, reflections: Tensor) -> Tensor:
    """Blur x [n, 3, s, s] where `apply` [n, 1] is 1, by two batched matrix products, for accelerators."""
    size = x.shape[-1]
    half = _half_kernel(sigma, len(reflections) - 1)
    identity = (torch.arange(len(reflections), device=x.device) == 0).float()
    half = torch.where(apply > 0, half, identity)
    matrix = (half @ reflections).view(-1, size, size)
    x = torch.bmm(x.reshape(len(x), -1, size), matrix.transpose(1, 2)).view_as(x)
    return torch.matmul(matrix[:, None], x)
