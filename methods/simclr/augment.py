"""The two random views of SimCLR (arXiv:2002.05709, App. A; CIFAR: App. B.9)."""

from common.views.recipe import ViewRecipe
from common.views.spec import View

from .config import Config


def two_views(cfg: Config) -> ViewRecipe:
    """Crop, flip, color jitter (.8, .8, .8, hue) * strength with p = .8, grayscale, blur; the same for both views.

    Two differences from the TensorFlow code: brightness is multiplicative, as in torchvision and today's SimCLR
    repository (v1 of the paper's code added it), and RandomResizedCrop samples as torchvision does.
    """
    view = View(
        size=cfg.image_size,
        scale=cfg.crop_scale,
        ratio=(3 / 4, 4 / 3),
        interpolation=cfg.interpolation,
        flip=0.5,
        color_jitter_prob=0.8,
        brightness=0.8 * cfg.color_strength,
        contrast=0.8 * cfg.color_strength,
        saturation=0.8 * cfg.color_strength,
        hue=cfg.hue,
        grayscale=cfg.grayscale,
        blur=cfg.blur,
        blur_sigma=(0.1, 2.0),
        mean=cfg.mean,
        std=cfg.std,
    )
    return ViewRecipe([view, view], compile=cfg.compile)
