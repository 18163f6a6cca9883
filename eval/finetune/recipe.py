"""How to fine-tune: what the command line sets (`Recipe`) and what one training then uses (`ResolvedRecipe`).

    recipe = resolve(Recipe(epochs=30), backbone, image_size=32, images=50_000)

The defaults are published recipes: MAE's for ViTs and SimCLR's for other networks, lighter for small images.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.errors import UserError
from eval.features import pooled

LARGE = 160  # px: from here on the published recipes for 224 px, below it the ones for small images
MIN_STEPS = 1000  # ours, in all recipes: with few labels the published epochs are a few dozen steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of fine-tuning. None: the default for the network, the image size and the number of images."""

    epochs: int | None = None
    """Passes over the labelled images. Default with few images: as many as make `min_steps` steps."""
    min_steps: int | None = None
    """Minimum number of steps where `epochs` is not set: 1 % of a small data set would otherwise be a few dozen."""
    batch_size: int | None = None
    """Images per step; all of them where there are fewer."""
    optimizer: str | None = None
    """adamw (betas 0.9, 0.999) or sgd (Nesterov momentum 0.9)."""
    base_lr: float | None = None
    """Peak learning rate of the head per 256 images (linear rule); layers below get less, see layer_decay."""
    rates: tuple[float, ...] = ()
    """Values of base_lr to choose from, as 1e-3 4e-3: each network takes the one that does best on a fifth of its
    labelled images, held out, and is then trained on all of them. Default: no search."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine, not scaled with the batch."""
    warmup_epochs: float | None = None
    """Linear warm-up from 0. Default with adamw: 5, at most a tenth of the epochs."""
    weight_decay: float | None = None
    """Weight decay; none for biases, norms, positions and class token."""
    layer_decay: float | None = None
    """Factor of the learning rate from a layer to the one below it: a ViT's blocks, a ResNet's stages. 1: one rate."""
    drop_path: float | None = None
    """Stochastic depth: rate of the last residual block, falling linearly to 0 at the first."""
    crop: float | None = None
    """Smallest area of the random crop, as a share of the image; the largest is all of it. A flip follows."""
    interpolation: str | None = None
    """bilinear or bicubic, for the crop and RandAugment."""
    rand_augment: str | None = None
    """timm's RandAugment, e.g. rand-m9-mstd0.5-inc1; "none" for none."""
    erase: float | None = None
    """Probability of random erasing (a rectangle of noise)."""
    mixup: float | None = None
    """Alpha of mixup; 0 for none. With cutmix too, each step takes one of the two at random."""
    cutmix: float | None = None
    """Alpha of cutmix; 0 for none."""
    smoothing: float | None = None
    """Label smoothing."""
    pool: str | None = None
    """ViT tokens that the head reads: cls, mean, last-N or auto, as --pool. Default: --pool, or mean (MAE)."""
    labels: tuple[str, ...] = ("1%", "10%")
    """lowshot: shares or numbers of the labelled training images, as 1% 10% or 500 5000."""
    subset_seed: int = 0
    """lowshot: which images. Not the seed of the run: all runs share their subsets."""
    scratch: tuple[int, ...] = (1, 3)
    """Baselines: the same network from random weights, trained for this many times the epochs, one baseline each."""
    precision: str = "auto"
    """no, bf16, or auto: bf16 on GPUs that have it."""


