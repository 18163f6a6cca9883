"""MoCo v3's recipes. Defaults are the 100-epoch ResNet-50 of the official CONFIG.md; every other recipe is a preset.

"paper" is arXiv:2104.02057; "code" is facebookresearch/moco-v3 (main_moco.py, moco/builder.py, vits.py, CONFIG.md).
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, ViTConfig, published


@dataclass(kw_only=True)
class Config(ResNetConfig, ViTConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of a view in pixels. Code."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none, or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""
    backbone: str = "resnet50"
    """timm name of a ResNet or a ViT. Code: ResNet-50, ViT-S/16 (12 heads), ViT-B/16."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes, in both encoders and all heads. Code: SyncBatchNorm."""
    frozen_patch_projection: bool = False
    """Random, untrained patch projection of a ViT. Paper section 4.2; code --stop-grad-conv1 in all ViT commands."""
    sincos_positions: bool = False
    """Fixed 2-D sin-cos positions of a ViT. Code vits.py: always."""
    hidden_dim: int = 4096
    """Hidden layers of projector and predictor. Code --moco-mlp-dim."""
    projector_dim: int = 256
    """Width of projections and predictions. Code --moco-dim."""
    projector_layers: int = 2
    """Linear layers of the projector. Code: 2 for ResNets, 3 for ViTs."""
    predictor_norm: bool = False
    """BatchNorm on the predictor's output. Code: not for ResNets, for ViTs."""

    # ---- objective
    temperature: float = 1.0
    """Code --moco-t: 1 with ResNet-50, 0.2 with ViTs."""
    ema_momentum: float = 0.99
    """Momentum of the momentum encoder at the first step; a cosine brings it to 1 at the last. Code --moco-m: 0.99;
    0.996 for 1000 epochs."""

    # ---- views
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop. Code --crop-min: 0.2 for ResNet-50, 0.08 for ViTs."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of brightness, contrast, saturation and hue, applied with p = 0.8. Code."""
    grayscale: float = 0.2
    """Probability of grayscale. Code."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view 1 and in view 2. Code."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarization in view 1 and in view 2. Code."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of crops. Code: torchvision's default, bilinear."""

    # ---- optimization
    optimizer: Literal["lars", "larc", "adamw"] = "lars"
    """Code: LARS for ResNet-50, without decay and ratio for biases and norms; AdamW for ViTs, which decays them too.
    larc: solo-learn on CIFAR-10, trust 0.02, clipped at the rate."""
    epochs: int = 100
    """Code CONFIG.md: 100, 300 and 1000 for ResNet-50, 300 for ViTs."""
    batch_size: int = 4096
    """Global batch size, over all processes. Code."""
    base_lr: float = 0.6
    """Peak learning rate per 256 images. Code CONFIG.md: 0.6 for 100 epochs, 0.3 for more; 1.5e-4 for ViTs."""
    warmup_epochs: float = 10
    """Linear warm-up from 0. Code: 10; 40 for ViTs."""
    weight_decay: float = 1e-6
    """Code: 1e-6, 1.5e-6 for 1000 epochs, 0.1 for ViTs."""
    momentum: float = 0.9
    """Optimizer momentum (LARS, LARC). Code."""


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

# Two cores: narrow heads for 64 features, AdamW, the temperature of the ViTs.
SMALL = dict(
    **TINY,
    image_size=32,
    hidden_dim=256,
    projector_dim=64,
    temperature=0.2,
    blur=(0.0, 0.0),
    optimizer="adamw",
    batch_size=256,
    base_lr=4e-3,
    warmup_epochs=1,
    knn_every=5,
)

SHAPES = Config(
    **SMALL,
    data="shapes",
    normalize="shapes",
    crop_scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.5),  # any hue: on shapes color would otherwise solve the task
    epochs=15,
    save_every=200,
)

