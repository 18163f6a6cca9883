"""What I-JEPA logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "loss": "distance of predicted from target features; it may rise while they become richer, and be 0 in a collapse",
    "relative_error": "squared error over that of the batch's mean at the same patch; 1: the context is of no use",
    "target_std": "spread over images of the target features of one patch: 1 at most, 0 if all images get the same",
    "feature_std": "spread of the target encoder's mean token over the sphere: 0 if all images get the same",
    "context_patches": "patches that the context encoder sees, the same number in every image of a step",
    "weight_decay": "its schedule, rising along a cosine",
    "ema_momentum": "how slowly the target encoder follows",
}


def health_checks(warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    settled = max(warmup_steps + steps_per_epoch, 500)
    return [
        HealthCheck(
            "target_std",
            below=0.05,
            after=settled,
            message="The target encoder gives every image the same features: collapse, however low the loss. Raise "
            "--ema-momentum, lower --lr or warm up longer.",
        ),
        HealthCheck(
            "relative_error",
            above=0.98,
            after=settled,
            message="Target blocks are predicted no better than by the mean of the same patch: the context is of no "
            "use. Try another learning rate, smaller --target-scale, or more steps.",
        ),
    ]
