"""Fine-tuning: the whole network trained with labels, all of them (`finetune`) or few (`lowshot`).

    recipe = recipe_for(backbone, image_size=32, given=Recipe(epochs=30))
    result = finetune(backbone, train, test, recipe, image_size=32, mean=mean, std=std)

The way of a batch: crops and flips are made as everywhere here, batched on the device (`ViewLoader`). RandAugment is
timm's and works on 8-bit images, so where it is on, the crops go through it on the CPU; normalising, random erasing and
mixup or cutmix (timm's too) follow on the device.

Everything random is a function of (seed, step): images and crops by their keys, and timm's parts, which draw from the
global generators of Python, NumPy and torch, because those are seeded from the key of the step before each step and put
back afterwards. So a run repeats exactly (on a GPU up to the order of its sums).

Nothing is chosen, unless `rates` are given; then it is on training images. The last step's network reads the test set
once.
"""

import copy
import dataclasses
import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.augment import View, ViewRecipe
from common.data import ImageStream, ViewLoader
from common.errors import UserError
from common.optim import decay_groups, set_lr
from common.rng import generator
from common.schedules import scaled_lr, warmup_cosine
from common.vit import layer_groups
from eval.features import forward_features, normaliser, pooled

LARGE = 160  # px: from here on the published recipes of 224 px, below the ones for small images


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to fine-tune. None: the default for the network and the image size, see `recipe_for`."""

    epochs: int | None = None
    """Passes through the labelled images. Default with few images: as many as make `min_steps` steps."""
    min_steps: int | None = None
    """Fewest steps where `epochs` is not given: 1 % of a small data set would otherwise be a few dozen steps."""
    batch_size: int | None = None
    """Images per step; all of them where there are fewer."""
    optimizer: str | None = None
    """adamw (betas 0.9, 0.999) or sgd (Nesterov momentum 0.9)."""
    base_lr: float | None = None
    """Peak rate of the head per 256 images (linear rule); layers below have less, see layer_decay."""
    rates: str = ""
    """Values of base_lr to choose from, comma-separated, as 1e-3,4e-3: each network takes the one that does best on a
    fifth of its labelled images, held out, and is then trained on all of them. Default: none is tried."""
    min_lr: float | None = None
    """Rate at the end of the cosine, not scaled with the batch."""
    warmup_epochs: float | None = None
    """Linear warm-up from 0. Default for adamw: 5, at most a tenth of the epochs."""
    weight_decay: float | None = None
    """Not on biases, norms, positions and class token."""
    layer_decay: float | None = None
    """Factor of the rate from a layer to the one below it: a ViT's blocks, a ResNet's stages. 1: one rate for all."""
    drop_path: float | None = None
    """Stochastic depth: rate of the last residual block, falling linearly to 0 at the first."""
    crop: float | None = None
    """Smallest area of the random crop, as a share of the image; the largest is the whole. A flip follows."""
    interpolation: str | None = None
    """bilinear or bicubic, of the crop and of RandAugment."""
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
    """Tokens of a ViT that the head reads: cls, mean, last-N or auto, as --pool. Default: --pool, else mean (MAE)."""
    labels: str = "1%,10%"
    """lowshot: shares or numbers of the labelled training images, comma-separated, as 1%,10% or 500,5000."""
    subset_seed: int = 0
    """lowshot: which images. Not the seed of the run: all runs share their subsets."""
    scratch: str = "1,3"
    """Baselines: the same network from random weights, trained for this many times the epochs, comma-separated; "none"
    for none."""
    precision: str = "auto"
    """no, bf16, or auto: bf16 on GPUs that have it."""

    def settings(self) -> dict:
        """What defines the training, as plain values; labels and pooling are stated where they are known."""
        left_out = ("labels", "subset_seed", "scratch", "precision", "min_steps", "pool", "rates")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}


# MAE (arXiv:2111.06377, facebookresearch/mae FINETUNE.md): ViT-B, and the larger ones below by width. Its crop and flip
# are those of timm's training transform. Fewest steps: ours, in all recipes; ImageNet has far more.
MAE = Recipe(
    epochs=100,
    min_steps=1000,
    batch_size=1024,
    optimizer="adamw",
    base_lr=5e-4,
    min_lr=1e-6,
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
MAE_SMALLER = dict(layer_decay=0.75)  # nobody's recipe: ViT-B's with the default decay of MAE's script
MAE_LARGER = {
    1024: dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    1280: dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3),
}
# SimCLR's semi-supervised fine-tuning (arXiv:2002.05709): Nesterov, 0.05 per 256, no warm-up, no decay, crop and flip
# only, 30 epochs for 10 % of ImageNet (60 for 1 %: here `min_steps` does that). Its batch is 4096, BYOL's 1024.
SIMCLR = Recipe(
    epochs=30,
    min_steps=1000,
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
# Small images. Batch and rate of IcarusWizard's ViT on CIFAR-10 (1e-3 * 128 / 256, 100 epochs). Small networks in a
# hundred epochs or fewer underfit rather than overfit under what MAE needs for 300 million parameters, so no mixing, no
# RandAugment, no erasing; a crop of 8 % would be 9 pixels wide, so half the area, a little more than the usual shift by
# 4 pixels of 32.
SMALL = dict(batch_size=128, crop=0.5, interpolation="bilinear", rand_augment="none", erase=0.0, mixup=0.0, cutmix=0.0)
SMALL_VIT = dict(base_lr=1e-3, layer_decay=0.75)
# With SimCLR's SGD the same network from random weights learns little in as many steps, and a baseline must not be weak
# by its rate. The 4 MMAC ResNet with 5,000 labels of CIFAR-10 (JPEG), 10 epochs, pretrained / random weights: SGD 0.05
# 59.1 / 32.1 %, SGD 0.2 38.1 / 40.4 %, AdamW 0.004 58.3 / 38.5 % (test images, one seed: a default, not a result).
SMALL_OTHER = dict(optimizer="adamw", base_lr=4e-3, weight_decay=0.05, warmup_epochs=None)

NOTHING = Recipe()


def recipe_for(backbone: nn.Module, image_size: int, given: Recipe = NOTHING, pool: str = "auto") -> Recipe:
    """`given` with a value for everything that is None: `MAE` for ViTs, `SIMCLR` for all other networks, from 160 px
    on; with `SMALL` below. `epochs` and `warmup_epochs` may stay None, they need the number of images (`planned`).

    Raises UserError for a value that makes no sense, and for layer_decay or drop_path where the network has no layers
    known here.
    """
    is_vit = isinstance(backbone, VisionTransformer)
    default = MAE if is_vit else SIMCLR
    if is_vit:
        width = backbone.embed_dim
        extra = next((more for least, more in sorted(MAE_LARGER.items(), reverse=True) if width >= least), {})
        default = dataclasses.replace(default, **(extra or (MAE_SMALLER if width < 768 else {})))
    if image_size < LARGE:
        default = dataclasses.replace(default, **SMALL, **(SMALL_VIT if is_vit else SMALL_OTHER))
    if pool != "auto":
        default = dataclasses.replace(default, pool=pool)
    chosen = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if getattr(given, f.name) is not None}
    recipe = dataclasses.replace(default, **chosen)
    if given.epochs is not None and given.min_steps is None:
        recipe = dataclasses.replace(recipe, min_steps=0)  # who names a number of epochs gets it
    _check(recipe, backbone)
    if given.rates and given.base_lr is not None:
        raise UserError("fine-tuning: give base_lr, or rates to choose it from, not both.")
    if recipe.optimizer != default.optimizer and given.base_lr is None and not given.rates:
        raise UserError(
            f"fine-tuning: optimizer {recipe.optimizer} needs a base_lr of its own, as the default "
            f"{default.base_lr:g} is for {default.optimizer}."
        )
    pooled(backbone, recipe.pool)  # its own errors
    return recipe


def _check(recipe: Recipe, backbone: nn.Module) -> None:
    r = recipe
    known = isinstance(backbone, VisionTransformer | ResNet)
    name = type(backbone).__name__
    checks = {
        f"epochs must be at least 1, not {r.epochs}": r.epochs >= 1,
        f"batch_size must be an even number of images, as mixup pairs them, not {r.batch_size}": r.batch_size >= 2
        and r.batch_size % 2 == 0,
        f"optimizer must be adamw or sgd, not {r.optimizer}": r.optimizer in ("adamw", "sgd"),
        f"base_lr must be positive, not {r.base_lr:g}": r.base_lr > 0,
        f"min_lr must not be negative, as {r.min_lr:g} is": r.min_lr >= 0,
        f"warmup_epochs must be 0 or more and below the {r.epochs} epochs, not {r.warmup_epochs}": r.warmup_epochs
        is None
        or 0 <= r.warmup_epochs < r.epochs,
        f"weight_decay must not be negative, as {r.weight_decay:g} is": r.weight_decay >= 0,
        f"layer_decay must be above 0 and at most 1, not {r.layer_decay:g}": 0 < r.layer_decay <= 1,
        f"layer_decay other than 1 is for timm's ViTs and ResNets; {name} is neither": r.layer_decay == 1 or known,
        f"drop_path must be within 0 and 1, not {r.drop_path:g}": 0 <= r.drop_path < 1,
        f"drop_path is for timm's ViTs and ResNets; {name} is neither": r.drop_path == 0 or known,
        f"crop is a share of the image's area, so above 0 and at most 1, not {r.crop:g}": 0 < r.crop <= 1,
        f"interpolation must be bilinear or bicubic, not {r.interpolation}": r.interpolation in ("bilinear", "bicubic"),
        f"erase is a probability, so within 0 and 1, not {r.erase:g}": 0 <= r.erase <= 1,
        f"mixup must not be negative, as {r.mixup:g} is": r.mixup >= 0,
        f"cutmix must not be negative, as {r.cutmix:g} is": r.cutmix >= 0,
        f"smoothing must be within 0 and 1, not {r.smoothing:g}": 0 <= r.smoothing < 1,
        f"precision must be auto, no or bf16, not {r.precision}": r.precision in ("auto", "no", "bf16"),
        f"rand_augment must be like rand-m9-mstd0.5-inc1, or none, not {r.rand_augment!r}": r.rand_augment == "none"
        or re.fullmatch(r"rand(-(m|n|inc)\d+|-(p|mstd)\d+(\.\d+)?)*", r.rand_augment),
    }
    for sentence, fine in checks.items():
        if not fine:
            raise UserError(f"fine-tuning: {sentence}.")
    multiples(r.scratch)
    rates(r.rates)


def planned(recipe: Recipe, images: int) -> Recipe:
    """The recipe for so many images: batch size, epochs and warm-up as they will be."""
    batch_size = min(recipe.batch_size, images - images % 2)
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / (images // batch_size)))
    warmup = recipe.warmup_epochs
    return dataclasses.replace(
        recipe, batch_size=batch_size, epochs=epochs, warmup_epochs=min(5, epochs / 10) if warmup is None else warmup
    )


def multiples(scratch: str) -> list[int]:
    """ "1,3" -> [1, 3], "none" -> []. Raises UserError for anything else."""
    parts = [] if scratch.strip() in ("", "none") else [part.strip() for part in scratch.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise UserError(f"scratch must be multiples of the epochs, as 1,3, or none, not {scratch!r}.")
    return [int(part) for part in dict.fromkeys(parts)]


def rates(spec: str) -> list[float]:
    """ "1e-3,4e-3" -> [0.001, 0.004], "" -> []. Raises UserError for anything that is not a positive number."""
    try:
        found = [float(part) for part in spec.split(",")] if spec.strip() else []
    except ValueError:
        found = [math.nan]
    if not all(0 < rate < math.inf for rate in found):
        raise UserError(f"rates must be positive numbers with commas between, as 1e-3,4e-3, not {spec!r}.")
    return list(dict.fromkeys(found))


# ---- few labels ------------------------------------------------------------------------------------------------------


def label_counts(spec: str, labels: Tensor) -> dict[str, int]:
    """ "1%,5000" -> {"1%": a hundredth of the labelled images, "5000": 5000}, rounded down to equally many a class.

    labels: long [N], negative where an image has none. Raises UserError for what cannot be: no number, a share outside
    0 and 100 %, fewer images than classes, a number that the classes do not divide, or more of a class than there are.
    """
    sizes = labels[labels >= 0].bincount()
    sizes = sizes[sizes > 0]
    total, classes, smallest = int(sizes.sum()), len(sizes), int(sizes.min())
    counts = {}
    for part in (part.strip() for part in spec.split(",")):
        share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", part)
        number = re.fullmatch(r"[1-9]\d*", part)
        if not (share or number):
            raise UserError(f"labels {spec!r}: {part!r} is neither a share, as 1%, nor a number of images, as 500")
        count = int(part) if number else math.floor(total * float(share[1]) / 100 + 1e-9)
        if share and not 0 < float(share[1]) <= 100:
            raise UserError(f"labels {part}: a share must be above 0 % and at most 100 %")
        if count < classes:
            least = f"{math.ceil(1e4 * classes / total) / 100:g}%"
            raise UserError(
                f"labels {part}: {count} of the {total:,} labelled images are fewer than one for each of "
                f"the {classes} classes; take at least {least} or {classes}"
            )
        if number and count % classes:
            raise UserError(
                f"labels {part}: {classes} classes cannot have equally many; take {count - count % classes}"
                f" or {count - count % classes + classes}"
            )
        if count // classes > smallest:
            raise UserError(
                f"labels {part}: {count // classes} of every class are needed, but the smallest class has "
                f"{smallest} images; take at most {smallest * classes}"
            )
        counts[part] = count // classes * classes
    return counts


def label_subset(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Ascending indices of `count` labelled images, equally many of every class: long [count].

    A function of the labels and the seed alone: every class is taken in the order of one random permutation of all
    images (CPU, key ("low-shot", seed, N)), so a smaller subset is part of every larger one.
    """
    order = torch.randperm(len(labels), generator=generator("low-shot", seed, len(labels)))
    classes = labels[labels >= 0].unique()
    each = count // len(classes)
    mixed = labels.cpu()[order]
    return torch.cat([order[mixed == c][:each] for c in classes]).sort().values


