"""MoCo v2's recipes. Defaults are the ImageNet run of the official README; every other recipe is a preset.

"v1" is arXiv:1911.05722, "v2" arXiv:2003.04297; "code" is facebookresearch/moco (main_moco.py, moco/builder.py,
README) with its options of v2, --mlp --moco-t 0.2 --aug-plus --cos.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from common.config import ImageConfig, ResNetConfig, published
from common.errors import UserError


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
    zero_is_off: ClassVar[frozenset[str]] = frozenset({"hidden_dim"})

    # ---- data and network: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of a view in pixels. Code."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none, or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""
    backbone: str = "resnet50"
    """timm name. Code."""
    bn_groups: int = 8
    """Groups of the batch that BatchNorm takes its statistics of; the keys' images are shuffled among them. Code: the
    GPUs, 8. A multiple of the number of processes; 0: no groups and no shuffling, see sync_bn."""
    sync_bn: bool = True
    """Where bn_groups is 0: BatchNorm statistics over all processes, otherwise each its own. solo-learn: yes."""
    hidden_dim: int = 2048
    """Hidden layer of the projector; 0: a linear projector, as in v1. Code --mlp: as wide as the features, 2048."""
    projector_dim: int = 128
    """Width of the projections. Code --moco-dim."""

    # ---- objective
    temperature: float = 0.2
    """Code --moco-t: 0.2 in v2, 0.07 in v1."""
    queue_length: int = 65536
    """Earlier keys K that are the negatives, a multiple of the batch. Code --moco-k."""
    ema_momentum: float = 0.999
    """Momentum of the key encoder at the first step. Code --moco-m: 0.999 throughout."""
    ema_momentum_end: float = 0.999
    """Momentum of the key encoder at the last step, by a cosine. Code: constant; solo-learn: 0.99 to 0.999."""
    symmetric: bool = False
    """Each view is a query once, with a queue of its own, and the two losses are averaged. Code: view 1 alone;
    solo-learn and lightly: both."""

    # ---- views
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop. Code."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of brightness, contrast, saturation and hue, applied with p = 0.8. Code --aug-plus."""
    grayscale: float = 0.2
    """Probability of grayscale. Code."""
    blur: float = 0.5
    """Probability of Gaussian blur. Code --aug-plus."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of crops. Code: torchvision's default, bilinear."""

    # ---- optimization
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Code: SGD. Both decay every parameter. adamw is there for short runs."""
    epochs: int = 200
    """v2: 200 and 800. Code: 200."""
    batch_size: int = 256
    """Global batch size, over all processes. Code."""
    base_lr: float = 0.03
    """Peak learning rate per 256 images. Code README: 0.03, 0.015 at batch 128."""
    warmup_epochs: float = 0
    """Linear warm-up from 0. Code: none; solo-learn: 10."""
    weight_decay: float = 1e-4
    """On all parameters, biases and norms too. Code."""
    momentum: float = 0.9
    """Optimizer momentum (SGD). Code."""

    def check(self, processes: int) -> None:
        """Raise UserError where batch, queue, groups and processes do not fit together."""
        if self.queue_length < 1 or self.queue_length % self.batch_size:
            raise UserError(
                f"--queue-length {self.queue_length} is no multiple of the batch of {self.batch_size}: a batch of keys "
                "takes the place of the oldest one"
            )
        if not self.bn_groups:
            return
        if self.batch_size % self.bn_groups or self.batch_size < 2 * self.bn_groups:
            raise UserError(
                f"--bn-groups {self.bn_groups} does not divide the batch of {self.batch_size} into groups of 2 images "
                "or more; 0 takes the statistics of the batch"
            )
        if self.bn_groups % processes:
            raise UserError(
                f"--bn-groups {self.bn_groups} does not divide among {processes} processes: choose a multiple of "
                f"{processes}, or 0 for the statistics of the batch"
            )

    def batch_norm_rows(self, processes: int) -> str:
        """What a BatchNorm takes its statistics of, for --plan."""
        if self.bn_groups:
            return f"{self.bn_groups} groups of {self.batch_size // self.bn_groups} images, shuffled for the keys"
        return f"{self.batch_size if self.sync_bn else self.batch_size // processes} images, not shuffled"


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)

# No CIFAR-10 in the paper: solo-learn's MoCo v2+, the last .sh of its command (48e669e) with the width of its .yaml.
CIFAR10_R18 = Config(
    data="cifar10",
    image_size=32,
    normalize="cifar10",
    backbone="resnet18",
    stem="cifar",
    bn_groups=0,
    projector_dim=256,
    queue_length=32768,
    ema_momentum=0.99,
    symmetric=True,
    crop_scale=(0.08, 1.0),
    blur=0.0,
    interpolation="bicubic",
    epochs=1000,
    base_lr=0.3,
    warmup_epochs=10,
)

# Two cores: a narrow projector for 64 features, a queue that is shorter than the data, a key encoder for short runs.
SMALL = dict(
    **TINY,
    image_size=32,
    hidden_dim=64,
    projector_dim=64,
    queue_length=4096,
    ema_momentum=0.99,
    ema_momentum_end=0.99,
    blur=0.0,
    optimizer="adamw",
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
    epochs=20,
    save_every=200,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see MoCo learn",
        replace(SHAPES, data="pairs", normalize="pairs"),
    ),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            limit=256,
            epochs=4,
            batch_size=64,
            bn_groups=4,
            queue_length=128,
            ema_momentum=0.9,  # 16 steps
            ema_momentum_end=0.9,
            base_lr=1.6e-2,
            knn_every=0,
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 30 epochs",
        replace(
            Config(**SMALL, data="cifar10", normalize="cifar10", crop_scale=(0.2, 1.0), epochs=30),
            **STRIDE2,
            hidden_dim=192,
            projector_dim=128,
        ),
    ),
    "cifar10-r18": (
        "CIFAR-10, ResNet-18, batch 256, 1000 epochs: solo-learn's recipe, 92.9 % online linear",
        CIFAR10_R18,
    ),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, batch 256, 800 epochs: lightly's recipe, kNN 87.4 %",
        replace(
            CIFAR10_R18,
            data="frgfm/imagenette:160px",
            image_size=128,
            normalize="imagenet-1k",
            stem="timm",
            projector_dim=128,
            temperature=0.1,
            queue_length=4096,
            ema_momentum_end=0.99,
            blur=0.5,
            interpolation="bilinear",
            epochs=800,
            base_lr=0.06,
            warmup_epochs=0,
            weight_decay=5e-4,
        ),
    ),
    "imagenet-r50": ("ImageNet, ResNet-50, batch 256, 200 epochs: the paper, 67.5 % linear", Config()),
    "imagenet-r50-e800": ("ImageNet, ResNet-50, batch 256, 800 epochs: the paper, 71.1 % linear", Config(epochs=800)),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(92.94, "linear-augmented", "solo-learn CIFAR-10 table", "online linear probe during training"),
        published(
            84.7,
            "knn-200-0.1",
            "lightly CIFAR-10 benchmark",
            "batch 512, 200 epochs, its own recipe, best epoch on test",
        ),
    ],
    "imagenette-r18": [
        published(
            87.4,
            "knn-20-0.07",
            "lightly Imagenette benchmark",
            "best epoch on test; its text says k = 20, its script k = 200, T = 0.1",
        )
    ],
    "imagenet-r50": [
        published(67.5, "linear-augmented", "facebookresearch/moco README", "mean of 5 runs, standard deviation 0.1")
    ],
    "imagenet-r50-e800": [
        published(71.1, "linear-augmented", "facebookresearch/moco README", "800 epochs"),
        published(61.9, "knn-20-0.07", "arXiv:2104.14294 Table 2", "measured by the authors of DINO"),
    ],
}
