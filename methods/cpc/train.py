"""CPC for images: Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018, 1807.03748).

Encode the overlapping patches of an image one by one; from the rows above, tell the patch that comes some rows below
from patches of elsewhere.

    python -m methods.cpc.train quickstart                     # embedded data, minutes on two cores
    python -m methods.cpc.train stl10                          # GIM's recipe: 80.5 % linear (unverified)
    accelerate launch -m methods.cpc.train imagenet            # the paper (v1): 48.7 % linear
    python -m methods.cpc.train                                # all presets; add --plan to any to see before you run
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from common.backbones import BackboneSpec, create_backbone, export_backbone, own_encoder
from common.cli import guarded, parse
from common.data import ViewLoader, open_data
from common.distributed import per_rank
from common.errors import UserError
from common.health import feature_std
from common.optim import set_lr
from common.rng import generator
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from eval.finish import finish, online_knn

from .augment import PatchJitter, grid_side, one_view, statistics
from .config import PRESETS, PUBLISHED, Config
from .loss import cpc_loss, draw_negatives
from .model import CPC, Encoder
from .retrieval import held_out, rows_of, section, sentence

METHOD = Path(__file__).parent.name
SIGNALS = {
    "retrieval": "share of predictions that score their own patch above all negatives",
    "positive_score": "mean score of the true patch; scores have no bound, and grow with the certainty",
    "feature_std": "spread of the images' mean patch embedding over the sphere: 0 if all images get the same",
}


def build(cfg: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[CPC, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError where sizes do not fit each other."""
    if cfg.color_drop and cfg.grey:
        raise UserError("--color-drop drops channels of coloured patches: use it with --no-grey")
    side = grid_side(cfg.crop_size, cfg.patch, cfg.stride) if cfg.stride > 0 else 0
    offsets = tuple(range(cfg.skip_step + 1, cfg.skip_step + cfg.prediction_steps + 1))
    if cfg.skip_step < 0 or cfg.prediction_steps < 1:
        raise UserError("--skip-step cannot be negative, and --prediction-steps must be at least 1")
    if cfg.stride > 0 and offsets[-1] >= side:
        raise UserError(
            f"a view of {cfg.crop_size} px has {max(side, 0)} rows of patches ({cfg.patch} px, stride {cfg.stride}), "
            f"but --skip-step {cfg.skip_step} and --prediction-steps {cfg.prediction_steps} need {offsets[-1] + 1}: "
            "predict fewer rows, or make patches or strides smaller"
        )
    sizes = dict(patch=cfg.patch, stride=cfg.stride, patch_crop=cfg.patch_crop, grey=cfg.grey, norm=cfg.norm)
    stem = dict(stem_width=cfg.stem_width, stem_kernel=cfg.stem_kernel, stem_stride=cfg.stem_stride)
    stages = dict(stem_pool=cfg.stem_pool, layers=cfg.layers, channels=cfg.channels, hidden=cfg.hidden)
    spec = own_encoder(Encoder, arguments=sizes | stem | stages, image_size=cfg.image_size, mean=mean, std=std)
    light = dict(brightness=cfg.patch_brightness, contrast=cfg.patch_contrast, color_drop=cfg.color_drop)
    shape = dict(context=cfg.context, width=cfg.context_width, depth=cfg.context_depth, directions=cfg.directions)
    compared = dict(offsets=offsets, embedding=cfg.embedding, scale=cfg.embedding_scale)
    jitter = PatchJitter(cfg.patch, cfg.stride, cfg.patch_crop, **light)
    return CPC(create_backbone(spec), **shape, **compared, jitter=jitter), spec


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    part = slice(accelerator.process_index * local_batch, (accelerator.process_index + 1) * local_batch)
    torch.use_deterministic_algorithms(cfg.deterministic)

    # ---- model (before the data: sizes that do not fit are then told at once) --------------------------------------
    mean, std = statistics(cfg.normalize, cfg.grey)
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg, mean, std)
    model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.backbone.blocks.compile()
    jitter, offsets = model.jitter, model.offsets
    side = grid_side(cfg.crop_size, cfg.patch, cfg.stride)

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, cfg.split, limit=cfg.limit or None, **source)
    needed = cfg.eval or cfg.knn_every
    test = open_data(cfg.data, "test", **source) if needed else None
    labelled = open_data(cfg.data, "train", **source) if needed and cfg.split != "train" else train
    crop = dict(crop_scale=cfg.crop_scale, flip=cfg.flip, grey=cfg.grey)
    recipe = one_view(cfg.crop_size, **crop, mean=mean, std=std, compile=cfg.compile)
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=cfg.weight_decay)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    end_lr = cfg.lr if cfg.schedule == "constant" else 0.0
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    pooled = cfg.batch_size if cfg.pool == "global" else local_batch  # images whose patches can be negatives
    candidates = 1 + cfg.num_negatives if cfg.negatives == "sampled" else pooled * side**2
    chance = math.log(candidates)
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "patches": f"{side} x {side} of {jitter.describe()}",
            "predicted rows": f"{', '.join(map(str, offsets))} below, in {cfg.directions} direction(s)",
            "candidates": f"{candidates} an anchor ({cfg.negatives}), of {pooled} images; chance level {chance:.3f}",
            "views": recipe.describe(),
        },
    )
    if (shared := cfg.patch - offsets[0] * cfg.stride) > 0:
        run.say(
            f"the nearest predicted row shares {shared} of {cfg.patch} rows of pixels with its anchor: that much can "
            "be copied, the loss falls fast and the features are poor. A larger --skip-step prevents it."
        )
    settled = warmup_steps + max(loader.steps_per_epoch, 200)
    run.watch(
        Watch(
            "retrieval",
            below=1.5 / candidates,
            after=settled,
            message=f"The true patch is found hardly more often than by chance (loss at chance: {chance:.2f}): nothing "
            "is learnt. Try another --lr, a warm-up, or less of the patches' own jitter.",
        ),
        Watch(
            "feature_std",
            below=0.01,
            after=settled,
            message="All images get the same embedding: the representation collapses. Lower --lr or warm up longer.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=cfg.lr, total=total_steps, warmup=warmup_steps, end=end_lr)
        set_lr(optimizer, lr)
        (images,) = loader(step).views  # [n, 3, S, S]
        numbers = jitter.sample(cfg.batch_size, side**2, generator(cfg.seed, "patches", step))[part]
        negatives = None
        if cfg.negatives == "sampled":
            stream = generator(cfg.seed, "negatives", step)
            drawn = (cfg.batch_size, pooled, side, side, offsets, cfg.num_negatives, stream, part)
            negatives = [draw_negatives(*drawn).to(device, non_blocking=True) for _ in range(cfg.directions)]
        compared, predictions, z = model(images, numbers.to(device, non_blocking=True))  # [n, R, Q, E], [A, E] each
        loss, parts = cpc_loss(compared, predictions, offsets, negatives, everywhere=cfg.pool == "global")
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss.detach(), **parts, feature_std=feature_std(z.detach().mean((1, 2))), lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, labelled, test)

    loader.close()

    # ---- export (of the patch encoder), evaluation, result card, report ----------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            sizes = dict(crop=cfg.crop_size, batch=cfg.batch_size, count=cfg.num_negatives)
            found = held_out(plain, test, spec, **sizes, seed=cfg.seed)
            run.say(sentence(found))
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            marks = dict(references={"loss": (chance, "chance level, ln of the candidates")})
            extra = dict(extra_rows=rows_of(found), extra_sections=[section(found, cfg.stride, cfg.patch)])
            finish(run, train=labelled, test=test, recipe=recipe, **told, **marks, **extra)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
