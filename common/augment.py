"""Random views of a batch of images, made on the images' device, every sample with its own random numbers.

A `View` says what one view is, a `ViewRecipe` holds all views of a method. Its work has two halves that never mix:

    params = recipe.sample(n, generator)    every random number for n samples, on the CPU, whatever the image size
    views = recipe(images, params)          pixels only: no randomness, so a rank's slice of params gives its slice of
                                            the views, and a test can replay each sample through another library

Order of the operations: crop and resize, flip, colour jitter, greyscale, blur, solarise, normalise. Pixels are float32
in [0, 1] from the crop on and are never rounded to 8 bits again.

How it is made fast. Brightness, contrast and saturation are all x <- clamp(lerp(x, target, weight)) with the target
black, the mean grey level, or the grey image; so four operations in any order are three such steps and one change of
hue, which stands before, between or behind them. Two forms of the same arithmetic:
    sorted   the samples are ordered by the place of their hue change, which is then run once on each contiguous block;
             block sizes depend on the numbers drawn. Fastest in eager mode on a CPU.
    masked   a hue change, possibly by zero, is run at all four places: static shapes, no host synchronisation. Used on
             accelerators and under torch.compile.
Resampling is separable: an output row is a weighted sum of a few input rows, with the weights of torch's antialiased
`interpolate`. On a CPU the rows are summed by `embedding_bag` and the columns by a matrix product per sample; on
accelerators both are batched matrix products. Above `EXACT_CROP_PIXELS` input pixels a CPU uses torch's native 8-bit
resize sample by sample, three to eight times faster there; it rounds the crop to whole levels. The worker path of
streamed data (`crop_one`, then `finish`) always does, because uint8 is what travels to the device.

Exactness: every operation equals torchvision's v2 functional operation on float tensors given the same numbers. Largest
differences, in units of 1/255 (tests/test_augment.py): 0.001 for each operation and for whole pipelines at 32 px, 0.01
at 96 px and more, where float32 positions weigh; sorted, masked and compiled agree to the same. The 8-bit crop equals
torchvision's on uint8; bilinear it is within 1 of the float crop, and after jitter with factors up to 1.8 within 8, 0.2
on average. Bicubic has the same average, but beside hard edges single pixels differ by 10 to 40: 8-bit resizes (PIL's
too) clip the overshoot after either pass. Matrix products in TF32 would leave about 0.2.

Where the libraries differ (their differences exceed ours by four orders of magnitude):
    crop box     torchvision: area uniform, aspect log-uniform, ten attempts, else the largest centred crop within the
                 aspect limits; whole-pixel boxes. That is what is done here. TensorFlow's distorted bounding box
                 (SimCLR) samples differently and tries 100 times; BYOL tries once and clips the box to the image.
    resize       bilinear or bicubic (a = -1/2), antialiased, as PIL and torchvision do; without antialiasing crops
                 larger than the output differ by up to 50/255. PIL clips bicubic overshoot to [0, 255], float tensors
                 keep it; here it is clipped, because the colour operations are defined on [0, 1].
    brightness   multiplied by U(1 - b, 1 + b), as torchvision; the first SimCLR and BYOL added U(-b, b).
    contrast     about the mean grey level, as torchvision and PIL (which rounds the mean); TensorFlow and JAX use the
                 mean of each channel.
    grey         0.2989, 0.587, 0.114 as torchvision; the weights sum to 0.9999.
    jitter order random for each sample, as torchvision, SimCLR and BYOL; kornia draws one order for the batch. Values
                 are clipped to [0, 1] after each operation everywhere.
    hue          in float here; PIL goes through 8-bit HSV (up to 10/255 away, 0.4 on average).
    blur         a true Gaussian with an odd kernel and reflected borders, as SimCLR (kernel = a tenth of the side).
                 PIL approximates it by three box blurs of the given "radius" and extends the border (up to 14/255).
    solarise     inverts values >= 0.5; PIL inverts levels >= 128, which is the same set of 8-bit values.
    rounding     PIL and 8-bit tensors cut to whole levels after every operation: about one level darker at the end, up
                 to 19/255 in single pixels at 32 px and 33/255 at 224 px. 8-bit torchvision and PIL differ as much.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

# Images up to this many pixels are cropped in float on a CPU, larger ones by the native 8-bit resize.
EXACT_CROP_PIXELS = 64 * 64

ATTEMPTS = 10
GREY = (0.2989, 0.587, 0.114)
# The 24 orders of the four jitter operations, numbered as in torchvision.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))


@dataclass(frozen=True)
class View:
    """One view: probabilities are per sample, strengths are torchvision's.

    size           side of the square output in pixels
    scale, ratio   area of the crop as a share of the image, width / height; both as (low, high)
    interpolation  "bilinear" or "bicubic", always antialiased
    translate      instead of the crop, with probability `translated`: the whole image moved by up to this many pixels
                   along either axis, a whole number, with its reflection where it left (the border pixel not repeated)
    flip           probability of a left-right flip
    jitter         probability that the four colour operations are applied, in random order: brightness, contrast and
                   saturation factors U(max(0, 1 - v), 1 + v), hue shift U(-hue, hue) in turns of the colour circle
    grey           probability of a greyscale image
    blur           probability of a Gaussian blur with sigma ~ U(blur_sigma) pixels and `blur_kernel` taps (odd; by
                   default a tenth of the side, made odd)
    solarize       probability that values >= 0.5 are inverted
    mean, std      normalisation (x - mean) / std of each channel, in [0, 1] units; the default leaves x alone

    Raises UserError for values no image can satisfy.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    translate: int = 0
    translated: float = 1.0
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarize: float = 0.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.blur_kernel is None:
            object.__setattr__(self, "blur_kernel", self.size // 10 | 1)
        checks = {
            f"size must be a positive number of pixels, not {self.size}": self.size >= 1,
            f"scale must be 0 < low <= high <= 1, not {self.scale}": 0 < self.scale[0] <= self.scale[1] <= 1,
            f"ratio must be 0 < low <= high, not {self.ratio}": 0 < self.ratio[0] <= self.ratio[1],
            f"interpolation must be bilinear or bicubic, not {self.interpolation}": self.interpolation
            in ("bilinear", "bicubic"),
            f"translate must be a number of pixels from 0 on, not {self.translate}": self.translate >= 0,
            f"hue must be within 0 and 0.5, not {self.hue}": 0 <= self.hue <= 0.5,
            f"blur_sigma must be 0 < low <= high, not {self.blur_sigma}": 0 < self.blur_sigma[0] <= self.blur_sigma[1],
            f"std must be positive, not {self.std}": all(s > 0 for s in self.std),
        }
        for name in _CHANCES:
            value = getattr(self, name)
            checks[f"{name} is a probability, so within 0 and 1, not {value}"] = 0 <= value <= 1
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            checks[f"{name} must not be negative, as {value} is"] = value >= 0
        if self.blur > 0:
            fits = self.blur_kernel % 2 == 1 and 1 <= self.blur_kernel < 2 * self.size
            checks[f"blur_kernel must be odd and below twice the size {self.size}, not {self.blur_kernel}"] = fits
        for sentence, fine in checks.items():
            if not fine:
                raise UserError(f"View: {sentence}.")

    def describe(self) -> str:
        """One line in plain words."""
        low, high = self.scale
        words = [f"{self.size} px", f"crop of {low:.3g}-{high:.3g} of the area, {self.interpolation}"]
        if self.translate:
            words[1] = f"moved by up to {self.translate} px, p {self.translated:g}, borders reflected"
        elif self.ratio != (3 / 4, 4 / 3):
            words.append(f"aspect {self.ratio[0]:.3g}-{self.ratio[1]:.3g}")
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        sigma = f"sigma {self.blur_sigma[0]:g}-{self.blur_sigma[1]:g} px, {self.blur_kernel} taps"
        for name, probability, detail in (
            ("flip", self.flip, ""),
            ("colour jitter", self.jitter, "/".join(f"{v:g}" for v in strengths)),
            ("grey", self.grey, ""),
            ("blur", self.blur, sigma),
            ("solarise", self.solarize, ""),
        ):
            if probability > 0:
                words.append(f"{name} p {probability:g}" + f" ({detail})" * bool(detail))
        if (self.mean, self.std) == ((0.0,) * 3, (1.0,) * 3):
            words.append("values in [0, 1]")
        else:
            words.append("normalised by mean " + " ".join(f"{v:g}" for v in self.mean)
                         + ", std " + " ".join(f"{v:g}" for v in self.std))
        return ", ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers. One float32 row per sample and view; the columns by name.

_DRAWN = {"area": slice(0, ATTEMPTS), "log_ratio": slice(ATTEMPTS, 2 * ATTEMPTS)}
_DRAWN |= {name: 2 * ATTEMPTS + i for i, name in enumerate(
    ("top", "left", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "order", "grey", "blur", "sigma",
     "solarize"))}
_DRAWN |= {"translated": 2 * ATTEMPTS + 13}
_DRAWN_WIDTH = 2 * ATTEMPTS + 14
_CHANCES = ("flip", "jitter", "grey", "blur", "solarize", "translated")


@dataclass(frozen=True)
class ViewParams:
    """All random numbers of n samples times V views, independent of the image size.

    values: float32 [n, V, 34]. `params["hue"]` is a column [n, V]; "area" and "log_ratio" are the ten crop candidates
    [n, V, 10]; "top" and "left" are in [0, 1); "order" is a row of ORDERS; flip, jitter, grey, blur, solarize and
    translated are 0 or 1. `params[a:b]` are the numbers of samples a to b.
    """

    values: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, key: str | slice) -> "Tensor | ViewParams":
        if isinstance(key, str):
            return self.values[..., _DRAWN[key]]
        return ViewParams(self.values[key])

    def to(self, device: torch.device | str) -> "ViewParams":
        return ViewParams(self.values.to(device, non_blocking=True))


