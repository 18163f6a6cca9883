"""Views of images: the whole image for every arm but A8, whose augmentation stands in for the dropout."""

from common.augment import View, ViewRecipe


def one_view(
    size: int, *, crop_flip: bool, crop_scale: tuple[float, float], mean: tuple[float, ...], std: tuple[float, ...]
) -> ViewRecipe:
    """One view: the whole image normalised, or (A8) a random crop of `crop_scale` of the area and a flip."""
    if crop_flip:
        return ViewRecipe([View(size=size, scale=crop_scale, flip=0.5, mean=mean, std=std)])
    return ViewRecipe([View(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, mean=mean, std=std)])
