"""SimCLR's recipes. Defaults are the CIFAR-10 command of the official README; every other recipe is a preset.

"paper" is arXiv:2002.05709v3; "code" is google-research/simclr, v1 where it says so.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.run import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    # ---- data
    data: str = "cifar10"
    """shapes, a hub name (cifar10, stl10, imagenet-1k, org/name ...), an image folder or a folder of parquet files."""
    image_column: str = ""
    """Column with the images; default: found from the features."""
    label_column: str = ""
    """Column with the labels; default: found from the features, none is fine for pretraining."""
    limit: int = 0
    """Use only this many training images (0: all), a fixed random subset."""
    image_size: int = 32
    """Side of a view in pixels. Paper App. B.9: 32 for CIFAR-10; 224 for ImageNet."""
    normalize: str = "none"
    """Mean and std of the inputs: none (code: inputs in [0, 1]) or those of shapes, cifar10, imagenet-1k ..."""

    # ---- network
    backbone: str = "resnet18"
    """timm name. Code README, CIFAR-10 command: ResNet-18; paper: ResNet-50."""
    stem: Literal["timm", "cifar"] = "cifar"
    """cifar: 3x3 convolution, stride 1, no max-pool (paper App. B.9)."""
    layers: tuple[int, ...] = ()
    """Blocks per stage of a ResNet; default: timm's."""
    channels: tuple[int, ...] = ()
    """Width per stage of a ResNet; default: timm's."""
    stem_width: int = 64
    """Channels of the cifar stem; must equal the first of `channels` where narrower than 64."""
    patch_size: int = 0
    """Of ViTs: side of a patch in pixels; 0: the backbone's own."""
    width: int = 0
    """Of ViTs: width; 0: the backbone's own."""
    depth: int = 0
    """Of ViTs: blocks; 0: the backbone's own."""
    heads: int = 0
    """Of ViTs: attention heads; 0: the backbone's own."""
    norm: Literal["batch", "group"] = "batch"
    """Norm of backbone and projector. group: GroupNorm and LayerNorm, with which --micro-batch is exact."""
    sync_bn: bool = True
    """BatchNorm over all ranks (paper section 2.2, "global BN")."""
    # ---- stability tricks for ViTs (common/vit.py); the paper has no ViT
    layer_scale: float = 0.0
    """Initial LayerScale of the residual branches, 0: none (CaiT, arXiv:2103.17239)."""
    qk_norm: bool = False
    """LayerNorm of queries and keys per head (arXiv:2302.05442)."""
    frozen_patch_projection: bool = False
    """Random, untrained patch projection (MoCo-v3, arXiv:2104.02057, section 4.2)."""
    sincos_positions: bool = False
    """Fixed 2-D sin-cos positions (MoCo-v3, MAE) instead of learnt ones."""
    drop_path: float = 0.0
    """Stochastic depth, growing linearly over the blocks (Huang et al. 2016, arXiv:1603.09382); each view its own."""
    layer_decay: float = 1.0
    """Learning rate times this per block from the top (BEiT, arXiv:2106.08254)."""

    # ---- projector
    projector_dim: int = 128
    """Width of the projections. Paper section 2.1; hidden layers are as wide as the features."""
    projector_layers: int = 2
    """Linear layers of the projector. Paper section 4.2: 2 (1: linear); SimCLR v2: 3. 0: none, as in DirectCLR."""
    subvector: int = 0
    """Without projector: the loss sees only this many of the features (DirectCLR, arXiv:2110.09348); 0: all."""

    # ---- objective
    temperature: float = 0.5
    """Paper App. B.9: 0.5 is best on CIFAR-10 beyond 300 epochs; 0.1 on ImageNet (paper Table 5)."""
    loss_weight: float = 2.0
    """Code: the means over both views' rows are added, twice the paper's mean over 2B rows. Under LARS it matters to
    norms and biases only."""
    decoupled: bool = False
    """Leave the positive out of the denominator (DCL, arXiv:2110.06848)."""

    # ---- views
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop. Paper App. A."""
    color_strength: float = 0.5
    """Paper App. B.9: 0.5 on CIFAR-10; App. A: 1.0 on ImageNet. Brightness, contrast, saturation: 0.8 times it."""
    hue: float = 0.1
    """Hue jitter: 0.2 times the strength (paper App. A)."""
    grey: float = 0.2
    """Probability of greyscale. Paper App. A."""
    blur: float = 0.0
    """Probability of Gaussian blur. Paper App. B.9: none on CIFAR-10; App. A: 0.5 on ImageNet."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of crops. Code data_util.py: bicubic."""

    # ---- optimisation
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """Paper section 2.2: LARS. sgd and adamw are there to compare; adamw wants --base-lr 1e-3 --lr-scaling none."""
    epochs: int = 1000
    """Code README, CIFAR-10 command."""
    batch_size: int = 512
    """Global batch in images, over all processes. Code README, CIFAR-10 command."""
    base_lr: float = 1.0
    """Rate before scaling with the batch. Code README, CIFAR-10 command: 1.0 per 256; paper section 2.2: 0.3."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: base * B / 256 (paper section 2.2). sqrt: base * sqrt(B), base 0.075, better at small B (App. B.1)."""
    warmup_epochs: float = 10
    """Linear warm-up from 0. Paper section 2.2."""
    weight_decay: float = 1e-6
    """Paper section 2.2 and first release; today's command line has v2's 1e-4. Not on norms and biases."""
    momentum: float = 0.9
    """Of LARS and SGD. Code lars_optimizer.py."""
    clip: float = 0.0
    """Largest norm of the whole gradient, 0: no clipping. Paper and code: none."""

    # ---- memory, precision, randomness
    micro_batch: int = 0
    """Images per rank whose activations are held at once (gradient caching); 0: the whole batch. With BatchNorm the
    statistics are per micro-batch."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: the whole batch's gradient in less memory, BatchNorm included."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs, float32 on CPUs. The loss is always float32."""
    compile: bool = False
    """torch.compile for backbone and colour operations."""
    deterministic: bool = False
    """Deterministic GPU kernels, slower: a resumed run is then bit-identical (CPU runs are anyway)."""
    seed: int = 0
    """Of initialisation, order, views and probes."""
    knn_every: int = 0
    """Epochs between online kNN evaluations (0: none)."""

    def __post_init__(self):
        self.crop_scale, self.layers, self.channels = tuple(self.crop_scale), tuple(self.layers), tuple(self.channels)


