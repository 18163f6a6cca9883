"""What MAE logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "loss": "mean squared error of the predicted numbers on removed patches (of normalized patches with norm_pix)",
    "visible_mean": "that error if every removed patch were painted in the mean of the image's visible ones",
    "relative_error": "loss / visible_mean: 1 means that nothing of the image's structure is used",
    "feature_std": "spread of the encoder's mean token over the sphere: 0 if all images get the same",
}


def health_checks(warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    settled = max(warmup_steps + steps_per_epoch, 500)  # fresh weights are worse than the mean, then stay at it
    return [
        HealthCheck(
            "relative_error",
            above=0.98,
            after=settled,
            message="Removed patches are predicted no better than by the mean of the visible ones: nothing of the "
            "images' structure is learned. Try another learning rate, a lower --mask-ratio, or more steps.",
        ),
        HealthCheck(
            "feature_std",
            below=0.01,
            after=settled,
            message="The encoder gives all images the same tokens, so the decoder predicts from position alone. Lower "
            "the learning rate or warm up longer.",
        ),
    ]
