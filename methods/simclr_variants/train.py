"""SimCLR with what its paper has not: ViTs with stability tricks, and the loss on a part of the features (DirectCLR).

A fork of methods/simclr for the studies of stability and of projectors; the update is the same.

    python -m methods.simclr_variants.train quickstart               # embedded data, ViT, minutes on two cores
    python -m methods.simclr_variants.train directclr                # arXiv:2110.09348: no projector, a subvector
    python -m methods.simclr_variants.train                          # all presets; add --plan to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone
from common.cli import parse, run_cli
from common.errors import UserError
from common.health import feature_std
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from common.vit import StochasticDepth, fix_sincos_positions, freeze_patch_projection, is_vit, layer_groups
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import nt_xent

METHOD = Path(__file__).parent.name


class SimCLR(nn.Module):
    """Backbone and projector: images [N, 3, H, W] -> projections [N, projector_dim], not normalized.

    `layers` 0: no projector, the features themselves, or the first `subvector` of them.
    """

    def __init__(self, backbone: nn.Module, projector_dim: int, norm: str, layers: int = 2, subvector: int = 0):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        if subvector and (layers or not 0 < subvector <= width):
            raise UserError(f"--subvector takes 1 to {width} of the features and needs --projector-layers 0")
        self.subvector = subvector or width
        norm_layer = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        # Code model_util.py: no bias before a norm, a norm on the output too, but without shift; weights N(0, 0.01).
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(width, width, bias=False), norm_layer(width), nn.ReLU(inplace=True)]
        if layers:
            parts += [nn.Linear(width, projector_dim, bias=False), norm_layer(projector_dim)]
            parts[-1].bias.requires_grad_(False)
        self.projector = nn.Sequential(*parts)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.projector(features) if len(self.projector) else features[:, : self.subvector]


def build(cfg: Config) -> tuple[SimCLR, BackboneSpec]:
    """The network and the description of its backbone."""
    norm = "batch" if is_vit(cfg.backbone) else cfg.norm  # a ViT has LayerNorm
    arguments = cfg.vit_arguments(layer_scale=cfg.layer_scale, qk_norm=cfg.qk_norm)
    spec = cfg.resnet_spec(norm=norm, arguments=arguments)
    backbone = create_backbone(spec)
    if cfg.frozen_patch_projection:
        freeze_patch_projection(backbone)
    if cfg.sincos_positions:
        fix_sincos_positions(backbone)
    return SimCLR(backbone, cfg.projector_dim, cfg.norm, cfg.projector_layers, cfg.subvector), spec


def compute_loss(
    model: nn.Module, depth: StochasticDepth, views: Sequence[Tensor], cfg: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's images and what is logged of it; views: two [n, 3, S, S]."""
    depth.select(first=0, count=2)
    z1, z2 = model(torch.cat(list(views))).chunk(2)  # both views in one pass: BatchNorm over 2B rows
    loss, parts = nt_xent(z1, z2, cfg.temperature)
    return cfg.loss_weight * loss, {**parts, "projection_std": feature_std(torch.cat([z1, z2]).detach())}


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    model, spec = build(cfg)
    depth = StochasticDepth(model.backbone, cfg.drop_path, seed=cfg.seed, views=2, batch_size=cfg.batch_size)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    groups = layer_groups(decay_groups(model, cfg.weight_decay), model.backbone, cfg.layer_decay)
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum, lars_form="lr-inside")
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * len(session.train) / cfg.batch_size)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, cfg.lr_scaling)

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "negatives": f"{2 * cfg.batch_size - 2}",
            "peak learning rate": f"{peak_lr:.4g} ({cfg.lr_scaling} scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(cfg.batch_size, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=peak_lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        views = session.views(step)  # two [n, 3, S, S]

        optimizer.zero_grad(set_to_none=True)
        depth.draw(step, session.device)
        loss, parts = compute_loss(model, depth, views, cfg)
        session.backward(loss)
        if cfg.clip:
            session.accelerator.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        session.log(loss=loss / cfg.loss_weight, **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (chance_level(cfg.batch_size), "chance level, ln(2B - 1)")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
