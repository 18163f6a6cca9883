"""CPC's networks for images (arXiv:1807.03748, section 3.2): patch encoder, a context that looks up, one W per offset.

B images; R x Q grid of patches; D: width of a patch's embedding z; E: width of what is compared (D, or `embedding`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.views.color import GRAY_WEIGHTS as GRAY

from .augment import PatchJitter, grid_side
from .loss import turned

CPU_IMAGES = 64  # evaluated at once: their patches' activations stay in the cache


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016b): norm, ReLU, convolution, two or with `hidden` three times."""

    def __init__(self, width_in: int, width: int, hidden: int, stride: int, norm: str):
        super().__init__()
        if hidden:
            sizes = [(width_in, hidden, 1, 1), (hidden, hidden, 3, stride), (hidden, width, 1, 1)]
        else:
            sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        self.norms = nn.ModuleList(_norm(norm, a) for a, *_ in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2) for a, b, k, s in sizes)
        changes = stride > 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        short = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            y = conv(F.relu(norm(y)))
        return short + y


def _norm(norm: str, width: int) -> nn.Module:
    """none, or a LayerNorm over one patch's channels and pixels (v2). Never BatchNorm: it lets patches of an image know
    of each other (v2 measured the harm), and SyncBN does not cure that."""
    match norm:
        case "none":
            return nn.Identity()
        case "layer":
            return nn.GroupNorm(1, width)
    raise UserError(f"unknown norm {norm!r} of the patch encoder: none or layer")