def subset_hash(indices: Tensor) -> str:
    """Twelve hexadecimal digits that name a subset."""
    return hashlib.blake2b(indices.numpy().astype("<i8").tobytes(), digest_size=6).hexdigest()


def subset(store, indices: Tensor):
    """The store with these images only."""
    if len(indices) == len(store):
        return store
    parts = {"labels": store.labels[indices], "factors": None}
    if isinstance(store, ImageStream):
        return dataclasses.replace(store, rows=store.rows[indices], **parts)
    return dataclasses.replace(store, images=store.images[indices.to(store.images.device)], **parts)


# ---- the network and its parameters ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone and a linear head, the only parameters that are new: [B, 3, H, W] -> [B, num_classes].

    The head starts as MAE's (main_finetune.py): weights from a normal distribution of width 2e-5, biases 0.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, pool: str, seed: int):
        super().__init__()
        self.backbone = backbone
        features = pooled(backbone, pool)
        self.features = [features]  # in a list: the same parameters must not have two names
        self.head = nn.utils.skip_init(nn.Linear, features.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=generator(seed, "fine-tuning head"))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(forward_features(self.features[0], images))


def parameter_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for an optimiser, each with the rate's `lr_scale` = layer_decay^(L + 1 - l), as MAE's lr_decay.py.

    ViT of L blocks (`common.vit.layer_groups`): l = 0 patches, positions, tokens; i + 1 block i; L + 1 final norm and
    head. ResNet of L = 4 stages: l = 0 stem, i stage i, 5 head. Without weight decay: vectors, and what the network
    names itself (`no_weight_decay`: positions and class token of a ViT).
    """
    exempt = {f"backbone.{name}" for name in getattr(model.backbone, "no_weight_decay", set)()}
    groups = []
    for group in decay_groups(model, weight_decay):
        for names, own in (
            ([n for n in group["names"] if n not in exempt], {}),
            ([n for n in group["names"] if n in exempt], {"weight_decay": 0.0}),
        ):
            if names:
                params = dict(zip(group["names"], group["params"], strict=True))
                groups.append({**group, **own, "names": names, "params": [params[n] for n in names]})
    if layer_decay == 1:
        return groups
    if isinstance(model.backbone, VisionTransformer):
        return layer_groups(groups, model.backbone, layer_decay)
    return _stage_groups(groups, layer_decay)


def _stage_groups(groups: list[dict], decay: float) -> list[dict]:
    def stage(name: str) -> int:
        found = re.match(r"backbone\.layer(\d)\.", name)
        return int(found[1]) if found else 0 if name.startswith("backbone.") else 5

    split = []
    for group in groups:
        for depth in sorted({stage(name) for name in group["names"]}):
            chosen = [i for i, name in enumerate(group["names"]) if stage(name) == depth]
            part = {key: [group[key][i] for i in chosen] for key in ("names", "params")}
            split.append({**group, **part, "lr_scale": decay ** (5 - depth)})
    return split


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Stochastic depth of a ViT or ResNet by timm's layers and rule: `rate` at the last block, linearly from 0.

    What the backbone was pretrained with is replaced; other networks keep what they have.
    """
    if isinstance(backbone, VisionTransformer):
        blocks, places = list(backbone.blocks), ("drop_path1", "drop_path2")
    elif isinstance(backbone, ResNet):
        blocks, places = [block for i in range(1, 5) for block in getattr(backbone, f"layer{i}")], ("drop_path",)
    else:
        return
    for i, block in enumerate(blocks):
        for place in places:
            share = rate * i / max(len(blocks) - 1, 1)
            setattr(block, place, DropPath(share).train(block.training) if share > 0 else nn.Identity())


