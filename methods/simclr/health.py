"""What SimCLR logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
    "retrieval": "share of views whose partner is the nearest of the 2B - 1 candidates",
    "alignment": "similarity of the two views divided by the temperature: the term that pulls",
    "log_sum_exp": "log of the softmax denominator: the term that pushes; loss = log_sum_exp - alignment",
}


def chance_level(batch_size: int) -> float:
    """Loss of a network that cannot distinguish images: ln(2B - 1)."""
    return math.log(2 * batch_size - 1)


def health_checks(batch_size: int, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "retrieval",
            below=4 / (2 * batch_size - 1),
            after=warmup_steps + steps_per_epoch,
            message="Positives are retrieved barely above chance (loss at chance: ln(2B - 1) = "
            f"{chance_level(batch_size):.2f}): the model is not learning. Try another learning rate, a longer warm-up, "
            "or views that share more (larger crop scale, less color jitter).",
        ),
        HealthCheck(
            "projection_std",
            below=0.1,
            after=warmup_steps,
            message="All projections point the same way (1 would be uniform): the representation collapses. Lower the "
            "learning rate or raise the temperature.",
        ),
    ]
