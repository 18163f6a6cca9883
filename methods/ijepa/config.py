"""I-JEPA's recipes. Defaults are the paper's for ViT-B/16 on ImageNet; every other recipe is a preset.

"code" is facebookresearch/ijepa (configs/in1k_vith14_ep300.yaml, src/), whose constants were read there; "paper" is
arXiv:2301.08243v3. Values marked "unverified" are quoted from memory of the paper.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ViTConfig, published


@dataclass(kw_only=True)
class Config(ViTConfig, ImageConfig):
    # ---- data: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of an image in pixels. Code: 224, and 448 for the best one."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Code transforms.py: ImageNet."""

    # ---- encoder
    backbone: str = "vit_base_patch16_224"
    """timm name of a ViT; it is built without class token. Paper App. A: ViT-B/16, L/16, H/14, H/16."""
    patch_std: float = 0.02
    """Std of the patch projection's initial weights. Code: 0.02, for 768 numbers per patch; small patches need more
    relative to positions, whose std is 0.7 (not in the paper): 0.08 keeps the sum of 48 numbers as large."""
    rescale_init: bool = False
    """Output matrices of block l start divided by sqrt(2 l). Code: written, but undone by helper.py init_model."""

    # ---- predictor
    predictor_dim: int = 384
    """Width of the predictor. Code: pred_emb_dim."""
    predictor_depth: int = 6
    """Predictor blocks. Paper App. A: 6 for ViT-B (unverified; the code's default), 12 for L and H. Code: 12 for H."""
    predictor_heads: int = 0
    """Attention heads of the predictor; 0: as many as the encoder. Code helper.py."""

    # ---- masks
    blocks: int = 4
    """Target blocks per image. Code: num_pred_masks."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Area of a target block as a share of the image. Code: pred_mask_scale."""
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Height / width of a target block. Code: aspect_ratio."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area of the square context block, before the targets are taken out. Code: enc_mask_scale."""
    min_keep: int = 10
    """Minimum number of context patches per image. Code: min_keep, applied to any block, so small grids hang."""

    # ---- loss and target encoder
    loss: Literal["smooth-l1", "l2"] = "smooth-l1"
    """Distance of features. smooth-l1: code train.py; l2: paper equation 1."""
    ema_momentum: float = 0.996
    """Momentum of the target encoder at the first step. Code: ema."""
    ema_momentum_end: float = 1.0
    """Momentum at the last step; linear in between. Code: ema."""

    # ---- view
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Area of the random crop; 1 1: the full image. Code."""
    flip: float = 0.0
    """Probability of a left-right flip. Code: none, nor any color change or blur."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of crops. Code: torchvision's default."""

    # ---- optimization
    epochs: int = 600
    """Passes over the training images. Paper: 600 for ViT-B and L, 300 for H."""
    batch_size: int = 2048
    """Global batch size, over all processes. Code: 128 on each of 16 GPUs."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, not scaled with the batch. Code, for 2048 images."""
    start_lr: float = 1e-4
    """Learning rate at the start of the warm-up. Paper App. A (unverified); code for ViT-H: 2e-4."""
    end_lr: float = 1e-6
    """Learning rate at the end of the cosine. Code: final_lr."""
    warmup_epochs: float = 15
    """Linear warm-up, by steps. Paper App. A (unverified); code for ViT-H: 40."""
    weight_decay: float = 0.04
    """Weight decay at the first step. Not on biases, norms and other vectors. Code."""
    weight_decay_end: float = 0.4
    """Weight decay at the last step. Code: along a cosine; paper: linear (unverified)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas. Code: torch's defaults."""
    schedule_scale: float = 1.0
    """Stretch the schedules of rate, decay and momentum by this factor and cut them off. Code ipe_scale: 1.0."""
    micro_batch: int = 0
    """Images per process whose activations are held at a time; 0: all of them. Exact: no term couples images."""

    # ---- evaluation
    compile: bool = False
    """torch.compile for the networks; context lengths change from step to step, so with dynamic shapes."""
    knn_every: int = 0
    """Epochs between online kNN evaluations of the target encoder (0: none)."""


