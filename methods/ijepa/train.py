"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (Assran et al. 2023,
arXiv:2301.08243).

From one part of an image predict what a slow copy of the encoder, which saw all of it, says of four other parts.

    python -m methods.ijepa.train quickstart                   # embedded data, minutes on one core
    python -m methods.ijepa.train cifar10-vit                  # nobody's recipe
    accelerate launch -m methods.ijepa.train imagenet-vith     # the paper: 79.3 % linear, 16 GPUs, under 72 hours
    python -m methods.ijepa.train                              # all presets; add --plan to any to see before you run
"""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank
from common.ema import ema_update, make_teacher
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from common.vit import is_vit, vit_arguments
from eval.finish import finish, online_knn

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .figure import mask_section
from .loss import blocks_of, health, moments, normalised, prediction_error
from .masking import BlockMasks
from .model import IJEPA

METHOD = Path(__file__).parent.name
SIGNALS = {
    "loss": "distance of predicted from target features; it may rise while they become richer, and be 0 in a collapse",
    "relative_error": "squared error over that of the batch's mean at the same place; 1: the context is of no use",
    "target_std": "spread over images of the target features of one place: 1 at most, 0 if all images get the same",
    "feature_std": "spread of the target encoder's mean token over the sphere: 0 if all images get the same",
    "context_patches": "patches that the context encoder sees, the same number of every image of a step",
}


def build(cfg: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[IJEPA, BackboneSpec]:
    """The trained networks and the description of the encoder. Raises UserError where sizes do not fit each other."""
    if not is_vit(cfg.backbone):
        raise UserError(f"I-JEPA drops patches, so it needs a ViT of timm: --backbone vit_..., not {cfg.backbone}")
    shape = dict(patch_size=cfg.patch_size, width=cfg.width, depth=cfg.depth, heads=cfg.heads)
    arguments = vit_arguments(cfg.backbone, sizes=(cfg.image_size,), **shape)
    arguments |= dict(class_token=False, global_pool="avg", fc_norm=False)  # the norm, then the mean (paper App. A)
    spec = BackboneSpec(cfg.backbone, arguments=arguments, image_size=cfg.image_size, mean=mean, std=std)
    sizes = dict(predictor_dim=cfg.predictor_dim, predictor_depth=cfg.predictor_depth)
    start = dict(patch_std=cfg.patch_std, rescale_init=cfg.rescale_init)
    return IJEPA(create_backbone(spec), **sizes, predictor_heads=cfg.predictor_heads, **start), spec


def masks_of(cfg: Config, grid: tuple[int, int]) -> BlockMasks:
    ranges = dict(target_scale=cfg.target_scale, target_aspect=cfg.target_aspect, context_scale=cfg.context_scale)
    for name, (low, high) in ranges.items():
        if not 0 < low <= high or (name != "target_aspect" and high > 1):
            limit = "0 < low <= high" + (" <= 1" if name != "target_aspect" else "")
            raise UserError(f"--{name.replace('_', '-')} {low:g} {high:g}: needed is {limit}")
    if cfg.blocks < 1 or cfg.min_keep < 1:
        raise UserError(f"--blocks {cfg.blocks} and --min-keep {cfg.min_keep} must be at least 1")
    return BlockMasks(*grid, blocks=cfg.blocks, min_keep=cfg.min_keep, **ranges)


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    torch.use_deterministic_algorithms(cfg.deterministic)
    micro_batch = cfg.micro_batch or local_batch
    if local_batch % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} does not divide the {local_batch} images of each process")

    # ---- model (before the data: a patch that does not fit is then told at once) -----------------------------------
    mean, std = mean_std(cfg.normalize)
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg, mean, std)
    masks = masks_of(cfg, model.encoder.backbone.patch_embed.grid_size)
    masks.check()  # blocks that leave no context: told now, not at some step
    target = make_teacher(model.encoder).to(device)  # before DDP, from one seed: the same on all ranks
    if cfg.compile:
        model.compile(dynamic=True)
        target.compile()

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    crop = dict(crop_scale=cfg.crop_scale, flip=cfg.flip, interpolation=cfg.interpolation)
    recipe = one_view(cfg.image_size, **crop, mean=mean, std=std, compile=cfg.compile)
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)
    part = slice(accelerator.process_index * local_batch, (accelerator.process_index + 1) * local_batch)

    # ---- optimiser and schedules -----------------------------------------------------------------------------------
    # As the code: no decay for 1-D tensors; the mask token has three dimensions and is decayed. No clipping.
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0, betas=cfg.betas)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    if cfg.schedule_scale < 1:
        raise UserError(f"--schedule-scale {cfg.schedule_scale}: schedules that end before the run would turn around")
    horizon = int(cfg.schedule_scale * total_steps)  # where the schedules end
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "patches": f"{masks.rows} x {masks.columns} of {target.backbone.patch_embed.patch_size[0]} px",
            "first masks": "targets of {} x {}, context block of {} x {}".format(*sum(masks.sizes(cfg.seed, 0), ())),
            "views": recipe.describe(),
        },
    )
    settled = max(warmup_steps + loader.steps_per_epoch, 500)
    run.watch(
        Watch(
            "target_std",
            below=0.05,
            after=settled,
            message="The target encoder says the same of every image: collapse, however low the loss. Raise "
            "--ema-momentum, lower --lr or warm up longer.",
        ),
        Watch(
            "relative_error",
            above=0.98,
            after=settled,
            message="Target blocks are predicted no better than by the mean of the same place: the context is of no "
            "use. Try another learning rate, smaller --target-scale, or more steps.",
        ),
    )
    run.resume(model=plain, target=target, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    def loss_of(images: Tensor, context: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The loss of a micro-batch, its `moments`, and the target encoder's mean tokens [m, D]."""
        with torch.no_grad(), accelerator.autocast():
            tokens = target(images)  # [m, L, D] of the whole image: blocks are cut from the output, not the input
        goals = normalised(tokens)
        predictions = model(images, context, targets)  # [m, M, T, D]
        loss = prediction_error(predictions, blocks_of(goals, targets), cfg.loss)
        return loss, moments(predictions, goals, targets), tokens.mean(1)

    model.train()
    for step in run.steps():
        # step + 1: the code moves its rate and decay before they are used, its momentum after.
        warm = dict(warmup=warmup_steps, start=cfg.start_lr, end=cfg.end_lr)
        set_lr(optimizer, lr := warmup_cosine(step + 1, peak=cfg.lr, total=horizon, **warm))
        decay = warmup_cosine(step + 1, peak=cfg.weight_decay, end=cfg.weight_decay_end, total=horizon)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["adapt"] else 0.0  # "adapt" marks the tensors with ndim > 1
        momentum = cfg.ema_momentum + step / horizon * (cfg.ema_momentum_end - cfg.ema_momentum)

        (images,) = loader(step).views  # [n, 3, S, S]
        drawn = masks.draw(cfg.batch_size, cfg.seed, step)  # of the global batch
        context, targets = (ids[part].to(device, non_blocking=True) for ids in drawn)  # [n, C], [n, M, T]

        optimizer.zero_grad(set_to_none=True)
        losses, parts, pooled = [], [], []  # of the micro-batches
        for chunk in zip(*(x.split(micro_batch) for x in (images, context, targets)), strict=True):
            last = len(losses) == local_batch // micro_batch - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, part_moments, part_pooled = loss_of(*chunk)
                accelerator.backward(loss * (micro_batch / local_batch))
            losses.append(loss.detach()), parts.append(part_moments), pooled.append(part_pooled)
        optimizer.step()
        ema_update(target, plain.encoder, momentum)  # after the step, from the new weights
        signals = {**health(parts, targets), "feature_std": feature_std(torch.cat(pooled))}
        run.log(loss=torch.stack(losses).mean(), **signals, context_patches=context.shape[1], lr=lr, weight_decay=decay,
                ema_momentum=momentum)  # fmt: skip
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, target.backbone, spec, train, test)

    loader.close()

    # ---- export (of the target encoder), evaluation, result card, report -------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, target.backbone, spec)
        if cfg.eval:
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            marks = dict(references={"relative_error": (1.0, "the mean of the same place")})
            sections = mask_section(test, cfg.image_size, masks, cfg.seed)
            finish(run, train=train, test=test, recipe=recipe, **told, **marks, extra_sections=sections)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
