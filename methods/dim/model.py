"""DIM's networks (arXiv:1808.06670): encoder, encode-and-dot scorers, discriminator of the prior.

M x M = L: locations of the local map; U: units of the score space; y: the summary of the image, 64 numbers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.views.constants import constant

OUTPUTS = ("conv", "fc", "y")
GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Layout:
    """convs: (channels, kernel, stride, padding, max-pool 3/2 after it); fc: widths; local: the conv, from 1, whose
    output is the local map. Numbers of the code, configs/convnets.py."""

    convs: tuple[tuple[int, int, int, int, bool], ...]
    fc: tuple[int, ...]
    local: int


LAYOUTS = {
    # 32 px: local map 8 x 8, receptive field 10 px, stride 4.
    "basic32": Layout(((64, 4, 2, 1, False), (128, 4, 2, 1, False), (256, 4, 2, 1, False)), (1024,), 2),
    # 64 px, AlexNet-like: local map 15 x 15.
    "alex64": Layout(
        ((96, 3, 1, 1, True), (192, 3, 1, 1, True), (384, 3, 1, 1, False), (384, 3, 1, 1, False), (192, 3, 1, 1, True)),
        (4096, 4096),
        3,
    ),
}


class Layers(NamedTuple):
    """One image's activations: local [N, d, M, M], conv [N, C, S, S], fc [N, F], y [N, 64]."""

    local: Tensor
    conv: Tensor
    fc: Tensor
    y: Tensor


class Encoder(nn.Module):
    """[N, 3, H, W] -> [N, num_features], the layer that `output` names: "conv" (the last map, flattened), "fc" or "y".

    y is what is trained to hold the image's information, before the sigmoid of the prior; conv and fc are what the
    paper's Tables 1 and 2 classify best.
    width: factor on all hidden widths. grayscale: the network sees luminance alone (three equal channels). contrast:
    each image is standardized by its own mean and deviation first (global contrast normalization).
    """

    def __init__(
        self,
        *,
        layout: str = "basic32",
        image_size: int = 32,
        width: float = 1.0,
        y_dim: int = 64,
        grayscale: bool = False,
        contrast: bool = False,
        output: str = "conv",
    ):
        super().__init__()
        self.layout, self.image_size, self.width, self.output = layout, image_size, width, output
        self.grayscale, self.contrast = grayscale, contrast
        plan = LAYOUTS[layout]
        convs = _convs(plan, width)
        self.trunk, self.top = nn.Sequential(*convs[: plan.local]), nn.Sequential(*convs[plan.local :])
        self.fc = _fully_connected(plan, image_size, width)
        self.y = nn.Linear(round(plan.fc[-1] * width), y_dim)

    @property
    def num_features(self) -> int:
        plan = LAYOUTS[self.layout]
        conv = round(plan.convs[-1][0] * self.width) * map_size(plan, self.image_size, len(plan.convs)) ** 2
        return {"conv": conv, "fc": self.y.in_features, "y": self.y.out_features}[self.output]

    def layers(self, images: Tensor) -> Layers:
        if self.grayscale:
            weights = constant(GRAY, images.device, images.dtype).view(1, 3, 1, 1)
            images = (images * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        if self.contrast:
            deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
            images = (images - mean) / (deviation + 1e-3)  # an image of one color is zero
        local = self.trunk(images)
        conv = self.top(local)
        fc = self.fc(conv)
        return Layers(local, conv, fc, self.y(fc))

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.layers(images), self.output).flatten(1)


