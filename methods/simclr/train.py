"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv:2002.05709).

Two random views of each image; every projection must find its partner among the 2B - 1 others of the batch.

    python -m methods.simclr.train quickstart                  # embedded data, minutes on two cores
    python -m methods.simclr.train cifar10-r18                 # official README command: about 91 % linear
    accelerate launch -m methods.simclr.train imagenet-r50     # the paper: 69.3 % linear, batch 4096, 1000 epochs
    python -m methods.simclr.train                             # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.health import feature_std
from common.memory import grad_cache_backward, uses_batch_statistics
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import nt_xent

METHOD = Path(__file__).parent.name


class SimCLR(nn.Module):
    """Backbone and projector: images [N, 3, H, W] -> projections [N, projector_dim], not normalized.

    `layers` 0: no projector, the features themselves.
    """

    def __init__(self, backbone: nn.Module, projector_dim: int, norm: str = "batch", layers: int = 2):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
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
        return self.projector(self.backbone(images))


def contrast(z1: Tensor, z2: Tensor, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's images and what is logged of it; z1, z2: projections [n, D]."""
    loss, parts = nt_xent(z1, z2, cfg.temperature, decoupled=cfg.decoupled)
    return cfg.loss_weight * loss, {**parts, "projection_std": feature_std(torch.cat([z1, z2]).detach())}


def compute_loss(model: nn.Module, views: Sequence[Tensor], cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """`contrast` of two views [n, 3, S, S]."""
    z1, z2 = model(torch.cat(list(views))).chunk(2)  # both views in one pass: BatchNorm over 2B rows
    return contrast(z1, z2, cfg)


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)
    cfg.check_micro_batch(session.local_batch)

    # ---- network ---------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec(norm=cfg.norm)
    model = SimCLR(create_backbone(spec), cfg.projector_dim, cfg.norm, cfg.projector_layers)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    groups = decay_groups(model, cfg.weight_decay)  # no decay, no adaptation for biases and norms
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
    if cfg.micro_batch and uses_batch_statistics(model):
        session.print(
            f"--micro-batch with BatchNorm: statistics are taken over {cfg.micro_batch} images, as "
            f"{session.local_batch // cfg.micro_batch} processes without SyncBN would; the gradient is not the whole "
            "batch's. --activation-checkpointing is exact."
        )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=peak_lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        views = session.views(step)  # two [n, 3, S, S]

        optimizer.zero_grad(set_to_none=True)
        if cfg.micro_batch:  # the whole batch's negatives in the memory of a part of it
            loss, parts = grad_cache_backward(
                model,
                views,
                partial(contrast, cfg=cfg),
                cfg.micro_batch,
                backward=session.backward,
                no_sync=session.no_sync,
                seed=step,
            )
        else:
            loss, parts = compute_loss(model, views, cfg)
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
