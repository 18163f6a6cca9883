"""What an autoencoder logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "relative_error": "squared error divided by that of the mean image: 1, nothing learned; 0, perfect",
    "mean_image": "squared error of the batch's mean image, in the same units as the loss: the level to be below",
    "feature_std": "spread of the pooled features over the sphere; 0 if all images get the same ones",
}


def health_checks(after: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "relative_error",
            above=0.99,
            after=after,
            message="Reconstructions are no better than the mean image: the decoder ignores its input. Lower --lr, "
            "warm up longer, or widen --bottleneck; with --variant masked remove less.",
        ),
        HealthCheck(
            "feature_std",
            below=0.02,
            after=after,
            message="All images get nearly the same pooled features: they collapse. Lower --lr or --weight-decay, or "
            "let the latent read them (--latent-from pooled).",
        ),
    ]
