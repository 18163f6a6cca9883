"""What VICReg logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "invariance": "the loss's first term, unweighted: mean square difference of the two views' projections",
    "variance": "the loss's second term, unweighted: how far standard deviations are below 1, on average",
    "covariance": "the loss's third term, unweighted: squared covariances of different dimensions, both views",
    "std": "mean standard deviation of a projection's dimension: 1 where the hinge holds it, 0 collapsed",
    "agreement": "1 - invariance / (2 * variance of a dimension): 1 for equal views, 0 for unrelated ones",
    "redundancy": "typical covariance of two different dimensions over their variance: 1 if all are the same",
}


def health_checks(after: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "std",
            below=0.1,
            after=after,
            message="The projections are nearly constant: collapse. Raise --variance-weight (it should not be below "
            "--invariance-weight), lower the learning rate, or lengthen the warm-up.",
        ),
        HealthCheck(
            "redundancy",
            above=0.7,
            after=after,
            message="Different dimensions are redundant: the representation collapses to few directions. Raise "
            "--covariance-weight, enlarge the batch, or lower the learning rate.",
        ),
        HealthCheck(
            "agreement",
            below=0.1,
            after=after,
            message="The two views' projections have barely anything in common: nothing is learned. Try another "
            "learning rate, a longer warm-up, milder views, or a larger --invariance-weight.",
        ),
    ]