# The code's ViT: frozen patches, fixed positions, three layers and a norm more than the ResNet's heads.
VIT = dict(
    stem="timm",
    frozen_patch_projection=True,
    sincos_positions=True,
    projector_layers=3,
    predictor_norm=True,
    temperature=0.2,
    optimizer="adamw",
    weight_decay=0.1,
)
TINY_VIT = VIT | dict(
    backbone="vit_tiny_patch16_224",
    layers=(),
    channels=(),
    stem_width=64,
    patch_size=8,
    width=64,
    depth=4,
    heads=4,
)

IMAGENET_VITS = replace(
    Config(),
    **VIT,
    backbone="vit_small_patch16_224",
    heads=12,
    crop_scale=(0.08, 1.0),
    epochs=300,
    base_lr=1.5e-4,
    warmup_epochs=40,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see MoCo v3 learn",
        replace(SHAPES, data="pairs", normalize="pairs"),
    ),
    "smoke": (
        "a few seconds on a CPU, with a ViT: what the tests run",
        replace(
            SHAPES, **TINY_VIT, limit=256, epochs=4, batch_size=64, base_lr=4e-3, knn_every=0, log_every=2, save_every=4
        ),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs",
        replace(
            Config(**SMALL, data="cifar10", normalize="cifar10", crop_scale=(0.2, 1.0), epochs=30),
            **STRIDE2,
            hidden_dim=512,
            projector_dim=128,
        ),
    ),
    "cifar10-r18": (
        "CIFAR-10, ResNet-18, batch 256, 1000 epochs: solo-learn's recipe, 93.1 % online linear",
        Config(
            data="cifar10",
            image_size=32,
            normalize="cifar10",
            backbone="resnet18",
            stem="cifar",
            temperature=0.2,
            crop_scale=(0.08, 1.0),
            blur=(0.0, 0.0),
            interpolation="bicubic",
            optimizer="larc",
            epochs=1000,
            batch_size=256,
            base_lr=0.3,
        ),
    ),
    "imagenet-r50-e100": ("ImageNet, ResNet-50, batch 4096, 100 epochs: official code, 68.9 % linear", Config()),
    "imagenet-r50-e300": (
        "ImageNet, ResNet-50, batch 4096, 300 epochs: official code, 72.8 % linear",
        Config(epochs=300, base_lr=0.3),
    ),
    "imagenet-r50": (
        "ImageNet, ResNet-50, batch 4096, 1000 epochs: official code, 74.6 % linear",
        Config(epochs=1000, base_lr=0.3, weight_decay=1.5e-6, ema_momentum=0.996),
    ),
    "imagenet-vits": ("ImageNet, ViT-S/16, batch 4096, 300 epochs: official code, 73.2 % linear", IMAGENET_VITS),
    "imagenet-vits-b1024": (
        "ImageNet, ViT-S/16, batch 1024, 300 epochs: the official command for 8 GPUs",
        replace(IMAGENET_VITS, batch_size=1024),
    ),
    "imagenet-vitb": (
        "ImageNet, ViT-B/16, batch 4096, 300 epochs: official code, 76.7 % linear",
        replace(IMAGENET_VITS, backbone="vit_base_patch16_224", heads=0),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
OFFICIAL = "facebookresearch/moco-v3 CONFIG.md"
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(93.10, "linear-augmented", "solo-learn CIFAR-10 table", "online linear probe during training")
    ],
    "imagenet-r50-e100": [published(68.9, "linear-augmented", OFFICIAL, "100 epochs")],
    "imagenet-r50-e300": [published(72.8, "linear-augmented", OFFICIAL, "300 epochs")],
    "imagenet-r50": [published(74.6, "linear-augmented", OFFICIAL, "1000 epochs")],
    "imagenet-vits": [published(73.2, "linear-augmented", OFFICIAL, "300 epochs")],
    "imagenet-vitb": [published(76.7, "linear-augmented", OFFICIAL, "300 epochs")],
}