# 4.2 million multiply-adds a 32-px view: two views of hundreds of images a second train on two cores.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)

CIFAR10_R18 = Config()

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    temperature=0.2,
    crop_scale=(0.3, 1.0),
    hue=0.5,  # any hue: on shapes colour would otherwise solve the task
    interpolation="bilinear",
    epochs=30,
    batch_size=256,
    base_lr=2.0,
    warmup_epochs=1,
    knn_every=5,
    save_every=200,
)

SHAPES_VIT = replace(
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
    "quickstart": (
        "embedded shapes, 4 MMAC ResNet: minutes on two cores, to see SimCLR learn",
        SHAPES,
    ),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, base_lr=0.4, knn_every=0, log_every=2, save_every=4),
    ),
    "shapes-vit": ("embedded shapes, ViT of width 64 and depth 4, patches of 8 px, AdamW", SHAPES_VIT),
    "cifar10-r18": ("CIFAR-10, ResNet-18, 1000 epochs: the official README's command, about 91 % linear", CIFAR10_R18),
    "cifar10-r50": (
        "CIFAR-10, ResNet-50, batch 1024, 1000 epochs: paper App. B.9, 94.0 % linear",
        replace(CIFAR10_R18, backbone="resnet50", batch_size=1024),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 4 MMAC ResNet, 5 epochs",
        replace(
            CIFAR10_R18,
            **TINY,
            normalize="cifar10",
            temperature=0.2,
            crop_scale=(0.2, 1.0),
            interpolation="bilinear",
            epochs=5,
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


def _published(value: float, protocol: str, source: str, note: str = "") -> dict:
    return {"value": value, "metric": "top-1", "protocol": protocol, "source": source, "note": note}


# What others report, shown beside our number under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-r18": [
        _published(91.0, "linear-augmented", "google-research/simclr README", "1000 epochs, original pixels"),
        _published(84.8, "knn-200-0.1", "lightly CIFAR-10 benchmark", "batch 512, 200 epochs, best epoch on test"),
    ],
    "cifar10-r50": [_published(94.0, "linear-augmented", "arXiv:2002.05709v3 App. B.9", "original pixels")],
    "imagenette-r18": [_published(88.9, "knn-20-0.07", "lightly Imagenette benchmark", "best epoch on test")],
    "imagenet-r50": [_published(69.3, "linear-augmented", "arXiv:2002.05709v3 Table 6", "1000 epochs")],
    "imagenet-r50-b256": [_published(62.8, "linear-augmented", "arXiv:2002.05709v3 Table B.1", "100 epochs")],
}
