"""What Barlow Twins logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "on_diagonal": "mean correlation of a dimension with itself across views: 1 when nothing of the distortion remains",
    "off_diagonal": "root mean square correlation of different dimensions: 0 when none is redundant",
    "invariance": "the loss's first term, sum of (1 - C_ii)^2",
    "redundancy": "the loss's second term, lambd * sum of the other C_ij^2",
}


def health_checks(after: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "on_diagonal",
            below=0.1,
            after=after,
            message="The two views' projections are barely correlated: either nothing is learned, or they have become "
            "constant. Try another learning rate, a longer warm-up, milder views, or a smaller --lambd.",
        ),
        HealthCheck(
            "off_diagonal",
            above=0.5,
            after=after,
            message="Different dimensions are redundant: the representation collapses to few directions. Raise "
            "--lambd, enlarge the batch, or lower the learning rate.",
        ),
    ]
