"""SwAV's multi-crop: two large views and several small ones (arXiv:2006.09882, section 3.2 and App. A)."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def multi_crop(cfg: Config) -> ViewRecipe:
    """Crop, flip, color jitter with p = .8, grayscale, blur: the same for all views except for size and area.

    One difference from the official code: its blur is PIL's, with the sigma as PIL's radius.
    """
    brightness, contrast, saturation, hue = cfg.color_jitter

    def view(size: int, scale: tuple[float, float]) -> View:
        return View(
            size=size,
            scale=scale,
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

    large, small = view(cfg.image_size, cfg.crop_scale), view(cfg.local_size, cfg.local_scale)
    return ViewRecipe([large] * 2 + [small] * cfg.local_views, compile=cfg.compile)
