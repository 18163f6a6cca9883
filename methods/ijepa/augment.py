"""The one view of I-JEPA (arXiv:2301.08243, section 3 and App. A): a random crop, no flip, no colour, no blur."""

from common.augment import View, ViewRecipe


def one_view(
    size: int,
    *,
    crop_scale: tuple[float, float],
    flip: float,
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    compile: bool = False,
) -> ViewRecipe:
    """RandomResizedCrop; crop_scale (1, 1) is the image itself. Context and targets are parts of this one view."""
    view = View(size=size, scale=crop_scale, interpolation=interpolation, flip=flip, mean=mean, std=std)
    return ViewRecipe([view], compile=compile)
