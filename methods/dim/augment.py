"""DIM's input: the image itself (CIFAR) or a random crop at full resolution with a flip (STL-10), paper section 4."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def one_view(cfg: Config) -> ViewRecipe:
    """A random square of `crop_area` of the image (1: all of it), flipped with probability `flip`.

    Area (64 / 96)^2 of a 96-px image is a crop of 64 px that needs no resizing.
    """
    area = (cfg.crop_area, cfg.crop_area)
    view = View(size=cfg.image_size, scale=area, ratio=(1.0, 1.0), flip=cfg.flip, mean=cfg.mean, std=cfg.std)
    return ViewRecipe([view], compile=cfg.compile)
