"""Views of images: the full image for every arm except A8, which augments instead of applying dropout."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def one_view(cfg: Config, *, crop_flip: bool) -> ViewRecipe:
    """One view: the full image normalized, or (A8) a random crop of `crop_scale` of the area and a flip."""
    if crop_flip:
        return ViewRecipe([View(size=cfg.image_size, scale=cfg.crop_scale, flip=0.5, mean=cfg.mean, std=cfg.std)])
    whole = View(size=cfg.image_size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, mean=cfg.mean, std=cfg.std)
    return ViewRecipe([whole])
