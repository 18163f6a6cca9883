"""AMDIM: Learning Representations by Maximizing Mutual Information Across Views (Bachman et al. 2019, 1906.00910).

From the global and a local feature of one view, identify the local features of the image's other view among those of
all other images, at two scales; small receptive fields of the local features keep that from being trivial.

    python -m methods.amdim.train quickstart                   # embedded data, minutes on two cores
    python -m methods.amdim.train cifar10                      # the code's defaults for one GPU
    accelerate launch -m methods.amdim.train imagenet-128      # the paper: 68.1 % linear with the large encoder
    python -m methods.amdim.train                              # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, custom_encoder_spec
from common.cli import parse, run_cli
from common.errors import UserError
from common.optim import set_lr
from common.rng import generator
from common.transfer import to_device
from eval.session import ImageSession

from .augment import statistics, two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import chance, draw_positions, effective_dimensions, multi_scale, probe_loss
from .model import AMDIM, Encoder, Probes
from .report import held_out, held_out_row, held_out_section

METHOD = Path(__file__).parent.name


def build(cfg: Config, classes: int = 0) -> tuple[AMDIM, BackboneSpec]:
    """The network, with online probes for that many classes, and the description of its encoder.

    Raises UserError where sizes do not fit each other.
    """
    mean, std = statistics(cfg.normalize)
    spec = custom_encoder_spec(
        Encoder,
        arguments={
            "image_size": cfg.image_size,
            "ndf": cfg.ndf,
            "n_rkhs": cfg.n_rkhs,
            "n_depth": cfg.n_depth,
            "hidden_bn": cfg.hidden_bn,
        },
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    return AMDIM(create_backbone(spec), hidden_bn=cfg.hidden_bn, classes=classes), spec


def learning_rate(step: int, cfg: Config, steps_per_epoch: int) -> float:
    """Linear warm-up from lr / warmup_steps, then lr times 0.2 for every milestone (in epochs) that is passed."""
    passed = sum(step >= epoch * steps_per_epoch for epoch in cfg.milestones)
    return cfg.lr * 0.2**passed * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))


def draw_noise(cfg: Config, step: int) -> Tensor:
    """Dropout noise of the online probes, [2, B, R + hidden], of the global batch."""
    return torch.rand(2, cfg.batch_size, cfg.n_rkhs + Probes.hidden, generator=generator(cfg.seed, "probes", step))


def compute_loss(
    model: nn.Module,
    views: Sequence[Tensor],
    positions: Tensor,
    cfg: Config,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimize, and what is logged: AMDIM's `loss` (without online probes) and the signals.

    views: two [n, 3, S, S]; positions: long [2, n], sources of the pair 5-5; noise and labels: [2n, R + hidden] and
    long [n], with online probes.
    """
    f1, f5, f7, logits = model(*views, noise)  # [2, n, R], [2, n, 25, R], [2, n, 49, R]
    loss, parts = multi_scale(f1, f5, f7, positions, clip=cfg.clip, penalty=cfg.penalty)
    parts = {"loss": loss.detach()} | parts
    if noise is not None:
        probes, online = probe_loss(logits, labels)
        loss, parts = loss + probes, parts | online
    return loss, parts | {"dimensions": effective_dimensions(f1[0].detach())}


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), split=cfg.split, published=PUBLISHED)
    train, classes = session.train, 0
    if cfg.online_probes:
        if train.labels is None or int(train.labels.max()) < 0:
            raise UserError(f"--online-probes needs labels, and the training images of {train.name!r} have none")
        classes = max(int(train.labels.max()) + 1, len(train.class_names or ()))

    # ---- network ---------------------------------------------------------------------------------------------------
    model, spec = build(cfg, classes)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model.backbone.to7, model.backbone.to5, model.backbone.to1)

    # ---- optimizer -------------------------------------------------------------------------------------------------
    # One group: the code decays biases and BatchNorm too. Adam's own decay is coupled (added to the gradient).
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=cfg.betas, eps=1e-8, weight_decay=cfg.weight_decay)
    model, unwrapped, optimizer = session.prepare(model, optimizer)

    # ---- training --------------------------------------------------------------------------------------------------
    levels = chance(cfg.batch_size)
    session.start(
        plan={
            "negatives": f"{cfg.batch_size - 1} images",
            "loss by chance": f"{levels['loss']:.2f}, which bounds what can be learned: larger batches raise it",
            "warm-up": f"{cfg.warmup_steps} steps",
        },
        checks=health_checks(cfg, session.steps_per_epoch, session.total_steps),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = learning_rate(step, cfg, session.steps_per_epoch)
        set_lr(optimizer, lr)
        views = session.views(step)  # two [n, 3, S, S]
        positions = draw_positions(cfg.seed, step, cfg.batch_size)[:, session.local_slice]  # [2, n]
        positions = to_device(positions, session.device)
        noise = labels = None
        if classes:
            noise = draw_noise(cfg, step)[:, session.local_slice].flatten(0, 1)  # [2n, R + hidden]
            noise = to_device(noise, session.device)
            labels = to_device(train.labels[session.loader.indices(step)], session.device)  # [n]

        loss, parts = compute_loss(model, views, positions, cfg, noise, labels)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(**parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        found = held_out(unwrapped, session.test, session.recipe, cfg, session.device)
        text = ", ".join(f"{name} {found[name]:.4g} (chance {level:.4g})" for name, level in levels.items())
        session.print(f"held-out images: {text}")
        session.evaluate(
            signals=SIGNALS,
            references={name: (level, "chance level") for name, level in levels.items()},
            extra_rows=[held_out_row(found)],
            extra_sections=[held_out_section(found)],
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
