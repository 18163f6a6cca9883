"""What SimSiam logs, and when a run is in trouble."""

from common.run import HealthCheck

SIGNALS = {
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
    "agreement": "cosine of the two views' projections, without the predictor's help",
}


def health_checks(after: int) -> list[HealthCheck]:
    return [
        HealthCheck(
            "projection_std",
            below=0.1,
            after=after,
            message="All projections point the same way (1 would be uniform): the representation collapses. Is the "
            "predictor there, and the stop-gradient? Otherwise lower the learning rate.",
        ),
        HealthCheck(
            "loss",
            below=-0.99,
            after=after,
            message="Predictions equal their targets: the views have become indistinguishable, by collapse or because "
            "the augmentation changes nothing. Look at online_knn; strengthen the views.",
        ),
    ]
