"""The arms and recipes. "blog" is the post under test; "study design" is ours, written before any run.

Post: "Dropout Inherently Enables Contrastive Self Supervised Pretraining" (Pawan). It has no numbers and no code, so
every number here is labeled as a choice of the study design.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from common.config import ResNetConfig, Stem


@dataclass(frozen=True)
class Arm:
    """How an arm trains. All arms of a seed share initial weights, order of records, steps and forward passes."""

    about: str
    noise: str = "element"
    frozen: bool = False  # the same mask for a sample in every epoch
    copies: int = 1  # masks of a record in one batch, whose records are then B / copies; 0: --copies
    auxiliary: str = ""  # an explicit auxiliary loss: "nt_xent" or "r_drop"
    crop_flip: bool = False
    random_labels: bool = False
    pretrained: bool = False
    single_pass: bool = False
    kl: bool = False  # add beta times the VAE's KL


ARMS: dict[str, Arm] = {
    "A0": Arm("no noise", noise="none"),
    "A1": Arm("dropout of the input, a fresh mask every epoch: the claim"),
    "A1s": Arm("spatial dropout: entire channels after the stem", noise="channel"),
    "A1p": Arm("patches of the image, or tokens of a ViT", noise="patch"),
    "A1h": Arm("dropout before the head alone: no noise in the encoder", noise="head"),
    "A2": Arm("the same mask for a sample in every epoch: A1's noise, never two masks of one sample", frozen=True),
    "A3": Arm("multiplicative Gaussian noise of dropout's variance", noise="gaussian"),
    "A3a": Arm("additive Gaussian noise", noise="additive"),
    "A4": Arm("VAE layer after the stem, with beta times its KL", noise="vae", kl=True),
    "A4x": Arm("VAE layer without its KL (beta = 0): sigma is expected to collapse", noise="vae"),
    "A5": Arm("two masks a record and lambda times NT-Xent between them", copies=2, auxiliary="nt_xent"),
    "A5r": Arm("two masks a record and alpha times R-Drop between them", copies=2, auxiliary="r_drop"),
    "A6": Arm("zipped: B / K records with K masks each in one batch", copies=0),
    "A7": Arm("NT-Xent between two masks first, without labels; then the labels", copies=2, pretrained=True),
    "A8": Arm("crop and flip instead of dropout", noise="none", crop_flip=True),
    "A9": Arm("A1 on random labels", random_labels=True),
    "A10": Arm("A1 on fresh records: one epoch instead of many", single_pass=True),
}


@dataclass(kw_only=True)
class Config(ResNetConfig):
    zero_is_off: ClassVar[frozenset[str]] = frozenset({"projector_dim"})

    # ---- the arm
    arm: Literal[
        "A0", "A1", "A1s", "A1p", "A1h", "A2", "A3", "A3a", "A4", "A4x", "A5", "A5r", "A6", "A7", "A8", "A9", "A10"
    ] = "A1"
    """Arm of the study; README.md and ARMS describe each."""
    p: float = 0.2
    """Share of dropped entries. Study design: one of .1, .2, .3, .5."""
    sigma: float = 0.5
    """Standard deviation of A3a's noise. Our choice: the variance p / (1 - p) of dropout with p = 0.2 on inputs of
    variance 1."""
    patch: int = 4
    """Side of a dropped square in pixels (A1p with a ResNet). Our choice."""
    beta: float = 1e-3
    """Weight of A4's KL. Study design: 1e-3 and 1e-2."""
    lambd: float = 0.1
    """Weight of A5's NT-Xent. Study design: .1 and 1."""
    alpha: float = 1.0
    """Weight of A5r's R-Drop term. Our choice (the paper tunes it per task)."""
    copies: int = 2
    """A6's masks per record in one batch. Study design: 2 and 4."""
    temperature: float = 0.5
    """Temperature of NT-Xent in A5 and A7. Study design measures at .1 and .5; SimCSE trains at .05."""
    pretrain_share: float = 0.5
    """A7: share of the steps trained without labels, on all training records. Our choice."""
    projector_dim: int = 0
    """Outputs of an MLP on the features that NT-Xent sees (0: the features). SimCSE trains with one, section 4.1."""

    # ---- data: see common/config.py for the other settings
    data: str = "cifar10"
    """table (generated), diamonds (needs plotnine), shapes, a hub name, an image folder or parquet files."""
    labels: int = 0
    """Labeled records (0: all), a random subset of the seed; smaller budgets are subsets of larger ones."""
    normalize: str = "none"
    """Mean and std of the images: none or those of shapes, cifar10, imagenet-1k ... With them a dropped entry is the
    mean color."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Area of A8's random crop, which is followed by a flip. Our choice."""

    # ---- network
    backbone: str = "resnet18"
    """timm name; a table has an MLP instead. Study design: ResNet-18."""
    stem: Stem = "cifar"
    patch_size: int = 0
    """Side of a ViT's patches in pixels; default: timm's."""
    norm: Literal["group", "batch"] = "group"
    """group: GroupNorm, and LayerNorm in the MLP. batch mixes the masks of a batch (study design: it confounds A6)."""
    width: int = 256
    """Units in each of the MLP's three layers. Study design."""

    # ---- optimization
    steps: int = 10_000
    """Optimizer steps, equal for all arms. Study design: for instance 10k."""
    batch_size: int = 128
    """Forward passes per step, over all processes, equal for all arms. Study design."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer. Study design: SGD for convolutions, Adam for the MLP."""
    lr: float = 0.1
    """Peak learning rate, not scaled with the batch, then half a cosine to 0. Study design: SGD 0.1, Adam 1e-3."""
    warmup_steps: int = 0
    """Linear warm-up. Study design: none."""
    weight_decay: float = 5e-4
    """Weight decay, not on norms and biases. Study design: 5e-4 with SGD, 0 with Adam."""
    momentum: float = 0.9
    """Momentum of SGD. Study design."""

    # ---- measuring
    masks: int = 8
    """Masks per sample in each measurement. Study design."""
    measured: int = 512
    """Held-out records, and training records, in each measurement. Study design."""
    protocol: Literal["study", "common"] = "study"
    """common: the repository's evaluation of frozen features, with all training images; study: accuracy, and probes
    on the labeled records alone, which suits a study of label budgets."""

    # ---- randomness
    seed: int = 0
    """Seed for initial weights, labeled subset, order and masks: the same for all arms, so that seeds pair them."""


