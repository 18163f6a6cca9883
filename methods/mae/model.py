"""MAE's network (arXiv:2111.06377, section 3): a timm ViT that sees only the patches that stay, and a light decoder."""

from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.vit import fix_sincos_positions, sincos_positions, take

from .loss import patchify
from .masking import split


class Decoder(nn.Module):
    """Tokens of the visible patches -> P numbers for every patch. [N, 1 + keep, D], [N, L] -> [N, L, P]."""

    def __init__(
        self, width: int, grid: tuple[int, int], numbers: int, *, dim: int, depth: int, heads: int, learned: bool
    ):
        super().__init__()
        if dim % heads:
            raise UserError(f"--decoder-dim {dim} does not divide among --decoder-heads {heads}: change one of the two")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if learned:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], dim), std=0.02))
        else:
            positions = F.pad(sincos_positions(dim, *grid), (0, 0, 1, 0))[None]  # the CLS token's is zero
            self.register_buffer("pos_embed", positions)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, numbers)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        x = self.embed(tokens)
        cls, visible = x[:, :1], x[:, 1:]
        missing = restore.shape[1] - visible.shape[1]
        masks = self.mask_token.to(x.dtype).expand(len(x), missing, -1)
        patches = take(torch.cat([visible, masks], 1), restore)  # [N, L, dim], every token at its position
        x = torch.cat([cls, patches], 1) + self.pos_embed
        return self.predict(self.norm(self.blocks(x)))[:, 1:]


class MAE(nn.Module):
    """Encoder (`backbone`, a timm ViT with CLS token) and decoder, initialized as the paper's code does.

    forward(images [N, 3, H, W], noise [N, L], keep) -> predictions [N, L, P], mask [N, L] (True: removed), encoder
    tokens [N, 1 + keep, D].
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        learned_positions: bool = False,
    ):
        super().__init__()
        if not isinstance(backbone, VisionTransformer) or backbone.num_prefix_tokens != 1 or backbone.no_embed_class:
            raise UserError("MAE needs a plain ViT of timm with a CLS token and no registers: --backbone vit_...")
        self.backbone = backbone
        self.patch = backbone.patch_embed.patch_size[0]
        sizes = dict(dim=decoder_dim, depth=decoder_depth, heads=decoder_heads, learned=learned_positions)
        self.decoder = Decoder(backbone.embed_dim, backbone.patch_embed.grid_size, 3 * self.patch**2, **sizes)
        if not learned_positions:
            fix_sincos_positions(backbone)
        self._initialize()

    def _initialize(self) -> None:
        """Code models_mae.py: Xavier for every matrix, the patch projection as a matrix [D, P]; tokens N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        kernel = self.backbone.patch_embed.proj.weight.data
        nn.init.xavier_uniform_(kernel.view(len(kernel), -1))
        nn.init.normal_(self.backbone.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def forward(self, images: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        visible, restore, mask = split(noise, keep)
        tokens = self.encode(images, visible)
        return self.decoder(tokens, restore), mask, tokens

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens of the patches `visible` [N, keep] alone, after the final norm: [N, 1 + keep, D], CLS first.

        Removed pixels are dropped before the patch projection, which is then a matrix product. The rest is timm's own
        forward pass, and with every patch visible in order it equals `backbone.forward_features(images)`.
        """
        vit, projection = self.backbone, self.backbone.patch_embed.proj
        pixels = take(patchify(images, self.patch), visible)  # [N, keep, P]
        kernel = projection.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P] in patchify's order
        x = F.linear(pixels, kernel, projection.bias)
        positions = vit.pos_embed[0, 1:].index_select(0, visible.flatten())
        x = x + positions.view_as(x)  # before anything is forgotten about where a patch was
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat([cls, x], 1))))
