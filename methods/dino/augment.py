"""DINO's multi-crop: two global views, which differ in blur and solarization, and small local ones (SwAV's idea)."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def multi_crop(cfg: Config) -> ViewRecipe:
    """Crop, flip, color jitter with p = .8, grayscale, blur; solarize in the second global view only.

    One difference from the official code: its blur is PIL's (three box blurs); here it is a true Gaussian.
    """
    brightness, contrast, saturation, hue = cfg.color_jitter

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> View:
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
            blur=blur,
            blur_sigma=(0.1, 2.0),
            solarize=solarize,
            mean=cfg.mean,
            std=cfg.std,
        )

    first_blur, second_blur, local_blur = cfg.blur
    first = view(cfg.image_size, cfg.global_crop_scale, first_blur)
    second = view(cfg.image_size, cfg.global_crop_scale, second_blur, cfg.solarize)
    local = view(cfg.local_size, cfg.local_crop_scale, local_blur)
    return ViewRecipe([first, second] + [local] * cfg.local_views, compile=cfg.compile)
