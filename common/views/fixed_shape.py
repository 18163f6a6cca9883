"""Views with shapes and operations that do not depend on the random numbers, for accelerators and torch.compile.

A change of hue, possibly by zero, is made at all four positions, and every operation on all samples: nothing waits for
the device.
"""

import torch
from torch import Tensor

from common.views.blur import blur_by_matmul, reflections
from common.views.color import jitter_step, shift_hue, solarize, to_grayscale
from common.views.crop import crop_by_matmul
from common.views.pixel_params import PixelParams
from common.views.stack import Operations, ViewStack

CHUNK_BYTES = 1 << 30  # of temporaries


def fixed_shape(x: Tensor, rows: Tensor, operations: Operations, reflections: Tensor | None = None) -> Tensor:
    """Everything after the crop: x float [n, 3, s, s] in [0, 1]; rows [n, 29 + E], see `PixelParams`.

    reflections: those of `common.views.blur`, if there is a blur.
    """
    params, shape = PixelParams.of(rows), x.shape
    x = x.flatten(2)
    for position in range(4):
        if operations.hue:
            x = shift_hue(x, params.hue[:, position : position + 1])
        if operations.jitter_steps and position < 3:
            x = jitter_step(x, *params.step(position))
    if operations.grayscale:
        x = torch.where(params.grayscale[..., None] > 0, to_grayscale(x), x)
    if operations.blur:
        assert reflections is not None
        x = blur_by_matmul(x.view(shape), params.blur, params.sigma, reflections).flatten(2)
    if operations.solarize:
        x = torch.where(params.solarize[..., None] > 0, solarize(x), x)
    if operations.extra:
        x = operations.apply_extra(x.view(shape), params.extra).flatten(2)
    if operations.normalize:
        x = x * params.gain[..., None] + params.shift[..., None]
    return x.view(shape)


def crop_and_fixed_shape(
    images: Tensor, rows: Tensor, size: int, cubic: bool, operations: Operations, reflections: Tensor | None
) -> Tensor:
    """The complete views, one graph: uint8 [n, 3, H, W], rows [n, G, 29 + E] -> [G, n, 3, size, size]."""
    params = PixelParams.of(rows)
    x = crop_by_matmul(images, params.box, params.flip[..., 0], size, cubic)
    if cubic:
        x = x.clamp(0, 1)
    return fixed_shape(x.flatten(0, 1), rows.transpose(0, 1).flatten(0, 1), operations, reflections).view_as(x)


class FixedShape:
    """Makes the views of a stack on an accelerator."""

    def __init__(self, compile: bool):
        self._fixed_shape, self._crop_and_fixed_shape = fixed_shape, crop_and_fixed_shape
        if compile:
            self._fixed_shape = torch.compile(fixed_shape, dynamic=False)
            self._crop_and_fixed_shape = torch.compile(crop_and_fixed_shape, dynamic=False)

    def from_images(self, stack: ViewStack, images: Tensor, rows: Tensor) -> Tensor:
        """uint8 [n, 3, H, W], rows [G, n, 29 + E] -> float [G, n, 3, s, s]."""
        _, _, height, width = images.shape
        floats = 3 * width * (height + stack.size * len(stack.views)) + 6 * stack.size**2 * len(stack.views)
        chunk = max(1, CHUNK_BYTES // (4 * floats))
        parts = [
            self._crop_and_fixed_shape(
                image_part,
                row_part,
                stack.size,
                stack.cubic,
                stack.operations,
                self._reflections(stack, images.device),
            )
            for image_part, row_part in zip(images.split(chunk), rows.transpose(0, 1).split(chunk), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def from_crops(self, stack: ViewStack, crops: Tensor, rows: Tensor) -> Tensor:
        """uint8 [R, 3, s, s], rows [R, 29 + E] -> float [R, 3, s, s]."""
        return self._fixed_shape(
            crops.float().mul_(1 / 255), rows, stack.operations, self._reflections(stack, crops.device)
        )

    @staticmethod
    def _reflections(stack: ViewStack, device: torch.device) -> Tensor | None:
        return reflections(stack.size, stack.blur_radius, device) if stack.operations.blur else None