class Encoder(nn.Module):
    """Every patch of the grid alone through a pre-activation ResNet and a spatial mean: [B, 3, H, W] -> [B, D].

    `forward`, for evaluation: the mean of z over the grid (paper: 7 x 7 x 1024 -> 1024). `grid`: z, [B, R, Q, D].
    Images of any size that holds a patch; grayscale=True reads their gray level (of gray images the one they
    have), so a network trained on gray views sees the same at evaluation. layers, channels and hidden: blocks, width
    and, for bottlenecks, inner width (or nothing) of each stage; every stage but the first halves the resolution.
    """

    def __init__(
        self,
        *,
        patch: int,
        stride: int,
        patch_crop: int = 0,
        grayscale: bool = True,
        stem_width: int = 64,
        stem_kernel: int = 5,
        stem_stride: int = 1,
        stem_pool: bool = False,
        layers: tuple[int, ...] = (3, 4, 6),
        channels: tuple[int, ...] = (256, 512, 1024),
        hidden: tuple[int, ...] = (64, 128, 256),
        norm: str = "none",
    ):
        super().__init__()
        if len(layers) != len(channels) or (hidden and len(hidden) != len(layers)):
            raise UserError(
                f"--layers {_listed(layers)}, --channels {_listed(channels)} and --hidden {_listed(hidden)} must have "
                "one number for each stage (--hidden may be left empty: blocks without a bottleneck)"
            )
        if not 1 <= stride <= patch:
            raise UserError(f"--stride {stride} must be between 1 and --patch {patch}: patches touch or overlap")
        if patch_crop and not 0 < patch_crop <= patch:
            raise UserError(
                f"--patch-crop {patch_crop} does not fit into --patch {patch}: use 1 to {patch}, or 0 for none"
            )
        self.num_features, self.cut, self.grayscale = channels[-1], PatchJitter(patch, stride, patch_crop), grayscale
        self.stem = nn.Conv2d(1 if grayscale else 3, stem_width, stem_kernel, stem_stride, stem_kernel // 2)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        blocks, width = [], stem_width
        for stage, (count, wide) in enumerate(zip(layers, channels, strict=True)):
            for i in range(count):
                step = 2 if stage and not i else 1
                blocks.append(Block(width, wide, hidden[stage] if hidden else 0, step, norm))
                width = wide
        self.blocks = nn.Sequential(*blocks)
        weights = torch.tensor(GRAY).view(1, 3, 1, 1) / sum(GRAY)
        self.register_buffer("luma_weights", weights, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Without norms nothing else holds the scale: He for every convolution, and each block's last one divided by
        the square root of their number, so that the sum over blocks has the scale of one."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                block.convs[-1].weight.mul_(len(self.blocks) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        size = CPU_IMAGES if images.device.type == "cpu" else len(images)
        return torch.cat([self.grid(part).mean((1, 2)) for part in images.split(size)])

    def grid(self, images: Tensor, numbers: Tensor | None = None, jitter: PatchJitter | None = None) -> Tensor:
        """z of every patch, [B, R, Q, D]; in training `jitter` cuts the patches with its random numbers."""
        cut = jitter or self.cut
        rows, columns = (grid_side(n, cut.patch, cut.stride) for n in images.shape[-2:])
        if rows < 1 or columns < 1:
            raise UserError(f"an image of {tuple(images.shape[-2:])} pixels is smaller than a patch of {cut.patch}")
        if self.grayscale:
            images = (images * self.luma_weights).sum(1, keepdim=True)
        x = cut(images, numbers).contiguous(memory_format=torch.channels_last)
        x = self.blocks(self.pool(self.stem(x))).mean((2, 3))  # [B * R * Q, D]
        return x.view(len(images), rows, columns, -1)


# ---- contexts: [B, D, R, Q] -> [B, width, R, Q], where row i has seen rows 0 to i and no other -----------------------


class GatedLayer(nn.Module):
    """A 3x3 convolution whose lower row is masked, tanh times sigmoid (PixelCNN's vertical stack, as in GIM's code).

    The mask is a shape: a 2x3 kernel and one row of zeros above compute what 3x3 with three zeros does, in 2/3 of the
    time.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, (2, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(F.pad(x, (0, 0, 1, 0))).chunk(2, 1)
        return x + a.tanh() * b.sigmoid()


class PixelCNN(nn.Sequential):
    """`depth` gated layers between 1x1 convolutions; sees the row itself and `depth` rows above it."""

    def __init__(self, features: int, width: int, depth: int):
        layers = [GatedLayer(width) for _ in range(depth)]
        super().__init__(nn.Conv2d(features, width, 1), *layers, nn.Conv2d(width, width, 1))


class RowGRU(nn.Module):
    """A GRU from row to row, its matrices 1x3 convolutions along the row (the PixelRNN that v1 found similar)."""

    def __init__(self, features: int, width: int, depth: int = 1):
        super().__init__()
        if depth != 1:
            raise UserError(f"--context-depth {depth}: a row GRU has one layer, and its rows are its depth; use 1")
        self.width = width
        self.input = nn.Conv2d(features, 3 * width, (1, 3), padding=(0, 1))
        self.state = nn.Conv1d(width, 3 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.input(x).unbind(2)  # [B, 3 * width, Q] each
        h = rows[0].new_zeros(len(x), self.width, x.shape[3])
        states = []
        for row in rows:
            (reset, update, new), (h_reset, h_update, h_new) = row.chunk(3, 1), self.state(h).chunk(3, 1)
            keep = (update + h_update).sigmoid()
            h = torch.lerp((new + (reset + h_reset).sigmoid() * h_new).tanh(), h, keep)
            states.append(h)
        return torch.stack(states, 2)


class ResidualBlock(nn.Module):
    """Of v2's context: 1x1, ReLU, 1x3, a row of zeros above, 2x1, ReLU, 1x1."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.squeeze = nn.Conv2d(features, hidden, 1)
        self.along = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(hidden, hidden, (2, 1))
        self.expand = nn.Conv2d(hidden, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.along(F.relu(self.squeeze(x))), (0, 0, 1, 0))
        return x + self.expand(F.relu(self.down(y)))


class ResidualContext(nn.Sequential):
    """CPC v2's context: `depth` residual blocks of inner width `width`, ReLU; as wide as z (arXiv:1905.09272, App.)."""

    def __init__(self, features: int, width: int, depth: int):
        super().__init__(*[ResidualBlock(features, width) for _ in range(depth)], nn.ReLU())


CONTEXTS: dict[str, type[nn.Module]] = {"pixelcnn": PixelCNN, "gru": RowGRU, "residual": ResidualContext}


# ---- the trained network ---------------------------------------------------------------------------------------------


class CPC(nn.Module):
    """forward(images [n, 3, H, W], numbers) -> what is compared [n, R, Q, E], and for each direction predictions [A, E]
    of its anchors in the order of `loss.positives`, on the grid that `turned` makes for that direction.

    offsets: which rows below an anchor are predicted, each by its own W without bias. directions: 1 (down, v1) or 4
    (v2), each with its own context and Ws. embedding: width of a 1x1 projection of z that is compared (v2: 64), 0: z
    itself; scale: factor on the predictions (v2: 0.1). The third output is z, for the log.
    """

    def __init__(
        self,
        backbone: Encoder,
        *,
        offsets: tuple[int, ...],
        context: str = "pixelcnn",
        width: int = 1024,
        depth: int = 4,
        directions: int = 1,
        embedding: int = 0,
        scale: float = 1.0,
        jitter: PatchJitter | None = None,
    ):
        super().__init__()
        features = backbone.num_features
        self.backbone, self.jitter, self.offsets, self.scale = backbone, jitter, offsets, scale
        self.embed = nn.Conv2d(features, embedding, 1) if embedding else nn.Identity()
        self.contexts = nn.ModuleList(CONTEXTS[context](features, width, depth) for _ in range(directions))
        wide, compared = features if context == "residual" else width, embedding or features
        self.predictors = nn.ModuleList(
            nn.ModuleList(nn.Linear(wide, compared, bias=False) for _ in offsets) for _ in range(directions)
        )
        for layer in (w for ws in self.predictors for w in ws):
            nn.init.normal_(layer.weight, std=(wide * compared) ** -0.5)  # scores of about the features' size

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        z = self.backbone.grid(images, numbers, self.jitter)  # [n, R, Q, D]
        compared = self.embed(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [n, R, Q, E]
        predictions = []
        for direction, (context, ws) in enumerate(zip(self.contexts, self.predictors, strict=True)):
            c = context(turned(z, direction).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [n, R, Q, width]
            rows = c.shape[1]
            made = [w(c[:, : rows - o]).flatten(0, 2) for o, w in zip(self.offsets, ws, strict=True)]
            predictions.append(torch.cat(made) * self.scale)
        return compared, predictions, z


def _listed(values: tuple[int, ...]) -> str:
    return " ".join(str(v) for v in values) or "(empty)"
