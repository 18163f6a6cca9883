"""MAE's recipes. Defaults are the paper's for ViT-B/16 on ImageNet; every other recipe is a preset.

"paper" is arXiv:2111.06377v3; "code" is facebookresearch/mae (main_pretrain.py, PRETRAIN.md); "Icarus" is the CIFAR-10
reproduction IcarusWizard/MAE.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ViTConfig, published


@dataclass(kw_only=True)
class Config(ViTConfig, ImageConfig):
    # ---- data: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of an image in pixels. Paper Table 8."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""

    # ---- encoder
    backbone: str = "vit_base_patch16_224"
    """timm name of a ViT with CLS token. Paper App. A.1: ViT-B/16, L/16, H/14."""
    learned_positions: bool = False
    """Learned positions in encoder and decoder, not fixed sin-cos ones. Paper App. A.1: sin-cos; Icarus: learned."""

    # ---- decoder
    decoder_dim: int = 512
    """Width of the decoder. Paper Table 1b."""
    decoder_depth: int = 8
    """Blocks of the decoder. Paper Table 1a."""
    decoder_heads: int = 16
    """Attention heads of the decoder. Code models_mae.py."""

    # ---- masks and targets
    mask_ratio: float = 0.75
    """Share of patches removed. Paper Figure 5."""
    masking: Literal["random", "block", "grid", "window"] = "random"
    """Mask sampling. Paper Table 1f: random is best; window: equally many in every cell (UM-MAE, arXiv:2205.10063)."""
    mask_window: int = 2
    """Side of a cell of grid and window masks, in patches. Paper Figure 6: 2."""
    norm_pix: bool = True
    """Predict each patch normalized by its mean and variance. Paper Table 1d, code PRETRAIN.md."""

    # ---- view
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop; 1 1: the full image. Code: 0.2 to 1."""
    flip: float = 0.5
    """Probability of a left-right flip. Code."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code: bicubic."""

    # ---- optimization
    epochs: int = 800
    """Passes over the training images. Paper App. A.1, code PRETRAIN.md; the best runs have 1600."""
    batch_size: int = 4096
    """Global batch size, over all processes. Paper Table 8."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images (linear rule). Paper Table 8. The code's own default is 1e-3."""
    warmup_epochs: float = 40
    """Linear warm-up from 0, by steps. Paper Table 8."""
    weight_decay: float = 0.05
    """Weight decay, not on biases and norms, but on CLS and mask token (code: 1-D tensors excluded). Paper Table 8."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. Paper Table 8."""
    micro_batch: int = 0
    """Images per process whose activations are held at a time; 0: all of them. Exact: no term couples images."""

    # ---- evaluation
    knn_every: int = 0
    """Epochs between online kNN evaluations (0: none). kNN stays low: MAE is judged by fine-tuning."""
    lowshot: tuple[str, ...] = ()
    """Labels for fine-tuning at the end, in `eval`'s form (10%, 5000 or both); default: none, it takes long."""
    lowshot_epochs: int = 100
    """Epochs of that fine-tuning. The baseline, random weights, gets as many and three times as many."""
    report_ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Mask ratios of the reconstructions in the report. Paper Figure 4: 75, 85, 95 %."""


VIT_B = Config()

# IcarusWizard's recipe: ViT-Ti on raw pixels without augmentation. Its Normalize(.5) is what "shapes" stands for.
CIFAR10_P2 = Config(
    data="cifar10",
    image_size=32,
    normalize="shapes",
    backbone="vit_tiny_patch16_224",
    patch_size=2,
    learned_positions=True,
    decoder_dim=192,
    decoder_depth=4,
    decoder_heads=3,
    norm_pix=False,
    crop_scale=(1.0, 1.0),
    flip=0.0,
    epochs=2000,
    warmup_epochs=200,
)

# Width 96, 4 blocks, patches of 4 px: hundreds of images a second train on two cores.
TINY = dict(
    image_size=32,
    backbone="vit_tiny_patch16_224",
    patch_size=4,
    width=96,
    depth=4,
    heads=3,
    decoder_dim=64,
    decoder_depth=2,
    decoder_heads=4,
    interpolation="bilinear",
)

SHAPES = Config(
    **TINY,
    data="shapes",
    normalize="shapes",
    norm_pix=False,
    epochs=40,
    batch_size=128,
    base_lr=3e-3,
    warmup_epochs=2,
    lowshot=("10%",),
    lowshot_epochs=40,
    save_every=500,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, ViT of width 96 and depth 4: minutes on two cores, to see MAE learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=10),
    ),
    "shapes": ("embedded single shapes, ViT of width 96 and depth 4, 40 epochs", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            patch_size=8,
            width=48,
            depth=2,
            decoder_dim=32,
            limit=256,
            epochs=6,
            batch_size=64,
            base_lr=2e-2,
            warmup_epochs=1,
            lowshot=(),
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: ViT of width 96 and depth 4, patches of 4 px, 15 epochs",
        Config(
            **TINY,
            data="cifar10",
            normalize="cifar10",
            epochs=15,
            batch_size=256,
            base_lr=1.5e-3,
            warmup_epochs=2,
            lowshot=("5000",),
            lowshot_epochs=30,
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
            decoder_dim=192,
            decoder_depth=4,
            decoder_heads=3,
            epochs=400,
            batch_size=1024,
            base_lr=3e-4,  # Icarus' 2.4e-3 at 4096, scaled by the square root
        ),
    ),
    "cifar10-vit-p2": (
        "CIFAR-10, ViT-Ti with patches of 2 px, batch 4096, 2000 epochs: IcarusWizard, 89.77 % fine-tuned",
        CIFAR10_P2,
    ),
    "imagenette-vits": (
        "Imagenette, ViT-S/16 at 224 px, batch 256, 200 epochs; another code base: linear 84.1, kNN 72.1",
        replace(
            VIT_B,
            data="frgfm/imagenette:320px",
            backbone="vit_small_patch16_224",
            epochs=200,
            batch_size=256,
            base_lr=6e-4,  # the paper's 2.4e-3 at 4096, scaled by the square root
            warmup_epochs=20,
        ),
    ),
    "imagenet-vitb": (
        "ImageNet, ViT-B/16, batch 4096, 800 epochs: the paper's recipe; its 1600 epochs: 83.6 % fine-tuned",
        VIT_B,
    ),
    "imagenet-vitl": (
        "ImageNet, ViT-L/16, batch 4096, 800 epochs: the paper's ablations, 85.4 % fine-tuned, 73.9 % linear",
        replace(VIT_B, backbone="vit_large_patch16_224"),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-vit-p2": [
        published(89.77, "finetune", "IcarusWizard/MAE README", "from scratch 74.13; original pixels"),
    ],
    "imagenette-vits": [
        published(72.1, "knn-20-0.07", "stable-pretraining Imagenette", "200 epochs, best epoch on test"),
        published(84.1, "linear-augmented", "stable-pretraining Imagenette", "200 epochs, online, best epoch on test"),
        published(61.0, "knn-20-0.07", "lightly Imagenette benchmark", "800 epochs, 128 px, best epoch on test"),
    ],
    "imagenet-vitb": [
        published(83.6, "finetune", "facebookresearch/mae README", "1600 epochs"),
        published(68.0, "linear-augmented", "arXiv:2111.06377v3", "1600 epochs; released code: 67.8"),
    ],
    "imagenet-vitl": [
        published(85.4, "finetune", "arXiv:2111.06377v3 Table 1d", "800 epochs, normalized pixels"),
        published(73.9, "linear-augmented", "arXiv:2111.06377v3 Table 1d", "800 epochs, normalized pixels"),
    ],
}
