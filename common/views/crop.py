"""Crop boxes, and the crop, resize and flip of the pixels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.views.constants import constant
from common.views.sampling import ViewParams
from common.views.spec import View


def crop_boxes(params: ViewParams, views: Sequence[View], height: int, width: int) -> Tensor:
    """Crop boxes in an image of height x width: whole numbers as float64 [n, V, 4], each (top, left, height, width).

    torchvision's RandomResizedCrop.get_params: the first of ten candidates that fits, or a centered crop. A view that
    translates has the whole image, with top and left anywhere between -translate and translate.
    """
    sampled = params.columns
    area = sampled.area.double() * (height * width)
    ratio = sampled.log_ratio.double().exp()
    w, h = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.byte().argmax(-1, keepdim=True)
    h, w = h.gather(-1, first)[..., 0], w.gather(-1, first)[..., 0]
    # uniform in [0, 1) times a count can round up to the count
    top = (sampled.top.double() * (height - h + 1)).floor_().minimum(height - h)
    left = (sampled.left.double() * (width - w + 1)).floor_().minimum(width - w)
    random = torch.stack((top, left, h, w), -1)
    centered = constant(tuple(_centered_box(view, height, width) for view in views), random.device).double()
    boxes = torch.where(fits.any(-1)[..., None], random, centered)
    if not any(view.translate for view in views):
        return boxes
    reach = constant(tuple(view.translate for view in views), random.device).double()  # [V]
    down, right = (
        ((column.double() * (2 * reach + 1)).floor_().minimum(2 * reach) - reach) * sampled.translated
        for column in (sampled.top, sampled.left)
    )
    whole = torch.stack((down, right, torch.full_like(down, height), torch.full_like(down, width)), -1)
    return torch.where(reach[:, None] > 0, whole, boxes)


def _centered_box(view: View, height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centered box within the view's aspect limits."""
    low, high = view.ratio
    h, w = height, width
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


def reflect_borders(images: Tensor, border: int) -> Tensor:
    """Images [..., H, W] with `border` pixels of their reflection on every side."""
    if border >= min(images.shape[-2:]):
        raise UserError(f"translations by {border} px are too much for an image of {min(images.shape[-2:])} px")
    if border == 0:
        return images
    for axis in (-2, -1):
        last = images.shape[axis] - 1
        position = torch.arange(-border, last + border + 1, device=images.device).abs_()
        images = images.index_select(axis, last - (last - position).abs_())
    return images


def _filter(distance: Tensor, cubic: bool) -> Tensor:
    """Weight of an input pixel at `distance` >= 0 (in units of max(scale, 1) pixels) from the output's center."""
    if not cubic:
        return 1 - distance.clamp(max=1)
    t = distance.clamp(max=2)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, far)


