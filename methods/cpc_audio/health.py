"""What CPC on sound logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "loss": "InfoNCE over the steps ahead; the dashed line is chance, ln(1 + N)",
    "chance": "the loss if all candidates scored equally: below ln(1 + N) where a negative is the target itself",
    "retrieval": "share of frames ahead that score highest among their candidates; by chance 1 / (1 + N)",
    "context_std": "1 if the contexts spread evenly over the sphere, 0 if every frame has the same",
}


def health_checks(negative_count: int, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    settled = max(warmup_steps + steps_per_epoch, 200)
    return [
        HealthCheck(
            "retrieval",
            below=2 / (1 + negative_count),
            after=settled,
            message="Future frames are found barely more often than by chance (loss at chance: ln(1 + N) = "
            f"{math.log(1 + negative_count):.2f}): the model is not learning. Try another learning rate, a longer "
            "warm-up or --norm channel.",
        ),
        HealthCheck(
            "context_std",
            below=0.02,
            after=settled,
            message="The context is the same at every frame (1 would be spread evenly): it has collapsed. Lower "
            "--base-lr.",
        ),
    ]
