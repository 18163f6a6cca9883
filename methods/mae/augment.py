"""The one view of MAE (arXiv:2111.06377, section 4 and Table 8): crop and flip; colour jitter makes it worse."""

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
    """RandomResizedCrop and left-right flip; crop_scale (1, 1) and flip 0 are the image itself."""
    view = View(size=size, scale=crop_scale, interpolation=interpolation, flip=flip, mean=mean, std=std)
    return ViewRecipe([view], compile=compile)
