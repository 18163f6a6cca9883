"""AMDIM's network (arXiv:1906.00910; code model.py): local features that see little, one global feature that sees all.

Convolutions are unpadded (except the reflecting stem at 128 px), so features of all positions have one distribution and
see exactly the pixels of the table; depth comes from 1x1 units, which do not enlarge the receptive field:

    image   7x7 features see   5x5   1x1   one step is
    32      8 px               16    32    4 px
    64      16                 32    64    8
    128     35                 67    131   16

R: n_rkhs, width of the features that are compared (the paper's f1, f5, f7 after their embeddings).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError

# image size -> blocks as (kernel, stride, width in units of ndf). The (2, 2) block's output is 7x7, the next one's 5x5.
BLOCKS = {
    32: ((4, 2, 2), (2, 2, 4), (3, 1, 4), (3, 1, 4)),
    64: ((4, 2, 2), (4, 2, 4), (2, 2, 8), (3, 1, 8), (3, 1, 8)),
    128: ((4, 2, 2), (4, 2, 4), (2, 2, 8), (3, 1, 8), (3, 1, 8)),
}


def _norm(width: int, used: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if used else nn.Identity()


class Unit(nn.Module):
    """Residual unit: convolution - [BN] - ReLU - 1x1 convolution, plus the average pool of the same window.

    No activation after the sum. New channels of the shortcut are zero. The second convolution starts at zero, so that
    a unit starts as its shortcut.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, hidden_bn: bool = False):
        super().__init__()
        self.kernel, self.stride, self.grown = kernel, stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
        self.bn = _norm(outputs, hidden_bn)
        self.conv2 = nn.Conv2d(outputs, outputs, 1, bias=False)
        nn.init.kaiming_uniform_(self.conv1.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.relu(self.bn(self.conv1(x)), inplace=True))
        shortcut = x if self.kernel == 1 else F.avg_pool2d(x, self.kernel, self.stride)
        if self.grown:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.grown))
        return branch + shortcut


def block(inputs: int, outputs: int, kernel: int, stride: int, depth: int, hidden_bn: bool) -> list[nn.Module]:
    """One unit with a window and depth - 1 units of 1x1, which see no pixel more."""
    more = [Unit(outputs, outputs, hidden_bn=hidden_bn) for _ in range(depth - 1)]
    return [Unit(inputs, outputs, kernel, stride, hidden_bn), *more]


