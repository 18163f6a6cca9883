"""Vanilla, denoising and masked autoencoders with timm backbones (A. Sahai, CS 182/282A, lecture 16, 2022).

The encoder squeezes an image, as it is or damaged, into a few numbers; a light decoder must draw the image from them.

    python -m methods.autoencoder.train quickstart                               # embedded data, minutes on two cores
    python -m methods.autoencoder.train quickstart --variant masked --mask-ratio 0.75
    python -m methods.autoencoder.train cifar10-r18 --variant denoising --noise 0.25
    accelerate launch -m methods.autoencoder.train imagenette-r18 --variant masked
    python -m methods.autoencoder.train                                          # all presets; add --plan to any
    python -m methods.autoencoder.linear                                         # the lecture's linear forms, measured
    python -m methods.autoencoder.study                                          # width, noise and mask ratio compared
"""

from dataclasses import asdict
from pathlib import Path

import torch

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from common.vit import vit_arguments
from eval.finish import finish, online_knn

from .augment import Corruption, one_view
from .config import PRESETS, PUBLISHED, Config
from .loss import reconstruction_loss
from .model import Autoencoder
from .reconstruct import reconstruction_section

METHOD = Path(__file__).parent.name
SIGNALS = {
    "relative_error": "squared error divided by that of the mean image: 1, nothing learnt; 0, perfect",
    "mean_image": "squared error of the batch's mean image, in the same units as the loss: the level to be below",
    "feature_std": "spread of the pooled features over the sphere; 0 if all images get the same ones",
}


def health_rules(after: int) -> list[Watch]:
    return [
        Watch(
            "relative_error",
            above=0.99,
            after=after,
            message="Reconstructions are no better than the mean image: the decoder ignores its input. Lower --lr, "
            "warm up longer, or widen --bottleneck; with --variant masked remove less.",
        ),
        Watch(
            "feature_std",
            below=0.02,
            after=after,
            message="All images get nearly the same pooled features: they collapse. Lower --lr or --weight-decay, or "
            "let the latent read them (--latent-from pooled).",
        ),
    ]


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    part = slice(accelerator.process_index * local_batch, (accelerator.process_index + 1) * local_batch)
    torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.loss_on == "masked" and cfg.variant != "masked":
        raise UserError(f"--loss-on masked compares what was removed, and --variant {cfg.variant} removes nothing")

    # ---- data ------------------------------------------------------------------------------------------------------
    mean, std = mean_std(cfg.normalize)
    strength = dict(noise=cfg.noise, mask_ratio=cfg.mask_ratio, patch=cfg.mask_patch)
    corruption = Corruption(cfg.variant, cfg.image_size, **strength, std=std)
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    recipe = one_view(
        cfg.image_size,
        crop_scale=cfg.crop_scale,
        flip=cfg.flip,
        interpolation=cfg.interpolation,
        mean=mean,
        std=std,
        compile=cfg.compile,
    )
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- model -----------------------------------------------------------------------------------------------------
    spec = BackboneSpec(
        cfg.backbone,
        stem=cfg.stem,
        layers=cfg.layers,
        channels=cfg.channels,
        stem_width=cfg.stem_width,
        arguments=vit_arguments(cfg.backbone, sizes=(cfg.image_size,), patch_size=cfg.patch_size),
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    torch.manual_seed(cfg.seed)
    sizes = dict(size=cfg.image_size, decoder_width=cfg.decoder_width)
    model = Autoencoder(create_backbone(spec), cfg.bottleneck, cfg.latent_from, **sizes)
    model = model.to(memory_format=torch.channels_last)
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)
    if cfg.compile:
        model.compile()

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
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
            "latent": f"{cfg.bottleneck} of {3 * cfg.image_size**2} input numbers",
            "views": recipe.describe(),
            "encoder's input": corruption.describe(),
        },
    )
    run.watch(*health_rules(after=warmup_steps + 2 * loader.steps_per_epoch))
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=cfg.lr, total=total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        target = loader(step).views[0].contiguous(memory_format=torch.channels_last)  # [n, 3, s, s]
        drawn = corruption.draw(cfg.batch_size, cfg.seed, step, device)  # of the global batch
        inputs, mask = corruption(target, None if drawn is None else drawn[part])
        optimizer.zero_grad(set_to_none=True)
        output, features = model(inputs)
        loss, parts = reconstruction_loss(output, target, mask if cfg.loss_on == "masked" else None)
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss, **parts, feature_std=feature_std(features.detach()), lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export (of the backbone: the decoder was a means), evaluation, result card, report -------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            marks = dict(references={"relative_error": (1.0, "the mean image")})
            pictures = reconstruction_section(plain, corruption, spec, test, seed=cfg.seed, device=device)
            finish(run, train=train, test=test, recipe=recipe, **told, **marks, extra_sections=pictures)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