def _centers(length: Tensor, size: int, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Centers [n, size] of the output pixels in crop coordinates, and the filter's stretch [n, 1]."""
    scale = (length / size)[:, None]
    i = torch.arange(size, device=length.device, dtype=torch.float32)
    if flip is not None:
        i = i + flip[:, None] * (size - 1 - 2 * i)
    return (i + 0.5) * scale, scale.clamp(min=1)


def _normalized(weights: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """Weights of the positions inside the crop, summing to 1 along the last axis."""
    inside = (position >= 0) & (position < length[:, None, None])
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _resampling_matrices(
    start: Tensor, length: Tensor, side: int, size: int, flip: Tensor | None, cubic: bool
) -> Tensor:
    """[n, size, side]: start, length and flip float [n]; `side` is the image's."""
    center, stretch = _centers(length, size, flip)
    position = torch.arange(side, device=start.device, dtype=torch.float32) - start[:, None, None]
    distance = ((position + 0.5 - center[..., None]) / stretch[..., None]).abs()
    return _normalized(_filter(distance, cubic), position, length)


def _resampling_taps(
    start: Tensor, length: Tensor, side: int, size: int, flip: Tensor, cubic: bool
) -> tuple[Tensor, Tensor]:
    """The non-zero entries of those matrices: input index (int64) and weight, both [n, size, taps]."""
    center, stretch = _centers(length, size, flip)
    reach = 2 if cubic else 1
    taps = math.ceil(2 * reach * max(side / size, 1))
    first = (center - reach * stretch + 0.5).floor_()
    position = first[..., None] + torch.arange(taps, dtype=torch.float32)
    distance = ((position + 0.5 - center[..., None]) / stretch[..., None]).abs_()
    weights = _normalized(_filter(distance, cubic), position, length)
    position = position.clamp_(min=0).minimum((length - 1)[:, None, None])
    return (position + start[:, None, None]).long(), weights


def crop_by_matmul(images: Tensor, box: Tensor, flip: Tensor, size: int, cubic: bool) -> Tensor:
    """Every image's G crops by two batched matrix products, for accelerators.

    images uint8 [n, 3, H, W]; box [n, G, 4]; flip [n, G]. Returns float [G, n, 3, size, size] in [0, 1], or slightly
    beyond if cubic.
    """
    n, _, height, width = images.shape
    views = box.shape[1]
    top, left, h, w = box.flatten(0, 1).unbind(-1)
    down = _resampling_matrices(top, h, height, size, None, cubic) * (1 / 255)
    across = _resampling_matrices(left, w, width, size, flip.flatten(), cubic)
    pixels = images.permute(0, 2, 1, 3).float().reshape(n, height, 3 * width)
    x = torch.bmm(down.view(n, views * size, height), pixels).view(n * views, size * 3, width)
    x = torch.bmm(x, across.transpose(1, 2)).view(n, views, size, 3, size)
    return x.permute(1, 0, 3, 2, 4).contiguous()


class RowCrop:
    """The CPU's float crops. What depends only on the boxes is computed once for all R rows.

    Input rows are summed by `embedding_bag`, columns by a matrix product per sample.
    """

    def __init__(self, images: Tensor, box: Tensor, flip: Tensor, size: int, cubic: bool):
        """images uint8 [n, 3, H, W]; box [R, 4]; flip [R]; row r is of image r % n."""
        n, _, self.height, self.width = images.shape
        self.size, self.cubic = size, cubic
        top, left, h, w = box.unbind(-1)
        # both axes in one go: these tensors are small, so the number of calls is what costs
        flips = torch.cat((torch.zeros_like(top), flip))
        side = max(self.height, self.width)
        index, weights = _resampling_taps(torch.cat((top, left)), torch.cat((h, w)), side, size, flips, cubic)
        (self.down, self.across), (self.down_weights, self.across_weights) = index.chunk(2), weights.chunk(2)
        self.down += (torch.arange(len(box)) % n * self.height)[:, None, None]
        self.down_weights *= 1 / 255
        self.table = images.permute(0, 2, 1, 3).contiguous().float().view(n * self.height, 3 * self.width)

    def __call__(self, index: Tensor) -> Tensor:
        """Row numbers [k] -> float [k, 3, size, size] in [0, 1]."""
        k, size, width = len(index), self.size, self.width
        down, down_weights, across, across_weights = (
            x.index_select(0, index) for x in (self.down, self.down_weights, self.across, self.across_weights)
        )
        x = F.embedding_bag(
            down.view(k * size, -1), self.table, mode="sum", per_sample_weights=down_weights.view(k * size, -1)
        )
        matrix = torch.zeros(k, size, width).scatter_add_(2, across, across_weights)
        x = torch.bmm(x.view(k, size * 3, width), matrix.transpose(1, 2)).view(k, size, 3, size)
        x = x.permute(0, 2, 1, 3).contiguous()
        return x.clamp_(0, 1) if self.cubic else x


def crop_by_interpolate(image: Tensor, box: Sequence[int], flip: bool, size: int, cubic: bool) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size] by torch's 8-bit antialiased resize, which is fastest with the channels
    of a pixel side by side."""
    top, left, h, w = box
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    crop = F.interpolate(crop, (size, size), mode="bicubic" if cubic else "bilinear", antialias=True)[0]
    return crop.flip(-1) if flip else crop
