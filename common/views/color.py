"""Changes of color: brightness, contrast, saturation, hue, grayscale, solarize.

x is float [n, 3, P] in [0, 1] with the pixels of a channel side by side; numbers per sample are [n, 1].

Brightness, contrast and saturation are all x <- clamp(lerp(x, target, weight)) with the target black, the mean gray
level, or the grayscale image. So color jitter in any order is three such steps and one change of hue, which comes
before, between or after them.

`jitter_step` and `shift_hue` exist twice. The functional ones serve torch.compile, which fuses them, and accelerators.
Eager on a CPU they are bound by memory, and the ones in place, with scratch memory that stays in the caches, take 0.6
times as long (131 samples of 32 px on one thread: hue 1.1 instead of 1.8 ms, a step 0.32 instead of 0.52 ms).
"""

import torch
from torch import Tensor

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


def gray_level(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Gray level [n, P]."""
    r, g, b = x.unbind(1)
    return torch.mul(r, GRAY_WEIGHTS[0], out=out).add_(g, alpha=GRAY_WEIGHTS[1]).add_(b, alpha=GRAY_WEIGHTS[2])


def to_grayscale(x: Tensor) -> Tensor:
    return gray_level(x)[:, None].expand_as(x)


def solarize(x: Tensor) -> Tensor:
    """Invert values >= 0.5."""
    return torch.where(x >= 0.5, 1 - x, x)


def jitter_step(x: Tensor, weight: Tensor, to_gray: Tensor, to_mean: Tensor) -> Tensor:
    """One of brightness, contrast and saturation: clamp(lerp(x, target, weight)).

    The target is the grayscale image where to_gray is 1, the mean gray level where to_mean is 1, or black.
    """
    gray = gray_level(x)
    target = gray * to_gray + gray.mean(-1, keepdim=True) * to_mean
    return (x + weight[..., None] * (target[:, None] - x)).clamp(0, 1)


def jitter_step_(x: Tensor, weight: Tensor, to_gray: Tensor, to_mean: Tensor, scratch: Tensor) -> Tensor:
    """jitter_step in place, for CPUs; scratch [6, n, P]."""
    gray = gray_level(x, out=scratch[0])
    mean = gray.mean(-1, keepdim=True).mul_(to_mean)
    return x.lerp_(gray.mul_(to_gray).add_(mean)[:, None], weight[..., None]).clamp_(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (1 = the full circle).

    With m the smallest channel, C the range and h the hue in sixths of the circle (red 0, green 2, blue 4), the
    channels are m + C * clamp(2 - distance of h from the channel's own hue, 0, 1). Solved for h without cases:
    |h| = (1 - red + green + blue) in units of C above m, positive where green >= blue. Grays (C = 0) do not change.
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


def shift_hue_(x: Tensor, shift: Tensor, scratch: Tensor) -> Tensor:
    """shift_hue in place, for CPUs; scratch [6, n, P]."""
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
    return x
