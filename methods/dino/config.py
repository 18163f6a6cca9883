"""DINO's recipes. Defaults are the official code's for ViT-S/16 on ImageNet; every other recipe is a preset.

"paper" is arXiv:2104.14294v2; "code" is facebookresearch/dino (main_dino.py, README).
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, ViTConfig, published
from common.errors import UserError


@dataclass(kw_only=True)
class Config(ResNetConfig, ViTConfig, ImageConfig):
    # ---- data and network: see common/config.py for the other settings
    data: str = "imagenet-1k"
    image_size: int = 224
    """Side of a global view in pixels. Paper section 3.1: 224."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Code: ImageNet."""
    backbone: str = "vit_small_patch16_224"
    """timm name of a ViT or a ResNet. Paper Table 1: ViT-S/16, width 384, 12 blocks, 6 heads."""
    sync_bn: bool = True
    """BatchNorm statistics of student and teacher over all processes. Code: SyncBatchNorm."""

    # ---- stability tricks for ViTs (common/vit.py); DINO has only the first
    drop_path: float = 0.0
    """Stochastic depth of the student, growing linearly over the blocks; the teacher has none. Code: 0.1 for ViTs."""
    layer_scale: float = 0.0
    """Initial LayerScale of the residual branches, 0: none. DINO v1 has none; DINOv2: 1e-5."""
    qk_norm: bool = False
    """LayerNorm of queries and keys per head. DINO v1: no."""
    frozen_patch_projection: bool = False
    """Random, untrained patch projection (MoCo-v3, arXiv:2104.02057, section 4.2). DINO v1: no."""
    sincos_positions: bool = False
    """Fixed 2-D sin-cos positions (MoCo-v3, MAE) instead of learned ones. DINO v1: no."""
    layer_decay: float = 1.0
    """Factor on the learning rate per block below the top. DINO v1: 1; DINOv2: 0.9."""

    # ---- head
    out_dim: int = 65536
    """Prototypes K, the dimensions of the output. Paper App. C, code."""
    hidden_dim: int = 2048
    """Width of the head's hidden layers. Paper App. C."""
    bottleneck_dim: int = 256
    """Width before the last layer. Paper App. C."""
    head_layers: int = 3
    """Linear layers before the L2 norm. Paper App. C."""
    head_bn: bool = False
    """BatchNorm in the head. Code use_bn_in_head: no; the ResNet-50 release: yes (unverified)."""
    norm_last_layer: bool = True
    """Keep the norms of the last layer's rows at 1. Code: yes; the best ViT-S runs: no."""

    # ---- objective
    student_temperature: float = 0.1
    """Temperature of the student. Paper section 3.1, code."""
    teacher_temperature: float = 0.04
    """Final temperature of the teacher. Code: 0.04; paper's runs: 0.07; unstable above."""
    warmup_teacher_temperature: float = 0.04
    """Temperature of the teacher in the first epoch. Paper, code."""
    warmup_teacher_epochs: int = 0
    """Epochs of the linear warm-up to the final temperature. Code: 0; paper's runs: 30."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """What keeps one prototype from winning: subtract a moving average, or Sinkhorn-Knopp. Paper: mean; sinkhorn in
    Table 7 and in DINOv2."""
    center_momentum: float = 0.9
    """Momentum of the center, the moving average of the teacher's raw outputs; 1 disables centering. Paper App. D,
    code."""
    ema_momentum: float = 0.996
    """Momentum of the teacher at the first step; a cosine brings it to 1. Paper; code's advice: 0.9995 at batch 256."""

    # ---- views
    global_crop_scale: tuple[float, float] = (0.4, 1.0)
    """Area of the two global crops. Code: 0.4 to 1; best ViT-S/16: 0.25 to 1; convnets: 0.14 to 1."""
    local_views: int = 8
    """Local crops, which only the student sees. Code: 8; best ViT-S/16: 10."""
    local_size: int = 96
    """Side of a local view in pixels. Paper section 3.1."""
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a local crop. Code: 0.05 to 0.4; convnets: 0.05 to 0.14."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue, applied with probability 0.8. Code."""
    grayscale: float = 0.2
    """Probability of grayscale. Code."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur in global view 1, global view 2 and local views. Code."""
    solarize: float = 0.2
    """Probability of solarization in global view 2. Code."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code: bicubic."""

    # ---- optimization
    optimizer: Literal["adamw", "sgd", "lars", "larc"] = "adamw"
    """Code: AdamW for ViTs, SGD (README) or LARS (release) for ResNet-50. larc: solo-learn on CIFAR-10, trust
    coefficient 0.02, no tensor faster than the learning rate."""
    epochs: int = 100
    """Passes over the training images. Code."""
    batch_size: int = 512
    """Global batch size, over all processes. Code README: 8 GPUs x 64."""
    base_lr: float = 5e-4
    """Peak learning rate per 256 images (linear rule). Code."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, not scaled with the batch. Code."""
    warmup_epochs: float = 10
    """Linear warm-up from 0, the peak reached at its last step. Code."""
    weight_decay: float = 0.04
    """Weight decay at the first step. Not on biases and norms; on positions and CLS token, unlike timm's ViTs. Code."""
    weight_decay_end: float = 0.4
    """Weight decay at the last step, by a cosine without warm-up. Code."""
    momentum: float = 0.9
    """Optimizer momentum (SGD, LARS, LARC). Code."""
    clip: float = 3.0
    """Largest gradient norm of each parameter separately (0: no clipping). Code: 3; none in the best ViT-S run."""
    freeze_last_layer: int = 1
    """Epochs in which the head's last layer is not trained. Code."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs (fp16 on those without it), float32 on CPUs; the loss is always float32. Code: fp16, none for
    patches below 16."""

    def check(self) -> None:
        """Raise UserError if a recomputed block would drop other paths than the first pass."""
        if self.activation_checkpointing and self.drop_path:
            raise UserError(
                "choose --activation-checkpointing or --drop-path: a recomputed block would drop other paths. "
                "--drop-path 0 switches it off."
            )


