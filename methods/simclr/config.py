"""SimCLR's recipes. Defaults are the CIFAR-10 command of the official README; every other recipe is a preset.

"paper" is arXiv:2002.05709v3; "code" is google-research/simclr, v1 where it says so.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, Stem, published
from common.errors import UserError


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
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
    """Norm of backbone and projector. group: GroupNorm and LayerNorm, with which --micro-batch is exact."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes (paper section 2.2, "global BN")."""

    # ---- projector
    projector_dim: int = 128
    """Width of the projections. Paper section 2.1; hidden layers are as wide as the features."""
    projector_layers: int = 2
    """Linear layers of the projector: 2, or 1 or 0 as paper section 4.2 compares; SimCLR v2: 3."""

    # ---- objective
    temperature: float = 0.5
    """Paper App. B.9: 0.5 is best on CIFAR-10 beyond 300 epochs; 0.1 on ImageNet (paper Table 5)."""
    loss_weight: float = 2.0
    """Code: the means over both views' rows are added, twice the paper's mean over 2B rows. Under LARS it matters to
    norms and biases only."""
    decoupled: bool = False
    """Leave the positive out of the denominator (DCL, arXiv:2110.06848)."""
    micro_batch: int = 0
    """Images per process whose activations are held at a time (gradient caching); 0: all of them. With BatchNorm the
    statistics are per micro-batch."""

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

    def check_micro_batch(self, local_batch: int) -> None:
        """Raise UserError where --micro-batch cannot work on the `local_batch` images of a process."""
        if self.micro_batch and self.activation_checkpointing:
            raise UserError("choose --micro-batch or --activation-checkpointing: the second makes the first useless")
        if self.micro_batch and local_batch % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} does not divide the {local_batch} images of a process")


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

CIFAR10_R18 = Config()

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

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see SimCLR learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=20),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet: a task with easier answers than the shape", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, base_lr=0.4, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-r18": ("CIFAR-10, ResNet-18, 1000 epochs: the official README's command, about 91 % linear", CIFAR10_R18),
    "cifar10-r50": (
        "CIFAR-10, ResNet-50, batch 1024, 1000 epochs: paper App. B.9, 94.0 % linear",
        replace(CIFAR10_R18, backbone="resnet50", batch_size=1024),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs",
        replace(
            CIFAR10_R18,
            **STRIDE2,
            normalize="cifar10",
            temperature=0.2,
            crop_scale=(0.2, 1.0),
            interpolation="bilinear",
            epochs=30,
            batch_size=256,
            base_lr=3.0,
            warmup_epochs=1,
            knn_every=5,
        ),
    ),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, batch 256, 800 epochs, square-root rate",
        Config(
            data="frgfm/imagenette:160px",
            image_size=128,
            normalize="imagenet-1k",
            backbone="resnet18",
            stem="timm",
            temperature=0.1,
            color_strength=1.0,
            hue=0.2,
            blur=0.5,
            epochs=800,
            batch_size=256,
            base_lr=0.075,
            lr_scaling="sqrt",
        ),
    ),
    "imagenet-r50": (
        "ImageNet, ResNet-50, batch 4096, 1000 epochs: the paper, 69.3 % linear",
        Config(
            data="imagenet-1k",
            image_size=224,
            backbone="resnet50",
            stem="timm",
            temperature=0.1,
            color_strength=1.0,
            hue=0.2,
            blur=0.5,
            epochs=1000,
            batch_size=4096,
            base_lr=0.3,
        ),
    ),
    "imagenet-r50-b256": (
        "ImageNet, ResNet-50, batch 256, 100 epochs, square-root rate: paper Table B.1, 62.8 % linear",
        Config(
            data="imagenet-1k",
            image_size=224,
            backbone="resnet50",
            stem="timm",
            temperature=0.1,
            color_strength=1.0,
            hue=0.2,
            blur=0.5,
            epochs=100,
            batch_size=256,
            base_lr=0.075,
            lr_scaling="sqrt",
        ),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(91.0, "linear-augmented", "google-research/simclr README", "1000 epochs, original pixels"),
        published(84.8, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 512, 200 epochs, best epoch on test"),
    ],
    "cifar10-r50": [published(94.0, "linear-augmented", "arXiv:2002.05709v3 App. B.9", "original pixels")],
    "imagenette-r18": [published(88.9, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenet-r50": [published(69.3, "linear-augmented", "arXiv:2002.05709v3 Table 6", "1000 epochs")],
    "imagenet-r50-b256": [published(62.8, "linear-augmented", "arXiv:2002.05709v3 Table B.1", "100 epochs")],
}
