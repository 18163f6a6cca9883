"""Stability tricks for timm's VisionTransformer, each a switch of its own and off by default. Beside them attention
maps, and tokens taken out of many.

    patch_size, LayerScale, QK-norm   arguments of timm: `vit_arguments`, for `BackboneSpec(arguments=...)`
    frozen random patch projection    `freeze_patch_projection` (MoCo-v3)
    fixed sin-cos positions           `fix_sincos_positions` (MoCo-v3, MAE)
    stochastic depth                  `StochasticDepth`: keyed by step and sample, so that ranks agree
    layer-wise learning rates         `layer_groups` (BEiT, MAE, DINOv2)

An exported backbone needs none of this to be rebuilt: frozen weights and fixed positions are in its state dict, and
stochastic depth has no parameters. Warm-up by iterations is `common.schedules.warmup_cosine`.
"""

import math
from collections.abc import Sequence

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common import rng
from common.distributed import rank, world_size
from common.errors import UserError


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

    The first size is the training size, whose grid of positions is learnt; for the others it is resampled (bicubic).
    patch_size (pixels), width, depth (blocks), heads: 0 for the name's own. layer_scale: initial scale of each residual
    branch, learnt per channel (CaiT, arXiv:2103.17239: 0.1 up to 18 blocks, 1e-5 for 24, 1e-6 for 36; DINOv2 1e-5), 0
    for none. qk_norm: LayerNorm of queries and keys per head. Raises UserError for an option the network has not, a
    size that patches do not divide, or a width that the heads do not divide.
    """
    if not is_vit(name):
        chosen = dict(patch_size=patch_size, width=width, depth=depth, heads=heads, layer_scale=layer_scale)
        for option, value in {**chosen, "qk_norm": qk_norm}.items():
            _require(not value, option, name)
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
        patch = timm.create_model(name, **{**arguments, "depth": 1}).patch_embed.patch_size[0]
    for size in sizes:
        if size % patch:
            raise UserError(f"views of {size} px do not divide into patches of {patch} px: change one of the two")
    return arguments


def _require(fine: bool, option: str, network: str) -> None:
    if not fine:
        raise UserError(f"--{option.replace('_', '-')} is an option of ViTs; {network} has none of it")


def freeze_patch_projection(vit: nn.Module) -> None:
    """Random patch projection that is never trained (MoCo-v3, arXiv:2104.02057, section 4.2).

    Weights uniform within sqrt(6 / (3 p^2 + D)), bias 0 (moco-v3 vits.py), both without gradient, so that neither an
    optimiser nor weight decay moves them. Call before DDP and before the optimiser takes its parameters.
    """
    _require(isinstance(vit, VisionTransformer), "frozen_patch_projection", type(vit).__name__)
    projection = vit.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D positions [rows * columns, dim] in the order of the patches (row by row), as MAE's pos_embed.py.

    The first half of the channels is of the column index, the second of the row; each is [sin, cos] of
    index * 10000^(-i / (dim / 4)), i = 0 ... dim/4 - 1. Raises UserError unless 4 divides dim.
    """
    if dim % 4:
        raise UserError(f"2-D sin-cos positions need a width that 4 divides, not {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [index.flatten()[:, None] * frequency for index in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def fix_sincos_positions(vit: nn.Module) -> None:
    """Replace learnt positions by `sincos_positions`, without gradient; rows of CLS and register tokens are zero."""
    _require(isinstance(vit, VisionTransformer), "sincos_positions", type(vit).__name__)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    with torch.no_grad():
        vit.pos_embed[:, :prefix] = 0
        vit.pos_embed[:, prefix:] = sincos_positions(vit.embed_dim, *vit.patch_embed.grid_size)
    vit.pos_embed.requires_grad_(False)


class KeyedDropPath(nn.Module):
    """Zero a residual branch for whole samples and scale the others by 1 / (1 - rate), with masks from outside."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.mask = rate, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.mask.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class StochasticDepth:
    """Stochastic depth in a ViT's residual branches; masks are a pure function of (seed, step, layer, view, sample).

    timm's own layers draw from the global generator, so ranks and resumed runs would differ. `rate` grows linearly
    from 0 at the first block to `rate` at the last (timm, DINO); `uniform` gives all blocks the same (DINOv2).
    batch_size: global; views: an upper bound of the views a step has. Put it into a network *after* its teacher was
    copied: a teacher has none.

        depth = StochasticDepth(student.backbone, 0.1, seed=0, views=10, batch_size=64)
        depth.draw(step, device)          once a step, on every rank
        depth.select(first=2, count=8)    before a forward pass of views 2 ... 9 concatenated, [8 * n, ...]
    """

    def __init__(
        self, vit: nn.Module, rate: float, *, seed: int, views: int, batch_size: int, uniform: bool = False
    ) -> None:
        self.seed, self.shape, self.layers, self.masks = seed, (views, batch_size), [], None
        if rate == 0:
            return
        _require(isinstance(vit, VisionTransformer), "drop_path", type(vit).__name__)
        depth = len(vit.blocks)
        for i, block in enumerate(vit.blocks):
            share = rate if uniform else rate * i / max(depth - 1, 1)
            if share > 0:
                block.drop_path1, block.drop_path2 = KeyedDropPath(share), KeyedDropPath(share)
                self.layers += [block.drop_path1, block.drop_path2]

    def draw(self, step: int, device: torch.device | str = "cpu") -> None:
        """Draw for the global batch, keep this rank's samples."""
        if not self.layers:
            return
        numbers = torch.rand(len(self.layers), *self.shape, generator=rng.generator(self.seed, "drop-path", step))
        n = self.shape[1] // world_size()
        rates = torch.tensor([layer.rate for layer in self.layers])[:, None, None]
        masks = (numbers[..., rank() * n : (rank() + 1) * n] >= rates) / (1 - rates)
        self.masks = masks.to(device, non_blocking=True)  # [layers, views, n]

    def select(self, first: int, count: int) -> None:
        """Use the masks of views `first` ... `first + count - 1` in the next forward pass."""
        for i, layer in enumerate(self.layers):
            layer.mask = self.masks[i, first : first + count].flatten()


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Some tokens of each sample: [N, L, D] and [N, k] -> [N, k, D]. Several times faster than `gather`."""
    n, length, width = tokens.shape
    flat = ids + torch.arange(n, device=ids.device)[:, None] * length
    return tokens.reshape(n * length, width).index_select(0, flat.flatten()).view(n, -1, width)


def layer_groups(groups: list[dict], vit: nn.Module, decay: float, *, prefix: str = "backbone.") -> list[dict]:
    """Split the groups of `common.optim.decay_groups` by depth and give each an `lr_scale`, which `set_lr` applies.

    lr_scale = decay^(L + 1 - l) for L blocks: l = 0 for patches, positions and tokens, i + 1 for block i, L + 1 for the
    rest (final norm, heads). MAE lr_decay.py and DINOv2 (0.9) have the same rule. prefix: the ViT's place in `names`.
    """
    if decay == 1:
        return groups
    _require(isinstance(vit, VisionTransformer), "layer_decay", type(vit).__name__)
    last = len(vit.blocks) + 1

    def layer(name: str) -> int:
        parts = name.removeprefix(prefix).split(".") if name.startswith(prefix) else [""]
        if parts[0] in ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre"):
            return 0
        return int(parts[1]) + 1 if parts[0] == "blocks" else last

    split = []
    for group in groups:
        members: dict[int, list[int]] = {}
        for i, name in enumerate(group["names"]):
            members.setdefault(layer(name), []).append(i)
        for depth, chosen in sorted(members.items()):
            part = {key: [group[key][i] for i in chosen] for key in ("names", "params")}
            split.append({**group, **part, "lr_scale": decay ** (last - depth)})
    return split


@torch.no_grad()
def last_attention(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of the last block: images [N, 3, H, W] -> [N, heads, tokens, tokens], rows sum to 1, CLS first.

    A hook sees the matrix only where it is made, so the fused kernel is off for this one pass.
    """
    attention, training, kept = vit.blocks[-1].attn, vit.training, []
    fused = attention.fused_attn
    hook = attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        attention.fused_attn = False
        vit.eval()(images)
    finally:
        hook.remove()
        attention.fused_attn = fused
        vit.train(training)
    return kept[0]
