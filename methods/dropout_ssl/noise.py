"""Noise layers whose every number is a pure function of (seed, stream, epoch, sample, copy).

Each sample has a key, an int64 (`mask_keys`); entry j of its noise is a hash of (key, j). Nothing is sampled in
sequence, so processes, batch sizes, resumed runs and devices agree, and a frozen mask is one whose key omits the epoch.
A layer without keys is the identity: noise is enabled by keys, not by `train()`.

x: [N, D] a table's rows or pooled features, [N, C, H, W] images or maps, [N, T, D] tokens; keys: int64 [N].
"""

import math

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.rng import generator

STREAMS = {"train": 0, "held-out": 1, "train, measured": 2, "gradients": 3, "report": 4}
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as signed 64-bit numbers


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift of int64 keeps the sign


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al. 2014): every input bit changes every output bit with chance 1/2."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def mask_keys(seed: int, stream: str, epoch: Tensor | int, sample: Tensor, copy: Tensor | int) -> Tensor:
    """int64 [N]: one key for each (epoch, sample, copy). `stream` keeps measurements apart from training."""
    key = torch.full_like(sample, generator(seed, "masks").initial_seed() + (STREAMS[stream] << 40))
    for part in (epoch, sample, copy):
        part = part if isinstance(part, Tensor) else torch.full_like(sample, part)  # a Python product would not wrap
        key = _mix(key + (part + 1) * _GOLDEN)
    return key


def uniform(keys: Tensor, count: int, lane: int = 0) -> Tensor:
    """float32 [N, count] in [0, 1), on a grid of 2^-24; lanes are independent of each other."""
    places = torch.arange(1, count + 1, device=keys.device) + (lane << 32)
    return _shift(_mix(keys[:, None] + places * _GOLDEN), 40).float() * 2.0**-24


def normal(keys: Tensor, count: int) -> Tensor:
    """float32 [N, count] ~ N(0, 1), by Box and Muller."""
    radius = (-2 * (uniform(keys, count, 0) + 2.0**-25).log()).sqrt()
    return radius * (2 * math.pi * uniform(keys, count, 1)).cos()


class Element(nn.Module):
    """Dropout of single entries: x * mask / (1 - p). On standardized inputs a dropped entry is the mean, not absent."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"--p {p}: the share of dropped entries is at least 0 and below 1")
        self.p = p

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of one sample's mask, to be broadcast over the sample."""
        return tuple(x.shape[1:])

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None or self.p == 0:
            return x
        shape = self.shape(x)
        keep = (uniform(keys, math.prod(shape)) >= self.p).view(len(x), *shape)
        return x * self.spread(keep.to(x.dtype), x) / (1 - self.p)

    def spread(self, keep: Tensor, x: Tensor) -> Tensor:
        return keep


class Channel(Element):
    """SpatialDropout (Tompson et al. 2015, arXiv:1411.4280): entire channels of a map [N, C, H, W]."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        if x.ndim != 4:
            raise UserError("spatial dropout (A1s) drops channels of feature maps: it needs a convolutional network")
        return (x.shape[1], 1, 1)


class Patch(Element):
    """Dropout of positions: squares of `size` pixels of an image, in all channels; or entire tokens of [N, T, D]."""

    def __init__(self, p: float, size: int):
        super().__init__(p)
        self.size = size

    def shape(self, x: Tensor) -> tuple[int, ...]:
        if x.ndim == 3:
            return (x.shape[1], 1)
        if x.ndim != 4:
            raise UserError("patch masks (A1p) remove positions of an image: rows of a table have none")
        if x.shape[-2] % self.size or x.shape[-1] % self.size:
            raise UserError(f"--patch {self.size} does not divide images of {x.shape[-2]} x {x.shape[-1]} pixels")
        return (1, x.shape[-2] // self.size, x.shape[-1] // self.size)

    def spread(self, keep: Tensor, x: Tensor) -> Tensor:
        return keep.repeat_interleave(self.size, -2).repeat_interleave(self.size, -1) if x.ndim == 4 else keep


class Gaussian(nn.Module):
    """Multiplicative Gaussian noise with dropout's variance: x * (1 + sqrt(p / (1 - p)) eps) (Srivastava 2014)."""

    def __init__(self, p: float):
        super().__init__()
        self.scale = math.sqrt(p / (1 - p))

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return x if keys is None else x * (1 + self.scale * _like(x, keys))


class Additive(nn.Module):
    """x + sigma eps: of inputs of variance 1 the same noise at every entry, large or small."""

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return x if keys is None else x + self.sigma * _like(x, keys)


class VAE(nn.Module):
    """z = mu + sigma(x) eps with mu = x, the layer's input: without noise the network is the plain backbone.

    sigma is learned: log sigma = W x + b per channel, W = 0 and sigma^2 = p / (1 - p) at the start, dropout's relative
    variance for inputs of unit scale. `kl` is KL(N(mu, sigma^2) || N(0, 1)) of the last noisy pass, summed over
    channels, averaged over positions and samples; `sigma` its mean sigma.
    """

    def __init__(self, channels: int, p: float):
        super().__init__()
        self.log_sigma = nn.Linear(channels, channels)
        nn.init.zeros_(self.log_sigma.weight)
        nn.init.constant_(self.log_sigma.bias, 0.5 * math.log(p / (1 - p)))
        self.kl = self.sigma = None

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            return x
        mu = x.movedim(1, -1) if x.ndim == 4 else x  # channels last
        log_sigma = self.log_sigma(mu)
        self.kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(-1).mean()
        self.sigma = log_sigma.detach().exp().mean()
        z = mu + log_sigma.exp() * _like(mu, keys)
        return z.movedim(-1, 1) if x.ndim == 4 else z


def _like(x: Tensor, keys: Tensor) -> Tensor:
    return normal(keys, x[0].numel()).view(x.shape).to(x.dtype)