# ---- randomness and augmentation -------------------------------------------------------------------------------------


@contextmanager
def random_states_kept(device: torch.device | str) -> Iterator[None]:
    """The global generators of Python, NumPy and torch are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(*key: int | str) -> None:
    """Seed those generators from a key: timm's Mixup, RandomErasing, RandAugment and DropPath draw from them."""
    seed = generator(*key).initial_seed()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class RandAugment:
    """timm's RandAugment for a batch: timm draws the operations of all images, one after the other, then threads do
    the pixels. uint8 [B, 3, s, s] -> the same, on the CPU and back; empty areas get the mean colour, as in timm.
    """

    def __init__(self, config: str, mean: Sequence[float], interpolation: str, workers: int):
        resample = getattr(Image.Resampling, interpolation.upper())
        colour = tuple(min(255, round(255 * value)) for value in mean)
        self.transform = rand_augment_transform(config, {"img_mean": colour, "interpolation": resample})
        for op in self.transform.ops:  # write down what would be done, instead of doing it
            op.aug_fn = partial(_noted, op.aug_fn)
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="rand-augment")

    def plan(self, n: int) -> list[list[Callable]]:
        """The operations of n images, from the global generators."""
        return [self.transform([]) for _ in range(n)]

    def __call__(self, images: Tensor) -> Tensor:
        plans = self.plan(len(images))
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

        def work(i: int) -> None:
            picture = Image.fromarray(pixels[i])
            for operation in plans[i]:
                picture = operation(picture)
            pixels[i] = np.asarray(picture)

        list(self.pool.map(work, [i for i, plan in enumerate(plans) if plan]))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(images.device)

    def close(self) -> None:
        self.pool.shutdown()


