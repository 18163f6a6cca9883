"""The one view of MAE (arXiv:2111.06377, section 4 and Table 8): crop and flip; color jitter makes it worse."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def one_view(cfg: Config) -> ViewRecipe:
    """RandomResizedCrop and left-right flip; crop_scale (1, 1) and flip 0 are the image itself."""
    view = View(
        size=cfg.image_size,
        scale=cfg.crop_scale,
        interpolation=cfg.interpolation,
        flip=cfg.flip,
        mean=cfg.mean,
        std=cfg.std,
    )
    return ViewRecipe([view], compile=cfg.compile)
