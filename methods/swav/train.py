"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020, 2006.09882).

Predict the cluster of one view from another view; clusters are kept equally large, so that they cannot all be one.

    python -m methods.swav.train quickstart                    # embedded data, minutes on two cores
    python -m methods.swav.train cifar10-r18                   # solo-learn's recipe: 89.2 % online linear
    accelerate launch -m methods.swav.train imagenet-r50       # the paper: 75.3 % linear, batch 4096, 800 epochs
    python -m methods.swav.train                               # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.health import feature_std
from common.optim import LARC, set_lr
from common.schedules import cosine_schedule
from eval.session import ImageSession

from .augment import multi_crop
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import Queue, sinkhorn, swapped_prediction

METHOD = Path(__file__).parent.name


class SwAV(nn.Module):
    """Views -> projections [V * n, D] of unit length, view after view, and their scores [V * n, K]."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int, prototypes: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        hidden = [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)] if hidden_dim else []
        self.projector = nn.Sequential(*hidden, nn.Linear(hidden_dim or width, projector_dim))
        self.prototypes = nn.Linear(projector_dim, prototypes, bias=False)
        self.normalize_prototypes()

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Unit rows. Call at the start of every step: no gradient, and the optimizer's momentum does not change."""
        self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))

    def scores(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # half precision would round
            return linear(z, self.prototypes.weight)

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        # One pass per view size, so BatchNorm's statistics are per size; the projector sees all views at once.
        sizes = [list(same) for _, same in groupby(views, key=lambda view: view.shape[-1])]
        z = self.projector(torch.cat([self.backbone(torch.cat(same)) for same in sizes]))
        z = normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        return z, self.scores(z)


def compute_loss(
    model: nn.Module, views: Sequence[Tensor], earlier: Tensor | None, cfg: Config
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of this process's images, what is logged of it, and the projections [2, n, D] that a queue takes.

    views: two [n, 3, S, S], which get codes, then `local_views` of [n, 3, s, s]; earlier: scores [2, m, K] of this
    process's part of the queue, which are balanced together with those of the views, or None.
    """
    z, scores = model(*views)  # [V * n, D], [V * n, K]
    scores = scores.unflatten(0, (len(views), -1))  # [V, n, K]
    samples = scores[:2].detach()
    if earlier is not None:
        samples = torch.cat([earlier, samples], 1)
    codes = sinkhorn(samples, cfg.epsilon, cfg.sinkhorn_iterations)[:, -scores.shape[1] :]  # [2, n, K]
    loss, parts = swapped_prediction(scores, codes, cfg.temperature)
    return loss, {**parts, "projection_std": feature_std(z)}, z.detach().unflatten(0, (len(views), -1))[:2]


def main(preset: str, cfg: Config) -> None:
    cfg.check()
    session = ImageSession(cfg, METHOD, preset, PRESETS, multi_crop(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    sizes = (cfg.image_size, cfg.local_size) if cfg.local_views else (cfg.image_size,)
    spec = cfg.resnet_spec(zero_init_last=False, sizes=sizes)
    model = SwAV(create_backbone(spec), cfg.hidden_dim, cfg.projector_dim, cfg.prototypes)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)
    queue_batches = cfg.queue_length // cfg.batch_size  # complete batches
    queue = Queue(queue_batches * cfg.batch_size, cfg.projector_dim).to(session.device)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    optimizer: torch.optim.Optimizer
    if cfg.optimizer == "larc":  # one group: biases and norms are adapted and decayed too
        optimizer = LARC(
            model.parameters(),
            lr=0.0,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            trust_coefficient=cfg.trust_coefficient,
            clip=cfg.larc_clip,
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=cfg.weight_decay)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = cfg.warmup_epochs * session.steps_per_epoch
    fill_from = cfg.queue_start * session.steps_per_epoch
    use_from = fill_from + queue_batches  # full

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "warm-up": f"{warmup_steps} steps",
            "queue": f"{queue_batches} batches, filled from step {fill_from}" if queue_batches else "none",
        },
        checks=health_checks(cfg, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
        queue=queue if queue_batches else None,
    )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(
            step,
            base=cfg.lr,
            start=cfg.lr_start,
            final=cfg.lr_end,
            total=session.total_steps,
            warmup=warmup_steps,
            endpoint=True,
        )
        set_lr(optimizer, lr)
        unwrapped.normalize_prototypes()
        views = session.views(step)  # two [n, 3, S, S], then local_views of [n, 3, s, s]

        earlier = None
        if queue_batches and step >= use_from:  # scored by the current prototypes
            earlier = unwrapped.scores(queue.part()).detach()  # [2, m, K]
        loss, parts, z = compute_loss(model, views, earlier, cfg)
        if queue_batches and step >= fill_from:
            queue.push(z)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        if step < cfg.freeze_prototypes:
            unwrapped.prototypes.weight.grad = None  # not zero: momentum and weight decay would still move them
        optimizer.step()
        session.log(loss=loss.detach(), **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (chance_level(cfg.prototypes), "chance level, ln K")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
