"""The networks: an MLP for tables, and any backbone with a noise layer at its input, after its stem or at the head."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import UserError

from .noise import VAE, Additive, Channel, Element, Gaussian, Patch


class MLP(nn.Module):
    """`depth` layers of `width` units: [N, inputs] -> [N, width]. Linear, norm, ReLU."""

    def __init__(self, inputs: int, width: int = 256, depth: int = 3, norm: str = "group"):
        super().__init__()
        self.num_features = width

        def layer(n: int) -> nn.Sequential:
            # LayerNorm where images have GroupNorm: neither couples the samples of a batch.
            scale = nn.LayerNorm(width) if norm == "group" else nn.BatchNorm1d(width)
            return nn.Sequential(nn.Linear(n, width), scale, nn.ReLU())

        self.stem = layer(inputs)
        self.rest = nn.Sequential(*[layer(width) for _ in range(depth - 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


class Outputs(NamedTuple):
    features: Tensor  # [N, D], before the head
    logits: Tensor  # [N, K]
    projections: Tensor  # [N, P]; the features where there is no projector
    kl: Tensor  # 0-d; 0 but for a VAE layer


class Network(nn.Module):
    """Backbone, linear head and one noise layer at `place`: "input", "stem" or "head".

    `network(x, keys)` is noisy, `network(x)` clean. `network(x, keys, common=True)` uses, in place of the arm's own
    layer, the noise all arms are measured with: element dropout of the input. So networks trained without noise, or
    with another one, are measured alike.
    """

    def __init__(self, backbone: nn.Module, classes: int, p: float, projector_dim: int = 0):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        self.head = nn.Linear(width, classes)
        # SimCSE (arXiv:2104.08821, section 4.1): an MLP on top, in training only.
        self.projector = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projector_dim))
            if projector_dim
            else nn.Identity()
        )
        self.common, self.noise, self.place = Element(p), None, "input"
        self._keys: Tensor | None = None

    def set_noise(self, noise: nn.Module | None, place: str) -> None:
        """Put the arm's layer in; after the rest is initialized, so that all arms start from the same weights."""
        self.noise, self.place = noise, place
        if place == "stem" and noise is not None:
            stem_of(self.backbone)[0].register_forward_hook(self._behind_stem)

    def _behind_stem(self, _module: nn.Module, _inputs: tuple, out: Tensor) -> Tensor:
        if self._keys is None:
            return out
        if isinstance(self.backbone, VisionTransformer):  # [N, H, W, D] where sizes may change, otherwise tokens
            return self.noise(out.reshape(len(out), -1, out.shape[-1]), self._keys).view(out.shape)
        return self.noise(out, self._keys)

    def forward(self, x: Tensor, keys: Tensor | None = None, common: bool = False) -> Outputs:
        own = keys if self.noise is not None and not common else None
        if common:
            x = self.common(x, keys)
        if self.place == "input" and own is not None:
            x = self.noise(x, own)
        self._keys = own
        features = self.backbone(x)
        self._keys = None
        logits = self.head(self.noise(features, own) if self.place == "head" and own is not None else features)
        vae = isinstance(self.noise, VAE) and own is not None
        return Outputs(features, logits, self.projector(features), self.noise.kl if vae else logits.new_zeros(()))


def stem_of(backbone: nn.Module) -> tuple[nn.Module, int]:
    """(the module behind which noise enters the encoder, its channels): MLP's first layer, patches of a ViT, a ResNet's
    stem after its activation. UserError for another network."""
    if isinstance(backbone, MLP):
        return backbone.stem, backbone.num_features
    if isinstance(backbone, VisionTransformer):
        return backbone.patch_embed, backbone.embed_dim
    if hasattr(backbone, "act1") and hasattr(backbone, "bn1"):
        return backbone.act1, backbone.bn1.weight.numel()
    raise UserError("noise after the stem needs an MLP, ViT or ResNet: choose another arm for this network")


def make_noise(kind: str, backbone: nn.Module, *, p: float, sigma: float, patch: int) -> tuple[nn.Module | None, str]:
    """(layer, place) of a kind of `config.ARMS`."""
    match kind:
        case "none":
            return None, "input"
        case "element":
            return Element(p), "input"
        case "channel":
            return Channel(p), "stem"
        case "patch":  # tokens of a ViT are masked after the patch projection; positions are added later
            return Patch(p, patch), "stem" if isinstance(backbone, VisionTransformer) else "input"
        case "head":
            return Element(p), "head"
        case "gaussian":
            return Gaussian(p), "input"
        case "additive":
            return Additive(sigma), "input"
        case "vae":
            return VAE(stem_of(backbone)[1], p), "stem"
    raise ValueError(f"unknown noise {kind!r}")


def copies_of(x: Tensor, copies: int) -> Tensor:
    """[n, ...] -> [copies * n, ...], the first copy of every record, then the second ...: "zipped" in one batch."""
    return torch.cat([x] * copies)
