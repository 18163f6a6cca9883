"""VICReg: Variance-Invariance-Covariance Regularization (Bardes et al. 2022, arXiv:2105.04906).

Two views' projections should be equal (invariance) while every dimension keeps a standard deviation of 1 (variance) and
is uncorrelated with the others (covariance). Nothing is normalized; each branch is kept from collapse by itself.

    python -m methods.vicreg.train quickstart                  # embedded data, minutes on two cores
    python -m methods.vicreg.train cifar10-r18                 # solo-learn's recipe: 92.1 % online linear
    accelerate launch -m methods.vicreg.train imagenet-r50     # the paper: 73.2 % linear, batch 2048, 1000 epochs
    python -m methods.vicreg.train                             # all presets; add --plan to any to see before you run
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
from .loss import vicreg

METHOD = Path(__file__).parent.name


class VICReg(nn.Module):
    """Backbone and projector, the paper's expander: two views [n, 3, H, W] -> their projections [n, D], as they are."""

    def __init__(self, backbone: nn.Module, widths: tuple[int, ...]):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.num_features
        for width in widths[:-1]:
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            inputs = width
        if widths:  # no norm and no ReLU at the end: they would fix what the loss is to learn; a bias would cancel
            layers.append(nn.Linear(inputs, widths[-1], bias=False))
        self.projector = nn.Sequential(*layers)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        # One pass per view, as in the code: BatchNorm takes each view's statistics, and running averages move twice.
        return self.projector(self.backbone(view1)), self.projector(self.backbone(view2))


def parameter_groups(model: nn.Module, *, weight_decay: float, adapt_vectors: bool) -> list[dict]:
    """Matrices and kernels with decay and LARS's ratio; biases and norms without, unless `adapt_vectors`."""
    groups = decay_groups(model, weight_decay)
    if adapt_vectors:
        groups[1] |= {"weight_decay": weight_decay, "adapt": True}
    return groups


def compute_loss(model: nn.Module, views: Sequence[Tensor], cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over the batch of all processes and what is logged of it; views: two [n, 3, S, S]."""
    return vicreg(
        *model(*views),
        invariance_weight=cfg.invariance_weight,
        variance_weight=cfg.variance_weight,
        covariance_weight=cfg.covariance_weight,
    )


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec()
    model = VICReg(create_backbone(spec), cfg.projector)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    groups = parameter_groups(model, weight_decay=cfg.weight_decay, adapt_vectors=cfg.adapt_vectors)
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-outside")
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
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

        loss, parts = compute_loss(model, views, cfg)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss, **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (0.99 * cfg.variance_weight, "collapse: constant projections"), "std": (1.0, "the hinge")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