def _noted(operation: Callable, done: list, *arguments, **more) -> list:
    if operation is NAME_TO_OP["Posterize"] and arguments == (0,):  # timm's highest level: black, which Pillow refuses
        return [*done, lambda picture: Image.new("RGB", picture.size)]
    return [*done, lambda picture: operation(picture, *arguments, **more)]


class Batches:
    """`batches(step)`: images float [B, 3, s, s] on the device and soft targets [B, C], rows that sum to 1."""

    def __init__(
        self,
        store,
        recipe: Recipe,
        *,
        num_classes: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        device: torch.device | str,
        workers: int,
    ):
        self.classes, self.smoothing = num_classes, recipe.smoothing
        self.augment = self.normalise = self.mix = None
        statistics = {"mean": tuple(mean), "std": tuple(std)}
        if recipe.rand_augment != "none":
            self.augment = RandAugment(recipe.rand_augment, mean, recipe.interpolation, workers)
            self.normalise, statistics = normaliser(mean, std, device), {}
        view = View(size=image_size, scale=(recipe.crop, 1.0), interpolation=recipe.interpolation, **statistics)
        self.loader = ViewLoader(
            store, ViewRecipe([view]), batch_size=recipe.batch_size, seed=seed, device=device, workers=workers
        )
        # pixel noise, a rectangle of 2 to 33 % of the area: MAE's, the default of timm's training script
        self.erase = RandomErasing(recipe.erase, mode="pixel", device=device) if recipe.erase else None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.loader(step)
        images = batch.views[0]
        if self.augment:
            images = self.normalise(self.augment(images.mul(255).round_().to(torch.uint8)))
        if self.erase:
            images = self.erase(images)
        if self.mix:
            return self.mix(images, batch.labels)
        return images, mixup_target(batch.labels, self.classes, smoothing=self.smoothing)

    def close(self) -> None:
        self.loader.close()
        if self.augment:
            self.augment.close()


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Finetuned:
    """`accuracy` is the test top-1 in percent, NaN where the training diverged."""

    accuracy: float
    predictions: Tensor  # int64 [N_test labelled]
    recipe: Recipe  # as it was run
    details: dict  # steps, peak rate, last training loss, seconds: what no comparison depends on
    model: Classifier


