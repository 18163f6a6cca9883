"""DINO's recipes. Defaults are the official code's for ViT-S/16 on ImageNet; every other recipe is a preset.

"paper" is arXiv:2104.14294v2; "code" is facebookresearch/dino (main_dino.py, README).
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.run import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    # ---- data
    data: str = "imagenet-1k"
    """shapes, a hub name (cifar10, stl10, imagenet-1k, org/name ...), an image folder or a folder of parquet files."""
    image_column: str = ""
    """Column with the images; default: found from the features."""
    label_column: str = ""
    """Column with the labels; default: found from the features, none is fine for pretraining."""
    limit: int = 0
    """Use only this many training images (0: all), a fixed random subset."""
    image_size: int = 224
    """Side of a global view in pixels. Paper section 3.1: 224."""
    normalize: str = "imagenet-1k"
    """Mean and std of the inputs: none or those of shapes, cifar10, imagenet-1k ... Code: ImageNet's."""

    # ---- network
    backbone: str = "vit_small_patch16_224"
    """timm name. Paper Table 1: ViT-S/16, width 384, 12 blocks, 6 heads; or a ResNet."""
    stem: Literal["timm", "cifar"] = "timm"
    """Of ResNets. cifar: 3x3 convolution, stride 1, no max-pool."""
    layers: tuple[int, ...] = ()
    """Blocks per stage of a ResNet; default: timm's."""
    channels: tuple[int, ...] = ()
    """Width per stage of a ResNet; default: timm's."""
    stem_width: int = 64
    """Channels of the cifar stem; must equal the first of `channels` where narrower than 64."""
    width: int = 0
    """Width of a ViT; 0: the backbone's own."""
    depth: int = 0
    """Blocks of a ViT; 0: the backbone's own."""
    heads: int = 0
    """Attention heads of a ViT; 0: the backbone's own."""
    sync_bn: bool = True
    """BatchNorm of student and teacher over all ranks, where there is one. Code: SyncBatchNorm."""

    # ---- stability tricks for ViTs (common/vit.py); DINO has only the first
    drop_path: float = 0.0
    """Stochastic depth of the student, growing linearly over the blocks; the teacher has none. Code: 0.1 for ViTs."""
    patch_size: int = 0
    """Side of a patch in pixels; 0: the backbone's own."""
    layer_scale: float = 0.0
    """Initial LayerScale of the residual branches, 0: none. DINO v1 has none; DINOv2: 1e-5."""
    qk_norm: bool = False
    """LayerNorm of queries and keys per head. DINO v1: no."""
    frozen_patch_projection: bool = False
    """Random, untrained patch projection (MoCo-v3, arXiv:2104.02057, section 4.2). DINO v1: no."""
    sincos_positions: bool = False
    """Fixed 2-D sin-cos positions (MoCo-v3, MAE) instead of learnt ones. DINO v1: no."""
    layer_decay: float = 1.0
    """Learning rate times this per block from the top. DINO v1: 1; DINOv2: 0.9."""

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
    """Paper section 3.1, code."""
    teacher_temperature: float = 0.04
    """Final temperature. Code: 0.04; paper's runs: 0.07; unstable above."""
    warmup_teacher_temperature: float = 0.04
    """Temperature of the first epoch. Paper, code."""
    warmup_teacher_epochs: int = 0
    """Epochs of the linear way to the final temperature. Code: 0; paper's runs: 30."""
    center_momentum: float = 0.9
    """Of the centre, the moving average of the teacher's raw outputs; 1 switches centring off. Paper App. D, code."""
    ema_momentum: float = 0.996
    """Of the teacher at the first step, growing by a cosine to 1. Paper; code's advice: 0.9995 at batch 256."""

    # ---- views
    global_crop_scale: tuple[float, float] = (0.4, 1.0)
    """Area of the two global crops. Code: 0.4 to 1; best ViT-S/16: 0.25 to 1; convnets: 0.14 to 1."""
    local_views: int = 8
    """Local crops, which only the student sees. Code: 8; best ViT-S/16: 10."""
    local_size: int = 96
    """Side of a local view in pixels. Paper section 3.1."""
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a local crop. Code: 0.05 to 0.4; convnets: 0.05 to 0.14."""
    color: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue jitter, with p = .8. Code."""
    grey: float = 0.2
    """Probability of greyscale. Code."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of blur in global view 1, global view 2 and local views. Code."""
    solarize: float = 0.2
    """Probability of solarisation in global view 2. Code."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code: bicubic."""

    # ---- optimisation
    optimizer: Literal["adamw", "sgd", "lars", "larc"] = "adamw"
    """Code: AdamW for ViTs, SGD (README) or LARS (release) for ResNet-50. larc: solo-learn on CIFAR-10, trust 0.02,
    no tensor faster than the rate."""
    epochs: int = 100
    """Code."""
    batch_size: int = 512
    """Global batch in images, over all processes. Code README: 8 GPUs x 64."""
    base_lr: float = 5e-4
    """Peak rate per 256 images (linear rule). Code."""
    min_lr: float = 1e-6
    """Rate at the end of the cosine, not scaled with the batch. Code."""
    warmup_epochs: float = 10
    """Linear warm-up from 0, the peak reached at its last step. Code."""
    weight_decay: float = 0.04
    """At the first step. Biases and norms have none; positions and CLS token have, unlike timm's ViTs. Code."""
    weight_decay_end: float = 0.4
    """At the last step, by a cosine without warm-up. Code."""
    momentum: float = 0.9
    """Of SGD, LARS and LARC. Code."""
    clip: float = 3.0
    """Largest norm of each parameter's gradient, one by one (0: no clipping). Code: 3; none in the best ViT-S run."""
    freeze_last_layer: int = 1
    """Epochs in which the head's last layer is not trained. Code."""

    # ---- precision, randomness
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs, float32 on CPUs. The loss is always float32. Code: fp16, none for patches below 16."""
    compile: bool = False
    """torch.compile for backbones and colour operations."""
    deterministic: bool = False
    """Deterministic GPU kernels, slower: a resumed run is then bit-identical (CPU runs are anyway)."""
    seed: int = 0
    """Of initialisation, order, views, stochastic depth and probes."""
    knn_every: int = 0
    """Epochs between online kNN evaluations of the teacher (0: none)."""

    def __post_init__(self):
        for name in ("layers", "channels", "global_crop_scale", "local_crop_scale", "color", "blur"):
            setattr(self, name, tuple(getattr(self, name)))


# 4.2 million multiply-adds a 32-px view: hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
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
    color=(0.4, 0.4, 0.2, 0.5),  # any hue: on shapes colour would otherwise solve the task
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

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded shapes, 4 MMAC ResNet, 2x32 + 4x16 px: minutes on two cores, to see DINO learn",
        replace(
            SHAPES,
            out_dim=512,
            hidden_dim=64,
            bottleneck_dim=64,
            head_layers=2,
            # A teacher much sharper than the student, and a centre that follows at once: at .1, .04 and .9 the answer
            # becomes uniform on shapes.
            student_temperature=0.2,
            teacher_temperature=0.03,
            warmup_teacher_temperature=0.03,
            center_momentum=0.7,
            local_crop_scale=(0.2, 0.5),
            epochs=30,
        ),
    ),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 4 MMAC ResNet, two views of 32 px, 5 epochs",
        replace(
            CIFAR10_R18,
            **TINY,
            **TINY_HEAD,
            global_crop_scale=(0.2, 1.0),
            interpolation="bilinear",
            teacher_temperature=0.04,
            warmup_teacher_epochs=0,
            ema_momentum=0.99,
            optimizer="adamw",
            epochs=5,
            base_lr=3e-3,
            warmup_epochs=1,
            weight_decay=0.04,
            weight_decay_end=0.04,
            clip=3.0,
            knn_every=1,
        ),
    ),
    "cifar10-r18": (
        "CIFAR-10, ResNet-18, batch 256, 1000 epochs: solo-learn's recipe, 89.5 % online linear",
        CIFAR10_R18,
    ),
    "cifar10-vit": (
        "CIFAR-10, ViT-Ti with patches of 4 px, 2x32 + 4x16 px, batch 256, 400 epochs; nobody's published recipe",
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


def _published(value: float, protocol: str, source: str, note: str = "") -> dict:
    return {"value": value, "metric": "top-1", "protocol": protocol, "source": source, "note": note}


# What others report, shown beside our number under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        _published(89.5, "linear-augmented", "solo-learn CIFAR-10", "1000 epochs, online; about 87 in its issue 397"),
        _published(84.0, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 128, 200 epochs, best epoch on test"),
    ],
    "imagenette-r18": [_published(88.8, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenette-vits": [
        _published(83.8, "knn-20-0.07", "stable-pretraining Imagenette", "200 epochs, best epoch on test"),
        _published(86.1, "linear-augmented", "stable-pretraining Imagenette", "200 epochs, online, best epoch on test"),
    ],
    "imagenet-vits": [
        _published(74.5, "knn-20-0.07", "arXiv:2104.14294 Table 2"),
        _published(77.0, "linear-augmented", "arXiv:2104.14294 Table 2", "CLS of the last 4 blocks"),
    ],
    "imagenet-vits-300": [
        _published(73.3, "knn-20-0.07", "facebookresearch/dino README"),
        _published(76.0, "linear-augmented", "facebookresearch/dino README", "CLS of the last 4 blocks"),
    ],
    "imagenet-vits-100": [
        _published(69.3, "knn-20-0.07", "facebookresearch/dino README"),
        _published(74.0, "linear-augmented", "facebookresearch/dino README", "CLS of the last 4 blocks"),
    ],
    "imagenet-r50": [
        _published(67.5, "knn-20-0.07", "arXiv:2104.14294 Table 2"),
        _published(75.3, "linear-augmented", "arXiv:2104.14294 Table 2"),
    ],
}
