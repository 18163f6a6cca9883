"""AMDIM's two views (code datasets.py): one flip for both, then each moved or cropped and recoloured on its own."""

from common.augment import View, ViewRecipe
from common.data import mean_std

# The code's own constants, which differ a little from those of common.data.STATS.
STATS = {
    "amdim-cifar": (tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7))),
    "amdim-stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
}


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) for --normalize NAME: the code's, or those of `common.data.mean_std`. UserError for another name."""
    return STATS[name] if name in STATS else mean_std(name)


def two_views(
    size: int,
    *,
    translate: int,
    crop_scale: tuple[float, float],
    jitter: tuple[float, float, float, float],
    jitter_p: float,
    grey: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    compile: bool = False,
) -> ViewRecipe:
    """Moved by up to `translate` px with reflected borders (p .8), or where that is 0 a bicubic random resized crop of
    aspect .7 to 1.4; then colour jitter and greyscale. The flip is one draw an image: independent flips would be
    another, harder task. The code flips before it crops; each order gives the same views, as crops are symmetric.
    """
    view = View(
        size=size,
        translate=translate,
        translated=0.8,
        scale=crop_scale,
        ratio=(0.7, 1.4),
        interpolation="bilinear" if translate else "bicubic",
        flip=0.5,
        jitter=jitter_p,
        brightness=jitter[0],
        contrast=jitter[1],
        saturation=jitter[2],
        hue=jitter[3],
        grey=grey,
        mean=mean,
        std=std,
    )
    return ViewRecipe([view, view], compile=compile, shared=("flip",))
