"""CPC's recipes for images. Defaults are GIM's for STL-10, the most complete public one; the rest are presets.

"paper" is arXiv:1807.03748v2 (v1 of the method); "v2" is arXiv:1905.09272; "GIM" is loeweX/Greedy_InfoMax
(arXiv:1905.11786), which trains CPC too; "bolts" is PyTorch Lightning Bolts' CPC.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, published


@dataclass(kw_only=True)
class Config(ImageConfig):
    # ---- data: see common/config.py for the other settings
    data: str = "stl10"
    split: str = "unlabeled"
    """Split that is trained on; evaluation always uses train and test. GIM: STL-10's 100,000 unlabeled images."""
    image_size: int = 96
    """Side of an image in evaluation, whose grid has as many patches as fit."""
    normalize: str = "stl10"
    """Mean and std of the inputs: none or those of shapes, cifar10, stl10 ... GIM: STL-10, of gray images."""

    # ---- view
    crop_size: int = 64
    """Side of a training view in pixels. GIM: 64 of 96; paper: 256 of 300."""
    crop_scale: tuple[float, float] = (4 / 9, 4 / 9)
    """Share of the area of the square random crop; 64 of 96 pixels are 4/9, which then keeps its resolution."""
    flip: float = 0.5
    """Probability of a left-right flip. Paper section 3.2, GIM."""
    grayscale: bool = True
    """Grayscale, in training and evaluation. Paper section 3.2; on in GIM's published script."""

    # ---- patches
    patch: int = 16
    """Side of a patch in pixels. GIM: 16; paper: 64; bolts on CIFAR-10: 8."""
    stride: int = 8
    """Pixels from patch to patch. Half a patch in paper, GIM and bolts: a 7 x 7 grid."""
    patch_crop: int = 0
    """Side of a random sub-crop of each patch, padded back with zeros (0: none). Paper: 60 of 64; GIM: none."""
    patch_brightness: float = 0.0
    """Brightness shift per patch, U(-b, b) standard deviations. v2 has one; its range is unknown to us."""
    patch_contrast: float = 0.0
    """Contrast factor per patch, U(1 - c, 1 + c). v2 has one; its range is unknown to us."""
    color_drop: float = 0.0
    """Probability that a patch keeps only one of its three channels; needs --no-grayscale. v2."""

    # ---- patch encoder: a pre-activation ResNet
    stem_width: int = 64
    """Channels of the first convolution. GIM: this value."""
    stem_kernel: int = 5
    """Kernel of the first convolution. GIM: 5; ResNet-101 of the paper: 7."""
    stem_stride: int = 1
    """Stride of the first convolution. GIM: 1; ResNet-101: 2."""
    stem_pool: bool = False
    """Max-pool (3, stride 2) after the first convolution, as in ResNet-101."""
    layers: tuple[int, ...] = (3, 4, 6)
    """Blocks per stage. GIM: ResNet-50's first three stages; paper: ResNet-101's, 3 4 23; v2: 3 4 46."""
    channels: tuple[int, ...] = (256, 512, 1024)
    """Width per stage; the last is z's. Paper and GIM: 1024; v2: 4096."""
    hidden: tuple[int, ...] = (64, 128, 256)
    """Inner width of the bottlenecks per stage; empty: blocks without. Paper and GIM: 256 in the third; v2: 512."""
    norm: Literal["none", "layer"] = "none"
    """Norm in the encoder. Paper, GIM: none; v2: LayerNorm. BatchNorm would leak from patch to patch."""

    # ---- context and predictions
    context: Literal["pixelcnn", "gru", "residual"] = "pixelcnn"
    """pixelcnn: gated, vertical mask (paper, GIM); gru: from row to row (paper: similar); residual: v2's."""
    context_width: int = 1024
    """Channels of the context (residual: inner ones; its output is as wide as z). GIM: 1024; v2: 256."""
    context_depth: int = 4
    """Layers of the context. GIM: 4; v2: 5; a gru has 1."""
    directions: Literal[1, 4] = 1
    """Directions of prediction. 1: down (paper); 4: down, up, right and left, each with a separate context (v2)."""
    skip_step: int = 1
    """Rows skipped below the anchor. GIM: 1, because row i + 1 shares half of its pixels with row i."""
    prediction_steps: int = 5
    """Rows predicted, from skip_step + 1 on. Paper: up to five; v2: only the third row (skip_step 2, one step)."""
    embedding: int = 0
    """Width of a linear projection of z that is predicted and compared; 0: z itself (paper, GIM); v2: 64."""
    embedding_scale: float = 1.0
    """Factor on the predictions. v2: 0.1."""
    negatives: Literal["sampled", "all"] = "sampled"
    """sampled: random patches per anchor (GIM); all: every other patch of the pool (v2, bolts)."""
    num_negatives: int = 16
    """Negatives per anchor. GIM: 16."""
    pool: Literal["global", "local"] = "global"
    """Images whose patches can be negatives: those of all processes, or of this one (paper and GIM: one GPU)."""

    # ---- optimization
    epochs: int = 300
    """Passes over the training images. GIM."""
    batch_size: int = 32
    """Global batch size, over all processes. GIM: 32; paper: 32 GPUs x 16."""
    lr: float = 2e-4
    """Learning rate of Adam, not scaled with the batch. Paper section 3.2, GIM."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule. GIM: constant; the paper states none."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0. GIM: none."""
    weight_decay: float = 0.0
    """Weight decay, Adam's L2. GIM: none."""