# 4.2 million multiply-adds a 32-px image, as the CPU presets of the other methods.
TINY = dict(backbone="resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)
SHAPES = Config(data="shapes", normalize="shapes", **TINY, labels=1000, steps=400, save_every=200)
CIFAR = Config(normalize="cifar10")
TABULAR = Config(
    data="diamonds", labels=1000, steps=1500, optimizer="adam", lr=1e-3, weight_decay=0.0, save_every=1000, log_every=50
)
CONTRASTIVE = dict(
    arm="A7", pretrain_share=1.0, p=0.1, temperature=0.05, projector_dim=128, batch_size=512, protocol="common"
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": ("embedded shapes, 4 MMAC ResNet with GroupNorm, one arm: a minute on two cores", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            limit=256,
            labels=0,
            steps=16,
            batch_size=64,
            masks=3,
            measured=64,
            log_every=2,
            save_every=4,
            lr=0.05,
            protocol="common",
        ),
    ),
    "table": (
        "a generated table (16 columns, 5 classes), MLP 3 x 256, one arm: seconds",
        replace(TABULAR, data="table"),
    ),
    "tabular": ("diamonds (53,940 rows, 5 grades of cut; needs plotnine), MLP 3 x 256, one arm", TABULAR),
    "cifar10-cpu": (
        "CIFAR-10 on two cores: 4 MMAC ResNet with GroupNorm, 4,000 labels, 1,000 steps, one arm",
        replace(CIFAR, **TINY, labels=4000, steps=1000),
    ),
    "cifar10-r18": ("CIFAR-10, ResNet-18 with GroupNorm, all labels, 10,000 steps, one arm", CIFAR),
    "cifar10-r18-bn": ("the same with BatchNorm", replace(CIFAR, norm="batch")),
    "cifar10-vit": (
        "CIFAR-10, ViT-Tiny with patches of 4 px, Adam, one arm (try A1p: tokens)",
        replace(
            CIFAR,
            backbone="vit_tiny_patch16_224",
            stem="timm",
            norm="batch",
            patch_size=4,
            optimizer="adam",
            lr=5e-4,
            warmup_steps=500,
            weight_decay=0.0,
        ),
    ),
    "shapes-contrastive": (
        "SimCSE for images on shapes: two masks of an image are the only views, NT-Xent, no labels; minutes",
        replace(SHAPES, **{**CONTRASTIVE, "batch_size": 256}, labels=0, lr=0.05, warmup_steps=40),
    ),
    "cifar10-contrastive": (
        "SimCSE for images on CIFAR-10, ResNet-18 with GroupNorm: two masks as the only views, no labels",
        replace(CIFAR, **CONTRASTIVE, warmup_steps=200),
    ),
}

PUBLISHED: dict[str, list[dict]] = {}  # none exist; SimCSE and R-Drop are on text
