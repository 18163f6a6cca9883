"""What is logged, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "supervised": "cross-entropy of the noisy predictions; 0 while A7 trains without labels",
    "auxiliary": "NT-Xent, R-Drop or the VAE's KL before its weight; 0 in arms without one",
    "sigma": "mean sigma of the VAE layer; falling to 0 means that the layer switches its noise off",
    "held-out": "measured under the noise on held-out records; each name is explained on the method's page",
    "train": "the same on training records",
    "own": "the same on held-out records under the arm's own noise",
    "feature_std": "spread of the features over the sphere; 0 if all inputs get the same ones",
}


def health_checks(steps: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "feature_std",
            below=0.02,
            after=steps // 10,
            message="All inputs get nearly the same features: they collapse. Lower --lr or the auxiliary loss's "
            "weight.",
        )
    ]