STL10 = Config()

CIFAR10 = replace(
    STL10,
    data="cifar10",
    split="train",
    image_size=32,
    normalize="cifar10",
    crop_size=32,
    crop_scale=(1.0, 1.0),
    patch=8,
    stride=4,
    epochs=1000,
    batch_size=64,
    lr=4e-5,
)

# Patches of 12 px: one of 8 px sees only an edge of a shape of 20. 6 x 6 of them are five times the image's pixels, so
# the first convolution has stride 3. Rows 3 to 5 below share no pixel with their anchor.
TINY = dict(
    split="train",
    image_size=32,
    crop_size=32,
    crop_scale=(1.0, 1.0),
    patch=12,
    stride=4,
    stem_width=32,
    stem_kernel=5,
    stem_stride=3,
    layers=(1, 1),
    channels=(64, 128),
    hidden=(16, 32),
    context_width=64,
    context_depth=2,
    skip_step=2,
    prediction_steps=3,
    embedding=64,
    batch_size=128,
    schedule="cosine",
    warmup_epochs=1,
    lr=2e-3,
)

SHAPES = Config(
    **TINY,
    data="shapes",
    normalize="shapes",
    patch_brightness=1.0,  # the gray level of the background would otherwise identify the image
    patch_contrast=0.5,
    epochs=30,
    knn_every=5,
    save_every=200,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, a small patch encoder: minutes on two cores, to see CPC learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=8),
    ),
    "shapes": ("embedded single shapes, a small patch encoder: a task with easier answers than the shape", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            channels=(16, 32),
            hidden=(8, 16),
            context_width=16,
            embedding=32,
            limit=256,
            epochs=6,
            batch_size=64,
            knn_every=0,
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: the quickstart's network, 8 epochs",
        Config(
            **TINY,
            data="cifar10",
            normalize="cifar10",
            patch_brightness=0.5,
            patch_contrast=0.5,
            epochs=8,
            knn_every=4,
        ),
    ),
    "cifar10": (
        "CIFAR-10, GIM's ResNet-50 without norms on patches of 8 px, batch 64, 1000 epochs (bolts' grid and rate)",
        CIFAR10,
    ),
    "stl10": (
        "STL-10, crops of 64 px, patches of 16 px, batch 32, 300 epochs: GIM's CPC, 80.5 % linear (unverified)",
        STL10,
    ),
    "imagenet": (
        "ImageNet, ResNet-101 on patches of 64 px, batch 512: the paper (v1), 48.7 % linear",
        Config(
            data="imagenet-1k",
            split="train",
            normalize="imagenet-1k",
            image_size=256,
            crop_size=256,
            crop_scale=((256 / 300) ** 2, (256 / 300) ** 2),
            patch=64,
            stride=32,
            patch_crop=60,
            stem_kernel=7,
            stem_stride=2,
            stem_pool=True,
            layers=(3, 4, 23),
            pool="local",
            epochs=100,
            batch_size=512,
        ),
    ),
}


# Published numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10": [published(84.52, "linear", "bolts' CPC v2, by arXiv:2009.00104", "another encoder, and v2's loss")],
    "stl10": [
        published(80.5, "linear", "arXiv:1905.11786 (unverified)", "CPC; supervised 71.4, random weights 27.0"),
        published(78.36, "linear", "bolts' CPC v2, by arXiv:2009.00104", "another encoder, and v2's loss"),
    ],
    "imagenet": [published(48.7, "linear", "arXiv:1807.03748 Table 3", "ResNet-v2-101; top-5 73.6")],
}
