"""SimSiam's recipes. Defaults are the paper's CIFAR-10 experiment; every other recipe is a preset.

"paper" is arXiv:2011.10566v1; "code" is facebookresearch/simsiam, which has the ImageNet run only.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, Stem, published


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "cifar10"
    image_size: int = 32
    """Side of a view in pixels. Paper App. D: 32 for CIFAR-10; code: 224 for ImageNet."""
    normalize: str = "cifar10"
    """Mean and std of the inputs: none, or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""
    backbone: str = "resnet18"
    """timm name. Paper App. D: ResNet-18 for CIFAR-10; section 3: ResNet-50."""
    stem: Stem = "cifar"
    """cifar: 3x3 convolution, stride 1, no max-pool (paper App. D: "the CIFAR variant")."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes (paper section 3)."""
    projector: tuple[int, ...] = (2048, 2048)
    """Widths of the projector's linear layers. Paper section 3: three layers; App. D: two for CIFAR-10; 2048-d."""
    predictor_hidden: int = 512
    """Width of the predictor's hidden layer. Paper section 3: a bottleneck of a quarter of the projections."""

    # ---- objective
    predictor: bool = True
    """Off: the prediction is the projection itself, and training fails (paper Table 1a: 0.1 % on ImageNet)."""
    stop_gradient: bool = True
    """Off: the loss runs to -1 and the projections collapse (paper section 4.1, Figure 2)."""

    # ---- views
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop. Paper section 3, code."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of brightness, contrast, saturation and hue, applied with p = 0.8. Paper section 3, code."""
    grayscale: float = 0.2
    """Probability of grayscale. Paper section 3, code."""
    blur: float = 0.0
    """Probability of Gaussian blur, sigma 0.1 to 2. Paper App. D: none on CIFAR-10; section 3, code: 0.5."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of crops. Code: torchvision's default."""

    # ---- optimization
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """Paper section 3 and code: SGD, and no need of LARS. lars and adamw are for narrow networks."""
    epochs: int = 800
    """Paper App. D: 800 on CIFAR-10; code: 100 on ImageNet."""
    batch_size: int = 512
    """Global batch size, over all processes. Paper section 3 and App. D, code."""
    base_lr: float = 0.03
    """Rate per 256 images. Paper App. D: 0.03 on CIFAR-10; section 3, code: 0.05 on ImageNet."""
    fix_predictor_lr: bool = True
    """Keep the predictor's rate at its peak instead of the cosine. Paper Table 1c: 68.1 against 67.7 on ImageNet;
    code: --fix-pred-lr."""
    warmup_epochs: float = 0
    """Linear warm-up from 0. Code: none; the paper (section 4.2) uses 10 epochs for batches of 1024 and more."""
    weight_decay: float = 5e-4
    """With SGD on all parameters, biases and norms too. Paper App. D: 5e-4 on CIFAR-10; section 3, code: 1e-4."""
    momentum: float = 0.9
    """Optimizer momentum (SGD, LARS). Paper section 3, code."""


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

# Two cores: the paper's SGD, heads in proportion to 64 features, rates for a run of a thousand steps.
SMALL = dict(
    **TINY,
    projector=(256, 256),
    predictor_hidden=64,
    batch_size=256,
    base_lr=0.5,
    knn_every=5,
)

SHAPES = Config(
    **SMALL,
    data="shapes",
    normalize="shapes",
    crop_scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.5),  # any hue: on shapes color would otherwise solve the task
    epochs=30,
    save_every=200,
)

SHAPES_ADAMW = replace(SHAPES, projector=(64, 64), predictor_hidden=32, optimizer="adamw", base_lr=4e-3)

IMAGENET_R50 = Config(
    data="imagenet-1k",
    image_size=224,
    normalize="imagenet-1k",
    backbone="resnet50",
    stem="timm",
    projector=(2048, 2048, 2048),
    blur=0.5,
    epochs=100,
    base_lr=0.05,
    weight_decay=1e-4,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see SimSiam learn",
        replace(SHAPES_ADAMW, data="pairs", normalize="pairs", epochs=20),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet: a task with easier answers than the shape", SHAPES_ADAMW),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-cpu": ("CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs", replace(Config(**SMALL, epochs=30), **STRIDE2)),
    "cifar10-r18": ("CIFAR-10, ResNet-18, batch 512, 800 epochs: paper App. D, 91.8 % linear", Config()),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, batch 256, 800 epochs: lightly's recipe, kNN (20, .07) 87.2 %",
        replace(
            IMAGENET_R50,
            data="frgfm/imagenette:160px",
            image_size=128,
            backbone="resnet18",
            epochs=800,
            batch_size=256,
            base_lr=0.06,
            fix_predictor_lr=False,
            weight_decay=5e-4,
        ),
    ),
    "imagenet-r50": ("ImageNet, ResNet-50, batch 512, 100 epochs: the official command, 68.1 % linear", IMAGENET_R50),
    "imagenet-r50-b256": (
        "ImageNet, ResNet-50, batch 256, 100 epochs: paper Table 2, 68.1 % linear",
        replace(IMAGENET_R50, batch_size=256),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(91.8, "linear-augmented", "arXiv:2011.10566 App. D", "800 epochs"),
        published(76.4, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 512, 200 epochs, best epoch on test"),
    ],
    "imagenette-r18": [published(87.2, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenet-r50": [published(68.1, "linear-augmented", "facebookresearch/simsiam README", "100 epochs")],
    "imagenet-r50-b256": [published(68.1, "linear-augmented", "arXiv:2011.10566 Table 2", "100 epochs")],
}
