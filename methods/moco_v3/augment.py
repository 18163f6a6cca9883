"""MoCo v3's two views, BYOL's: drawn from two distributions (arXiv:2104.02057, App.; code main_moco.py)."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def two_views(cfg: Config) -> ViewRecipe:
    """Crop, flip, color jitter with p = .8, grayscale, blur, solarize; `blur`, `solarize`: one probability per view."""
    brightness, contrast, saturation, hue = cfg.color_jitter
    views = [
        View(
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
            blur=blur,
            blur_sigma=(0.1, 2.0),
            solarize=solarize,
            mean=cfg.mean,
            std=cfg.std,
        )
        for blur, solarize in zip(cfg.blur, cfg.solarize, strict=True)
    ]
    return ViewRecipe(views, compile=cfg.compile)
