"""SwAV's recipes. Defaults are solo-learn's CIFAR-10 recipe: the paper trained on ImageNet only. The rest are presets.

"paper" is arXiv:2006.09882; "code" is facebookresearch/swav; "solo-learn" is vturrisi/solo-learn as it was when its
CIFAR-10 numbers were added (July 2021). Learning rates are absolute, as in the code: they follow no rule of the batch.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from common.config import ImageConfig, ResNetConfig, Stem, published
from common.errors import UserError


@dataclass(kw_only=True)
class Config(ResNetConfig, ImageConfig):
    zero_is_off: ClassVar[frozenset[str]] = frozenset({"hidden_dim"})

    # ---- data and network: see common/config.py for the other settings
    data: str = "cifar10"
    image_size: int = 32
    """Side of the two large views in pixels. Paper: 224; solo-learn: 32 for CIFAR-10."""
    normalize: str = "cifar10"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Code: ImageNet's, but std .228 .224
    .225."""
    backbone: str = "resnet18"
    """timm name. Paper: ResNet-50; solo-learn on CIFAR-10: ResNet-18."""
    stem: Stem = "cifar"
    sync_bn: bool = True
    """BatchNorm statistics over all processes. Code: groups of 8 GPUs at batch 4096, all of them at 256."""
    hidden_dim: int = 2048
    """Hidden layer of the projector; 0: a linear projector. Code: --hidden_mlp 2048, 0 likewise."""
    projector_dim: int = 128
    """Width of the projections. Code: --feat_dim 128."""

    # ---- objective
    prototypes: int = 3000
    """Number of prototypes K. Paper App. A: 3000; its author for CIFAR-10: 10 to 300 (issue 23); solo-learn: 3000."""
    temperature: float = 0.1
    """Temperature of the predictions. Paper App. A."""
    epsilon: float = 0.05
    """Temperature of the codes (Sinkhorn): smaller is sharper. Paper App. A: 0.05; code README: 0.03 where the loss
    stays at ln K."""
    sinkhorn_iterations: int = 3
    """Rounds of balancing. Paper App. A: 3. 0 skips it, and the prototypes collapse."""
    freeze_prototypes: int = 390
    """Steps in which the prototypes get no gradient. Code: 313 at batch 4096, 5005 at 256; solo-learn: 2 epochs."""
    queue_length: int = 3840
    """Earlier projections that help to balance small batches, cut to a multiple of the batch (0: none). Paper App. A:
    none at batch 4096, 3840 at 256."""
    queue_start: int = 50
    """First epoch that fills the queue, counted from 0; it is used once full. Code: 15 at batch 256; solo-learn: 50."""

    # ---- views
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the large crops. Paper App. A: (0.14, 1) with small views, (0.08, 1) without."""
    local_views: int = 0
    """Small views. Paper App. A: 6; solo-learn on CIFAR-10: none."""
    local_size: int = 16
    """Side of a small view in pixels. Paper App. A: 96."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Area of the small crops. Paper App. A."""
    color_jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    """Brightness, contrast, saturation and hue, applied with probability 0.8. Code multicropdataset.py."""
    grayscale: float = 0.2
    """Probability of grayscale. Code multicropdataset.py."""
    blur: float = 0.5
    """Probability of Gaussian blur. Code multicropdataset.py."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code: torchvision's default, bilinear; solo-learn: bicubic."""

    # ---- optimization
    optimizer: Literal["larc", "adamw"] = "larc"
    """Code: LARC around SGD, for every tensor, biases and norms too. adamw is there to compare."""
    trust_coefficient: float = 0.02
    """LARC's trust coefficient. Code: 0.001; solo-learn: 0.02."""
    larc_clip: bool = True
    """LARC never exceeds SGD's step. Code: off; solo-learn: on."""
    epochs: int = 1000
    """Paper: 100 to 800; solo-learn: 1000."""
    batch_size: int = 256
    """Global batch size, over all processes. Paper App. A: 4096, and 256 for the small-batch recipe."""
    lr: float = 0.6
    """Peak learning rate, not scaled with the batch. Code: 4.8 at batch 4096, 0.6 at 256; solo-learn: 0.6."""
    lr_start: float = 0.003
    """Learning rate of the first warm-up step. Code: 0.3 at batch 4096; solo-learn: 0.003."""
    lr_end: float = 0.0006
    """Learning rate at the end of the cosine. Code: 0.0048 at batch 4096, 0.0006 at 256; solo-learn: 0.0006."""
    warmup_epochs: int = 10
    """Linear warm-up from `lr_start`, end included. Code: 10 at batch 4096, none at 256; solo-learn: 10."""
    weight_decay: float = 1e-6
    """Weight decay of every tensor. Paper App. A."""
    momentum: float = 0.9
    """Optimizer momentum (LARC). Code main_swav.py."""

    def check(self) -> None:
        """Raise UserError where the codes would overflow."""
        if self.epsilon < 0.025:
            raise UserError(f"--epsilon {self.epsilon}: below 0.025 exp(score / epsilon) leaves the range of float32")


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
    prototypes=128,
    freeze_prototypes=39,
    queue_length=0,
    crop_scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.5),  # any hue: on shapes color would otherwise solve the task
    blur=0.0,
    interpolation="bilinear",
    trust_coefficient=0.001,
    larc_clip=False,
    epochs=30,
    batch_size=256,
    lr=2.0,
    lr_start=0.0,
    lr_end=0.002,
    warmup_epochs=1,
    knn_every=5,
    save_every=200,
)

