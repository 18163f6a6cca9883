"""Stability tricks for timm's VisionTransformer, each a separate option and off by default, and gathering of tokens.

    patch_size, LayerScale, QK-norm   arguments of timm: `vit_arguments`, for `BackboneSpec(arguments=...)`
    frozen random patch projection    `freeze_patch_projection` (MoCo-v3)
    fixed sin-cos positions           `fix_sincos_positions` (MoCo-v3, MAE)
    resampled positions               by a matrix, which has a deterministic gradient on GPUs; always on
    stochastic depth                  `StochasticDepth`: keyed by step and sample, so that processes agree
    layer-wise learning rates         `layer_groups` (BEiT, MAE, DINOv2)

An exported backbone needs none of this to be rebuilt: frozen weights and fixed positions are in its state dict, and
stochastic depth has no parameters. Warm-up by iterations is `common.schedules.cosine_schedule`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common import rng
from common.distributed import rank, world_size
from common.errors import UserError
from common.transfer import to_device

VIT_OPTIONS = {
    "patch_size": 0,
    "width": 0,
    "depth": 0,
    "heads": 0,
    "layer_scale": 0.0,
    "qk_norm": False,
    "frozen_patch_projection": False,
    "sincos_positions": False,
    "drop_path": 0.0,
    "layer_decay": 1.0,
}
"""Settings that only ViTs have, and their values for other networks."""


def is_vit(name: str) -> bool:
    """Whether timm builds `name` as its plain VisionTransformer."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.endswith(".vision_transformer")


def vit_arguments(
    name: str,
    *,
    sizes: Sequence[int],
    patch_size: int = 0,
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    layer_scale: float = 0.0,
    qk_norm: bool = False,
) -> dict:
    """Arguments of `timm.create_model` for a ViT that takes square images of all `sizes`; {} for other networks.

    The first size is the training size, whose grid of positions is learned; for the others it is resampled (bicubic).
    patch_size (pixels), width, depth (blocks), heads: 0 for timm's default. layer_scale: initial scale of each residual
    branch, learned per channel (CaiT, arXiv:2103.17239: 0.1 up to 18 blocks, 1e-5 for 24, 1e-6 for 36; DINOv2 1e-5), 0
    for none. qk_norm: LayerNorm of queries and keys per head. Raises UserError for an option the network lacks, a
    size not divisible by the patch size, or a width not divisible by the heads.
    """
    if not is_vit(name):
        chosen = dict(patch_size=patch_size, width=width, depth=depth, heads=heads, layer_scale=layer_scale)
        for option, value in {**chosen, "qk_norm": qk_norm}.items():
            if value:
                raise _only_for_vits(option, name)
        return {}
    if width and heads and width % heads:
        raise UserError(f"--width {width} does not divide among --heads {heads}: change one of the two")
    arguments: dict = {"img_size": sizes[0], "dynamic_img_size": True}
    for key, value in (("embed_dim", width), ("depth", depth), ("num_heads", heads)):
        if value:
            arguments[key] = value
    if patch_size:
        arguments["patch_size"] = patch_size
    if layer_scale:
        arguments["init_values"] = layer_scale
    if qk_norm:
        arguments["qk_norm"] = True
    with torch.device("meta"):
        vit = _vit(timm.create_model(name, **{**arguments, "depth": 1}), "patch_size")
    patch = vit.patch_embed.patch_size[0]
    for size in sizes:
        if size % patch:
            raise UserError(f"views of {size} px do not divide into patches of {patch} px: change one of the two")
    return arguments


def _vit(network: nn.Module, option: str) -> VisionTransformer:
    """`network`, typed as a ViT. Raises UserError if it is none, which `option` needs."""
    if not isinstance(network, VisionTransformer):
        raise _only_for_vits(option, type(network).__name__)
    return network


def _only_for_vits(option: str, network: str) -> UserError:
    return UserError(f"--{option.replace('_', '-')} applies only to ViTs, but the backbone is {network}")