def finetune(
    backbone: nn.Module,
    train,
    test,
    recipe: Recipe,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    workers: int = 2,
    log: Callable[[str], None] = lambda line: None,
) -> Finetuned:
    """Train all of `backbone` and a new head on the labelled images of `train`, then read `test` once.

    `train` and `test` are stores whose labels are long [N], negative for none; `recipe` comes from `recipe_for`;
    `batch_size` is of the test. The backbone itself is changed: pass a copy. Deterministic in `seed`.
    Raises UserError for fewer than two labelled images, or images smaller than `image_size`.
    """
    labelled = (train.labels >= 0).nonzero().flatten()
    if len(labelled) < 2:
        raise UserError(f"fine-tuning needs at least two labelled images, {train.name!r} has {len(labelled)}.")
    recipe = planned(recipe, len(labelled))
    set_drop_path(backbone, recipe.drop_path)
    model = Classifier(backbone, num_classes, recipe.pool, seed).requires_grad_(True)
    model = model.to(device, memory_format=torch.channels_last)
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    match recipe.optimizer:
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=0.0)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    bf16 = _bf16(recipe.precision, device)
    cast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=bf16)

    batches = Batches(
        subset(train, labelled),
        recipe,
        num_classes=num_classes,
        image_size=image_size,
        mean=mean,
        std=std,
        seed=seed,
        device=device,
        workers=workers,
    )
    per_epoch = batches.loader.steps_per_epoch
    steps, warmup = recipe.epochs * per_epoch, int(recipe.warmup_epochs * per_epoch)
    peak, start = scaled_lr(recipe.base_lr, recipe.batch_size, "linear"), time.perf_counter()
    say_every = math.ceil(recipe.epochs / 4) * per_epoch
    model.train()
    with random_states_kept(device):
        for step in range(steps):
            seed_all(seed, "fine-tuning", step)
            set_lr(optimizer, warmup_cosine(step, peak=peak, total=steps, warmup=warmup, end=recipe.min_lr))
            images, targets = batches(step)
            with cast():
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % say_every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - start
                log(
                    f"epoch {(step + 1) / per_epoch:.0f}/{recipe.epochs}, loss {loss.item():.3f}, "
                    f"{(step + 1) * recipe.batch_size / seconds:.0f} images/s"
                )
                if not math.isfinite(loss.item()):
                    break
    batches.close()
    details = {
        "steps": steps,
        "peak_lr": peak,
        "last_loss": loss.item(),
        "seconds": round(seconds, 1),
        "precision": "bf16" if bf16 else "float32",
    }

    predictions = _predict(model, test, image_size, mean, std, device, batch_size, cast)
    keep = test.labels >= 0
    predictions = predictions[keep]
    accuracy = 100.0 * int((predictions == test.labels[keep].cpu()).sum()) / len(predictions)
    if not math.isfinite(details["last_loss"]):
        log(f"the loss is {details['last_loss']} at step {step + 1}: training diverged, no accuracy; lower the base_lr")
        accuracy = math.nan
    return Finetuned(accuracy, predictions, recipe, details, model)


