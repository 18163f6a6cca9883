"""Batches for fine-tuning: crops and flips as everywhere here, RandAugment, erasing, mixup and cutmix as timm has them.

Crops and flips are made in batches on the device (`ViewLoader`). RandAugment is timm's and works on 8-bit images, so
where it is on, the crops go through it on the CPU; normalizing, random erasing and mixup or cutmix (timm's too) follow
on the device.

Everything random is a function of (seed, step): images and crops by their keys, and timm's parts, which draw from the
global generators of Python, NumPy and torch, because those are seeded from the key of the step before each step
(`seed_all`) and put back afterwards (`keep_random_states`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from common.data import Images, ViewLoader
from common.rng import generator
from common.views.recipe import ViewRecipe
from common.views.spec import View
from eval.features import channels, normalizer
from eval.finetune.recipe import ResolvedRecipe


@contextmanager
def keep_random_states(device: torch.device | str) -> Iterator[None]:
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
    the pixels. uint8 [B, 3, s, s] -> the same, on the CPU and back; empty areas get the mean color, as in timm.
    """

    def __init__(self, config: str, mean: Sequence[float], interpolation: str, workers: int):
        resample = getattr(Image.Resampling, interpolation.upper())
        color = tuple(min(255, round(255 * value)) for value in mean)
        self.transform = rand_augment_transform(config, {"img_mean": color, "interpolation": resample})
        for op in self.transform.ops:  # record the operation instead of doing it
            op.aug_fn = partial(_record, op.aug_fn)
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="rand-augment")

    def plan(self, n: int) -> list[list[Callable[[Any], Any]]]:
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


def _record(operation: Callable[..., Any], done: list, *args: Any, **kwargs: Any) -> list:
    if operation is NAME_TO_OP["Posterize"] and args == (0,):  # timm's highest level: black, which Pillow refuses
        return [*done, lambda picture: Image.new("RGB", picture.size)]
    return [*done, lambda picture: operation(picture, *args, **kwargs)]


class Batches:
    """`batches(step)`: images float [B, 3, s, s] on the device and soft targets [B, C], rows that sum to 1."""

    def __init__(
        self,
        store: Images,
        recipe: ResolvedRecipe,
        *,
        num_classes: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        device: torch.device | str,
        workers: int,
    ):
        self.num_classes, self.smoothing = num_classes, recipe.smoothing
        self.normalize = normalizer(mean, std, device)
        self.augment = self.erase = self.mix = None
        view = View(size=image_size, scale=(recipe.crop, 1.0), interpolation=recipe.interpolation)
        if recipe.rand_augment == "none":
            view = replace(view, mean=channels(mean), std=channels(std))
        else:  # it works on pixels, which are normalized afterwards
            self.augment = RandAugment(recipe.rand_augment, mean, recipe.interpolation, workers)
        self.loader = ViewLoader(
            store, ViewRecipe([view]), batch_size=recipe.batch_size, seed=seed, device=device, workers=workers
        )
        if recipe.erase:  # noise by pixel, a rectangle of 2 to 33 % of the area: MAE's, the default of timm's script
            self.erase = RandomErasing(recipe.erase, mode="pixel", device=device)
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.loader(step)
        images = batch.views[0]
        if self.augment:
            images = self.normalize(self.augment(images.mul(255).round_().to(torch.uint8)))
        if self.erase:
            images = self.erase(images)
        if self.mix:
            return self.mix(images, batch.labels)
        return images, mixup_target(batch.labels, self.num_classes, smoothing=self.smoothing)

    def close(self) -> None:
        self.loader.close()
        if self.augment:
            self.augment.close()