def freeze_patch_projection(vit: nn.Module) -> None:
    """Random patch projection that is never trained (MoCo-v3, arXiv:2104.02057, section 4.2).

    Weights uniform within sqrt(6 / (3 p^2 + D)), bias 0 (moco-v3 vits.py), both without gradient, so that neither an
    optimizer nor weight decay moves them. Call before DDP and before the optimizer takes its parameters.
    """
    vit = _vit(vit, "frozen_patch_projection")
    projection = vit.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D positions [rows * columns, dim] in the order of the patches (row by row), as MAE's pos_embed.py.

    The first half of the channels is of the column index, the second of the row; each is [sin, cos] of
    index * 10000^(-i / (dim / 4)), i = 0 ... dim/4 - 1. Raises UserError unless dim is divisible by 4.
    """
    if dim % 4:
        raise UserError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [index.flatten()[:, None] * frequency for index in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def fix_sincos_positions(vit: nn.Module) -> None:
    """Replace learned positions by `sincos_positions`, without gradient; rows of CLS and register tokens are zero."""
    vit = _vit(vit, "sincos_positions")
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    positions = vit.pos_embed
    assert positions is not None, "a ViT with relative positions has none to replace"
    with torch.no_grad():
        positions[:, :prefix] = 0
        positions[:, prefix:] = sincos_positions(vit.embed_dim, *vit.patch_embed.grid_size)
    positions.requires_grad_(False)


_interpolate = timm.layers.resample_abs_pos_embed
_matrices: dict[tuple[int, int, int, int, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result
def _matrix(rows: int, columns: int, new_rows: int, new_columns: int, device: torch.device) -> Tensor:
    """What antialiased bicubic resampling of a grid does to its cells, [new cells, cells]."""
    key = rows, columns, new_rows, new_columns, device
    if key not in _matrices:
        cells = torch.eye(rows * columns, device="cpu").view(-1, 1, rows, columns)
        resampled = functional.interpolate(cells, (new_rows, new_columns), mode="bicubic", antialias=True)
        _matrices[key] = resampled.flatten(1).T.contiguous().to(device)
    return _matrices[key]


def resample_positions(
    posemb: Tensor,
    new_size: Sequence[int],
    old_size: Sequence[int] | None = None,
    num_prefix_tokens: int = 1,
    **options: Any,
) -> Tensor:
    """timm's `resample_abs_pos_embed`, [1, prefix + cells, D] -> [1, prefix + new cells, D], as a product of matrices.

    The gradient of the interpolation has no deterministic kernel on GPUs, and --deterministic would stop there.
    """
    if options or old_size is None or tuple(old_size) == tuple(new_size):
        return _interpolate(posemb, new_size, old_size, num_prefix_tokens, **options)
    prefix, cells = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    matrix = _matrix(*old_size, *new_size, posemb.device)
    kind = posemb.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        resampled = (matrix @ cells.float()).to(posemb.dtype)
    return torch.cat([prefix, resampled], dim=1)


vision_transformer.resample_abs_pos_embed = resample_positions  # what timm's ViT calls where `dynamic_img_size` is set


class KeyedDropPath(nn.Module):
    """Drop a residual branch for entire samples and scale the others by 1 / (1 - rate), with masks set from outside."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.mask: Tensor | None = None  # [samples], set by `StochasticDepth.select`

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.mask is not None, "StochasticDepth.select comes before the forward pass"
        return x * self.mask.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class StochasticDepth:
    """Stochastic depth in a ViT's residual branches; masks are a pure function of (seed, step, layer, view, sample).

    timm's layers draw from the global generator, so processes and resumed runs would differ. The rate grows linearly
    from 0 at the first block to `rate` at the last (timm, DINO); `uniform` gives all blocks the same (DINOv2).
    batch_size: global; views: upper bound on the views of a step. Add it to a network *after* its teacher was copied:
    a teacher has no stochastic depth.

        depth = StochasticDepth(student.backbone, 0.1, seed=0, views=10, batch_size=64)
        depth.draw(step, device)          once per step, on every process
        depth.select(first=2, count=8)    before a forward pass of views 2 ... 9 concatenated, [8 * n, ...]
    """

    def __init__(
        self, vit: nn.Module, rate: float, *, seed: int, views: int, batch_size: int, uniform: bool = False
    ) -> None:
        self.seed, self.shape = seed, (views, batch_size)
        self.layers: list[KeyedDropPath] = []
        self.masks = torch.empty(0)  # [layers, views, samples of this process], set by `draw`
        if rate == 0:
            return
        vit = _vit(vit, "drop_path")
        depth = len(vit.blocks)
        for i, block in enumerate(vit.blocks):
            share = rate if uniform else rate * i / max(depth - 1, 1)
            if share > 0:
                paths = KeyedDropPath(share), KeyedDropPath(share)
                block.drop_path1, block.drop_path2 = paths
                self.layers += paths

    def draw(self, step: int, device: torch.device | str = "cpu") -> None:
        """Sample masks for the global batch, keep those of this process."""
        if not self.layers:
            return
        numbers = torch.rand(len(self.layers), *self.shape, generator=rng.generator(self.seed, "drop-path", step))
        n = self.shape[1] // world_size()
        rates = torch.tensor([layer.rate for layer in self.layers])[:, None, None]
        masks = (numbers[..., rank() * n : (rank() + 1) * n] >= rates) / (1 - rates)
        self.masks = to_device(masks, device)

    def select(self, first: int, count: int) -> None:
        """Use the masks of views `first` ... `first + count - 1` in the next forward pass."""
        for i, layer in enumerate(self.layers):
            layer.mask = self.masks[i, first : first + count].flatten()


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Some tokens of each sample: [N, L, D] and [N, k] -> [N, k, D]. Several times faster than `gather`."""
    n, length, width = tokens.shape
    flat = ids + torch.arange(n, device=ids.device)[:, None] * length
    return tokens.reshape(n * length, width).index_select(0, flat.flatten()).view(n, -1, width)


def layer_groups(groups: list[dict], vit: nn.Module, decay: float) -> list[dict]:
    """Split the groups of `common.optim.decay_groups` by depth and give each an `lr_scale`, which `set_lr` applies.

    lr_scale = decay^(L + 1 - l) for L blocks: l = 0 for patches, positions and tokens, i + 1 for block i, L + 1 for the
    rest (final norm, heads). MAE lr_decay.py and DINOv2 (0.9) have the same rule. The ViT is the model's `backbone`.
    """
    if decay == 1:
        return groups
    last = len(_vit(vit, "layer_decay").blocks) + 1

    def layer(name: str) -> int:
        parts = name.removeprefix("backbone.").split(".") if name.startswith("backbone.") else [""]
        if parts[0] in ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre"):
            return 0
        return int(parts[1]) + 1 if parts[0] == "blocks" else last

    return split_by_depth(groups, layer, last, decay)


def split_by_depth(groups: list[dict], depth: Callable[[str], int], last: int, decay: float) -> list[dict]:
    """Split each group by `depth` of its parameters' names, with `lr_scale` = decay^(last - depth)."""
    split = []
    for group in groups:
        members: dict[int, list[int]] = {}
        for i, name in enumerate(group["names"]):
            members.setdefault(depth(name), []).append(i)
        for level, chosen in sorted(members.items()):
            part = {key: [group[key][i] for i in chosen] for key in ("names", "params")}
            split.append({**group, **part, "lr_scale": decay ** (last - level)})
    return split


@torch.no_grad()
def last_attention(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of the last block: images [N, 3, H, W] -> [N, heads, tokens, tokens], rows sum to 1, CLS first.

    A hook sees the matrix only where it is made, so the fused kernel is off for this one pass.
    """
    attention: Any = vit.blocks[-1].get_submodule("attn")  # timm's kinds of attention share no class
    training, fused = vit.training, attention.fused_attn
    kept: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        attention.fused_attn = False
        vit.eval()(images)
    finally:
        hook.remove()
        attention.fused_attn = fused
        vit.train(training)
    return kept[0]
