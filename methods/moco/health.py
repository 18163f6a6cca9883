"""What MoCo logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "positive": "cosine of a query and its positive key: rises from near the negatives' towards 1",
    "negative": "mean cosine of queries and the queue's keys: near 0 where projections spread over the sphere",
    "retrieval": "share of queries whose positive key is the nearest of 1 + K; near 1 within an epoch: BatchNorm leaks",
    "projection_std": "1 if the queries spread evenly over the sphere, 0 if all of them point one way",
    "queue_age": "age of the oldest key in epochs; above 1 the queue has other views of the query's own image",
    "ema_momentum": "how slowly the key encoder follows the query encoder",
}


def chance_level(queue_length: int) -> float:
    """Loss of a network that cannot distinguish images: ln(1 + K)."""
    return math.log(1 + queue_length)


def health_checks(queue_length: int, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "retrieval",
            below=4 / (1 + queue_length),
            after=warmup_steps + 2 * steps_per_epoch,
            message="Positive keys are retrieved barely above chance (loss at chance: ln(1 + K) = "
            f"{chance_level(queue_length):.2f}): the model is not learning. Try another learning rate, a longer "
            "warm-up, a lower --ema-momentum in short runs, or views that share more (larger crop scale).",
        ),
        HealthCheck(
            "projection_std",
            below=0.1,
            after=warmup_steps + steps_per_epoch,
            message="All queries point the same way (1 would be uniform): the representation collapses. Lower the "
            "learning rate, or raise --ema-momentum: a key encoder that moves fast makes the queue useless.",
        ),
        HealthCheck(
            "queue_age",
            above=1.0,
            after=warmup_steps,
            message="The queue is longer than the data: every query meets another view of its own image among the "
            "negatives. Choose a --queue-length well below the number of training images.",
        ),
    ]
