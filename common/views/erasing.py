"""Random erasing, the example of an augmentation that `View(extra=...)` adds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError


@dataclass(frozen=True)
class RandomErasing:
    """Fill a random rectangle with one color (Zhong et al. 2017, arXiv:1708.04896).

    probability  that a sample has a rectangle
    scale        its area as a share of the view's, uniform in (low, high)
    ratio        its width / height, log-uniform in (low, high)
    fill         its color in [0, 1] units; the data's mean gives 0 after normalization

    Defaults are torchvision's but for the fill. A side longer than the view is cut to it; torchvision draws again.
    Raises UserError for values that no image can satisfy.
    """

    probability: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5)

    columns = 5  # whether, area, ratio, top, left

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"RandomErasing: probability must be between 0 and 1, not {self.probability}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"RandomErasing: scale must be 0 < low <= high <= 1, not {self.scale}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"RandomErasing: ratio must be 0 < low <= high, not {self.ratio}.")

    def describe(self) -> str:
        return f"random erasing p {self.probability:g} ({self.scale[0]:g}-{self.scale[1]:g} of the area)"

    def __call__(self, x: Tensor, uniform: Tensor) -> Tensor:
        """x float [n, 3, s, s] with rectangles; uniform [n, 5] in [0, 1)."""
        whether, area, ratio, top, left = uniform[:, :, None].unbind(1)  # [n, 1] each
        height, width = x.shape[-2:]
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * (height * width)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = (low + (high - low) * ratio).exp()
        h = (area / ratio).sqrt().round().clamp(max=height)
        w = (area * ratio).sqrt().round().clamp(max=width)
        rows = _inside(top, h, height) & (whether < self.probability)
        mask = rows[:, :, None] & _inside(left, w, width)[:, None]  # [n, s, s]
        # a channel at a time: the color need not be copied to the device, which could wait for it
        return torch.stack([channel.masked_fill(mask, v) for channel, v in zip(x.unbind(1), self.fill, strict=True)], 1)


def _inside(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Whether each of `side` positions is within the interval: start in [0, 1) of its free range, length in pixels."""
    first = (start * (side - length + 1)).floor().minimum(side - length)
    position = torch.arange(side, device=start.device)
    return (position >= first) & (position < first + length)