def _convs(plan: Layout, width: float) -> list[nn.Sequential]:
    made, channels = [], 3
    for out, kernel, stride, padding, pool in plan.convs:
        out = round(out * width)
        # No bias before a BatchNorm, which would take it out again.
        parts = [nn.Conv2d(channels, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        made.append(nn.Sequential(*parts, *[nn.MaxPool2d(3, 2)] * pool))
        channels = out
    return made


def _fully_connected(plan: Layout, image_size: int, width: float) -> nn.Sequential:
    side = map_size(plan, image_size, len(plan.convs))
    features, parts = round(plan.convs[-1][0] * width) * side**2, [nn.Flatten()]
    for out in plan.fc:
        out = round(out * width)
        parts += [nn.Linear(features, out, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
        features = out
    return nn.Sequential(*parts)


def map_size(plan: Layout, image_size: int, count: int) -> int:
    """Side of the map after the first `count` convolutions; 0 or less where the image is too small."""
    side = image_size
    for _, kernel, stride, padding, pool in plan.convs[:count]:
        side = (side + 2 * padding - kernel) // stride + 1
        side = (side - 3) // 2 + 1 if pool else side
    return side


class ScoreBlock(nn.Module):
    """[N, ..., d] -> [N, ..., U]: a residual block of 1x1 convolutions, then LayerNorm (code: MI1x1ConvNet).

    As linear layers on rows, which is what a 1x1 convolution is; BatchNorm counts every location. The shortcut starts
    as U(-0.01, 0.01) with ones on its diagonal, where U is at least d.
    """

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(inputs, units, bias=False), nn.BatchNorm1d(units), nn.ReLU(), nn.Linear(units, units)
        )
        self.shortcut = nn.Linear(inputs, units, bias=False)
        self.norm = nn.LayerNorm(units)
        if units >= inputs:
            with torch.no_grad():
                self.shortcut.weight.uniform_(-0.01, 0.01).fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.norm(self.block(rows) + self.shortcut(rows)).unflatten(0, x.shape[:-1])


class Pair(NamedTuple):
    """What is scored by dot products: summaries [N, U] with the parts of their images, [N, L, U] (global term: L 1)."""

    summaries: Tensor
    parts: Tensor


class DIM(nn.Module):
    """Images [N, 3, H, W] -> y [N, 64] and the pairs of the requested terms: "local", "global".

    Local: blocks on y and on the local map's locations. Global: a linear layer on y, and on the image's side a copy of
    the encoder's layers after the local map, with other weights, both to U units, without LayerNorm (code: GlobalDIM).
    """

    def __init__(self, encoder: Encoder, units: int, terms: tuple[str, ...]):
        super().__init__()
        self.backbone, self.terms = encoder, terms
        plan, y_dim = LAYOUTS[encoder.layout], encoder.y.out_features
        if "local" in terms:
            channels = encoder.trunk[-1][0].out_channels
            self.local_summary, self.local_parts = ScoreBlock(y_dim, units), ScoreBlock(channels, units)
        if "global" in terms:
            self.global_summary = nn.Linear(y_dim, units)
            top = _convs(plan, encoder.width)[plan.local :]
            last = nn.Linear(encoder.y.in_features, units)
            self.global_parts = nn.Sequential(*top, _fully_connected(plan, encoder.image_size, encoder.width), last)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Pair]]:
        layers = self.backbone.layers(images.contiguous(memory_format=torch.channels_last))
        pairs = {}
        if "local" in self.terms:
            locations = layers.local.flatten(2).transpose(1, 2)  # [N, L, d]
            pairs["local"] = Pair(self.local_summary(layers.y), self.local_parts(locations))
        if "global" in self.terms:
            pairs["global"] = Pair(self.global_summary(layers.y), self.global_parts(layers.local).unsqueeze(1))
        return layers.y, pairs


class Discriminator(nn.Module):
    """Numbers in [0, 1], [N, 64] -> logit [N] of "from the prior" (paper App. A.2, code: 1000-200-1), float32."""

    def __init__(self, inputs: int, hidden: tuple[int, ...] = (1000, 200)):
        super().__init__()
        parts = []
        for out in hidden:
            parts += [nn.Linear(inputs, out), nn.ReLU()]
            inputs = out
        self.layers = nn.Sequential(*parts, nn.Linear(inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layers(x if x.dtype == torch.float64 else x.float()).squeeze(1)
