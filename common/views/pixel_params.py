"""What the pixel code reads, made from the random numbers once the image size is known."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.views.constants import constant
from common.views.crop import crop_boxes
from common.views.sampling import CONTRAST, HUE, ORDERS, SATURATION, ViewParams
from common.views.spec import View

# For each order: the position of hue, and which change each of the other three is.
_HUE_POSITIONS = tuple(order.index(HUE) for order in ORDERS)
_STEPS = tuple(tuple(change for change in order if change != HUE) for order in ORDERS)
NO_JITTER = 4  # the hue position of samples without color jitter


class PixelParams(NamedTuple):
    """Named views of the columns of one tensor [..., 29 + E] with a row per output image; each [..., 1] or as noted."""

    box: Tensor  # [..., 4] top, left, height and width of the crop
    flip: Tensor  # 0 or 1
    weight: Tensor  # [..., 3] weights of the three interpolation steps (brightness, contrast, saturation in any order)
    to_gray: Tensor  # [..., 3] 1 where a step's target is the grayscale image
    to_mean: Tensor  # [..., 3] 1 where a step's target is the mean gray level
    hue: Tensor  # [..., 4] shift before, between and after the steps; 0 except at the hue position
    hue_position: Tensor  # 0 to 3, or NO_JITTER
    grayscale: Tensor  # 0 or 1
    blur: Tensor  # 0 or 1
    sigma: Tensor  # of the blur, in pixels
    solarize: Tensor  # 0 or 1
    gain: Tensor  # [..., 3] the normalization is x * gain + shift
    shift: Tensor  # [..., 3]
    extra: Tensor  # [..., E] in [0, 1), for the further operations of the view

    @staticmethod
    def of(rows: Tensor) -> "PixelParams":
        return PixelParams(*rows.split((4, 1, 3, 3, 3, 4, 1, 1, 1, 1, 1, 3, 3, rows.shape[-1] - 29), -1))

    def step(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, to_gray and to_mean of the i-th interpolation step, [..., 1] each."""
        column = slice(i, i + 1)
        return self.weight[..., column], self.to_gray[..., column], self.to_mean[..., column]


def pixel_rows(params: ViewParams, views: Sequence[View], height: int, width: int, border: int = 0) -> Tensor:
    """The columns of `PixelParams` as one tensor [n, V, 29 + E], on the device of `params`, without waiting for it.

    height, width: of the images without their `border` (pixels on every side), to which the boxes are moved.
    """
    device, sampled = params.values.device, params.columns
    jitter = sampled.color_jitter_prob[..., None]
    order = sampled.order.long()
    steps = constant(_STEPS, device)[order]
    factors = torch.stack((sampled.brightness, sampled.contrast, sampled.saturation), -1)
    hue_position = constant(_HUE_POSITIONS, device)[order][..., None]
    gain = constant(tuple(tuple(1 / s for s in view.std) for view in views), device)
    shift = constant(tuple(tuple(-m / s for m, s in zip(view.mean, view.std, strict=True)) for view in views), device)
    named = PixelParams(
        box=crop_boxes(params, views, height, width).float() + constant((border, border, 0, 0), device),
        flip=sampled.flip[..., None],
        weight=(1 - factors.gather(-1, steps.long())) * jitter,
        to_gray=(steps == SATURATION).float(),
        to_mean=(steps == CONTRAST).float(),
        hue=sampled.hue[..., None] * jitter * (hue_position == constant((0, 1, 2, 3), device)),
        hue_position=torch.where(jitter > 0, hue_position, NO_JITTER),
        grayscale=sampled.grayscale[..., None],
        blur=sampled.blur[..., None],
        sigma=sampled.sigma[..., None],
        solarize=sampled.solarize[..., None],
        gain=gain.expand(len(params), -1, -1),
        shift=shift.expand(len(params), -1, -1),
        extra=sampled.extra,
    )
    return torch.cat(named, -1)
