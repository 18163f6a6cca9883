"""The random numbers of views, drawn on the CPU for any image size."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from common.transfer import to_device
from common.views.spec import PROBABILITIES, View

CROP_ATTEMPTS = 10
# The 24 orders of the four color changes, numbered as in torchvision.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))


class Columns(NamedTuple):
    """Named views of the columns of one tensor [n, V, 34 + E]: for n samples and V views [n, V], or as noted."""

    area: Tensor  # [n, V, 10] area of the crop as a share of the image's, one per attempt
    log_ratio: Tensor  # [n, V, 10] log(width / height) of the crop, one per attempt
    top: Tensor  # in [0, 1)
    left: Tensor  # in [0, 1)
    flip: Tensor  # 0 or 1
    color_jitter_prob: Tensor  # 0 or 1
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor  # index into ORDERS
    grayscale: Tensor  # 0 or 1
    blur: Tensor  # 0 or 1
    sigma: Tensor  # in pixels
    solarize: Tensor  # 0 or 1
    translated: Tensor  # 0 or 1
    extra: Tensor  # [n, V, E] in [0, 1), for the further operations of each view


_SINGLE = len(Columns._fields) - 3
_WIDTH = 2 * CROP_ATTEMPTS + _SINGLE  # without extra


def _columns(values: Tensor) -> Columns:
    widths = (CROP_ATTEMPTS, CROP_ATTEMPTS, _SINGLE, values.shape[-1] - _WIDTH)
    area, log_ratio, single, extra = values.split(widths, -1)
    return Columns._make((area, log_ratio, *single.unbind(-1), extra))


@dataclass(frozen=True)
class ViewParams:
    """The random numbers of n samples times V views, independent of the image size.

    values: float32 [n, V, 34 + E], with E extra columns for further operations. `params.columns.hue` is its column of
    hues [n, V]; see `Columns`. `params[a:b]` are the numbers of samples a to b.
    """

    values: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, samples: slice) -> "ViewParams":
        return ViewParams(self.values[samples])

    def to(self, device: torch.device | str) -> "ViewParams":
        return ViewParams(to_device(self.values, device))

    @cached_property
    def columns(self) -> Columns:
        return _columns(self.values)


def sample(n: int, views: Sequence[View], generator: torch.Generator, shared: Sequence[str] = ()) -> ViewParams:
    """The random numbers for n samples; all views of a sample get the first view's columns `shared`."""
    extra = max(sum(augmentation.columns for augmentation in view.extra) for view in views)
    low_values, high_values = torch.zeros(len(views), _WIDTH + extra), torch.ones(len(views), _WIDTH + extra)
    low, high = _columns(low_values), _columns(high_values)
    for i, view in enumerate(views):
        low.area[i], high.area[i] = view.scale
        low.log_ratio[i], high.log_ratio[i] = (math.log(ratio) for ratio in view.ratio)
        low.brightness[i], high.brightness[i] = max(0.0, 1 - view.brightness), 1 + view.brightness
        low.contrast[i], high.contrast[i] = max(0.0, 1 - view.contrast), 1 + view.contrast
        low.saturation[i], high.saturation[i] = max(0.0, 1 - view.saturation), 1 + view.saturation
        low.hue[i], high.hue[i] = -view.hue, view.hue
        low.order[i], high.order[i] = 0, len(ORDERS)
        low.sigma[i], high.sigma[i] = view.blur_sigma
    # `translated` is newer than published results, and extra columns are optional: they are drawn after the others, so
    # that those keep their numbers for a seed
    widths = (_WIDTH - 1, 1, extra)
    values = torch.cat([torch.rand(n, len(views), width, generator=generator) for width in widths], -1)
    columns = _columns(values)
    for name in PROBABILITIES:
        column = getattr(columns, name)
        column.copy_(column < torch.tensor([getattr(view, name) for view in views]))
    values.mul_(high_values - low_values).add_(low_values)
    columns.order.floor_().clamp_(max=len(ORDERS) - 1)
    for name in shared:
        column = getattr(columns, name)
        column[:, 1:] = column[:, :1]
    return ViewParams(values)
