"""AMDIM's two views (code datasets.py): one flip for both, then each translated or cropped and recolored separately."""

from common.data import mean_std
from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config

# The code's constants, which differ slightly from those of common.data.STATS.
STATS = {
    "amdim-cifar": (tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7))),
    "amdim-stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
}


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) for --normalize NAME: the code's, or those of `common.data.mean_std`. UserError for another name."""
    return STATS[name] if name in STATS else mean_std(name)


def two_views(cfg: Config) -> ViewRecipe:
    """Moved by up to `translate` px with reflected borders (p .8), or where that is 0 a bicubic random resized crop of
    aspect .7 to 1.4; then color jitter and grayscale. The flip is sampled once per image: independent flips would be
    another, harder task. The code flips before it crops; each order gives the same views, as crops are symmetric.
    """
    brightness, contrast, saturation, hue = cfg.color_jitter
    mean, std = statistics(cfg.normalize)
    view = View(
        size=cfg.image_size,
        translate=cfg.translate,
        translated=0.8,
        scale=cfg.crop_scale,
        ratio=(0.7, 1.4),
        interpolation="bilinear" if cfg.translate else "bicubic",
        flip=0.5,
        color_jitter_prob=cfg.color_jitter_prob,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grayscale=cfg.grayscale,
        mean=mean,
        std=std,
    )
    return ViewRecipe([view, view], compile=cfg.compile, shared=("flip",))
