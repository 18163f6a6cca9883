"""The two views of MoCo v2, drawn from one distribution (arXiv:2003.04297, section 3; code main_moco.py --aug-plus)."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def two_views(cfg: Config) -> ViewRecipe:
    """Crop, flip, color jitter with p = .8, grayscale, blur."""
    brightness, contrast, saturation, hue = cfg.color_jitter
    view = View(
        size=cfg.image_size,
        scale=cfg.crop_scale,
        ratio=(3 / 4, 4 / 3),
        interpolation=cfg.interpolation,
        flip=0.5,
        color_jitter_prob=0.8,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grayscale=cfg.grayscale,
        blur=cfg.blur,
        blur_sigma=(0.1, 2.0),
        mean=cfg.mean,
        std=cfg.std,
    )
    return ViewRecipe([view, view], compile=cfg.compile)
