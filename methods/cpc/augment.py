"""CPC's views and patches (arXiv:1807.03748, section 3.2): crop, flip, grayscale, overlapping patches, and then
augmentations per patch: a sub-crop padded back; from CPC v2 (arXiv:1905.09272) brightness, contrast, dropped channels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from common.data import mean_std
from common.views.color import GRAY_WEIGHTS as GRAY
from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config

GRAY_STATS = {"stl10": (0.4120, 0.2570)}  # of the gray images, GIM's code; of others, by the channels' weights
DRAWS = 6  # random numbers per patch


def statistics(normalize: str, grayscale: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of `--normalize`; for gray images the same number for the three channels."""
    mean, std = mean_std(normalize)
    if not grayscale:
        return mean, std
    pair = GRAY_STATS.get(
        normalize, [sum(w * x for w, x in zip(GRAY, v, strict=True)) / sum(GRAY) for v in (mean, std)]
    )
    return (pair[0],) * 3, (pair[1],) * 3


def one_view(cfg: Config) -> ViewRecipe:
    """A square crop of a share of the area, left-right flip, grayscale: the paper's order up to the patches."""
    mean, std = statistics(cfg.normalize, cfg.grayscale)
    view = View(
        size=cfg.crop_size,
        scale=cfg.crop_scale,
        ratio=(1.0, 1.0),
        flip=cfg.flip,
        grayscale=float(cfg.grayscale),
        mean=mean,
        std=std,
    )
    return ViewRecipe([view], compile=cfg.compile)


def grid_side(side: int, patch: int, stride: int) -> int:
    """Patches along a side of `side` pixels."""
    return (side - patch) // stride + 1


@dataclass(frozen=True)
class PatchJitter:
    """Augmentations of every patch of every image, from random numbers per patch.

    crop        side in pixels of a random sub-crop, padded back to the patch with zeros (the mean of normalized
                images), never resized (v1: 60 of 64); 0: none
    brightness  shift by U(-b, b) standard deviations; contrast: factor U(1 - c, 1 + c) about the patch's mean (v2 has
                both among its patch operations; its ranges are not known here)
    color_drop  probability that only one of the three channels, at random, is kept (v2)
    """

    patch: int
    stride: int
    crop: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    color_drop: float = 0.0

    def sample(self, images: int, patches: int, generator: torch.Generator) -> Tensor:
        """Random numbers [images, patches, 6] in [0, 1) for the global batch; a process uses its slice."""
        return torch.rand(images, patches, DRAWS, generator=generator)

    def __call__(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> patches [B * L, C, p, p], image by image, row by row; numbers: [B, L, 6], as `sample` draws.

        Without numbers, for evaluation: the middle sub-crop, padded back as in training, and nothing random.
        """
        x = self._cut(images, numbers)
        if numbers is not None:
            x = self._jittered(x, numbers.flatten(0, 1).to(x.dtype))
        border = self.patch - x.shape[-1]
        return F.pad(x, (border // 2, border - border // 2) * 2) if border else x

    def _cut(self, images: Tensor, numbers: Tensor | None) -> Tensor:
        spare = self.patch - self.crop if self.crop else 0
        if not spare:
            tiles = images.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)
            return rearrange(tiles, "b c rows columns p q -> (b rows columns) c p q")
        # One gather of the needed pixels: sub-crops start at different positions.
        b, _, height, width = images.shape
        down, across = (torch.arange(n - self.patch + 1, device=images.device)[:: self.stride] for n in (height, width))
        corners = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1).flatten(0, 1)  # [L, 2]
        if numbers is None:
            corners = (corners + spare // 2).expand(b, -1, -1)
        else:
            corners = corners + (numbers[..., :2] * (spare + 1)).floor().long().clamp(max=spare)
        reach = torch.arange(self.crop, device=images.device)
        rows, columns = (corners[..., i, None] + reach for i in (0, 1))  # [B, L, crop] each
        place = rows[..., :, None] * width + columns[..., None, :]
        pixels = images.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, images.shape[1], -1))
        return rearrange(pixels, "b c (l p q) -> (b l) c p q", p=self.crop, q=self.crop)

    def _jittered(self, x: Tensor, numbers: Tensor) -> Tensor:
        _, _, gain, shift, drop, channel = numbers[..., None, None, None].unbind(1)
        if self.contrast:
            mean = x.mean((1, 2, 3), keepdim=True)
            x = mean + (x - mean) * (1 + self.contrast * (2 * gain - 1))
        if self.brightness:
            x = x + self.brightness * (2 * shift - 1)
        if self.color_drop:
            channels = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
            x = torch.where((drop < self.color_drop) & (channels != (channel * x.shape[1]).floor()), 0.0, x)
        return x

    def describe(self) -> str:
        words = [f"{self.patch} px, stride {self.stride}"]
        words += [f"sub-crop of {self.crop} px padded back"] if self.crop else []
        for name in ("brightness", "contrast", "color_drop"):
            words += [f"{name} {getattr(self, name):g}"] if getattr(self, name) else []
        return ", ".join(words)