# 4.2 million multiply-adds a 32-px view: hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
# 9 million and three times the features: the best of four for its minutes on CIFAR-10 (methods/cifar10-cpu.md).
STRIDE2 = TINY | dict(stem="stride2", channels=(24, 48, 96, 192), stem_width=24)
# For TINY: a head that does not cost more than the network.
TINY_HEAD = dict(out_dim=1024, hidden_dim=256, bottleneck_dim=128, head_bn=True)

VITS_100 = Config(drop_path=0.1)
VITS_300 = replace(
    VITS_100,
    epochs=300,
    batch_size=1024,
    teacher_temperature=0.07,
    warmup_teacher_epochs=30,
    norm_last_layer=False,
)
CONVNET_CROPS = dict(global_crop_scale=(0.14, 1.0), local_crop_scale=(0.05, 0.14))

# solo-learn's CIFAR-10 recipe (scripts of July 2021, when its results were published).
CIFAR10_R18 = Config(
    data="cifar10",
    image_size=32,
    normalize="cifar10",
    backbone="resnet18",
    stem="cifar",
    out_dim=4096,
    head_bn=True,
    teacher_temperature=0.07,
    warmup_teacher_epochs=50,
    ema_momentum=0.9995,
    global_crop_scale=(0.08, 1.0),
    local_views=0,
    blur=(0.0, 0.0, 0.0),
    optimizer="larc",
    epochs=1000,
    batch_size=256,
    base_lr=0.3,
    min_lr=0.0,
    weight_decay=1e-6,
    weight_decay_end=1e-6,
    clip=0.0,
)

