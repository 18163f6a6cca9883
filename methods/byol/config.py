"""BYOL's recipes. Defaults are solo-learn's CIFAR-10 recipe: the paper trained on ImageNet only. The rest are presets.

"paper" is arXiv:2006.07733v3; "code" is google-deepmind/deepmind-research, byol/; "solo-learn" is vturrisi/solo-learn
as it was when its CIFAR-10 numbers were added (July 2021).
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, Stem, published


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "cifar10"
    image_size: int = 32
    """Side of a view in pixels. Paper App. B: 224; solo-learn: 32 for CIFAR-10."""
    normalize: str = "cifar10"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Paper App. B: ImageNet."""
    backbone: str = "resnet18"
    """timm name. Paper section 3.2: ResNet-50; solo-learn on CIFAR-10: ResNet-18."""
    stem: Stem = "cifar"
    zero_init_last: bool = False
    """Start residual blocks as the identity. Paper: no; code README: yes in bottleneck blocks, steadier, and no
    worse at ResNet-50."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes, in both networks (code: cross-replica over all devices)."""
    hidden_dim: int = 4096
    """Hidden layer of projector and predictor. Paper section 3.2."""
    projector_dim: int = 256
    """Width of projections and predictions. Paper section 3.2."""
    projector_layers: int = 2
    """Linear layers of the projector (paper section 3.2: 2); 0: none, the features themselves are predicted."""

    # ---- objective
    predictor: bool = True
    """The online network's predictor. Without it everything collapses: below 0.3 % linear in the paper's ablation."""
    ema_momentum: float = 0.99
    """Momentum of the target at the first step; a cosine brings it to 1 at the last. solo-learn: 0.99. Paper: 0.996 for
    1000 epochs; code: 0.97 for 40, 0.99 for 100 and 300; 0.9995 for 1000 at batch 512 (paper)."""
    loss_weight: float = 0.5
    """1: both directions added (paper eq. 2); 0.5: their mean (solo-learn at the time). Under LARS it matters to norms
    and biases only."""

    # ---- views
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop. Paper App. B."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue, applied with probability 0.8. Paper App. B."""
    grayscale: float = 0.2
    """Probability of grayscale. Paper App. B."""
    blur: tuple[float, float] = (0.0, 0.0)
    """Probability of Gaussian blur in views 1 and 2. Paper App. B: 1.0 and 0.1; solo-learn on CIFAR-10: none."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarization in views 1 and 2. Paper App. B."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Paper App. B: bicubic."""

    # ---- optimization
    optimizer: Literal["lars", "larc", "sgd", "adamw"] = "larc"
    """Paper section 3.3: LARS, the rate outside the momentum. larc: solo-learn's, trust 0.02 with clipping, about SGD.
    None of them decays biases and norms."""
    epochs: int = 1000
    """Paper section 3.3; solo-learn: 1000 too."""
    batch_size: int = 256
    """Global batch size, over all processes. Paper section 3.3: 4096; solo-learn: 256."""
    base_lr: float = 1.0
    """Learning rate for 256 images, scaled with batch / 256. Paper: 0.2 for 1000 epochs; code: 0.3 for 300, 0.45 for
    100 and 40; solo-learn: 1.0."""
    warmup_epochs: float = 10
    """Linear warm-up from 0. Paper section 3.3."""
    weight_decay: float = 1e-5
    """Matrices and kernels only. Paper: 1.5e-6 for 1000 epochs; code: 1e-6 for 300 and fewer; solo-learn: 1e-5."""
    momentum: float = 0.9
    """Optimizer momentum (LARS, LARC, SGD). Source: optimizers.py."""


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

CIFAR10_R18 = Config()

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    hidden_dim=256,
    projector_dim=64,
    ema_momentum=0.97,
    loss_weight=1.0,
    crop_scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.5),  # any hue: on shapes color would otherwise solve the task
    interpolation="bilinear",
    optimizer="lars",
    epochs=30,
    batch_size=256,
    base_lr=2.0,
    warmup_epochs=1,
    weight_decay=1e-6,
    knn_every=5,
    save_every=200,
)

SHAPES_ADAMW = replace(SHAPES, hidden_dim=128, ema_momentum=0.99, optimizer="adamw", base_lr=4e-3)

IMAGENETTE = Config(
    data="frgfm/imagenette:160px",
    image_size=128,
    normalize="imagenet-1k",
    stem="timm",
    ema_momentum=0.996,
    loss_weight=1.0,
    blur=(1.0, 0.1),
    optimizer="lars",
    epochs=1000,
    batch_size=256,
    base_lr=2.0,
    weight_decay=1e-6,
)

IMAGENET = Config(
    data="imagenet-1k",
    image_size=224,
    normalize="imagenet-1k",
    backbone="resnet50",
    stem="timm",
    ema_momentum=0.996,
    loss_weight=1.0,
    blur=(1.0, 0.1),
    optimizer="lars",
    epochs=1000,
    batch_size=4096,
    base_lr=0.2,
    weight_decay=1.5e-6,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see BYOL learn",
        replace(SHAPES_ADAMW, data="pairs", normalize="pairs"),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet: a task with easier answers than the shape", SHAPES_ADAMW),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-r18": ("CIFAR-10, ResNet-18, 1000 epochs: solo-learn's recipe, 92.6 % online linear", CIFAR10_R18),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs",
        replace(
            SHAPES,
            **STRIDE2,
            data="cifar10",
            normalize="cifar10",
            crop_scale=(0.2, 1.0),
            color_jitter=(0.4, 0.4, 0.2, 0.1),
            epochs=30,
            save_every=500,
        ),
    ),
    "imagenette-r18": ("Imagenette at 128 px, ResNet-18, 1000 epochs: official README, 92.3 % online", IMAGENETTE),
    "imagenet-r50": ("ImageNet, ResNet-50, batch 4096, 1000 epochs: the paper, 74.3 % linear", IMAGENET),
    "imagenet-r50-e300": (
        "ImageNet, ResNet-50, batch 4096, 300 epochs: the paper's ablations, 72.5 % linear",
        replace(IMAGENET, ema_momentum=0.99, epochs=300, base_lr=0.3, weight_decay=1e-6),
    ),
    "imagenet-r50-e100": (
        "ImageNet, ResNet-50, batch 4096, 100 epochs: the official code's preset",
        replace(IMAGENET, ema_momentum=0.99, epochs=100, base_lr=0.45, weight_decay=1e-6),
    ),
    "imagenet-r50-b512": (
        "ImageNet, ResNet-50, batch 512, 1000 epochs: the authors' small-batch recipe, 73.7 % linear",
        replace(IMAGENET, ema_momentum=0.9995, batch_size=512, base_lr=0.4),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(92.58, "linear-augmented", "solo-learn CIFAR-10 table", "online linear probe during training"),
        published(86.8, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 512, 200 epochs, best epoch on test"),
    ],
    "imagenette-r18": [
        published(92.3, "linear-augmented", "official README", "online linear probe during training"),
        published(88.7, "knn-20-0.07", "lightly Imagenette benchmark", "800 epochs, best epoch on test"),
    ],
    "imagenet-r50": [
        published(74.3, "linear-augmented", "arXiv:2006.07733v3 Table 1"),
        published(64.8, "knn-20-0.07", "arXiv:2104.14294 Table 2", "measured by the authors of DINO"),
    ],
    "imagenet-r50-e300": [published(72.5, "linear-augmented", "arXiv:2006.07733v3 section 5")],
    "imagenet-r50-b512": [published(73.7, "linear-augmented", "arXiv:2006.07733v3")],
}
