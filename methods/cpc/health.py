"""What CPC logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "retrieval": "share of predictions that score the true patch above all negatives",
    "positive_score": "mean score of the true patch; scores are unbounded and grow with certainty",
    "feature_std": "spread of the images' mean patch embedding over the sphere: 0 if all images get the same",
}


def health_checks(candidates: int, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    """`candidates`: patches among which an anchor must find the true one."""
    settled = warmup_steps + max(steps_per_epoch, 200)
    return [
        HealthCheck(
            "retrieval",
            below=1.5 / candidates,
            after=settled,
            message="The true patch is found barely more often than by chance (loss at chance: "
            f"{math.log(candidates):.2f}): the model is not learning. Try another --lr, a warm-up, or less jitter per "
            "patch.",
        ),
        HealthCheck(
            "feature_std",
            below=0.01,
            after=settled,
            message="All images get the same embedding: the representation collapses. Lower --lr or warm up longer.",
        ),
    ]
