"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (Assran et al. 2023,
arXiv:2301.08243).

From one block of an image, predict the EMA encoder's features of four other blocks of the same image.

    python -m methods.ijepa.train quickstart                   # embedded data, minutes on one core
    python -m methods.ijepa.train cifar10-vit                  # not a published recipe
    accelerate launch -m methods.ijepa.train imagenet-vith     # the paper: 79.3 % linear, 16 GPUs, under 72 hours
    python -m methods.ijepa.train                              # all presets; add --plan to any to see before you run
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone
from common.cli import parse, run_cli
from common.ema import ema_update, make_teacher
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.schedules import cosine_schedule
from common.transfer import to_device
from common.vit import is_vit
from eval.session import ImageSession

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .figure import mask_section
from .health import SIGNALS, health_checks
from .loss import blocks_of, moments, normalize, prediction_error, signals
from .masking import BlockMasks
from .model import IJEPA

METHOD = Path(__file__).parent.name


def build(cfg: Config) -> tuple[IJEPA, BackboneSpec]:
    """The trained networks and the description of the encoder. Raises UserError where sizes do not fit each other."""
    if not is_vit(cfg.backbone):
        raise UserError(f"I-JEPA drops patches, so it needs a ViT of timm: --backbone vit_..., not {cfg.backbone}")
    spec = cfg.vit_spec(class_token=False, global_pool="avg", fc_norm=False)  # the norm, then the mean (paper App. A)
    model = IJEPA(
        create_backbone(spec),
        predictor_dim=cfg.predictor_dim,
        predictor_depth=cfg.predictor_depth,
        predictor_heads=cfg.predictor_heads,
        patch_std=cfg.patch_std,
        rescale_init=cfg.rescale_init,
    )
    return model, spec


def masks_of(cfg: Config, grid: tuple[int, int]) -> BlockMasks:
    """The block masks on a grid of patches. Raises UserError for ranges that no block can have."""
    for name in ("target_scale", "target_aspect", "context_scale"):
        low, high = getattr(cfg, name)
        if not 0 < low <= high or (name != "target_aspect" and high > 1):
            limit = "0 < low <= high" + (" <= 1" if name != "target_aspect" else "")
            raise UserError(f"--{name.replace('_', '-')} {low:g} {high:g}: needed is {limit}")
    return BlockMasks(
        *grid,
        blocks=cfg.blocks,
        min_keep=cfg.min_keep,
        target_scale=cfg.target_scale,
        target_aspect=cfg.target_aspect,
        context_scale=cfg.context_scale,
    )


def compute_loss(
    model: nn.Module, target: nn.Module, images: Tensor, context: Tensor, targets: Tensor, kind: str
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """The loss of images [m, 3, S, S], its `moments`, and the target encoder's mean tokens [m, D].

    context [m, C] and targets [m, M, T]: patches the context encoder sees, and those of the blocks to predict.
    """
    with torch.no_grad():
        tokens = target(images)  # [m, L, D] of the whole image: blocks are cut from the output, not the input
    goals = normalize(tokens)
    predictions = model(images, context, targets)  # [m, M, T, D]
    loss = prediction_error(predictions, blocks_of(goals, targets), kind)
    return loss, moments(predictions, goals, targets), tokens.mean(1)


def main(preset: str, cfg: Config) -> None:
    # ---- networks (before the data: a patch that does not fit is reported first) -----------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg)
    masks = masks_of(cfg, model.encoder.backbone.patch_embed.grid_size)
    masks.check()  # blocks that leave no context: reported now, not at some step
    if cfg.schedule_scale < 1:
        raise UserError(f"--schedule-scale {cfg.schedule_scale}: schedules that end before the run would turn around")

    session = ImageSession(cfg, METHOD, preset, PRESETS, one_view(cfg), published=PUBLISHED)
    session.init_from(model.encoder.backbone)
    target = make_teacher(model.encoder).to(session.device)  # before DDP, from one seed: the same in all processes
    if cfg.compile:  # context lengths change from step to step
        model.compile(dynamic=True)
        target.compile()
    micro_batch = cfg.micro_batch or session.local_batch
    if session.local_batch % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} does not divide the {session.local_batch} images of a process")

    # ---- optimizer and schedules -----------------------------------------------------------------------------------
    # As the code: no decay for 1-D tensors; the mask token has three dimensions and is decayed. No clipping.
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0, betas=cfg.betas)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    horizon = int(cfg.schedule_scale * session.total_steps)  # where the schedules end

    # ---- training --------------------------------------------------------------------------------------------------
    target_size, context_size = masks.sizes(cfg.seed, 0)
    session.start(
        plan={
            "warm-up": f"{warmup_steps} steps",
            "patches": f"{masks.rows} x {masks.columns} of {target.backbone.patch_embed.patch_size[0]} px",
            "first masks": f"targets of {target_size[0]} x {target_size[1]}, context block of {context_size[0]} x "
            f"{context_size[1]}",
        },
        checks=health_checks(warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        target=target,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        # step + 1: the code moves its rate and decay before they are used, its momentum after.
        lr = cosine_schedule(
            step + 1, base=cfg.lr, total=horizon, warmup=warmup_steps, start=cfg.start_lr, final=cfg.end_lr
        )
        set_lr(optimizer, lr)
        weight_decay = cosine_schedule(step + 1, base=cfg.weight_decay, final=cfg.weight_decay_end, total=horizon)
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay if group["adapt"] else 0.0  # "adapt" marks the tensors with ndim > 1
        ema_momentum = cfg.ema_momentum + step / horizon * (cfg.ema_momentum_end - cfg.ema_momentum)

        (images,) = session.loader(step).views  # [n, 3, S, S]
        context, targets = (
            to_device(ids[session.local_slice], session.device) for ids in masks.draw(cfg.batch_size, cfg.seed, step)
        )  # [n, C], [n, M, T]

        optimizer.zero_grad(set_to_none=True)
        losses, parts, pooled = [], [], []  # one entry per micro-batch
        for chunk in zip(*(x.split(micro_batch) for x in (images, context, targets)), strict=True):
            last = len(losses) == session.local_batch // micro_batch - 1
            with nullcontext() if last else session.no_sync(model):
                with session.autocast():
                    loss, chunk_moments, features = compute_loss(model, target, *chunk, cfg.loss)
                session.backward(loss * (micro_batch / session.local_batch))
            losses.append(loss.detach())
            parts.append(chunk_moments)
            pooled.append(features)
        optimizer.step()
        ema_update(target, unwrapped.encoder, ema_momentum)  # after the step, from the new weights
        session.log(
            loss=torch.stack(losses).mean(),
            **signals(parts, targets),
            feature_std=feature_std(torch.cat(pooled)),
            context_patches=context.shape[1],
            lr=lr,
            weight_decay=weight_decay,
            ema_momentum=ema_momentum,
        )
        session.online_knn(step, target.backbone, spec)

    # ---- evaluation (of the target encoder) ------------------------------------------------------------------------
    session.export(target.backbone, spec)
    if session.evaluates:
        session.evaluate(
            signals=SIGNALS,
            references={"relative_error": (1.0, "the mean of the same patch")},
            extra_sections=mask_section(session.test, cfg.image_size, masks, cfg.seed),
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
