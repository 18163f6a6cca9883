"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al. 2021, arXiv:2103.03230).

The cross-correlation matrix of two views' projections should be the identity: each dimension agrees with itself across
views (nothing of the distortion remains) and with no other (no collapse).

    python -m methods.barlow.train quickstart                  # embedded data, minutes on two cores
    python -m methods.barlow.train cifar10-r18                 # solo-learn's recipe: 92.1 % online linear
    accelerate launch -m methods.barlow.train imagenet-r50     # the paper: 73.2 % linear, batch 2048, 1000 epochs
    python -m methods.barlow.train                             # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import barlow_twins

METHOD = Path(__file__).parent.name


class BarlowTwins(nn.Module):
    """Backbone and projector: two views [n, 3, H, W] -> their projections [n, D], before any normalization."""

    def __init__(self, backbone: nn.Module, widths: tuple[int, ...]):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.num_features
        for width in widths[:-1]:
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            inputs = width
        if widths:  # nothing after the last layer: the loss normalizes, and a bias would cancel there
            layers.append(nn.Linear(inputs, widths[-1], bias=False))
        self.projector = nn.Sequential(*layers)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        # One pass per view, as in the code: BatchNorm takes each view's statistics, and running averages move twice.
        return self.projector(self.backbone(view1)), self.projector(self.backbone(view2))


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_vectors: bool, vector_lr_scale: float
) -> list[dict]:
    """Matrices and kernels at the full rate; biases and norms at `vector_lr_scale` of it, without LARS's ratio."""
    matrices, vectors = decay_groups(model, weight_decay)
    vectors |= {"lr_scale": vector_lr_scale, "weight_decay": weight_decay if decay_vectors else 0.0}
    return [matrices, vectors]


def compute_loss(model: nn.Module, views: Sequence[Tensor], lambd: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over the batch of all processes and what is logged of it; views: two [n, 3, S, S]."""
    return barlow_twins(*model(*views), lambd)


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec()
    model = BarlowTwins(create_backbone(spec), cfg.projector)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    groups = parameter_groups(
        model,
        weight_decay=cfg.weight_decay,
        decay_vectors=cfg.decay_vectors,
        vector_lr_scale=cfg.base_lr_biases / cfg.base_lr,
    )
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-outside")
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g}; biases and norms {peak_lr * cfg.base_lr_biases / cfg.base_lr:.4g}",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(after=warmup_steps + session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(
            step, base=peak_lr, total=session.total_steps, warmup=warmup_steps, final=cfg.lr_floor * peak_lr
        )
        set_lr(optimizer, lr)
        views = session.views(step)  # two [n, 3, S, S]

        loss, parts = compute_loss(model, views, cfg.lambd)
        optimizer.zero_grad(set_to_none=True)
        session.backward(cfg.loss_weight * loss)
        optimizer.step()
        session.log(loss=loss, **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    dimensions = cfg.projector[-1] if cfg.projector else unwrapped.backbone.num_features
    session.evaluate(
        signals=SIGNALS,
        references={"invariance": (float(dimensions), "uncorrelated views, D")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
