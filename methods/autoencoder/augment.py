"""The one view an autoencoder reconstructs, and what is done to it before the encoder sees it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common import rng
from common.errors import UserError
from common.views.constants import constant
from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def one_view(cfg: Config) -> ViewRecipe:
    """Crop and flip only: the target is the view itself, so color jitter would change what is learned, not how."""
    ratio = (1.0, 1.0) if cfg.crop_scale == (1.0, 1.0) else (3 / 4, 4 / 3)  # the image itself, or torchvision's crop
    view = View(
        size=cfg.image_size,
        scale=cfg.crop_scale,
        ratio=ratio,
        interpolation=cfg.interpolation,
        flip=cfg.flip,
        mean=cfg.mean,
        std=cfg.std,
    )
    return ViewRecipe([view], compile=cfg.compile)


@dataclass(frozen=True)
class Corruption:
    """From views to inputs: the identity, x + n, or x with blocks removed. Raises UserError for one that is void.

    noise: standard deviation of n for pixels in [0, 1]; mask_ratio: share of the blocks of `patch` px that is removed,
    rounded to complete blocks; std: the normalization of the views, by which noise is divided. A removed pixel is 0 in
    normalized units, the mean color. It is not rescaled by 1 / keep: that corrects sums, and norms follow here.
    """

    variant: str
    size: int
    noise: float = 0.25
    mask_ratio: float = 0.5
    patch: int = 4
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.variant == "denoising" and self.noise <= 0:
            raise UserError(f"--noise {self.noise:g}: denoising needs noise above 0; without it is --variant vanilla")
        if self.variant != "masked":
            return
        if self.size % self.patch:
            raise UserError(
                f"--mask-patch {self.patch} does not divide the image of {self.size} px: change one of the two"
            )
        if not 0 < self.removed < self.blocks:
            raise UserError(
                f"--mask-ratio {self.mask_ratio:g} removes {self.removed} of {self.blocks} blocks: it must remove at "
                "least one and leave at least one"
            )

    @property
    def blocks(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def removed(self) -> int:
        return round(self.mask_ratio * self.blocks)

    def describe(self) -> str:
        match self.variant:
            case "denoising":
                return f"noise of {self.noise:g} on pixels in [0, 1]"
            case "masked":
                return f"{self.removed} of {self.blocks} blocks of {self.patch} px removed"
        return "as it is"

    def draw(self, count: int, seed: int, step: int | str, device: torch.device | str = "cpu") -> Tensor | None:
        """The random part for a global batch, a function of (seed, step): noise [count, 3, s, s], block scores
        [count, blocks], or None. Slice the process's part. Drawn on `device`: large normals take long on CPUs.
        """
        if self.variant == "vanilla":
            return None
        key = rng.generator(seed, self.variant, step).initial_seed()
        g = torch.Generator(device=device).manual_seed(key)
        if self.variant == "denoising":
            return torch.randn(count, 3, self.size, self.size, generator=g, device=device)
        return torch.rand(count, self.blocks, generator=g, device=device)

    def __call__(self, views: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(inputs [n, 3, s, s], mask [n, 1, s, s] with 1 = removed, or None) of normalized views and their `draw`."""
        if self.variant == "vanilla":
            return views, None
        if self.variant == "denoising":
            std = constant(self.std, views.device, views.dtype).view(3, 1, 1)
            return views + drawn.to(views.dtype) * (self.noise / std), None
        mask = block_mask(drawn, self.removed, self.size // self.patch, self.patch).to(views.dtype)
        return views * (1 - mask), mask


def block_mask(scores: Tensor, removed: int, side: int, patch: int) -> Tensor:
    """Mask [n, 1, side * patch, side * patch], 1 where removed: the `removed` blocks of each row with least score."""
    order = scores.argsort(dim=1).argsort(dim=1)  # rank of each block
    blocks = (order < removed).view(-1, 1, side, side)
    return blocks.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
