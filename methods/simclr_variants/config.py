"""Recipes of the studies: SimCLR's settings with ViTs, their stability tricks, and DirectCLR.

"paper" is SimCLR's, arXiv:2002.05709v3; "code" is google-research/simclr, v1 where it says so.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, Stem, ViTConfig


@dataclass(kw_only=True)
class Config(ResNetConfig, ViTConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "cifar10"
    image_size: int = 32
    """Side of a view in pixels. Paper App. B.9: 32 for CIFAR-10; 224 for ImageNet."""
    normalize: str = "none"
    """Mean and std of the inputs: none (code: inputs in [0, 1]) or those of shapes, cifar10, imagenet-1k ..."""
    backbone: str = "resnet18"
    """timm name. Code README, CIFAR-10 command: ResNet-18; paper: ResNet-50."""
    stem: Stem = "cifar"
    """cifar: 3x3 convolution, stride 1, no max-pool (paper App. B.9)."""
    norm: Literal["batch", "group"] = "batch"
    """Norm of backbone and projector. group: GroupNorm and LayerNorm."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes (paper section 2.2, "global BN")."""

    # ---- stability tricks for ViTs (common/vit.py)
    layer_scale: float = 0.0
    """Initial LayerScale of the residual branches, 0: none (CaiT, arXiv:2103.17239)."""
    qk_norm: bool = False
    """LayerNorm of queries and keys per head (arXiv:2302.05442)."""
    frozen_patch_projection: bool = False
    """Random, untrained patch projection (MoCo-v3, arXiv:2104.02057, section 4.2)."""
    sincos_positions: bool = False
    """Fixed 2-D sin-cos positions (MoCo-v3, MAE) instead of learned ones."""
    drop_path: float = 0.0
    """Stochastic depth, growing linearly over the blocks (Huang et al. 2016, arXiv:1603.09382); sampled per view."""
    layer_decay: float = 1.0
    """Learning rate times this per block from the top (BEiT, arXiv:2106.08254)."""

    # ---- projector
    projector_dim: int = 128
    """Width of the projections. Paper section 2.1; hidden layers are as wide as the features."""
    projector_layers: int = 2
    """Linear layers of the projector: 2, or 1 or 0 as paper section 4.2 compares; SimCLR v2: 3."""
    subvector: int = 0
    """Without projector: the loss sees only this many of the features (DirectCLR, arXiv:2110.09348); 0: all."""

    # ---- objective
    temperature: float = 0.5
    """Paper App. B.9: 0.5 is best on CIFAR-10 beyond 300 epochs; 0.1 on ImageNet (paper Table 5)."""
    loss_weight: float = 2.0
    """Code: the means over both views' rows are added, twice the paper's mean over 2B rows. Under LARS it matters to
    norms and biases only."""

    # ---- views
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop. Paper App. A."""
    color_strength: float = 0.5
    """Paper App. B.9: 0.5 on CIFAR-10; App. A: 1.0 on ImageNet. Brightness, contrast, saturation: 0.8 times it."""
    hue: float = 0.1
    """Hue jitter: 0.2 times the strength (paper App. A)."""
    grayscale: float = 0.2
    """Probability of grayscale. Paper App. A."""
    blur: float = 0.0
    """Probability of Gaussian blur. Paper App. B.9: none on CIFAR-10; App. A: 0.5 on ImageNet."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code data_util.py: bicubic."""

    # ---- optimization
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """Paper section 2.2: LARS. sgd and adamw are there to compare; adamw wants --base-lr 1e-3 --lr-scaling none."""
    epochs: int = 1000
    """Code README, CIFAR-10 command."""
    batch_size: int = 512
    """Global batch size, over all processes. Code README, CIFAR-10 command."""
    base_lr: float = 1.0
    """Rate before scaling with the batch. Code README, CIFAR-10 command: 1.0 per 256; paper section 2.2: 0.3."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: base * B / 256 (paper section 2.2). sqrt: base * sqrt(B), base 0.075, better at small B (App. B.1)."""
    warmup_epochs: float = 10
    """Linear warm-up from 0. Paper section 2.2."""
    weight_decay: float = 1e-6
    """Paper section 2.2 and first release; today's command line has v2's 1e-4. Not on norms and biases."""
    momentum: float = 0.9
    """Optimizer momentum (LARS, SGD). Source: lars_optimizer.py."""
    clip: float = 0.0
    """Largest global gradient norm, 0: no clipping. Paper and code: none."""


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    temperature=0.2,
    crop_scale=(0.3, 1.0),
    hue=0.5,  # any hue: on shapes color would otherwise solve the task
    interpolation="bilinear",
    epochs=30,
    batch_size=256,
    base_lr=2.0,
    warmup_epochs=1,
    knn_every=5,
    save_every=200,
)

VIT = replace(
    SHAPES,
    backbone="vit_tiny_patch16_224",
    stem="timm",
    layers=(),
    channels=(),
    stem_width=64,
    patch_size=8,
    width=64,
    depth=4,
    heads=4,
    optimizer="adamw",
    base_lr=1e-3,
    lr_scaling="none",
    weight_decay=0.05,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": ("embedded shapes, ViT of width 64 and depth 4, patches of 8 px, AdamW: the stability study's", VIT),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(VIT, limit=256, epochs=4, batch_size=64, drop_path=0.1, knn_every=0, log_every=2, save_every=4),
    ),
    "directclr": (
        "embedded shapes, 4 MMAC ResNet, no projector, the loss on 16 of 64 features: the projector study's",
        replace(SHAPES, projector_layers=0, subvector=16),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: ViT of width 64 and depth 4, patches of 4 px, 5 epochs",
        replace(VIT, data="cifar10", normalize="cifar10", patch_size=4, crop_scale=(0.2, 1.0), hue=0.1, epochs=5),
    ),
}

PUBLISHED: dict[str, list[dict]] = {}