SHAPES = Config(
    data="shapes",
    image_size=32,
    normalize="shapes",
    **TINY,
    **TINY_HEAD,
    ema_momentum=0.99,
    global_crop_scale=(0.3, 1.0),
    local_views=4,
    local_size=16,
    local_crop_scale=(0.1, 0.3),
    color_jitter=(0.4, 0.4, 0.2, 0.5),  # any hue: on shapes color would otherwise solve the task
    blur=(0.0, 0.0, 0.0),
    interpolation="bilinear",
    epochs=20,
    batch_size=256,
    base_lr=3e-3,
    min_lr=0.0,
    warmup_epochs=1,
    weight_decay_end=0.04,
    knn_every=5,
    save_every=200,
)

# A teacher much sharper than the student, and a center that follows quickly: at .1, .04 and .9 the output becomes
# uniform on shapes.
SHAPES_SHARP = replace(
    SHAPES,
    out_dim=512,
    hidden_dim=64,
    bottleneck_dim=64,
    head_layers=2,
    student_temperature=0.2,
    teacher_temperature=0.03,
    warmup_teacher_temperature=0.03,
    center_momentum=0.7,
    local_crop_scale=(0.2, 0.5),
    epochs=30,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet, two crops of 32 px: minutes on two cores, to see DINO learn",
        replace(
            SHAPES_SHARP,
            data="pairs",
            normalize="pairs",
            hidden_dim=256,  # with 64, two layers and a bottleneck of 64 kNN stops at 46 % instead of 80
            bottleneck_dim=256,
            head_layers=3,
            local_views=0,
            student_temperature=0.1,
            teacher_temperature=0.01,
            warmup_teacher_temperature=0.01,
            center_momentum=0.5,
            ema_momentum=0.97,
            base_lr=4e-3,
            freeze_last_layer=0,
            epochs=14,
        ),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet, 2x32 + 4x16 px, 30 epochs", SHAPES_SHARP),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 9 MMAC ResNet, two views of 32 px, 30 epochs",
        replace(
            CIFAR10_R18,
            **STRIDE2,
            **TINY_HEAD | dict(out_dim=512, bottleneck_dim=256),
            global_crop_scale=(0.2, 1.0),
            interpolation="bilinear",
            teacher_temperature=0.01,
            warmup_teacher_temperature=0.01,
            warmup_teacher_epochs=0,
            center_momentum=0.5,
            ema_momentum=0.97,
            freeze_last_layer=0,
            optimizer="adamw",
            epochs=30,
            base_lr=4e-3,
            warmup_epochs=1,
            weight_decay=0.04,
            weight_decay_end=0.04,
            clip=3.0,
            knn_every=5,
        ),
    ),
    "cifar10-r18": (
        "CIFAR-10, ResNet-18, batch 256, 1000 epochs: solo-learn's recipe, 89.5 % online linear",
        CIFAR10_R18,
    ),
    "cifar10-vit": (
        "CIFAR-10, ViT-Ti with patches of 4 px, 2x32 + 4x16 px, batch 256, 400 epochs; not a published recipe",
        Config(
            data="cifar10",
            image_size=32,
            normalize="cifar10",
            backbone="vit_tiny_patch16_224",
            patch_size=4,
            drop_path=0.1,
            out_dim=4096,
            teacher_temperature=0.07,
            warmup_teacher_epochs=30,
            norm_last_layer=False,
            ema_momentum=0.9995,
            global_crop_scale=(0.25, 1.0),
            local_views=4,
            local_size=16,
            local_crop_scale=(0.05, 0.25),
            blur=(0.0, 0.0, 0.0),
            epochs=400,
            batch_size=256,
        ),
    ),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, 2x128 + 6x64 px, batch 256, 800 epochs: cifar10-r18 with convnet crops",
        replace(
            CIFAR10_R18,
            **CONVNET_CROPS,
            data="frgfm/imagenette:160px",
            image_size=128,
            normalize="imagenet-1k",
            stem="timm",
            local_views=6,
            local_size=64,
            blur=(1.0, 0.1, 0.5),
            epochs=800,
        ),
    ),
    "imagenette-vits": (
        "Imagenette, ViT-S/16, 2x224 + 8x96 px, batch 256, 200 epochs; another code base: linear 86.1, kNN 83.8",
        replace(
            VITS_100,
            data="frgfm/imagenette:320px",
            out_dim=4096,
            teacher_temperature=0.07,
            warmup_teacher_epochs=30,
            norm_last_layer=False,
            ema_momentum=0.9995,
            global_crop_scale=(0.25, 1.0),
            local_crop_scale=(0.05, 0.25),
            epochs=200,
            batch_size=256,
        ),
    ),
    "imagenet-vits": (
        "ImageNet, ViT-S/16, 2x224 + 10x96 px, batch 1024, 800 epochs: the paper, kNN 74.5 %, linear 77.0 %",
        replace(
            VITS_300,
            global_crop_scale=(0.25, 1.0),
            local_views=10,
            local_crop_scale=(0.05, 0.25),
            epochs=800,
            min_lr=1e-5,
            clip=0.0,
            precision="no",
        ),
    ),
    "imagenet-vits-300": (
        "ImageNet, ViT-S/16, batch 1024, 300 epochs: README's boosted run, kNN 73.3 %, linear 76.0 %",
        VITS_300,
    ),
    "imagenet-vits-100": (
        "ImageNet, ViT-S/16, batch 512, 100 epochs: README's vanilla run, kNN 69.3 %, linear 74.0 %",
        VITS_100,
    ),
    "imagenet-r50": (
        "ImageNet, ResNet-50, 2x224 + 6x96 px, batch 4080, 800 epochs: the release, kNN 67.5 %, linear 75.3 %",
        Config(
            **CONVNET_CROPS,
            backbone="resnet50",
            out_dim=60000,
            head_bn=True,
            teacher_temperature=0.07,
            warmup_teacher_epochs=30,
            local_views=6,
            optimizer="lars",
            epochs=800,
            batch_size=4080,
            base_lr=0.3,
            weight_decay=1e-6,
            weight_decay_end=1e-6,
            clip=0.0,
        ),
    ),
    "imagenet-r50-b512": (
        "ImageNet, ResNet-50, 2x224 + 8x96 px, batch 512, 100 epochs: README's convnet command for 8 GPUs",
        Config(
            **CONVNET_CROPS,
            backbone="resnet50",
            optimizer="sgd",
            base_lr=0.03,
            weight_decay=1e-4,
            weight_decay_end=1e-4,
        ),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        published(89.5, "linear-augmented", "solo-learn CIFAR-10", "1000 epochs, online; about 87 in its issue 397"),
        published(84.0, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 128, 200 epochs, best epoch on test"),
    ],
    "imagenette-r18": [published(88.8, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenette-vits": [
        published(83.8, "knn-20-0.07", "stable-pretraining Imagenette", "200 epochs, best epoch on test"),
        published(86.1, "linear-augmented", "stable-pretraining Imagenette", "200 epochs, online, best epoch on test"),
    ],
    "imagenet-vits": [
        published(74.5, "knn-20-0.07", "arXiv:2104.14294 Table 2"),
        published(77.0, "linear-augmented", "arXiv:2104.14294 Table 2", "CLS of the last 4 blocks"),
    ],
    "imagenet-vits-300": [
        published(73.3, "knn-20-0.07", "facebookresearch/dino README"),
        published(76.0, "linear-augmented", "facebookresearch/dino README", "CLS of the last 4 blocks"),
    ],
    "imagenet-vits-100": [
        published(69.3, "knn-20-0.07", "facebookresearch/dino README"),
        published(74.0, "linear-augmented", "facebookresearch/dino README", "CLS of the last 4 blocks"),
    ],
    "imagenet-r50": [
        published(67.5, "knn-20-0.07", "arXiv:2104.14294 Table 2"),
        published(75.3, "linear-augmented", "arXiv:2104.14294 Table 2"),
    ],
}
