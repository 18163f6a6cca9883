"""VICReg's recipes. Defaults are the ImageNet run of the official README; every other recipe is a preset.

"paper" is arXiv:2105.04906; "code" is facebookresearch/vicreg (main_vicreg.py, augmentations.py, README).
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, published


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of a view in pixels. Code."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none, or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""
    backbone: str = "resnet50"
    """timm name. Code."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes (code); those of the loss always are."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the linear layers of the projector (the paper's expander), none for no projector. Code --mlp."""

    # ---- objective
    invariance_weight: float = 25.0
    """Weight of the mean square difference of the two views' projections, lambda in the paper. Code --sim-coeff."""
    variance_weight: float = 25.0
    """Weight of the hinge that keeps standard deviations above 1, mean of both views: mu. Code --std-coeff."""
    covariance_weight: float = 1.0
    """Weight of the squared covariances of different dimensions, sum of both views: nu. Code --cov-coeff."""

    # ---- views
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop. Code: torchvision's default."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of brightness, contrast, saturation and hue, applied with p = 0.8. Code."""
    grayscale: float = 0.2
    """Probability of grayscale. Code."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view 1 and in view 2. Code."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarization in view 1 and in view 2. Code."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code."""

    # ---- optimization
    optimizer: Literal["lars", "larc", "adamw"] = "lars"
    """Code: LARS, with the rate outside the momentum buffer. larc: trust 0.02, clipped at the rate, as solo-learn has
    it. adamw is there to compare."""
    epochs: int = 1000
    """Code README."""
    batch_size: int = 2048
    """Global batch size, over all processes. Code README."""
    base_lr: float = 0.2
    """Peak learning rate per 256 images. Code README: 0.2 for 1000 epochs at batch 2048, 0.3 for 100 at 512."""
    lr_floor: float = 0.001
    """The cosine ends at this share of the peak. Code."""
    warmup_epochs: float = 10
    """Linear warm-up from 0. Code."""
    weight_decay: float = 1e-6
    """Code --wd. Not on biases and norms."""
    adapt_vectors: bool = False
    """Whether biases and norms have decay and LARS's ratio too. Code: no; lightly: yes."""
    momentum: float = 0.9
    """Optimizer momentum (LARS). Code."""


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

# No CIFAR-10 pretraining in the paper: solo-learn's command, as it was when its numbers were added (July 2021).
CIFAR10_R18 = Config(
    data="cifar10",
    image_size=32,
    normalize="cifar10",
    backbone="resnet18",
    stem="cifar",
    projector=(2048, 2048, 2048),
    variance_weight=50.0,  # its 25 is for the sum of both views
    crop_scale=(0.2, 1.0),
    blur=(0.5, 0.5),  # the default of its command then; today's file has none
    solarize=(0.1, 0.1),
    optimizer="larc",
    epochs=1000,
    batch_size=256,
    base_lr=0.3,
    lr_floor=0.0,
    weight_decay=1e-4,
)

# Two cores: a narrow projector for 64 features, the rate for a run of a thousand steps.
SMALL = dict(
    **TINY,
    image_size=32,
    projector=(64, 128),
    blur=(0.0, 0.0),
    interpolation="bilinear",
    batch_size=256,
    base_lr=2.0,
    warmup_epochs=1,
    knn_every=5,
)

SHAPES = Config(
    **SMALL,
    data="shapes",
    normalize="shapes",
    crop_scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.5),  # any hue: on shapes color would otherwise solve the task
    epochs=20,
    save_every=200,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see VICReg learn",
        replace(SHAPES, data="pairs", normalize="pairs"),
    ),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs",
        replace(Config(**SMALL, data="cifar10", normalize="cifar10", crop_scale=(0.2, 1.0), epochs=30), **STRIDE2),
    ),
    "cifar10-r18": (
        "CIFAR-10, ResNet-18, batch 256, 1000 epochs: solo-learn's recipe, 92.1 % online linear",
        CIFAR10_R18,
    ),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, batch 256, 800 epochs: lightly's recipe, kNN 84.5 %",
        replace(
            CIFAR10_R18,
            data="frgfm/imagenette:160px",
            image_size=128,
            normalize="imagenet-1k",
            stem="timm",
            variance_weight=25.0,
            crop_scale=(0.08, 1.0),
            interpolation="bilinear",
            optimizer="lars",
            adapt_vectors=True,
            epochs=800,
            warmup_epochs=40,
        ),
    ),
    "imagenet-r50": ("ImageNet, ResNet-50, batch 2048, 1000 epochs: the paper, 73.2 % linear", Config()),
    "imagenet-r50-100": (
        "ImageNet, ResNet-50, batch 512, 100 epochs: the official README's command for 8 GPUs",
        Config(batch_size=512, epochs=100, base_lr=0.3),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [published(92.07, "linear-augmented", "solo-learn", "1000 epochs, online classifier")],
    "imagenette-r18": [
        published(
            84.5,
            "knn-20-0.07",
            "lightly Imagenette benchmark",
            "best epoch on test; its text says k = 20, its script k = 200, T = 0.1",
        )
    ],
    "imagenet-r50": [published(73.2, "linear-augmented", "facebookresearch/vicreg README", "1000 epochs")],
}
