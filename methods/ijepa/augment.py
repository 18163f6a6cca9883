"""The one view of I-JEPA (arXiv:2301.08243, section 3 and App. A): a random crop, no flip, no color, no blur."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def one_view(cfg: Config) -> ViewRecipe:
    """RandomResizedCrop; crop_scale (1, 1) is the image itself. Context and targets are parts of this one view."""
    view = View(
        size=cfg.image_size,
        scale=cfg.crop_scale,
        interpolation=cfg.interpolation,
        flip=cfg.flip,
        mean=cfg.mean,
        std=cfg.std,
    )
    return ViewRecipe([view], compile=cfg.compile)
