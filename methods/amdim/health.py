"""What AMDIM logs, and when a run is in trouble."""

from common.run import HealthCheck

from .config import Config
from .loss import chance

SIGNALS = {
    "loss": "nce_1_5 + nce_1_7 + nce_5_5 and, three times, the penalty on raw scores",
    "nce_1_5": "the whole image's vector against the 5x5 features of the other view",
    "nce_1_7": "the whole image's vector against the 7x7 features of the other view",
    "nce_5_5": "the 5x5 vector of one position against the 5x5 features of the other view",
    "retrieval": "share of whole-image vectors whose best score in the batch is in their own image's other view",
    "score_rms": "root mean square of the scores before clipping; near C they saturate and gradients stop",
    "dimensions": "directions that f1 uses (participation ratio of its covariance): 1 if all images lie on one line",
    "online_linear": "ONLINE: a linear probe's accuracy on the training views; not the result",
    "online_mlp": "ONLINE: an MLP probe's accuracy on the training views; not the result",
}


def health_checks(cfg: Config, steps_per_epoch: int, total_steps: int) -> list[HealthCheck]:
    levels = chance(cfg.batch_size)
    # Scores of color alone come first, and small networks stay with them for a thousand steps.
    settled = max(cfg.warmup_steps + steps_per_epoch, min(total_steps // 2, 2000))
    return [
        HealthCheck(
            "retrieval",
            below=4 * levels["retrieval"],
            after=settled,
            message="An image's vector finds its other view barely more often than by chance (loss at chance: "
            f"{levels['loss']:.2f}): the model is not learning. Try another learning rate, a longer warm-up, or milder "
            "views.",
        ),
        HealthCheck(
            "score_rms",
            above=cfg.clip,
            after=cfg.warmup_steps,
            message="Scores lie beyond the clip, where tanh is flat and gradients stop. Raise --penalty or lower --lr.",
        ),
        HealthCheck(
            "dimensions",
            below=1.2,
            after=settled,
            message="All images lie on one line: the representation collapses. Lower --lr or warm up longer.",
        ),
    ]