class Encoder(nn.Module):
    """Images [N, 3, S, S] -> f1 [N, R], the features that evaluation sees; S is 32, 64 or 128.

    `features` also gives the maps from which f5 and f7 are embedded. Raises UserError for another size.
    """

    def __init__(self, image_size: int, ndf: int, n_rkhs: int, n_depth: int, hidden_bn: bool = False):
        super().__init__()
        if image_size not in BLOCKS:
            raise UserError(
                f"--image-size {image_size}: AMDIM's encoder has forms for {', '.join(map(str, BLOCKS))} pixels, whose "
                "windows end in 7x7, 5x5 and 1x1 features"
            )
        blocks = BLOCKS[image_size]
        self.image_size, self.num_features, self.map_width = image_size, n_rkhs, blocks[-1][2] * ndf
        if n_depth < 1:
            raise UserError(f"--n-depth {n_depth}: a block has at least one unit")
        if n_rkhs < self.map_width:
            raise UserError(
                f"--n-rkhs {n_rkhs} is narrower than the {self.map_width} channels before it ({blocks[-1][2]} times "
                "--ndf), which the shortcuts pass on: raise it or lower --ndf"
            )
        relu = nn.ReLU(inplace=True)
        if image_size == 128:
            stem = [nn.Conv2d(3, ndf, 5, 2, padding=2, padding_mode="reflect"), relu, nn.Conv2d(ndf, ndf, 3), relu]
        else:
            stem = [nn.Conv2d(3, ndf, 3), relu]
        if image_size == 32:
            stem.append(Unit(ndf, ndf, hidden_bn=hidden_bn))
        stages: list[list[nn.Module]] = [stem]
        width = ndf
        for kernel, stride, times in blocks:
            stages.append(block(width, times * ndf, kernel, stride, n_depth, hidden_bn))
            width = times * ndf
        stages[-3].append(_norm(width, hidden_bn))
        # Stages up to the 7x7 map, the one that gives the 5x5 map, and the rest.
        self.to7 = nn.Sequential(*[layer for stage in stages[:-2] for layer in stage])
        self.to5 = nn.Sequential(*stages[-2])
        self.to1 = nn.Sequential(*stages[-1], Unit(width, n_rkhs, 3, hidden_bn=hidden_bn), nn.BatchNorm2d(n_rkhs))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f1 [N, R] and the maps [N, map_width, 5, 5] and [N, map_width, 7, 7]."""
        if images.shape[-2:] != (self.image_size,) * 2:
            raise UserError(
                f"this encoder is for {self.image_size} x {self.image_size} pixels, not {images.shape[-2]} x "
                f"{images.shape[-1]}: its last window would not end in one feature"
            )
        map7 = self.to7(images)
        map5 = self.to5(map7)
        return self.to1(map5).flatten(1), map5, map7

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0]


class Embedding(nn.Module):
    """A map's features in the space of the scores, per position: 1x1 - [BN] - ReLU - 1x1 plus a linear shortcut, BN.

    The shortcut starts as (nearly) the identity, the branch at zero.
    """

    def __init__(self, inputs: int, outputs: int, hidden_bn: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = _norm(outputs, hidden_bn)
        self.conv2 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.bn_out = nn.BatchNorm2d(outputs)
        nn.init.kaiming_uniform_(self.conv1.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv2.weight)
        nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
        with torch.no_grad():
            self.shortcut.weight[:inputs, :, 0, 0].fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_out(self.conv2(F.relu(self.bn(self.conv1(x)), inplace=True)) + self.shortcut(x))


class Probes(nn.Module):
    """Linear and MLP classifier on detached f1, trained alongside the encoder: an online number, never the result.

    forward(f1 [M, R], noise [M, R + hidden]) -> logits [M, C] of both. noise: uniform numbers that choose what is
    dropped (share 0.2, MLP only; none in eval mode), drawn outside so that processes can share one draw.
    """

    hidden = 1024
    drop = 0.2

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.first = nn.Linear(features, self.hidden, bias=False)
        self.bn = nn.BatchNorm1d(self.hidden)
        self.second = nn.Linear(self.hidden, classes)

    def forward(self, f1: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f1 = f1.detach()
        x, keep = f1, None
        if self.training and noise is not None:
            keep = (noise >= self.drop).to(f1.dtype) / (1 - self.drop)
            x = x * keep[:, : f1.shape[1]]
        x = F.relu(self.bn(self.first(x)))
        if keep is not None:
            x = x * keep[:, f1.shape[1] :]
        return self.linear(f1), self.second(x)


class AMDIM(nn.Module):
    """forward(two views [n, 3, S, S]) -> f1 [2, n, R], f5 [2, n, 25, R], f7 [2, n, 49, R], view after view, places row
    by row, and the probes' logits, two of [2n, C] (none without `classes`)."""

    def __init__(self, backbone: Encoder, *, hidden_bn: bool = False, classes: int = 0):
        super().__init__()
        self.backbone = backbone
        self.embed5, self.embed7 = (Embedding(backbone.map_width, backbone.num_features, hidden_bn) for _ in range(2))
        self.probes = Probes(backbone.num_features, classes) if classes else None

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One view's f1 [n, R], f5 [n, 25, R], f7 [n, 49, R]."""
        f1, map5, map7 = self.backbone.features(images)
        f5, f7 = (f.flatten(2).transpose(1, 2) for f in (self.embed5(map5), self.embed7(map7)))
        return f1, f5, f7

    def forward(self, view1: Tensor, view2: Tensor, noise: Tensor | None = None):
        # One pass per view, as in the code: BatchNorm's statistics are per view.
        f1, f5, f7 = (torch.stack(pair) for pair in zip(self.embed(view1), self.embed(view2), strict=True))
        logits = () if self.probes is None else self.probes(f1.flatten(0, 1), noise)
        return f1, f5, f7, logits
