"""What SwAV logs, and when a run is in trouble."""

import math

from common.run import HealthCheck

from .config import Config

SIGNALS = {
    "code_entropy": "mean entropy of a code in nats: ln K if codes carry no information, 0 if each is one prototype",
    "prototypes_used": "perplexity of the mean prediction: the effective number of prototypes in use, at most K",
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
}


def chance_level(prototypes: int) -> float:
    """Loss of predictions that are uniform over K prototypes: ln K."""
    return math.log(prototypes)


def health_checks(cfg: Config, warmup_steps: int, steps_per_epoch: int) -> list[HealthCheck]:
    chance = chance_level(cfg.prototypes)
    return [
        HealthCheck(
            "loss",
            above=0.98 * chance,
            after=max(warmup_steps, cfg.freeze_prototypes) + steps_per_epoch,
            message=f"The loss stays at ln K = {chance:.2f}: codes cannot be predicted. Try --epsilon 0.03, a larger "
            "--freeze-prototypes, fewer small views or milder color jitter.",
        ),
        HealthCheck(
            "prototypes_used",
            below=0.1 * min(cfg.prototypes, cfg.batch_size),
            after=warmup_steps,
            message=f"Few of the {cfg.prototypes} prototypes get all images: collapse. Is --sinkhorn-iterations 3? "
            "Lower --lr or freeze the prototypes longer.",
        ),
        HealthCheck(
            "projection_std",
            below=0.1,
            after=warmup_steps,
            message="All projections point one way (1 would be uniform): the representation collapses. Lower --lr.",
        ),
    ]