DEFAULTS = Recipe()


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """The settings of one training, see `Recipe`."""

    epochs: int
    batch_size: int
    optimizer: str
    base_lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    crop: float
    interpolation: str
    rand_augment: str
    erase: float
    mixup: float
    cutmix: float
    smoothing: float
    pool: str
    min_steps: int = MIN_STEPS
    precision: str = "auto"

    def settings(self) -> dict[str, Any]:
        """What defines the training in a row; pooling and number of images are stated where they are known."""
        left_out = ("pool", "min_steps", "precision")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}

    def for_images(self, images: int) -> "ResolvedRecipe":
        """The recipe for so many labelled images: no larger a batch, and enough epochs for `min_steps`.

        Raises UserError for fewer than two images.
        """
        if images < 2:
            raise UserError(f"fine-tuning needs at least two labelled images, and there are {images}.")
        batch_size = min(self.batch_size, images - images % 2)
        epochs = max(self.epochs, math.ceil(self.min_steps / (images // batch_size)))
        return replace(self, batch_size=batch_size, epochs=epochs)


# MAE (arXiv:2111.06377, facebookresearch/mae FINETUNE.md) for ViT-B. Its crop and flip are those of timm's training
# transform.
MAE = ResolvedRecipe(
    epochs=100,
    batch_size=1024,
    optimizer="adamw",
    base_lr=5e-4,
    min_lr=1e-6,
    warmup_epochs=5,
    weight_decay=0.05,
    layer_decay=0.65,
    drop_path=0.1,
    crop=0.08,
    interpolation="bicubic",
    rand_augment="rand-m9-mstd0.5-inc1",
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    pool="mean",
)
MAE_LARGE = replace(MAE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)
MAE_HUGE = replace(MAE_LARGE, drop_path=0.3)
MAE_BELOW_BASE = replace(
    MAE, layer_decay=0.75
)  # not a published recipe: ViT-B's with the default decay of MAE's script
# SimCLR's semi-supervised fine-tuning (arXiv:2002.05709): Nesterov, 0.05 per 256, no warm-up, no decay, crop and flip
# only, 30 epochs for 10 % of ImageNet (60 for 1 %: here `min_steps` does that). Its batch is 4096, BYOL's 1024.
SIMCLR = ResolvedRecipe(
    epochs=30,
    batch_size=1024,
    optimizer="sgd",
    base_lr=0.05,
    min_lr=0.0,
    warmup_epochs=0.0,
    weight_decay=0.0,
    layer_decay=1.0,
    drop_path=0.0,
    crop=0.08,
    interpolation="bicubic",
    rand_augment="none",
    erase=0.0,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.0,
    pool="auto",
)


def default_recipe(backbone: nn.Module, image_size: int) -> ResolvedRecipe:
    """`MAE` or a variant of it for ViTs, `SIMCLR` for other networks; both lighter below `LARGE`."""
    if isinstance(backbone, VisionTransformer):
        recipe = MAE
        if backbone.embed_dim >= 1280:
            recipe = MAE_HUGE
        elif backbone.embed_dim >= 1024:
            recipe = MAE_LARGE
        elif backbone.embed_dim < 768:
            recipe = MAE_BELOW_BASE
        small = replace(recipe, base_lr=1e-3, layer_decay=0.75)
    else:
        recipe = SIMCLR
        # With SimCLR's SGD the same network from random weights learns little in as many steps, and a baseline must not
        # be weak because of its rate. The 4 MMAC ResNet with 5,000 labels of CIFAR-10 (JPEG), 10 epochs, pretrained /
        # random weights: SGD 0.05 59.1 / 32.1 %, SGD 0.2 38.1 / 40.4 %, AdamW 0.004 58.3 / 38.5 % (test images, one
        # seed: a default, not a result).
        small = replace(recipe, optimizer="adamw", base_lr=4e-3, weight_decay=0.05, warmup_epochs=5)
    if image_size >= LARGE:
        return recipe
    # Batch and rate of IcarusWizard's ViT on CIFAR-10 (1e-3 * 128 / 256, 100 epochs). Small networks in a hundred
    # epochs or fewer underfit rather than overfit under what MAE needs for 300 million parameters, so no mixing, no
    # RandAugment, no erasing; a crop of 8 % would be 9 pixels wide, so half the area, a little more than the usual
    # shift by 4 pixels of 32.
    return replace(
        small, batch_size=128, crop=0.5, interpolation="bilinear", rand_augment="none", erase=0.0, mixup=0.0, cutmix=0.0
    )


def resolve(recipe: Recipe, backbone: nn.Module, *, image_size: int, images: int, pool: str = "auto") -> ResolvedRecipe:
    """`recipe` with a value for everything, for training `backbone` on so many labelled images.

    `pool`: tokens of a ViT where the recipe names none. Who sets `epochs` gets them, whatever the number of steps.
    Raises UserError for fewer than two images, and as `check` does.
    """
    resolved = _with_defaults(recipe, backbone, image_size, pool).for_images(images)
    if recipe.warmup_epochs is None:
        resolved = replace(resolved, warmup_epochs=min(resolved.warmup_epochs, resolved.epochs / 10))
    return resolved


def check(recipe: Recipe, backbone: nn.Module, *, image_size: int, pool: str = "auto") -> None:
    """Raise UserError for a value that makes no sense, for options that contradict each other, and for layer_decay,
    drop_path or a pooling that the network cannot have."""
    _with_defaults(recipe, backbone, image_size, pool)


def _with_defaults(recipe: Recipe, backbone: nn.Module, image_size: int, pool: str) -> ResolvedRecipe:
    default = default_recipe(backbone, image_size)
    if pool != "auto":
        default = replace(default, pool=pool)
    names = [f.name for f in dataclasses.fields(ResolvedRecipe)]
    given = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    resolved = replace(default, **given)
    if recipe.epochs is not None and recipe.min_steps is None:
        resolved = replace(resolved, min_steps=0)
    _check_values(resolved, backbone)
    if recipe.warmup_epochs is not None and not 0 <= recipe.warmup_epochs < resolved.epochs:
        _fail(f"warmup_epochs must be 0 or more and below the {resolved.epochs} epochs, not {recipe.warmup_epochs}")
    if not all(times >= 1 for times in recipe.scratch):
        _fail(f"scratch must be multiples of the epochs, as 1 3, not {' '.join(map(str, recipe.scratch))}")
    if not all(0 < rate < math.inf for rate in recipe.rates):
        _fail(f"rates must be positive numbers, as 1e-3 4e-3, not {' '.join(f'{rate:g}' for rate in recipe.rates)}")
    if recipe.rates and recipe.base_lr is not None:
        _fail("set base_lr, or rates to choose it from, not both")
    if resolved.optimizer != default.optimizer and recipe.base_lr is None and not recipe.rates:
        _fail(
            f"optimizer {resolved.optimizer} needs its own base_lr, as the default {default.base_lr:g} is for "
            f"{default.optimizer}"
        )
    pooled(backbone, resolved.pool)  # raises its own errors
    return resolved


def _check_values(r: ResolvedRecipe, backbone: nn.Module) -> None:
    has_layers = isinstance(backbone, VisionTransformer | ResNet)
    name = type(backbone).__name__
    if r.epochs < 1:
        _fail(f"epochs must be at least 1, not {r.epochs}")
    if r.batch_size < 2 or r.batch_size % 2:
        _fail(f"batch_size must be an even number of images, as mixup pairs them, not {r.batch_size}")
    if r.optimizer not in ("adamw", "sgd"):
        _fail(f"optimizer must be adamw or sgd, not {r.optimizer}")
    if not r.base_lr > 0:
        _fail(f"base_lr must be positive, not {r.base_lr:g}")
    if not r.min_lr >= 0:
        _fail(f"min_lr must not be negative, not {r.min_lr:g}")
    if not r.weight_decay >= 0:
        _fail(f"weight_decay must not be negative, not {r.weight_decay:g}")
    if not 0 < r.layer_decay <= 1:
        _fail(f"layer_decay must be above 0 and at most 1, not {r.layer_decay:g}")
    if r.layer_decay != 1 and not has_layers:
        _fail(f"layer_decay other than 1 is for timm's ViTs and ResNets; {name} is neither")
    if not 0 <= r.drop_path < 1:
        _fail(f"drop_path must be at least 0 and below 1, not {r.drop_path:g}")
    if r.drop_path != 0 and not has_layers:
        _fail(f"drop_path is for timm's ViTs and ResNets; {name} is neither")
    if not 0 < r.crop <= 1:
        _fail(f"crop is a share of the image's area, so above 0 and at most 1, not {r.crop:g}")
    if r.interpolation not in ("bilinear", "bicubic"):
        _fail(f"interpolation must be bilinear or bicubic, not {r.interpolation}")
    if not 0 <= r.erase <= 1:
        _fail(f"erase is a probability, so between 0 and 1, not {r.erase:g}")
    if not r.mixup >= 0:
        _fail(f"mixup must not be negative, not {r.mixup:g}")
    if not r.cutmix >= 0:
        _fail(f"cutmix must not be negative, not {r.cutmix:g}")
    if not 0 <= r.smoothing < 1:
        _fail(f"smoothing must be at least 0 and below 1, not {r.smoothing:g}")
    if r.precision not in ("auto", "no", "bf16"):
        _fail(f"precision must be auto, no or bf16, not {r.precision}")
    if r.rand_augment != "none" and not re.fullmatch(r"rand(-(m|n|inc)\d+|-(p|mstd)\d+(\.\d+)?)*", r.rand_augment):
        _fail(f"rand_augment must be like rand-m9-mstd0.5-inc1, or none, not {r.rand_augment!r}")


def _fail(sentence: str) -> NoReturn:
    raise UserError(f"fine-tuning: {sentence}.")
