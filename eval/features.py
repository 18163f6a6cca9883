"""Frozen features: the one thing every protocol of `eval` sees.

A backbone is any module that maps float images [B, 3, H, W] to [B, D]. It runs in eval mode (BatchNorm uses its running
statistics and does not move them) without gradients, in float32, on the deterministic evaluation geometry of the store.
A ViT has many tokens, and which of them are its features is a choice (`pooled`) that every number must state.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbones import BackboneSpec
from common.data import Images
from common.distributed import all_gather, buffers_of_the_first, rank, world_size
from common.errors import UserError
from common.progress import track


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
        blocks: Any = self.backbone.forward_intermediates(
            images, indices=self.blocks, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        if self.pool == "mean":
            patches = blocks[-1][0] if self.backbone.num_prefix_tokens else blocks[-1]
            chosen = [patches.mean(1)]
        else:
            chosen = [prefix[:, 0] for _, prefix in blocks]
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


def channels(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean or standard deviation of each of the three channels, as a tuple of that length."""
    red, green, blue = values
    return red, green, blue


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] -> float32 on `device`, (x / 255 - mean) / std."""
    mean_, std_ = (torch.tensor(list(v), dtype=torch.float32, device=device).view(1, -1, 1, 1) for v in (mean, std))
    return lambda images: images.to(device, non_blocking=True).float().div_(255).sub_(mean_).div_(std_)


def forward_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """`backbone(images)` as float32 [B, D]. Raises UserError where the output has another shape."""
    features = backbone(images)
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(
            f"evaluation needs a backbone that returns [batch, features], but {type(backbone).__name__} "
            f"returned {found}: pool its output (timm: num_classes=0, global_pool='avg')."
        )
    return features.float()


def extract_features(
    backbone: nn.Module,
    store: Images,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    shared: bool = False,
) -> Tensor:
    """Features of every image of `store`, float32 [N, D] on the CPU, in store order.

    The backbone must be on `device` already. Training flags come back as they were and no BatchNorm statistic moves.
    shared: all processes call it with equal arguments; each computes its share of the batches, so every number is what
    one process computes, and the first returns all features, the others an empty tensor.
    Raises UserError, on all processes, for an empty store, an output that is not [B, D], or features that are not
    finite.
    """
    if len(store) == 0:
        raise UserError(f"the data {store.name!r} has no images to evaluate on.")
    processes, own = (world_size(), rank()) if shared else (1, 0)
    normalize, features = normalizer(mean, std, device), torch.empty(0)
    bad = torch.zeros((), dtype=torch.long, device=device)
    starts = range(0, len(store), processes * batch_size)
    with frozen(backbone), buffers_of_the_first(backbone) if shared else nullcontext():
        for first in track(starts, f"features of {len(store):,} images", len(starts)):
            start = first + own * batch_size
            if start >= len(store):  # nothing is left for this process: any batch will do
                start = 0
            stop = min(start + batch_size, len(store))
            batch = forward_features(backbone, normalize(store.eval_images(start, stop, image_size)))
            if processes > 1:
                batch = all_gather(F.pad(batch, (0, 0, 0, batch_size - len(batch))))[: len(store) - first]
            bad += (~batch.isfinite()).any(1).sum()
            if own > 0:
                continue
            if first == 0:  # one allocation: a list of batches and its concatenation need twice the memory
                features = torch.empty(len(store), batch.shape[1])
            features[first : first + len(batch)] = batch.cpu()
    if int(bad):
        raise UserError(
            f"the features of {int(bad)} of {len(store)} images are not finite: the backbone has diverged. "
            "Evaluate an earlier checkpoint, or train with a lower learning rate."
        )
    return features


def seconds_per_image(backbone: nn.Module, store: Images, spec: BackboneSpec, device: torch.device) -> float:
    """Of `extract_features`, measured on a few images, whatever comes out of the backbone."""
    count, normalize = min(64, len(store)), normalizer(spec.mean, spec.std, device)
    with frozen(backbone):
        for _ in range(2):  # the first pass warms up
            start = time.perf_counter()
            backbone(normalize(store.eval_images(0, count, spec.image_size)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


# ---- where features are used -----------------------------------------------------------------------------------------

DEVICE_SHARE = 0.5  # of the free memory of a device that a set of features may take
COLUMNS = 128  # whose statistics are taken at once


def place(features: Tensor, device: torch.device | str, free: float | None = None) -> Tensor:
    """`features` as float32, on `device` if they take at most `DEVICE_SHARE` of its free memory, else on the CPU.

    free: bytes, by default what CUDA says.
    """
    device = torch.device(device)
    if free is None:
        free = math.inf
        if device.type == "cuda":  # what the allocator holds and nobody uses is free too
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + held
    fits = 4 * features.numel() <= DEVICE_SHARE * free
    return features.to(device if fits else "cpu", torch.float32)


class Standardized:
    """Rows of features [N, D] as a probe reads them: standardized, on `device`, and only those that are asked for.

    A standardized copy of ImageNet's features would be another 10 GB. The numbers are those of `standardizer` on the
    whole set, to the last bit.
    """

    def __init__(self, x: Tensor, statistics: tuple[Tensor, Tensor], rows: Tensor | None, device: torch.device | str):
        self.x, self.statistics, self.device = x, statistics, torch.device(device)
        self.rows = torch.arange(len(x), device=x.device) if rows is None else rows.to(x.device)
        self.shape = (len(self.rows), x.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """float32 [B, D] at `index`, long [B]."""
        mean, scale = self.statistics
        return (self.x[self.rows[index.to(self.x.device)]].to(self.device, torch.float32) - mean).mul_(scale)

    def split(self, chunk: int) -> Iterator[Tensor]:
        """All rows, at most `chunk` at once."""
        for part in torch.arange(len(self), device=self.x.device).split(chunk):
            yield self[part]

    def all(self) -> Tensor:
        """[N, D]"""
        return torch.cat(list(self.split(len(self))))

    def of(self, x: Tensor, rows: Tensor | None = None) -> "Standardized":
        """Other features [M, D], or their `rows`, standardized by the same statistics."""
        return Standardized(x, self.statistics, rows, self.device)


def standardized(x: Tensor, rows: Tensor | None = None, *, device: torch.device | str) -> Standardized:
    """`x` [N, D], or its `rows` (long [n]), standardized by their own statistics; `x` may live on another device."""
    # By columns, because the rows at once would be a copy of the features.
    parts = [
        torch.var_mean(columns if rows is None else columns.index_select(0, rows.to(x.device)), 0, correction=0)
        for columns in x.split(COLUMNS, 1)
    ]
    variance, mean = (torch.cat(part) for part in zip(*parts, strict=True))
    return Standardized(x, (mean.to(device), scale_of(variance).to(device)), rows, device)


def scale_of(variance: Tensor) -> Tensor:
    """1 / standard deviation [D], above a floor of a millionth of the average variance: works at any scale of the
    features, and dead dimensions come out as 0."""
    return (variance + 1e-6 * variance.mean() + 1e-30).rsqrt()


def standardizer(features: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> (x - mean) * scale with the statistics of `features` [N, D] (a BatchNorm without affine parameters)."""
    variance, mean = torch.var_mean(features, 0, correction=0)
    scale = scale_of(variance)
    return lambda x: (x - mean).mul_(scale)
