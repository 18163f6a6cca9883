"""DIM's input: the image itself (CIFAR) or a random crop at full resolution with a flip (STL-10), paper section 4."""

from common.augment import View, ViewRecipe


def one_view(
    size: int,
    *,
    crop_area: float,
    flip: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    compile: bool = False,
) -> ViewRecipe:
    """A random square of `crop_area` of the image (1: all of it), flipped with probability `flip`.

    Area (64 / 96)^2 of a 96-px image is a crop of 64 px that needs no resizing.
    """
    view = View(size=size, scale=(crop_area, crop_area), ratio=(1.0, 1.0), flip=flip, mean=mean, std=std)
    return ViewRecipe([view], compile=compile)
