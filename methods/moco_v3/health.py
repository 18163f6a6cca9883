"""What MoCo v3 logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "positive": "cosine of a prediction and the other view's key: rises, far above the negatives'",
    "negative": "mean cosine of predictions and the keys of other images: falls towards 0",
    "retrieval": "share of predictions whose own key is the nearest of the B keys; dips are instability",
    "prediction_std": "1 if the predictions spread evenly over the sphere, 0 if all of them point one way",
    "gradient_norm": "norm of the gradient of all parameters: spikes come before dips of the accuracy in ViTs",
    "ema_momentum": "how slowly the momentum encoder follows: from its first value to 1 along a cosine",
}


def chance_level(batch_size: int, temperature: float) -> float:
    """Loss of a network that cannot distinguish images: 4 T ln B."""
    return 4 * temperature * math.log(batch_size)


def health_checks(batch_size: int, temperature: float, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "retrieval",
            below=4 / batch_size,
            after=warmup_steps + steps_per_epoch,
            message="Keys are retrieved barely above chance (loss at chance: 4 T ln B = "
            f"{chance_level(batch_size, temperature):.2f}): the model is not learning. Try another learning rate, a "
            "longer warm-up, or views that share more (larger crop scale, less color jitter).",
        ),
        HealthCheck(
            "prediction_std",
            below=0.1,
            after=warmup_steps,
            message="All predictions point the same way (1 would be uniform): the representation collapses. Lower the "
            "learning rate or lengthen the warm-up.",
        ),
    ]
