"""What DINO logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

SIGNALS = {
    "teacher_entropy": "entropy of the teacher's output for one view; ln K: it is the same for every image",
    "kl": "divergence of the student from the teacher, loss - teacher_entropy; near 0 for long: nothing left to learn",
    "agreement": "share of images where student and teacher, from different views, choose the same dimension",
    "largest_share": "share of the batch that the most chosen dimension takes; 1: one dimension has won",
    "feature_std": "spread of the teacher's outputs over the sphere: 0 if all images get the same",
    "temperature": "the teacher's temperature, constant within an epoch",
}


def chance_level(out_dim: int) -> float:
    """Loss and teacher entropy of the uniform answer over K dimensions: ln K."""
    return math.log(out_dim)


def health_checks(out_dim: int, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    chance, settled = chance_level(out_dim), warmup_steps + steps_per_epoch
    return [
        HealthCheck(
            "teacher_entropy",
            above=0.99 * chance,
            after=settled,
            message=f"The teacher answers uniformly (entropy near ln K = {chance:.2f}): the same for every "
            "image. Sharpen it (lower --teacher-temperature), lower --ema-momentum, or lower the learning rate.",
        ),
        HealthCheck(
            "largest_share",
            above=0.5,
            after=settled,
            message="One dimension of the teacher's output takes most images: collapse to one cluster. Check that "
            "--center-momentum is below 1, raise --teacher-temperature, or lower the learning rate.",
        ),
    ]
