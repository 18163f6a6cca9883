"""Recipes of the vanilla, the denoising and the masked autoencoder.

There is no paper to reproduce: "lecture" is A. Sahai, CS 182/282A (UC Berkeley), lecture 16 of 2022, sections 16.1 and
16.2, which has no numbers; "here" marks what this repository chose.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, ResNetConfig, Stem, ViTConfig


@dataclass(kw_only=True)
class Config(ResNetConfig, ViTConfig, ImageConfig):
    # ---- task
    variant: Literal["vanilla", "denoising", "masked"] = "vanilla"
    """What the encoder sees: x, x + noise, or x with blocks removed; the target is x. Lecture 16.2.1 to 16.2.3."""
    bottleneck: int = 128
    """Width of the latent. Lecture 16.1: lower than the input's; here 128 of 3072 at 32 px."""
    latent_from: Literal["map", "pooled"] = "map"
    """Input of the latent's linear layer: the last feature map, or the pooled features. Here: map."""
    noise: float = 0.25
    """Standard deviation of the noise on pixels in [0, 1], for --variant denoising. Here: 0.1 to 0.5 are studied."""
    mask_ratio: float = 0.5
    """Share of blocks removed, for --variant masked (the lecture's 1 - p). Here: 0.25 to 0.75 are studied."""
    mask_patch: int = 4
    """Side of a block in pixels. Here: single pixels would be completed from their neighbors."""
    loss_on: Literal["all", "masked"] = "all"
    """Pixels in the loss, for --variant masked. Lecture 16.2.3: all of x; masked: only what was removed (MAE)."""

    # ---- data: see common/config.py for the other settings
    data: str = "cifar10"
    normalize: str = "cifar10"
    """Mean and std of inputs and targets: none, or those of shapes, cifar10, imagenet-1k ..."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Area of a random crop; (1, 1): the full image. Here: CIFAR-10 without crops."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of crops."""

    # ---- network
    stem: Stem = "cifar"
    decoder_width: int = 64
    """Channels of the decoder's first grid; halved with each doubling of the side. Here: lighter than the encoder."""

    # ---- optimization
    epochs: int = 200
    """Passes over the training images. Here: as in the other methods' CIFAR-10 comparisons."""
    lr: float = 1e-3
    """Peak rate of AdamW, not scaled with the batch."""
    warmup_epochs: float = 5
    """Linear warm-up from 0."""
    weight_decay: float = 0.05
    """AdamW's weight decay; not on norms and biases."""


# 4.2 million multiply-adds an image of 32 px, and a decoder of a quarter of that.
TINY = dict(
    backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, decoder_width=32
)

CIFAR10_R18 = Config()

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    crop_scale=(0.6, 1.0),
    epochs=30,
    warmup_epochs=1,
    knn_every=5,
    save_every=200,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 4 MMAC ResNet: minutes on two cores, to see an autoencoder learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=8),
    ),
    "shapes": ("embedded single shapes, 4 MMAC ResNet, 30 epochs", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(SHAPES, limit=256, epochs=4, batch_size=64, knn_every=0, log_every=2, save_every=4),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 4 MMAC ResNet, 10 epochs",
        replace(CIFAR10_R18, **TINY, epochs=10, warmup_epochs=1, knn_every=5),
    ),
    "cifar10-r18": ("CIFAR-10, ResNet-18, batch 256, 200 epochs", CIFAR10_R18),
    "imagenette-r18": (
        "Imagenette at 128 px, ResNet-18, batch 256, 200 epochs, crops of 20 to 100 %",
        replace(
            CIFAR10_R18,
            data="frgfm/imagenette:160px",
            image_size=128,
            normalize="imagenet-1k",
            crop_scale=(0.2, 1.0),
            stem="timm",
            bottleneck=512,
            mask_patch=16,
        ),
    ),
}

# No published number: the literature's denoising autoencoders are fully connected stacks on MNIST.
PUBLISHED: dict[str, list[dict]] = {}
