"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al. 2021, arXiv:2104.14294).

A student, given all crops of an image, predicts its own moving average's centered, sharpened output on two of them.

    python -m methods.dino.train quickstart                    # embedded data, minutes on two cores
    python -m methods.dino.train cifar10-r18                   # solo-learn's recipe: 89.5 % online linear
    accelerate launch -m methods.dino.train imagenet-vits-100  # official README: kNN 69.3 %, linear 74.0 %
    accelerate launch -m methods.dino.train imagenet-vits      # the paper: kNN 74.5 %, linear 77.0 %, batch 1024
    python -m methods.dino.train                               # all presets; add --plan to any to see before you run
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone
from common.cli import parse, run_cli
from common.ema import ema_update, make_teacher
from common.health import feature_std
from common.optim import build_optimizer, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr
from common.vit import StochasticDepth, fix_sincos_positions, freeze_patch_projection, layer_groups
from eval.session import ImageSession

from .attention import attention_section
from .augment import multi_crop
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import GLOBAL_VIEWS, dino_loss, teacher_temperature, update_center
from .model import DINO, DINOHead

METHOD = Path(__file__).parent.name


def build(cfg: Config) -> tuple[DINO, BackboneSpec]:
    """The student without stochastic depth, which is also the first teacher, and the description of its backbone.

    Raises UserError where sizes or options do not fit the backbone.
    """
    sizes = (cfg.image_size, cfg.local_size) if cfg.local_views else (cfg.image_size,)
    arguments = cfg.vit_arguments(sizes, layer_scale=cfg.layer_scale, qk_norm=cfg.qk_norm)
    spec = cfg.resnet_spec(zero_init_last=False, arguments=arguments, sizes=sizes)
    backbone = create_backbone(spec)
    if cfg.frozen_patch_projection:
        freeze_patch_projection(backbone)
    if cfg.sincos_positions:
        fix_sincos_positions(backbone)
    head = DINOHead(
        backbone.num_features,
        cfg.out_dim,
        hidden=cfg.hidden_dim,
        bottleneck=cfg.bottleneck_dim,
        layers=cfg.head_layers,
        batch_norm=cfg.head_bn,
        norm_last_layer=cfg.norm_last_layer,
    )
    return DINO(backbone, head), spec


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale every gradient separately down to norm `limit` (code: clip_gradients), not their global norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp_max(1.0).unbind()))


def compute_loss(
    student: nn.Module, teacher: nn.Module, views: Sequence[Tensor], temperature: float, cfg: Config
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of this process's images, what is logged of it, and the teacher's outputs [2n, K] for the center.

    views: two global [n, 3, S, S], then `local_views` of [n, 3, s, s]; temperature: the teacher's.
    """
    with torch.no_grad():
        targets = teacher(views[:GLOBAL_VIEWS])  # [2n, K]
    outputs = student(views)  # [V * n, K]
    loss, parts = dino_loss(
        outputs,
        targets,
        teacher.center if cfg.centering == "mean" else None,
        student_temperature=cfg.student_temperature,
        teacher_temperature=temperature,
    )
    return loss, {**parts, "feature_std": feature_std(targets)}, targets


def main(preset: str, cfg: Config) -> None:
    cfg.check()
    session = ImageSession(cfg, METHOD, preset, PRESETS, multi_crop(cfg), published=PUBLISHED)

    # ---- networks --------------------------------------------------------------------------------------------------
    student, spec = build(cfg)
    session.init_from(student.backbone)
    student = session.place(student, sync_bn=cfg.sync_bn)
    teacher = make_teacher(student).to(session.device)  # before stochastic depth, so that it has none; in train mode
    teacher.register_buffer("center", torch.zeros(cfg.out_dim, device=session.device))  # saved with the teacher
    student.stochastic_depth = StochasticDepth(
        student.backbone, cfg.drop_path, seed=cfg.seed, views=GLOBAL_VIEWS + cfg.local_views, batch_size=cfg.batch_size
    )
    checkpointed = student.backbone if cfg.activation_checkpointing else None
    session.speed_up(student.backbone, teacher.backbone, checkpointed=checkpointed)

    # ---- optimizer and schedules -----------------------------------------------------------------------------------
    # As in DINO's code: no decay for 1-D tensors only, so positions and CLS token are decayed.
    groups = layer_groups(decay_groups(student, cfg.weight_decay), student.backbone, cfg.layer_decay)
    optimizer = build_optimizer(cfg.optimizer, groups, momentum=cfg.momentum)
    student, unwrapped, optimizer = session.prepare(student, optimizer)
    total_steps = session.total_steps
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(cfg.out_dim, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        teacher=teacher,
        optimizer=optimizer,
    )
    student.train()
    for step in session.steps():
        epoch = step // session.steps_per_epoch
        lr = cosine_schedule(
            step, base=peak_lr, final=cfg.min_lr, total=total_steps, warmup=warmup_steps, endpoint=True
        )
        set_lr(optimizer, lr)
        decay = cosine_schedule(step, base=cfg.weight_decay, final=cfg.weight_decay_end, total=total_steps)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["adapt"] else 0.0  # "adapt" marks the tensors with ndim > 1
        ema_momentum = cosine_schedule(step, base=cfg.ema_momentum, final=1.0, total=total_steps)
        temperature = teacher_temperature(
            epoch,
            start=cfg.warmup_teacher_temperature,
            final=cfg.teacher_temperature,
            warmup_epochs=cfg.warmup_teacher_epochs,
        )

        views = session.views(step)  # two global [n, 3, S, S], then local [n, 3, s, s]
        unwrapped.stochastic_depth.draw(step, session.device)
        with session.autocast():
            loss, parts, targets = compute_loss(student, teacher, views, temperature, cfg)
        if cfg.centering == "mean":
            update_center(teacher.center, targets, cfg.center_momentum)  # after the loss, which used the old one

        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        if cfg.clip:
            session.accelerator.unscale_gradients(optimizer)
            clip_each(unwrapped.parameters(), cfg.clip)
        if epoch < cfg.freeze_last_layer:
            for parameter in unwrapped.head.last_layer.parameters():
                parameter.grad = None  # not zero: AdamW would still decay it
        optimizer.step()
        ema_update(teacher, unwrapped, ema_momentum)
        session.log(loss=loss.detach(), **parts, temperature=temperature, lr=lr)
        session.online_knn(step, teacher.backbone, spec)

    # ---- evaluation (of the teacher) -------------------------------------------------------------------------------
    session.export(teacher.backbone, spec)
    if session.evaluates:
        chance = chance_level(cfg.out_dim)
        session.evaluate(
            signals=SIGNALS,
            references={"loss": (chance, "ln K"), "teacher_entropy": (chance, "ln K: uniform")},
            extra_sections=attention_section(session.run.directory, session.test),
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
