"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733).

An online network predicts, from one view, what a slowly following copy of itself projects from the other. No negatives.

    python -m methods.byol.train quickstart                    # embedded data, minutes on two cores
    python -m methods.byol.train cifar10-r18                   # solo-learn's recipe: 92.6 % online linear
    accelerate launch -m methods.byol.train imagenet-r50       # the paper: 74.3 % linear, batch 4096, 1000 epochs
    python -m methods.byol.train                               # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.ema import ema_update, make_teacher
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import byol_loss

METHOD = Path(__file__).parent.name


def mlp(width: int, hidden: int, out: int, layers: int = 2) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear without bias: no norm on the output (paper section 3.2)."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    if layers:
        parts.append(nn.Linear(width, out, bias=False))
    for layer in (p for p in parts if isinstance(p, nn.Linear)):  # Haiku's: a normal of std 1 / sqrt(fan-in), cut at 2
        std = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """Backbone and projector, shared by online and target network: [n, 3, H, W] -> projections [n, D]."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int, layers: int = 2):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, hidden_dim, projector_dim, layers)
        self.width = projector_dim if layers else backbone.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class Online(nn.Module):
    """Encoder and predictor: views -> predictions [n, D] of each. One pass per view: BatchNorm never mixes the two."""

    def __init__(self, encoder: Encoder, hidden_dim: int, predictor: bool = True):
        super().__init__()
        self.encoder = encoder
        self.predictor = mlp(encoder.width, hidden_dim, encoder.width) if predictor else nn.Identity()

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.predictor(self.encoder(view)) for view in views]


def compute_loss(online: nn.Module, target: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's images and what is logged of it; views: two [n, 3, S, S]."""
    with torch.no_grad():
        z1, z2 = (target(view) for view in views)  # [n, D]
    p1, p2 = online(*views)  # [n, D]
    return byol_loss(p1, p2, z1, z2)


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- networks --------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec(zero_init_last=cfg.zero_init_last)
    encoder = Encoder(create_backbone(spec), cfg.hidden_dim, cfg.projector_dim, cfg.projector_layers)
    session.init_from(encoder.backbone)
    online = session.place(Online(encoder, cfg.hidden_dim, cfg.predictor), sync_bn=cfg.sync_bn)
    # The target is copied after the norms are converted, and stays outside of DistributedDataParallel: all processes
    # start from one seed and apply the same averages, so their targets agree to the bit. It stays in train mode
    # (statistics of the batch) with separate running buffers.
    target = make_teacher(online.encoder).to(session.device)
    backbone = online.encoder.backbone
    session.speed_up(backbone, target.backbone, checkpointed=backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedules -----------------------------------------------------------------------------------
    groups = decay_groups(online, cfg.weight_decay)  # no decay, no adaptation for biases and norms
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-outside")
    online, unwrapped, optimizer = session.prepare(online, optimizer)
    total_steps = session.total_steps
    warmup_steps = int(cfg.warmup_epochs * len(session.train) / cfg.batch_size)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        target=target,
        optimizer=optimizer,
    )
    online.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=peak_lr, total=total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        ema_momentum = cosine_schedule(step, base=cfg.ema_momentum, final=1.0, total=total_steps)  # no warm-up

        views = session.views(step)  # two [n, 3, S, S]
        with session.autocast():
            loss, parts = compute_loss(online, target, views)
        optimizer.zero_grad(set_to_none=True)
        session.backward(cfg.loss_weight * loss)
        optimizer.step()
        ema_update(target, unwrapped.encoder, ema_momentum)  # after the step, from the new weights; parameters only
        session.log(loss=loss.detach(), **parts, lr=lr, ema_momentum=ema_momentum)
        session.online_knn(step, unwrapped.encoder.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.encoder.backbone, spec)  # the online network is the paper's result
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (4.0, "unrelated directions")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
