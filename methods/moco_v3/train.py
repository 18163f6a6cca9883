"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al. 2021, arXiv:2104.02057).

Recognize, from a prediction of one view, the other view of the same image among those of the whole batch, encoded by a
slowly following network. No queue. In ViTs the patch projection stays random: its gradient makes training unstable.

    python -m methods.moco_v3.train quickstart                 # embedded data, minutes on two cores
    python -m methods.moco_v3.train cifar10-r18                # solo-learn's recipe: 93.1 % online linear
    accelerate launch -m methods.moco_v3.train imagenet-vits   # official code: 73.2 % linear, batch 4096, 300 epochs
    python -m methods.moco_v3.train                            # all presets; add --plan to any to see before you run
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import named_apply
from timm.models.vision_transformer import init_weights_vit_moco
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone
from common.cli import parse, run_cli
from common.ema import ema_update, make_teacher
from common.health import feature_std
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from common.vit import fix_sincos_positions, freeze_patch_projection, is_vit
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import moco_v3

METHOD = Path(__file__).parent.name


def mlp(layers: int, width: int, hidden: int, out: int, norm: bool = True) -> nn.Sequential:
    """Linear layers without bias, BatchNorm and ReLU between; `norm`: BatchNorm without scale and shift at the end."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    if layers:
        parts.append(nn.Linear(width, out, bias=False))
    if layers and norm:
        parts.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """Backbone and projector, shared by base and momentum encoder: [n, 3, H, W] -> projections [n, D]."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int, layers: int):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(layers, backbone.num_features, hidden_dim, projector_dim)
        self.width = projector_dim if layers else backbone.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class Base(nn.Module):
    """Base encoder and predictor: views -> predictions [n, D] of each. One pass per view, each with its statistics."""

    def __init__(self, encoder: Encoder, hidden_dim: int, predictor_norm: bool):
        super().__init__()
        self.encoder = encoder
        self.predictor = mlp(2, encoder.width, hidden_dim, encoder.width, predictor_norm)

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.predictor(self.encoder(view)) for view in views]


def build(cfg: Config) -> tuple[Encoder, BackboneSpec]:
    """The encoder and the description of its backbone."""
    spec = cfg.resnet_spec(arguments=cfg.vit_arguments())
    backbone = create_backbone(spec)
    if is_vit(cfg.backbone):  # Xavier uniform, queries, keys and values as three matrices (code vits.py)
        named_apply(init_weights_vit_moco, backbone)
    if cfg.frozen_patch_projection:
        freeze_patch_projection(backbone)
    if cfg.sincos_positions:
        fix_sincos_positions(backbone)
    return Encoder(backbone, cfg.hidden_dim, cfg.projector_dim, cfg.projector_layers), spec


def parameter_groups(model: nn.Module, optimizer: str, weight_decay: float) -> list[dict]:
    """AdamW decays every parameter that is trained; LARS neither decays nor adapts biases and norms (code)."""
    if optimizer == "adamw":
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    return decay_groups(model, weight_decay)


def compute_loss(
    base: nn.Module, momentum_encoder: nn.Module, views: Sequence[Tensor], cfg: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's images against the keys of all, and what is logged of it; views: two [n, 3, S, S]."""
    q1, q2 = base(*views)  # [n, D]
    with torch.no_grad():
        k1, k2 = (momentum_encoder(view) for view in views)  # [n, D]
    loss, parts = moco_v3(q1, q2, k1, k2, cfg.temperature)
    return loss, {**parts, "prediction_std": (feature_std(q1) + feature_std(q2)) / 2}


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- networks --------------------------------------------------------------------------------------------------
    encoder, spec = build(cfg)
    session.init_from(encoder.backbone)
    base = session.place(Base(encoder, cfg.hidden_dim, cfg.predictor_norm), sync_bn=cfg.sync_bn)
    # Copied after the norms are converted and outside of DistributedDataParallel: all processes start from one seed and
    # apply the same averages, so their copies agree to the bit. In train mode, with running buffers of its own.
    momentum_encoder = make_teacher(base.encoder).to(session.device)
    backbone = base.encoder.backbone
    session.speed_up(
        backbone, momentum_encoder.backbone, checkpointed=backbone if cfg.activation_checkpointing else None
    )

    # ---- optimizer and schedules -----------------------------------------------------------------------------------
    groups = parameter_groups(base, cfg.optimizer, cfg.weight_decay)
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-outside")
    base, unwrapped, optimizer = session.prepare(base, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "negatives": f"{cfg.batch_size - 1}",
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(cfg.batch_size, cfg.temperature, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        momentum_encoder=momentum_encoder,
        optimizer=optimizer,
    )
    base.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=peak_lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        ema_momentum = cosine_schedule(step, base=cfg.ema_momentum, final=1.0, total=session.total_steps)
        views = session.views(step)  # two [n, 3, S, S]

        ema_update(momentum_encoder, unwrapped.encoder, ema_momentum)  # before the keys; parameters only
        with session.autocast():
            loss, parts = compute_loss(base, momentum_encoder, views, cfg)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        gradient_norm = session.accelerator.clip_grad_norm_(base.parameters(), math.inf)  # clips nothing
        optimizer.step()
        session.log(loss=loss.detach(), **parts, gradient_norm=gradient_norm, lr=lr, ema_momentum=ema_momentum)
        session.online_knn(step, unwrapped.encoder.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.encoder.backbone, spec)  # the base encoder
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (chance_level(cfg.batch_size, cfg.temperature), "chance level, 4 T ln B")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