def choose_rate(backbone: nn.Module, train, recipe: Recipe, *, seed: int = 0, **options) -> tuple[float, dict]:
    """(base_lr, accuracy of each rate of `recipe.rates`): the one that does best on a fifth of the labelled images of
    `train`, held out, for a copy of the backbone trained on the others; of equals the lowest. `options` as `finetune`.
    """
    labelled = (train.labels >= 0).nonzero().flatten()
    if len(labelled) < 10:
        raise UserError(f"choosing a rate holds out a fifth of the labelled images, and there are {len(labelled)}.")
    order = labelled[torch.randperm(len(labelled), generator=generator(seed, "fine-tuning holdout"))]
    held, kept = (subset(train, part.sort().values) for part in order.tensor_split([len(order) // 5]))
    log, found = options.pop("log"), {}
    for rate in sorted(rates(recipe.rates)):
        chosen = dataclasses.replace(recipe, base_lr=rate)
        own = dict(seed=seed, log=lambda line, rate=rate: log(f"trying {rate:g}: {line}"))
        found[rate] = finetune(copy.deepcopy(backbone), kept, held, chosen, **own, **options).accuracy
    best = max(found, key=lambda rate: -math.inf if math.isnan(found[rate]) else found[rate])
    log(f"base_lr {best:g} out of {', '.join(f'{rate:g} ({value:.1f} %)' for rate, value in found.items())}")
    return best, found


@torch.no_grad()
def _predict(model, store, image_size, mean, std, device, batch_size, cast) -> Tensor:
    """Classes of all images, int64 [N] on the CPU, in store order."""
    normalise, found = normaliser(mean, std, device), []
    model.eval()
    for start in range(0, len(store), batch_size):
        images = normalise(store.eval_images(start, min(start + batch_size, len(store)), image_size))
        with cast():
            found.append(model(images).argmax(1).cpu())
    return torch.cat(found)


def _bf16(precision: str, device: torch.device | str) -> bool:
    if precision == "auto":
        return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
