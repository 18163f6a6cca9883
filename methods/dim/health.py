"""Which settings can train, what is logged, and when a run is in trouble."""

import math

from common.errors import UserError
from common.run import HealthCheck

from .config import Config
from .loss import chance_level
from .model import LAYOUTS, map_size

SIGNALS = {
    "retrieval": "share of an image's parts that score highest with its summary among the B images' parts there",
    "positive": "mean score of a summary with the parts of its image",
    "negative": "mean score of a summary with the parts of other images",
    "local_loss": "the term of the summary and the local map",
    "global_loss": "the term of the summary and the last features",
    "prior_loss": "the summaries' distance from the prior, as the discriminator sees it: ln 2 if indistinguishable",
    "discriminator_loss": "the discriminator's loss, including its gradient penalty",
    "discriminator_accuracy": "0.5: summaries and prior are indistinguishable; 1: always distinguished",
    "gradient_penalty": "mean squared gradient of the discriminator at prior and summaries",
    "y_std": "spread of the summaries y over the sphere: 0 if all images get the same",
}


def check(cfg: Config) -> None:
    """Raise UserError for settings that leave nothing to train or do not fit each other."""
    if not cfg.alpha + cfg.beta:
        raise UserError("--alpha or --beta must be above 0, or nothing about the image is learned")
    layout = LAYOUTS[cfg.layout]
    if map_size(layout, cfg.image_size, len(layout.convs)) < 1:
        raise UserError(f"--image-size {cfg.image_size} is too small for --layout {cfg.layout}: its last map is empty")
    if round(min(c[0] for c in layout.convs) * cfg.width) < 1:
        raise UserError(f"--width {cfg.width} leaves a layer without channels")


def term_weights(cfg: Config) -> dict[str, float]:
    """The information terms that are trained, with their weights."""
    return {name: weight for name, weight in (("local", cfg.beta), ("global", cfg.alpha)) if weight}


def local_side(cfg: Config) -> int:
    """Side of the local map."""
    layout = LAYOUTS[cfg.layout]
    return map_size(layout, cfg.image_size, layout.local)


def chance_levels(cfg: Config) -> dict[str, float]:
    """Each term's loss where nothing is known about the image."""
    locations = {"local": local_side(cfg) ** 2, "global": 1}
    return {name: chance_level(cfg.estimator, cfg.batch_size, locations[name]) for name in term_weights(cfg)}


def references(cfg: Config) -> dict[str, tuple[float, str]]:
    """Reference lines of the report's curves."""
    levels = chance_levels(cfg)
    total = sum(weight * levels[name] for name, weight in term_weights(cfg).items()) + cfg.gamma * math.log(2)
    return {
        **{f"{name}_loss": (level, f"chance level, {cfg.estimator}") for name, level in levels.items()},
        "prior_loss": (math.log(2), "ln 2: matches the prior"),
        "retrieval": (1 / cfg.batch_size, "1 / B"),
        "loss": (total, "chance level, codes as the prior"),
    }


def health_checks(batch_size: int, steps_per_epoch: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "retrieval",
            below=3 / batch_size,
            after=2 * steps_per_epoch,
            message=f"Summaries find their own image's parts barely more often than by chance (1 in {batch_size}): the "
            "model is not learning. Try another --lr, a smaller --gamma, or --estimator infonce.",
        ),
        HealthCheck(
            "y_std",
            below=0.02,
            after=2 * steps_per_epoch,
            message="All images get the same summary y: it collapses. Lower --lr or --gamma.",
        ),
    ]
