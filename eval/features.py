"""Frozen features: the one thing every protocol of `eval` sees.

A backbone is any module that maps float images [B, 3, H, W] to [B, D]. It runs in eval mode (BatchNorm uses its running
statistics and does not move them) without gradients, in float32, on the deterministic evaluation geometry of the store.
A ViT has many tokens, and which of them are its features is a choice (`pooled`) that every number must state.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError


class RawPixels(nn.Module):
    """The baseline without a network: the normalised image itself, [B, 3, H, W] -> [B, 3 * s * s].

    Images larger than `largest` pixels are first shrunk to `largest` (bilinear, antialiased): 224 px would be 150,528
    features, more than any probe here is meant for, and nearest neighbours of pixels do not get better with size.
    """

    def __init__(self, largest: int = 32):
        super().__init__()
        self.largest = largest

    def forward(self, images: Tensor) -> Tensor:
        if max(images.shape[-2:]) > self.largest:
            images = F.interpolate(images, size=(self.largest, self.largest), mode="bilinear", antialias=True)
        return images.flatten(1)


class Pooled(nn.Module):
    """A timm ViT whose features are pooled as `pool` says: [B, 3, H, W] -> [B, D], for "last-n" [B, n * D].

    cls      class token of the last block, then the final norm (MAE's linear probe, DINO's kNN)
    mean     mean of the last block's patch tokens, then the final norm (MAE's fine-tuning; timm's "avg")
    last-n   class tokens of the last n blocks, each through the final norm, side by side (DINO's linear probe, n = 4)

    It has the backbone's parameters and none of its own. Raises UserError for another name, more blocks than there are,
    or a class token that the network has not.
    """

    def __init__(self, backbone: VisionTransformer, pool: str):
        super().__init__()
        found = re.fullmatch(r"cls|mean|last-([1-9]\d*)", pool)
        if not found:
            raise UserError(f"unknown pooling {pool!r}: choose auto, cls, mean or last-N, as last-4")
        blocks = int(found[1] or 1)
        if blocks > len(backbone.blocks):
            raise UserError(f"pooling {pool!r} needs {blocks} blocks, but this network has {len(backbone.blocks)}")
        if pool != "mean" and not backbone.has_class_token:
            raise UserError(f"pooling {pool!r} needs a class token, which this network has not: choose mean")
        self.backbone, self.pool, self.blocks = backbone, pool, blocks
        self.num_features = backbone.num_features * blocks

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_intermediates(
            images, indices=self.blocks, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
        if self.pool == "mean":
            patches = tokens[-1][0] if self.backbone.num_prefix_tokens else tokens[-1]
            chosen = [patches.mean(1)]
        else:
            chosen = [prefix[:, 0] for _, prefix in tokens]
        # One of the two norms is the identity; with "avg", timm's own pooling, it is the first.
        return torch.cat([self.backbone.fc_norm(self.backbone.norm(x)) for x in chosen], 1)


def pooled(backbone: nn.Module, pool: str = "auto") -> nn.Module:
    """The backbone with its features pooled by `pool` (see `Pooled`); "auto" is the backbone's own way.

    Raises UserError for a pooling that the network cannot have.
    """
    if pool == "auto":
        return backbone
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"pooling {pool!r} is a choice for ViTs; {type(backbone).__name__} pools its own way (auto)")
    return Pooled(backbone, pool)


def pooling(module: nn.Module) -> str | None:
    """How a ViT's tokens become features: "cls", "mean", "last-4" ...; None for networks without that choice."""
    if isinstance(module, Pooled):
        return module.pool
    if isinstance(module, VisionTransformer):
        return {"token": "cls", "avg": "mean"}.get(module.global_pool, module.global_pool)
    return None


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients inside, every submodule's own training flag as before afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for part, training in flags:
            part.training = training


def normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] -> float32 on `device`, (x / 255 - mean) / std."""
    mean_, std_ = (torch.tensor(list(v), dtype=torch.float32, device=device).view(1, -1, 1, 1) for v in (mean, std))
    return lambda images: images.to(device, non_blocking=True).float().div_(255).sub_(mean_).div_(std_)


def forward_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """`backbone(images)` as float32 [B, D]. Raises UserError where the output has another shape."""
    features = backbone(images)
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(f"evaluation needs a backbone that returns [batch, features], but {type(backbone).__name__} "
                        f"returned {found}: pool its output (timm: num_classes=0, global_pool='avg').")
    return features.float()


def extract_features(
    backbone: nn.Module,
    store,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Tensor:
    """Features of every image of `store` (an ImageStore or ImageStream), float32 [N, D] on the CPU, in store order.

    The backbone must be on `device` already. Training flags come back as they were and no BatchNorm statistic moves.
    Raises UserError for an empty store, an output that is not [B, D], or features that are not finite.
    """
    if len(store) == 0:
        raise UserError(f"the data {store.name!r} has no images to evaluate on.")
    normalise, features = normaliser(mean, std, device), None
    with frozen(backbone):
        for start in range(0, len(store), batch_size):
            stop = min(start + batch_size, len(store))
            batch = forward_features(backbone, normalise(store.eval_images(start, stop, image_size)))
            if features is None:  # one allocation: a list of batches and its concatenation need twice the memory
                features = torch.empty(len(store), batch.shape[1])
            features[start:stop] = batch.cpu()
    if not bool(torch.isfinite(features.sum())) and not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise UserError(f"the features of {bad} of {len(features)} images are not finite: the backbone has diverged. "
                        "Evaluate an earlier checkpoint, or train with a lower learning rate.")
    return features