def crop_boxes(params: ViewParams, views: Sequence[View], height: int, width: int) -> Tensor:
    """Crop boxes in an image of height x width: whole numbers as float64 [n, V, 4], each (top, left, height, width).

    torchvision's RandomResizedCrop.get_params: the first of ten candidates that fits, else a centred crop. A view that
    translates has the whole image, with top and left anywhere between -translate and translate.
    """
    area = params["area"].double() * (height * width)
    ratio = params["log_ratio"].double().exp()
    w, h = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.byte().argmax(-1, keepdim=True)
    h, w = h.gather(-1, first)[..., 0], w.gather(-1, first)[..., 0]
    # uniform in [0, 1) times a count can round up to the count
    top = (params["top"].double() * (height - h + 1)).floor_().minimum(height - h)
    left = (params["left"].double() * (width - w + 1)).floor_().minimum(width - w)
    drawn = torch.stack((top, left, h, w), -1)
    centred = []
    for view in views:
        low, high = view.ratio
        h0, w0 = height, width
        if width / height < low:
            h0 = round(width / low)
        elif width / height > high:
            w0 = round(height * high)
        centred.append(((height - h0) // 2, (width - w0) // 2, h0, w0))
    boxes = torch.where(fits.any(-1)[..., None], drawn, _constant(tuple(centred), drawn.device).double())
    if not any(view.translate for view in views):
        return boxes
    reach = _constant(tuple(view.translate for view in views), drawn.device).double()  # [V]
    moves = [(params[name].double() * (2 * reach + 1)).floor_().minimum(2 * reach) - reach for name in ("top", "left")]
    moves = [move * params["translated"] for move in moves]
    whole = torch.stack((*moves, torch.full_like(moves[0], height), torch.full_like(moves[0], width)), -1)
    return torch.where(reach[:, None] > 0, whole, boxes)


@lru_cache(maxsize=1024)
def _constant(values: tuple, device: torch.device) -> Tensor:
    """A float32 tensor, copied to the device once: a copy in every step could wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# What the pixel code reads: one float32 row per output image, made from ViewParams once the image size is known.

_BOX = slice(0, 4)
_FLIP = 4
_WEIGHT, _TO_GREY, _TO_MEAN = slice(5, 8), slice(8, 11), slice(11, 14)  # the three lerp steps
_HUE = slice(14, 18)  # shift at each of the four places, 0 where the change of hue is not due
_PLACE, _IS_GREY, _IS_BLURRED, _SIGMA, _IS_SOLARIZED = range(18, 23)
_GAIN, _SHIFT = slice(23, 26), slice(26, 29)  # normalisation as x * gain + shift
_NO_JITTER = 4  # stands in _PLACE

# For each order: place of hue, and which operation is each of the other three.
_PLACES = tuple(order.index(HUE) for order in ORDERS)
_STEPS = tuple(tuple(op for op in order if op != HUE) for order in ORDERS)


def _numbers(params: ViewParams, views: Sequence[View], height: int, width: int, border: int = 0) -> Tensor:
    """[n, V, 29]; see the column constants above; boxes in an image with a `border`. No host synchronisation."""
    device = params.values.device
    jitter = params["jitter"][..., None]
    order = params["order"].long()
    steps = _constant(_STEPS, device)[order]
    factors = torch.stack((params["brightness"], params["contrast"], params["saturation"]), -1)
    weight = (1 - factors.gather(-1, steps.long())) * jitter
    place = _constant(_PLACES, device)[order][..., None]
    hue = params["hue"][..., None] * jitter * (place == _constant((0, 1, 2, 3), device))
    scale = _constant(tuple((*(1 / s for s in v.std), *(-m / s for m, s in zip(v.mean, v.std, strict=True)))
                            for v in views), device)
    kept = torch.stack([params[name] for name in ("grey", "blur", "sigma", "solarize")], -1)
    return torch.cat((
        crop_boxes(params, views, height, width).float() + _constant((border, border, 0, 0), device),
        params["flip"][..., None],
        weight, (steps == SATURATION).float(), (steps == CONTRAST).float(),
        hue, torch.where(jitter > 0, place, _NO_JITTER), kept, scale.expand(len(params), -1, -1),
    ), -1)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Crop, resize, flip

def _bordered(images: Tensor, border: int) -> Tensor:
    """Images [..., H, W] with `border` pixels of their reflection on every side."""
    if border >= min(images.shape[-2:]):
        raise UserError(f"translations by {border} px are too much for an image of {min(images.shape[-2:])} px")
    for axis in (-2, -1) if border else ():
        last = images.shape[axis] - 1
        place = torch.arange(-border, last + border + 1, device=images.device).abs_()
        images = images.index_select(axis, last - (last - place).abs_())
    return images


def _filter(distance: Tensor, cubic: bool) -> Tensor:
    """Weight of an input pixel at `distance` >= 0 (in units of max(scale, 1) pixels) from the output's centre."""
    if not cubic:
        return 1 - distance.clamp(max=1)
    t = distance.clamp(max=2)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, far)


def _centres(length: Tensor, size: int, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Centres [n, size] of the output pixels in crop coordinates, and the filter's stretch [n, 1]."""
    scale = (length / size)[:, None]
    i = torch.arange(size, device=length.device, dtype=torch.float32)
    if flip is not None:
        i = i + flip[:, None] * (size - 1 - 2 * i)
    return (i + 0.5) * scale, scale.clamp(min=1)


def _normalised(weights: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """Weights of the positions inside the crop, summing to 1 along the last axis."""
    inside = (position >= 0) & (position < length[:, None, None])
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _rows(start: Tensor, length: Tensor, side: int, size: int, flip: Tensor | None, cubic: bool) -> Tensor:
    """Resampling matrices [n, size, side]: start, length, flip float [n]; `side` is the image's."""
    centre, stretch = _centres(length, size, flip)
    position = torch.arange(side, device=start.device, dtype=torch.float32) - start[:, None, None]
    distance = ((position + 0.5 - centre[..., None]) / stretch[..., None]).abs()
    return _normalised(_filter(distance, cubic), position, length)


def _taps(start: Tensor, length: Tensor, side: int, size: int, flip: Tensor | None, cubic: bool
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as _rows, non-zero entries only: input index (int64) and weight, both [n, size, taps]."""
    centre, stretch = _centres(length, size, flip)
    reach = 2 if cubic else 1
    taps = math.ceil(2 * reach * max(side / size, 1))
    first = (centre - reach * stretch + 0.5).floor_()
    position = first[..., None] + torch.arange(taps, dtype=torch.float32)
    distance = ((position + 0.5 - centre[..., None]) / stretch[..., None]).abs_()
    weights = _normalised(_filter(distance, cubic), position, length)
    position = position.clamp_(min=0).minimum((length - 1)[:, None, None])
    return (position + start[:, None, None]).long(), weights


def _crop_matmul(images: Tensor, numbers: Tensor, size: int, cubic: bool) -> Tensor:
    """uint8 [n, 3, H, W], numbers [n, G, .] -> float [G, n, 3, size, size] by two batched matrix products."""
    n, _, height, width = images.shape
    views = numbers.shape[1]
    row = numbers.flatten(0, 1)
    top, left, h, w = row[:, _BOX].unbind(-1)
    down = _rows(top, h, height, size, None, cubic) * (1 / 255)
    across = _rows(left, w, width, size, row[:, _FLIP], cubic)
    pixels = images.permute(0, 2, 1, 3).float().reshape(n, height, 3 * width)
    x = torch.bmm(down.view(n, views * size, height), pixels).view(n * views, size * 3, width)
    x = torch.bmm(x, across.transpose(1, 2)).view(n, views, size, 3, size)
    return x.permute(1, 0, 3, 2, 4).contiguous()


class _RowCrop:
    """The CPU's float crop of all rows of a group; what depends on the numbers alone is worked out once."""

    def __init__(self, images: Tensor, numbers: Tensor, size: int, cubic: bool):
        """images uint8 [n, 3, H, W]; numbers [R, .], row r is of image r % n."""
        n, _, self.height, self.width = images.shape
        self.size, self.cubic = size, cubic
        top, left, h, w = numbers[:, _BOX].unbind(-1)
        # both axes in one go: these tensors are small, so the number of calls is what costs
        flip = torch.cat((torch.zeros_like(top), numbers[:, _FLIP]))
        side = max(self.height, self.width)
        index, weights = _taps(torch.cat((top, left)), torch.cat((h, w)), side, size, flip, cubic)
        (self.down, self.across), (self.down_weights, self.across_weights) = index.chunk(2), weights.chunk(2)
        self.down += (torch.arange(len(numbers)) % n * self.height)[:, None, None]
        self.down_weights *= 1 / 255
        self.table = images.permute(0, 2, 1, 3).contiguous().float().view(n * self.height, 3 * self.width)

    def __call__(self, index: Tensor) -> Tensor:
        """Row numbers [k] -> float [k, 3, size, size]."""
        k, size, width = len(index), self.size, self.width
        down, down_weights, across, across_weights = (
            x.index_select(0, index) for x in (self.down, self.down_weights, self.across, self.across_weights)
        )
        x = F.embedding_bag(down.view(k * size, -1), self.table, mode="sum",
                            per_sample_weights=down_weights.view(k * size, -1))  # fmt: skip
        matrix = torch.zeros(k, size, width).scatter_add_(2, across, across_weights)
        x = torch.bmm(x.view(k, size * 3, width), matrix.transpose(1, 2)).view(k, size, 3, size)
        x = x.permute(0, 2, 1, 3).contiguous()
        return x.clamp_(0, 1) if self.cubic else x


def _crop_native(image: Tensor, box: Sequence[int], flip: bool, size: int, interpolation: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size] by torch's 8-bit antialiased resize, which is fastest with the channels
    of a pixel side by side."""
    top, left, h, w = box
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    crop = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]
    return crop.flip(-1) if flip else crop


# ---------------------------------------------------------------------------------------------------------------------
# Colour. x is float [n, 3, P] with the pixels of a channel side by side; per-sample numbers are [n].

def _grey(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Grey level [n, P]."""
    r, g, b = x.unbind(1)
    return torch.mul(r, GREY[0], out=out).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def _greyed(x: Tensor) -> Tensor:
    return _grey(x)[:, None].expand_as(x)


def _solarized(x: Tensor) -> Tensor:
    return torch.where(x >= 0.5, 1 - x, x)


def _step(x: Tensor, weight: Tensor, to_grey: Tensor, to_mean: Tensor) -> Tensor:
    """One of brightness, contrast and saturation: clamp(lerp(x, target, weight)); all numbers [n, 1]."""
    grey = _grey(x)
    target = grey * to_grey + grey.mean(-1, keepdim=True) * to_mean
    return (x + weight[..., None] * (target[:, None] - x)).clamp(0, 1)


def _step_(x: Tensor, weight: Tensor, to_grey: Tensor, to_mean: Tensor, scratch: Tensor) -> None:
    """_step in place; scratch [6, n, P]."""
    grey = _grey(x, out=scratch[0])
    mean = grey.mean(-1, keepdim=True).mul_(to_mean)
    x.lerp_(grey.mul_(to_grey).add_(mean)[:, None], weight[..., None]).clamp_(0, 1)


def _step_fused_(x: Tensor, weight: Tensor, to_grey: Tensor, to_mean: Tensor, scratch: None) -> None:
    x.copy_(_step(x, weight, to_grey, to_mean))


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` [n, 1] (1 = the full circle).

    With m the smallest channel, C the range and h the hue in sixths of the circle (red 0, green 2, blue 4), the
    channels are m + C * clamp(2 - distance of h from the channel's own hue, 0, 1). Solved for h without cases:
    |h| = (1 - red + green + blue) in units of C above m, positive where green >= blue. Greys (C = 0) are left alone.
    """
    r, g, b = x.unbind(1)
    low, high = torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)
    chroma = high - low
    hue = torch.copysign((high - 2 * low + g + b - r) / chroma.clamp(min=1e-20), g - b)
    hue = hue * (1 / 6) + shift
    hue = (hue - hue.floor()) * 6
    r = (low - chroma) + chroma * (hue - 3).abs().clamp(1, 2)
    g = (low + 2 * chroma) - chroma * (hue - 2).abs().clamp(1, 2)
    b = (low + 2 * chroma) - chroma * (hue - 4).abs().clamp(1, 2)
    return torch.stack((r, g, b), 1)


def _hue_(x: Tensor, shift: Tensor, scratch: Tensor) -> None:
    """_hue in place; scratch [6, n, P]."""
    r, g, b = x.unbind(1)
    low, chroma, hue, c, d, e = scratch.unbind(0)
    torch.minimum(torch.minimum(r, g, out=low), b, out=low)
    torch.maximum(torch.maximum(r, g, out=c), b, out=c)
    torch.sub(c, low, out=chroma)
    c.add_(low, alpha=-2).add_(g).add_(b).sub_(r)
    c.div_(torch.clamp(chroma, min=1e-20, out=d))
    torch.sub(g, b, out=d)
    torch.copysign(c, d, out=c)
    torch.add(shift, c, alpha=1 / 6, out=hue)
    hue.sub_(torch.floor(hue, out=c)).mul_(6)
    torch.sub(low, chroma, out=c)
    torch.add(low, chroma, alpha=2, out=d)
    torch.addcmul(c, chroma, torch.sub(hue, 3, out=e).abs_().clamp_(1, 2), out=r)
    torch.addcmul(d, chroma, torch.sub(hue, 2, out=e).abs_().clamp_(1, 2), value=-1, out=g)
    torch.addcmul(d, chroma, hue.sub_(4).abs_().clamp_(1, 2), value=-1, out=b)


def _hue_fused_(x: Tensor, shift: Tensor, scratch: None) -> None:
    x.copy_(_hue(x, shift))


def _half_kernel(sigma: Tensor, radius: int) -> Tensor:
    """Gaussian weights [n, radius + 1] of the distances 0, 1 ... radius; the whole kernel sums to 1."""
    distance = torch.arange(radius + 1, device=sigma.device, dtype=torch.float32)
    weights = (-0.5 * (distance / sigma[:, None]) ** 2).exp()
    return weights / (2 * weights.sum(-1, keepdim=True) - weights[:, :1])


def _blur_conv(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur x [n, 3, s, s], each sample with its own sigma [n], by two depthwise convolutions."""
    n, _, size, _ = x.shape
    half = _half_kernel(sigma, radius)
    kernel = torch.cat((half.flip(1), half[:, 1:]), 1).repeat_interleave(3, 0)[:, None]
    x = F.pad(x.reshape(1, 3 * n, size, size), (radius,) * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, :, None], groups=3 * n)
    return F.conv2d(x, kernel[..., None], groups=3 * n).view(n, 3, size, size)


@lru_cache(maxsize=1024)
def _reflections(size: int, radius: int, device: torch.device) -> Tensor:
    """[radius + 1, size * size]: entry (d, i, j) counts the taps at distance d from output pixel i that fall on input
    pixel j once the border is reflected; a half kernel times this is the blur's matrix."""
    counts = torch.zeros(radius + 1, size, size)
    rows = torch.arange(size)
    for offset in range(-radius, radius + 1):
        column = (rows + offset).abs()
        column = (size - 1) - ((size - 1) - column).abs()
        counts[abs(offset), rows, column] += 1
    return counts.flatten(1).to(device)


def _blur_matmul(x: Tensor, numbers: Tensor, reflections: Tensor) -> Tensor:
    """The same blur as two batched matrix products; samples without blur get the identity."""
    size = x.shape[-1]
    half = _half_kernel(numbers[:, _SIGMA], len(reflections) - 1)
    alone = (torch.arange(len(reflections), device=x.device) == 0).float()
    half = torch.where(numbers[:, _IS_BLURRED, None] > 0, half, alone)
    matrix = (half @ reflections).view(-1, size, size)
    x = torch.bmm(x.reshape(len(x), -1, size), matrix.transpose(1, 2)).view_as(x)
    return torch.matmul(matrix[:, None], x)


def _step_numbers(numbers: Tensor, step: int) -> tuple[Tensor, ...]:
    return tuple(numbers[:, columns][:, step : step + 1] for columns in (_WEIGHT, _TO_GREY, _TO_MEAN))


def _masked(x: Tensor, numbers: Tensor, work: tuple[str, ...], reflections: Tensor | None = None) -> Tensor:
    """Everything after the crop for x [n, 3, s, s], with shapes and operations that do not depend on the numbers."""
    shape = x.shape
    x = x.flatten(2)
    for place in range(4):
        if "hue" in work:
            x = _hue(x, numbers[:, _HUE][:, place : place + 1])
        if "steps" in work and place < 3:
            x = _step(x, *_step_numbers(numbers, place))
    if "grey" in work:
        x = torch.where(numbers[:, _IS_GREY, None, None] > 0, _greyed(x), x)
    if "blur" in work:
        x = _blur_matmul(x.view(shape), numbers, reflections).flatten(2)
    if "solarize" in work:
        x = torch.where(numbers[:, _IS_SOLARIZED, None, None] > 0, _solarized(x), x)
    if "scale" in work:
        x = x * numbers[:, _GAIN, None] + numbers[:, _SHIFT, None]
    return x.view(shape)


def _crop_and_masked(images: Tensor, numbers: Tensor, size: int, cubic: bool, work: tuple[str, ...],
                     reflections: Tensor | None) -> Tensor:  # fmt: skip
    """uint8 [n, 3, H, W], numbers [n, G, .] -> [G, n, 3, size, size]: the whole way on an accelerator, one graph."""
    x = _crop_matmul(images, numbers, size, cubic)
    if cubic:
        x = x.clamp(0, 1)
    return _masked(x.flatten(0, 1), numbers.transpose(0, 1).flatten(0, 1), work, reflections).view_as(x)


def _grey_chosen_(x: Tensor, numbers: Tensor) -> None:
    """Grey where the numbers say so. The forms named _chosen wait for the choice, so they are for CPUs."""
    rows = numbers[:, _IS_GREY].nonzero()[:, 0]
    x.index_copy_(0, rows, _greyed(x.index_select(0, rows)))


def _solarize_chosen_(x: Tensor, numbers: Tensor) -> None:
    rows = numbers[:, _IS_SOLARIZED].nonzero()[:, 0]
    x.index_copy_(0, rows, _solarized(x.index_select(0, rows)))


def _blur_chosen_(x: Tensor, numbers: Tensor, radius: int) -> None:
    rows = numbers[:, _IS_BLURRED].nonzero()[:, 0]
    if len(rows):
        x.index_copy_(0, rows, _blur_conv(x.index_select(0, rows), numbers[rows, _SIGMA], radius))


def _end_(out: Tensor, index: Tensor, x: Tensor, numbers: Tensor, work: tuple[str, ...]) -> None:
    """Grey, solarise and normalise x [n, 3, s, s], which may be overwritten; copy it to the rows `index` of out."""
    if "grey" in work:
        _grey_chosen_(x, numbers)
    if "solarize" in work:
        _solarize_chosen_(x, numbers)
    if "scale" in work:
        x.mul_(numbers[:, _GAIN, None, None]).add_(numbers[:, _SHIFT, None, None])
    out.index_copy_(0, index, x)


def _end_fused_(out: Tensor, index: Tensor, x: Tensor, numbers: Tensor, work: tuple[str, ...]) -> None:
    out.index_copy_(0, index, _masked(x, numbers, work))


# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Group:
    """Views of one size and interpolation, made in one batch."""

    views: tuple[int, ...]
    size: int
    cubic: bool
    radius: int
    work: tuple[str, ...]  # the operations any of them uses, in order


def _groups(views: Sequence[View]) -> list[_Group]:
    members = {}
    for i, view in enumerate(views):
        members.setdefault((view.size, view.interpolation, view.blur_kernel), []).append(i)
    groups = []
    for (size, interpolation, kernel), indices in members.items():
        chosen = [views[i] for i in indices]
        uses = {
            "steps": any(v.jitter > 0 and v.brightness + v.contrast + v.saturation > 0 for v in chosen),
            "hue": any(v.jitter > 0 and v.hue > 0 for v in chosen),
            "grey": any(v.grey > 0 for v in chosen),
            "blur": any(v.blur > 0 for v in chosen),
            "solarize": any(v.solarize > 0 for v in chosen),
            "scale": any((v.mean, v.std) != ((0.0,) * 3, (1.0,) * 3) for v in chosen),
        }
        work = tuple(name for name, used in uses.items() if used)
        groups.append(_Group(tuple(indices), size, interpolation == "bicubic", kernel // 2, work))
    return groups


# Values in flight on a CPU: blocks that stay in its caches and below malloc's threshold for fresh pages.
_BLOCK = 400_000
# Bytes of temporaries on an accelerator.
_CHUNK_BYTES = 1 << 30


class ViewRecipe:
    """All views of one training step. See the module's docstring for the operations and their order.

    views    one View each; views of one size and interpolation are made in one batch
    shared   random numbers that all views of a sample have in common, the first view's: "flip", or any other
             name of ViewParams
    compile  torch.compile the colour operations (on accelerators everything): some seconds at the first call, and on
             accelerators again for another batch or image size

    `_form` ("cpu", "accelerator") and `_crop` ("rows", "native") override the choice by device and image size, so that
    tests reach every path on a CPU.
    """

    def __init__(self, views: Sequence[View], compile: bool = False, *, shared: Sequence[str] = (),
                 _form: str | None = None, _crop: str | None = None):  # fmt: skip
        if not views:
            raise UserError("ViewRecipe: needs at least one View.")
        # Freeing one large block raises glibc's thresholds, so that the temporaries of every call reuse the same pages:
        # without it a third of the time goes into page faults. The memory is never touched.
        torch.empty(31 << 20, dtype=torch.uint8)
        self.views, self.shared = tuple(views), tuple(shared)
        if unknown := set(self.shared) - _DRAWN.keys():
            raise UserError(f"ViewRecipe: {', '.join(unknown)} cannot be shared: choose from {', '.join(_DRAWN)}.")
        self._border = max(view.translate for view in self.views)
        self._form, self._crop = _form, _crop
        self._groups = _groups(self.views)
        # compiled code needs no scratch memory
        self._scratch = not compile
        self._step_, self._hue_, self._end_ = _step_, _hue_, _end_
        self._masked, self._crop_and_masked = _masked, _crop_and_masked
        if compile:
            self._step_, self._hue_, self._end_ = (
                torch.compile(f) for f in (_step_fused_, _hue_fused_, _end_fused_)
            )
            self._masked, self._crop_and_masked = (
                torch.compile(f, dynamic=False) for f in (_masked, _crop_and_masked)
            )

    def describe(self) -> str:
        """One line a view, in plain words; equal neighbours share a line."""
        lines = []
        for view, same in itertools.groupby(self.views):
            count = len(list(same))
            lines.append(f"{count} view{'s' * (count > 1)}: {view.describe()}")
        if self.shared:
            lines.append(f"the same for all views of an image: {', '.join(self.shared)}")
        return "\n".join(lines)

    def sample(self, n: int, generator: torch.Generator) -> ViewParams:
        """All random numbers for n samples, on the CPU. Draw for the global batch, then slice the rank's part."""
        low, high = (torch.zeros(len(self.views), _DRAWN_WIDTH), torch.ones(len(self.views), _DRAWN_WIDTH))
        chance = torch.zeros(len(self.views), len(_CHANCES))
        for i, view in enumerate(self.views):
            ranges = {
                "area": view.scale,
                "log_ratio": tuple(math.log(r) for r in view.ratio),
                "hue": (-view.hue, view.hue),
                "order": (0, len(ORDERS)),
                "sigma": view.blur_sigma,
            }
            for name in ("brightness", "contrast", "saturation"):
                strength = getattr(view, name)
                ranges[name] = (max(0.0, 1 - strength), 1 + strength)
            for name, (a, b) in ranges.items():
                low[i, _DRAWN[name]], high[i, _DRAWN[name]] = a, b
            chance[i] = torch.tensor([getattr(view, name) for name in _CHANCES])
        # What came later is drawn later: the numbers before it are those that a seed has always had.
        widths = (_DRAWN_WIDTH - 1, 1)
        values = torch.cat([torch.rand(n, len(self.views), width, generator=generator) for width in widths], -1)
        chances = [_DRAWN[name] for name in _CHANCES]
        happens = (values[..., chances] < chance).float()
        values = values.mul_(high - low).add_(low)
        values[..., chances] = happens
        values[..., _DRAWN["order"]].floor_().clamp_(max=len(ORDERS) - 1)
        for name in self.shared:
            values[:, 1:, _DRAWN[name]] = values[:, :1, _DRAWN[name]]
        return ViewParams(values)

    @torch.no_grad()
    def __call__(self, images: Tensor, params: ViewParams) -> list[Tensor]:
        """Views of uint8 images [n, 3, H, W]: one float32 [n, 3, s, s] each, contiguous, on the images' device.

        params: the numbers of these n samples, on any device. Raises ValueError when shapes or types do not fit.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(params):
            raise ValueError(f"needs uint8 images [{len(params)}, 3, H, W] for {len(params)} samples' parameters, "
                             f"not {images.dtype} {list(images.shape)}")  # fmt: skip
        n, _, height, width = images.shape
        numbers = _numbers(params, self.views, height, width, self._border).to(images.device, non_blocking=True)
        images = _bordered(images, self._border)
        views = [None] * len(self.views)
        with torch.autocast(images.device.type, enabled=False):
            for group in self._groups:
                # no indexing by a list: it would copy the list to the device and wait
                chosen = torch.stack([numbers[:, i] for i in group.views])
                if self._on_cpu(images):
                    rows = chosen.flatten(0, 1)
                    made = self._sorted(group, rows, self._cropper(group, images, rows)).view(len(chosen), n, 3,
                                                                                            group.size, group.size)
                else:
                    made = self._accelerated(group, images, chosen.transpose(0, 1))
                for i, view in zip(group.views, made.unbind(0), strict=True):
                    views[i] = view
        return views

    @torch.no_grad()
    def crop_one(self, image: Tensor, params: ViewParams, i: int) -> list[Tensor]:
        """Worker path: crop, resize and flip sample i's image uint8 [3, H, W] to uint8 [3, s, s] for each view."""
        boxes = crop_boxes(params[i : i + 1], self.views, *image.shape[1:])[0].long()
        boxes[:, :2] += self._border
        image = _bordered(image, self._border)
        flips = params["flip"][i].tolist()
        return [
            _crop_native(image, box, flip > 0, view.size, view.interpolation).contiguous()
            for view, box, flip in zip(self.views, boxes.tolist(), flips, strict=True)
        ]

    @torch.no_grad()
    def finish(self, crops: list[Tensor], params: ViewParams) -> list[Tensor]:
        """The rest of the way for batches of crop_one's crops: uint8 [n, 3, s, s] a view, on the device, to float32."""
        device = crops[0].device
        numbers = _numbers(params, self.views, 1, 1).to(device, non_blocking=True)  # the boxes are not used
        views = [None] * len(crops)
        with torch.autocast(device.type, enabled=False):
            for group in self._groups:
                x = torch.cat([crops[i] for i in group.views])
                rows = torch.cat([numbers[:, i] for i in group.views])
                if self._on_cpu(x):
                    made = self._sorted(group, rows, lambda index, x=x: x.index_select(0, index).float().mul_(1 / 255))
                else:
                    made = self._masked(x.float().mul_(1 / 255), rows, group.work, self._reflections(group, device))
                for i, view in zip(group.views, made.chunk(len(group.views)), strict=True):
                    views[i] = view
        return views

    def _on_cpu(self, x: Tensor) -> bool:
        return (self._form or x.device.type) == "cpu"

    def _reflections(self, group: _Group, device: torch.device) -> Tensor | None:
        return _reflections(group.size, group.radius, device) if "blur" in group.work else None

    def _accelerated(self, group: _Group, images: Tensor, numbers: Tensor) -> Tensor:
        """[G, n, 3, s, s]; numbers [n, G, .]."""
        _, _, height, width = images.shape
        floats = 3 * width * (height + group.size * len(group.views)) + 6 * group.size**2 * len(group.views)
        size = max(1, _CHUNK_BYTES // (4 * floats))
        reflections = self._reflections(group, images.device)
        made = [
            self._crop_and_masked(part, part_numbers, group.size, group.cubic, group.work, reflections)
            for part, part_numbers in zip(images.split(size), numbers.split(size), strict=True)
        ]
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def _cropper(self, group: _Group, images: Tensor, numbers: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from row numbers [k] to their crops, float [k, 3, s, s] in [0, 1]."""
        exact = images.shape[2] * images.shape[3] <= EXACT_CROP_PIXELS
        if (self._crop or ("rows" if exact else "native")) == "rows":
            return _RowCrop(images, numbers, group.size, group.cubic)
        boxes, flips = numbers[:, _BOX].long().tolist(), numbers[:, _FLIP].tolist()
        interpolation = "bicubic" if group.cubic else "bilinear"

        def native(index: Tensor) -> Tensor:
            x = torch.empty(len(index), 3, group.size, group.size)
            for k, i in enumerate(index.tolist()):
                x[k] = _crop_native(images[i % len(images)], boxes[i], flips[i] > 0, group.size, interpolation)
            return x.mul_(1 / 255)

        return native

    def _sorted(self, group: _Group, numbers: Tensor, load: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [R, .] of numbers -> float [R, 3, s, s]; `load` gives the crops of some rows."""
        size, work = group.size, group.work
        out = torch.empty(len(numbers), 3, size, size)
        block = min(len(numbers), max(1, _BLOCK // (3 * size * size)))
        scratch = torch.empty(6, block, size * size) if self._scratch else None
        # blur stands between grey and solarise and stays eager: convolutions of the chosen samples only
        last = ("solarize", "scale") if "blur" in work else ("grey", "solarize", "scale")
        end = tuple(name for name in last if name in work)
        for index, place in _blocks(numbers, block, work):
            chosen = numbers.index_select(0, index)
            x = load(index)
            flat = x.flatten(2)
            part = scratch[:, : len(x)] if self._scratch else None
            for step in range(4 if place < _NO_JITTER else 0):
                if step == place and "hue" in work:
                    self._hue_(flat, chosen[:, _HUE][:, place : place + 1], part)
                if step < 3 and "steps" in work:
                    self._step_(flat, *_step_numbers(chosen, step), part)
            if "blur" in work:
                _grey_chosen_(x, chosen)
                _blur_chosen_(x, chosen, group.radius)
            self._end_(out, index, x, chosen, end)
        return out


def _blocks(numbers: Tensor, block: int, work: tuple[str, ...]) -> Iterator[tuple[Tensor, int]]:
    """Row numbers in runs of at most `block` that share the place of their hue change, with that place."""
    if "steps" not in work and "hue" not in work:
        place = torch.full((len(numbers),), _NO_JITTER)
    elif "hue" not in work:
        place = torch.where(numbers[:, _PLACE] == _NO_JITTER, _NO_JITTER, 0)
    else:
        place = numbers[:, _PLACE].long()
    order = place.argsort(stable=True)
    for p, rows in enumerate(order.split(place.bincount(minlength=_NO_JITTER + 1).tolist())):
        if len(rows):
            for index in rows.split(block):
                yield index, p
