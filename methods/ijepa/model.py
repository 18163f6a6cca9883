"""I-JEPA's networks (arXiv:2301.08243, section 3): a ViT that encodes some patches or all, and a narrow predictor."""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.vit import fix_sincos_positions, sincos_positions, take


class Encoder(nn.Module):
    """A timm ViT without class token and with fixed sin-cos positions: the context encoder, or a copy of it the target.

    forward(images [n, 3, H, W], ids [n, k]) -> tokens [n, k, D] of these patches alone, after the final norm; without
    ids of all patches, which equals timm's `forward_features`. Patches are dropped before the first block, so context
    tokens know nothing of the others.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        if not isinstance(backbone, VisionTransformer) or backbone.num_prefix_tokens:
            raise UserError("I-JEPA needs a plain ViT of timm without class token and registers: --backbone vit_...")
        self.backbone = backbone
        fix_sincos_positions(backbone)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        vit = self.backbone
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed  # [n, L, D]
        if ids is not None:
            x = take(x, ids)
        return vit.norm(vit.blocks(vit.norm_pre(x)))


class Predictor(nn.Module):
    """Tokens of the context [n, C, D] at patches `context` [n, C] -> features at `targets` [n, M, T]: [n, M, T, D].

    Every target block is a separate pass, in which a shared mask token with the positions of its T patches follows the
    context: blocks of one image do not see each other.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, dim: int, depth: int, heads: int):
        super().__init__()
        if dim % heads:
            raise UserError(f"--predictor-dim {dim} does not divide among {heads} heads: change --predictor-heads")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.project = nn.Linear(dim, width)

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        n, blocks, length = targets.shape
        x = self.embed(tokens) + F.embedding(context, self.pos_embed)
        x = x.repeat_interleave(blocks, 0)  # [n M, C, d], the blocks of an image side by side
        asked = self.mask_token + F.embedding(targets.flatten(0, 1), self.pos_embed)  # [n M, T, d]
        x = self.blocks(torch.cat([x, asked.to(x.dtype)], 1))[:, -length:]
        return self.project(self.norm(x)).unflatten(0, (n, blocks))


class IJEPA(nn.Module):
    """What is trained: context encoder and predictor. The target encoder is a moving average of `encoder`.

    forward(images [n, 3, H, W], context [n, C], targets [n, M, T]) -> predicted features [n, M, T, D].
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        predictor_dim: int,
        predictor_depth: int,
        predictor_heads: int,
        patch_std: float = 0.02,
        rescale_init: bool = False,
    ):
        super().__init__()
        self.encoder = Encoder(backbone)
        heads = predictor_heads or backbone.blocks[0].attn.num_heads
        sizes = dict(dim=predictor_dim, depth=predictor_depth, heads=heads)
        self.predictor = Predictor(backbone.embed_dim, backbone.patch_embed.grid_size, **sizes)
        self._initialize(patch_std, rescale_init)

    @torch.no_grad()
    def _initialize(self, patch_std: float, rescale: bool) -> None:
        """Code vision_transformer.py: normal of std 0.02 for matrices, patch projection and mask token, biases 0.

        rescale: the two output matrices of block l = 1, 2 ... divided by sqrt(2 l). The code does so too, but then
        helper.py initializes all matrices again, so the published networks were not rescaled.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=patch_std if isinstance(module, nn.Conv2d) else 0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.predictor.mask_token, std=0.02)
        for blocks in (self.encoder.backbone.blocks, self.predictor.blocks) if rescale else ():
            for layer, block in enumerate(blocks, start=1):
                for matrix in (block.attn.proj.weight, block.mlp.fc2.weight):
                    matrix.div_(math.sqrt(2 * layer))

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        return self.predictor(self.encoder(images, context), context, targets)
