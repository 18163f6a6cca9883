"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He 2020, arXiv:2011.10566).

Predict one view's projection from the other's, and let no gradient flow through what is predicted. No negatives, no
moving average, no large batch: the predictor and the stop-gradient alone keep it from collapsing.

    python -m methods.simsiam.train quickstart                  # embedded data, minutes on two cores
    python -m methods.simsiam.train cifar10-r18                 # the paper: 91.8 % linear after 800 epochs
    accelerate launch -m methods.simsiam.train imagenet-r50     # the official command: 68.1 % linear, 100 epochs
    python -m methods.simsiam.train                             # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.health import feature_std
from common.optim import build_optimizer, decay_groups
from common.schedules import cosine_schedule, scaled_lr
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import simsiam

METHOD = Path(__file__).parent.name


class SimSiam(nn.Module):
    """Backbone, projector and predictor: two views [n, 3, H, W] -> predictions p1, p2 and projections z1, z2 [n, D]."""

    def __init__(self, backbone: nn.Module, projector: tuple[int, ...], predictor_hidden: int, predictor: bool = True):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.num_features
        for width in projector[:-1]:
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            inputs = width
        dim = projector[-1]
        # A norm on the output too, without scale and shift (code builder.py); no linear layer before a norm has a bias.
        self.projector = nn.Sequential(*layers, nn.Linear(inputs, dim, bias=False), nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_hidden, bias=False),
            nn.BatchNorm1d(predictor_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(predictor_hidden, dim),  # no norm: with one, training is unstable (paper Table 3d)
        )
        if not predictor:
            self.predictor = nn.Identity()

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # One pass per view, as in the code: BatchNorm takes each view's own statistics.
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2


def parameter_groups(model: SimSiam, *, weight_decay: float, decay_vectors: bool) -> list[dict]:
    """Backbone and projector, whose rate follows the schedule, and the predictor, whose rate may stay; each as
    matrices and vectors, for LARS, which leaves vectors alone."""
    groups = []
    for part in (nn.ModuleList([model.backbone, model.projector]), model.predictor):
        groups += [{**group, "predictor": part is model.predictor} for group in decay_groups(part, weight_decay)]
    for group in groups:
        group["weight_decay"] = weight_decay if group["adapt"] or decay_vectors else 0.0
    return groups


def set_rates(optimizer: torch.optim.Optimizer, encoder_lr: float, predictor_lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = predictor_lr if group["predictor"] else encoder_lr


def compute_loss(
    model: nn.Module, views: Sequence[Tensor], *, stop_gradient: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's images and what is logged of it; views: two [n, 3, S, S]."""
    p1, p2, z1, z2 = model(*views)  # [n, D] each
    loss, parts = simsiam(p1, p2, z1, z2, stop_gradient=stop_gradient)
    return loss, {**parts, "projection_std": feature_std(torch.cat([z1, z2]).detach())}


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec()
    model = SimSiam(create_backbone(spec), cfg.projector, cfg.predictor_hidden, cfg.predictor)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    # SGD decays everything, biases and norms too (code); LARS leaves those alone.
    groups = parameter_groups(model, weight_decay=cfg.weight_decay, decay_vectors=cfg.optimizer == "sgd")
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-outside")
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g}; predictor {'constant' if cfg.fix_predictor_lr else 'decays too'}",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(after=warmup_steps),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=peak_lr, total=session.total_steps, warmup=warmup_steps)
        set_rates(optimizer, lr, peak_lr if cfg.fix_predictor_lr and step >= warmup_steps else lr)
        views = session.views(step)  # two [n, 3, S, S]

        loss, parts = compute_loss(model, views, stop_gradient=cfg.stop_gradient)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss, **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (-1.0, "all projections equal: collapse")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
