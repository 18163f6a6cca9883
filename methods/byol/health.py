"""What BYOL logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "agreement": "cosine of prediction and target: loss = 4 - 4 agreement; 1 from the start is collapse, not success",
    "target_std": "1 if the target's projections spread evenly over the sphere, 0 if all of them point one way",
    "prediction_std": "the same for the online network's predictions",
    "ema_momentum": "how slowly the target follows: from its first value to 1 along a cosine",
}


def health_checks(warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "target_std",
            below=0.1,
            after=warmup_steps,
            message="The target's projections all point one way (1 would be uniform): collapse, however low the loss. "
            "Is the predictor there? Lower the learning rate, or raise --ema-momentum: small batches need a slow one.",
        ),
        HealthCheck(
            "prediction_std",
            below=0.05,
            after=warmup_steps + steps_per_epoch,
            message="The predictor gives every image the same answer, the mean of all targets: one view predicts "
            "nothing of the other yet. Views that share more, or another learning rate, may help.",
        ),
        HealthCheck(
            "agreement",
            below=0.1,
            after=warmup_steps + steps_per_epoch,
            message="Predictions barely resemble their targets (0 is chance): the model is not learning. Try another "
            "learning rate, a longer warm-up, or views that share more (larger crop scale, less color jitter).",
        ),
    ]
