"""Views on a CPU, which does only what the random numbers ask for.

The samples are grouped by the position of their hue change, which is then made once per group; grayscale, blur and
solarize are made for the samples that have them. Work goes in blocks that stay in the caches.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.views.blur import blur_by_conv
from common.views.color import jitter_step, jitter_step_, shift_hue, shift_hue_, solarize, to_grayscale
from common.views.crop import RowCrop, crop_by_interpolate
from common.views.fixed_shape import fixed_shape
from common.views.pixel_params import NO_JITTER, PixelParams
from common.views.stack import Operations, ViewStack

# Images up to this many pixels are cropped in float, larger ones by the 8-bit resize.
EXACT_CROP_PIXELS = 64 * 64
# Values of a block: it stays in the caches and below malloc's threshold for fresh pages.
BLOCK_VALUES = 400_000


class Grouped:
    """Makes the views of a stack on a CPU. crop: "rows" or "native" instead of the choice by the size of the images."""

    def __init__(self, compile: bool, crop: str | None = None):
        # Freeing one large block raises glibc's thresholds, so that the temporaries of every call reuse the same pages:
        # without it a third of the time goes into page faults. The memory is never touched.
        torch.empty(31 << 20, dtype=torch.uint8)
        self._crop, self._compiled = crop, compile
        if compile:
            self._jitter_step, self._shift_hue = torch.compile(jitter_step), torch.compile(shift_hue)
            self._finish_ = torch.compile(_finish_fused_)

    def from_images(self, stack: ViewStack, images: Tensor, rows: Tensor) -> Tensor:
        """uint8 [n, 3, H, W], rows [G, n, 29 + E] -> float [G, n, 3, s, s]."""
        flat = rows.flatten(0, 1)
        x = self._views(stack, flat, self._cropper(stack, images, PixelParams.of(flat)))
        return x.view(*rows.shape[:2], *x.shape[1:])

    def from_crops(self, stack: ViewStack, crops: Tensor, rows: Tensor) -> Tensor:
        """uint8 [R, 3, s, s], rows [R, 29 + E] -> float [R, 3, s, s]."""
        return self._views(stack, rows, lambda index: crops.index_select(0, index).float().mul_(1 / 255))

    def _cropper(self, stack: ViewStack, images: Tensor, params: PixelParams) -> Callable[[Tensor], Tensor]:
        """A function from row numbers [k] to their crops, float [k, 3, s, s] in [0, 1]."""
        exact = images.shape[2] * images.shape[3] <= EXACT_CROP_PIXELS
        if (self._crop or ("rows" if exact else "native")) == "rows":
            return RowCrop(images, params.box, params.flip[:, 0], stack.size, stack.cubic)
        boxes, flips = params.box.long().tolist(), params.flip[:, 0].tolist()

        def native(index: Tensor) -> Tensor:
            x = torch.empty(len(index), 3, stack.size, stack.size)
            for k, i in enumerate(index.tolist()):
                x[k] = crop_by_interpolate(images[i % len(images)], boxes[i], flips[i] > 0, stack.size, stack.cubic)
            return x.mul_(1 / 255)

        return native

    def _views(self, stack: ViewStack, rows: Tensor, crop: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [R, 29 + E] -> float [R, 3, s, s]; `crop` gives the crops of some rows."""
        size, operations = stack.size, stack.operations
        out = torch.empty(len(rows), 3, size, size)
        block = min(len(rows), max(1, BLOCK_VALUES // (3 * size * size)))
        scratch = None if self._compiled else torch.empty(6, block, size * size)
        # What is left to do after the blur, which is never compiled: it is made only for the samples that have it.
        last = operations._replace(
            jitter_steps=False, hue=False, grayscale=operations.grayscale and not operations.blur, blur=False
        )
        for index, hue_position in _blocks(rows, block, operations):
            block_rows = rows.index_select(0, index)
            params = PixelParams.of(block_rows)
            x = crop(index)
            if hue_position != NO_JITTER:
                part = None if scratch is None else scratch[:, : len(x)]
                x = self._jitter(x.flatten(2), params, hue_position, operations, part).view_as(x)
            if operations.blur:
                _grayscale_subset_(x, params)
                _blur_subset_(x, params, stack.blur_radius)
            if self._compiled:
                self._finish_(out, index, x, block_rows, last)
            else:
                out.index_copy_(0, index, _finish(x, params, last))
        return out

    def _jitter(
        self, x: Tensor, params: PixelParams, hue_position: int, operations: Operations, scratch: Tensor | None
    ) -> Tensor:
        """Color jitter of x [k, 3, P], which may be overwritten. scratch: [6, k, P] unless compiled."""
        for position in range(4):
            if operations.hue and position == hue_position:
                shift = params.hue[:, position : position + 1]
                x = self._shift_hue(x, shift) if scratch is None else shift_hue_(x, shift, scratch)
            if operations.jitter_steps and position < 3:
                step = params.step(position)
                x = self._jitter_step(x, *step) if scratch is None else jitter_step_(x, *step, scratch)
        return x


def _blocks(rows: Tensor, block: int, operations: Operations) -> Iterator[tuple[Tensor, int]]:
    """Row numbers in runs of at most `block` that share the position of their hue change, with that position."""
    hue_position = PixelParams.of(rows).hue_position[:, 0]
    if not operations.jitter_steps and not operations.hue:
        hue_position = torch.full((len(rows),), NO_JITTER)
    elif not operations.hue:
        hue_position = torch.where(hue_position == NO_JITTER, NO_JITTER, 0)
    hue_position = hue_position.long()
    order = hue_position.argsort(stable=True)
    for position, group in enumerate(order.split(hue_position.bincount(minlength=NO_JITTER + 1).tolist())):
        if len(group):
            for index in group.split(block):
                yield index, position


def _grayscale_subset_(x: Tensor, params: PixelParams) -> None:
    """Grayscale the samples that are to be: x [n, 3, s, s]. Finding them would make an accelerator wait."""
    subset = params.grayscale[:, 0].nonzero()[:, 0]
    x.index_copy_(0, subset, to_grayscale(x.index_select(0, subset)))


def _solarize_subset_(x: Tensor, params: PixelParams) -> None:
    subset = params.solarize[:, 0].nonzero()[:, 0]
    x.index_copy_(0, subset, solarize(x.index_select(0, subset)))


def _blur_subset_(x: Tensor, params: PixelParams, radius: int) -> None:
    subset = params.blur[:, 0].nonzero()[:, 0]
    if len(subset):
        x.index_copy_(0, subset, blur_by_conv(x.index_select(0, subset), params.sigma[subset], radius))


def _finish(x: Tensor, params: PixelParams, operations: Operations) -> Tensor:
    """What is left to do for x [k, 3, s, s], which may be overwritten."""
    if operations.grayscale:
        _grayscale_subset_(x, params)
    if operations.solarize:
        _solarize_subset_(x, params)
    x = operations.apply_extra(x, params.extra)
    if operations.normalize:
        x.mul_(params.gain[..., None, None]).add_(params.shift[..., None, None])
    return x


def _finish_fused_(out: Tensor, index: Tensor, x: Tensor, rows: Tensor, operations: Operations) -> None:
    """The same into the rows `index` of out, for torch.compile, which makes one pass over the memory."""
    out.index_copy_(0, index, fixed_shape(x, rows, operations))