SHAPES_SHARP = replace(
    SHAPES,
    hidden_dim=64,
    projector_dim=128,
    prototypes=512,  # more and sharper codes ask for more of an image: with 128 colors stay in the features
    temperature=0.15,
    epsilon=0.025,  # codes much sharper than predictions: at .1 and .05 the loss stays at ln K on shapes
    optimizer="adamw",
    epochs=40,
    lr=4e-3,
    lr_end=1e-5,
)

IMAGENET = Config(
    data="imagenet-1k",
    image_size=224,
    normalize="imagenet-1k",
    backbone="resnet50",
    stem="timm",
    freeze_prototypes=313,
    queue_length=0,
    crop_scale=(0.14, 1.0),
    local_views=6,
    local_size=96,
    interpolation="bilinear",
    trust_coefficient=0.001,
    larc_clip=False,
    epochs=800,
    batch_size=4096,
    lr=4.8,
    lr_start=0.3,
    lr_end=0.0048,
)

SMALL_BATCH = dict(
    freeze_prototypes=5005,
    queue_length=3840,
    queue_start=15,
    batch_size=256,
    lr=0.6,
    lr_start=0.0,
    lr_end=0.0006,
    warmup_epochs=0,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see SwAV learn",
        replace(SHAPES_SHARP, data="pairs", normalize="pairs", epochs=20),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet: a task with easier answers than the shape", SHAPES_SHARP),
    "smoke": (
        "a few seconds on a CPU, with small views and the queue: what the tests run",
        replace(
            SHAPES,
            limit=256,
            local_views=2,
            local_scale=(0.1, 0.4),
            freeze_prototypes=4,
            queue_length=128,
            queue_start=1,
            epochs=4,
            batch_size=64,
            knn_every=0,
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10-r18": ("CIFAR-10, ResNet-18, 1000 epochs: solo-learn's recipe, 89.2 % online linear", CIFAR10_R18),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, 2 views, 30 epochs",
        replace(
            SHAPES_SHARP,
            **STRIDE2,
            data="cifar10",
            normalize="cifar10",
            freeze_prototypes=195,
            crop_scale=(0.2, 1.0),
            color_jitter=(0.4, 0.4, 0.4, 0.1),
            epochs=30,
            save_every=500,
        ),
    ),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, 2 + 6 views, batch 256, 800 epochs: the small-batch recipe",
        replace(
            IMAGENET,
            **{**SMALL_BATCH, "freeze_prototypes": 36},
            data="frgfm/imagenette:160px",
            image_size=128,
            backbone="resnet18",
            local_size=64,
        ),
    ),
    "imagenet-r50": ("ImageNet, ResNet-50, batch 4096, 2 + 6 views, 800 epochs: the paper, 75.3 % linear", IMAGENET),
    "imagenet-r50-2x224": (
        "ImageNet, ResNet-50, batch 4096, 2 views, 400 epochs: without multi-crop, 70.1 % linear",
        replace(IMAGENET, crop_scale=(0.08, 1.0), local_views=0, epochs=400),
    ),
    "imagenet-r50-b256": (
        "ImageNet, ResNet-50, batch 256 and queue, 2 + 6 views, 200 epochs: 72.7 % linear (400 epochs: 74.3 %)",
        replace(IMAGENET, **SMALL_BATCH, epochs=200),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(89.17, "linear-augmented", "solo-learn CIFAR-10 table", "online linear probe during training"),
        published(84.2, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 512, 200 epochs, best epoch on test"),
    ],
    "imagenette-r18": [published(90.2, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenet-r50": [
        published(
            75.3, "linear-augmented", "facebookresearch/swav README", "800 epochs; 400: 74.6, 200: 73.9, 100: 72.1"
        ),
        published(65.7, "knn-20-0.07", "arXiv:2104.14294 Table 2", "measured by the authors of DINO"),
    ],
    "imagenet-r50-2x224": [published(70.1, "linear-augmented", "facebookresearch/swav README")],
    "imagenet-r50-b256": [published(72.7, "linear-augmented", "facebookresearch/swav README", "400 epochs: 74.3")],
}