VIT_B = Config()

# MAE's small ViT here: width 96, 4 blocks, patches of 4 px, a grid of 8 x 8.
TINY = dict(
    image_size=32,
    backbone="vit_tiny_patch16_224",
    patch_size=4,
    width=96,
    depth=4,
    heads=3,
    patch_std=0.08,
    predictor_dim=48,
    predictor_depth=2,
)

SHAPES = Config(
    **TINY,
    data="shapes",
    normalize="shapes",
    ema_momentum=0.99,
    epochs=8,
    batch_size=32,
    lr=1e-3,
    warmup_epochs=0.5,
    weight_decay_end=0.04,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, ViT of width 96 and depth 4: minutes on one core, to see I-JEPA learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=4),
    ),
    "shapes": ("embedded single shapes, ViT of width 96 and depth 4, 8 epochs", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            patch_size=8,
            width=48,
            depth=2,
            patch_std=0.04,
            predictor_dim=24,
            predictor_depth=1,
            min_keep=3,
            limit=256,
            epochs=6,
            batch_size=64,
            lr=1.5e-3,
            warmup_epochs=1,
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on one core: ViT of width 96 and depth 4, patches of 4 px, 4 epochs",
        Config(
            **TINY,
            data="cifar10",
            normalize="cifar10",
            ema_momentum=0.99,
            epochs=4,
            batch_size=128,
            lr=1.5e-3,
            warmup_epochs=0.5,
            weight_decay_end=0.04,
        ),
    ),
    "cifar10-vit": (
        "CIFAR-10, ViT-Ti with patches of 4 px, batch 1024, 400 epochs; not a published recipe",
        Config(
            data="cifar10",
            image_size=32,
            normalize="cifar10",
            backbone="vit_tiny_patch16_224",
            patch_size=4,
            patch_std=0.08,
            predictor_dim=96,
            epochs=400,
            batch_size=1024,
            lr=7e-4,  # the paper's 1e-3 at 2048, scaled by the square root
            start_lr=7e-5,
            warmup_epochs=40,
        ),
    ),
    "imagenette-vits": (
        "Imagenette, ViT-S/16 at 224 px, batch 256, 200 epochs; another code base: linear 34.0, kNN 33.2",
        replace(
            VIT_B,
            data="frgfm/imagenette:320px",
            backbone="vit_small_patch16_224",
            epochs=200,
            batch_size=256,
            lr=3.5e-4,  # the paper's 1e-3 at 2048, scaled by the square root
            start_lr=3.5e-5,
        ),
    ),
    "imagenet-vitb": (
        "ImageNet, ViT-B/16, batch 2048, 600 epochs: the paper's, 72.9 % linear",
        VIT_B,
    ),
    "imagenet-vitl": (
        "ImageNet, ViT-L/16, batch 2048, 600 epochs: the paper's, 77.5 % linear",
        replace(VIT_B, backbone="vit_large_patch16_224", predictor_depth=12),
    ),
    "imagenet-vith": (
        "ImageNet, ViT-H/14, batch 2048, 300 epochs: the code's configuration, 79.3 % linear",
        replace(
            VIT_B,
            backbone="vit_huge_patch14_224",
            predictor_depth=12,
            epochs=300,
            start_lr=2e-4,
            warmup_epochs=40,
        ),
    ),
}


_PAPER = "arXiv:2301.08243v3 Table 1"
_PROBE = "average-pooled patches of the last layer, or of the last four side by side"

# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "imagenette-vits": [
        published(33.2, "knn-20-0.07", "stable-pretraining Imagenette", "200 epochs"),
        published(34.0, "linear-augmented", "stable-pretraining Imagenette", "200 epochs, online, best epoch on test"),
    ],
    "imagenet-vitb": [published(72.9, "linear-augmented", _PAPER, f"600 epochs; {_PROBE}; unverified")],
    "imagenet-vitl": [published(77.5, "linear-augmented", _PAPER, f"600 epochs; {_PROBE}; unverified")],
    "imagenet-vith": [published(79.3, "linear-augmented", _PAPER, f"300 epochs; {_PROBE}; unverified")],
}
