"""Deep InfoMax: Learning Deep Representations by Mutual Information Estimation and Maximization (Hjelm et al. 2018,
arXiv:1808.06670).

A summary of 64 numbers must tell the parts of its own image from the parts of all others.

    python -m methods.dim.train quickstart                     # embedded data, minutes on two cores
    python -m methods.dim.train cifar10                        # the paper, Jensen-Shannon: 73.25 % (conv, MLP probe)
    accelerate launch -m methods.dim.train cifar10-infonce     # the paper, infoNCE: 75.21 %
    python -m methods.dim.train                                # all presets; add --plan to any to see before you run
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from common.backbones import create_backbone, export_backbone, own_encoder
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.optim import set_lr
from common.rng import generator
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from eval.finish import finish, online_knn

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .layers import LayerReport
from .loss import chance_level, discriminator_loss, fooling_loss, information_loss
from .model import DIM, LAYOUTS, Discriminator, Encoder, map_size

METHOD = Path(__file__).parent.name
SIGNALS = {
    "retrieval": "share of an image's parts that score highest with its summary among the B images' parts at the place",
    "positive": "mean score of a summary with its own parts; negative: with others'",
    "discriminator_accuracy": "0.5: summaries cannot be told from the prior; 1: always",
    "y_std": "spread of the summaries y over the sphere: 0 if all images get the same",
}


def check(cfg: Config) -> None:
    """Raise UserError for settings that leave nothing to train or do not fit each other."""
    if min(cfg.alpha, cfg.beta, cfg.gamma) < 0 or not cfg.alpha + cfg.beta:
        raise UserError("--alpha, --beta and --gamma are weights, none negative; --alpha or --beta must be above 0, or "
                        "no information about the image is asked for")  # fmt: skip
    layout = LAYOUTS[cfg.layout]
    if map_size(layout, cfg.image_size, len(layout.convs)) < 1:
        raise UserError(f"--image-size {cfg.image_size} is too small for --layout {cfg.layout}: its last map is empty")
    if cfg.width <= 0 or round(min(c[0] for c in layout.convs) * cfg.width) < 1:
        raise UserError(f"--width {cfg.width} leaves a layer without channels")


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    part = slice(accelerator.process_index * local_batch, (accelerator.process_index + 1) * local_batch)
    torch.use_deterministic_algorithms(cfg.deterministic)
    check(cfg)

    # ---- data ------------------------------------------------------------------------------------------------------
    mean, std = mean_std(cfg.normalize)
    change = dict(crop_area=cfg.crop_area, flip=cfg.flip)
    recipe = one_view(cfg.image_size, **change, mean=mean, std=std, compile=cfg.compile)
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, cfg.split, limit=cfg.limit or None, **source)
    probed, test = train, None
    if cfg.eval or cfg.knn_every:
        probed = train if cfg.split == "train" else open_data(cfg.data, "train", **source)
        test = open_data(cfg.data, "test", **source)
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- model -----------------------------------------------------------------------------------------------------
    arguments = dict(layout=cfg.layout, image_size=cfg.image_size, width=cfg.width, y_dim=cfg.y_dim, grey=cfg.grey)
    arguments |= dict(contrast=cfg.contrast, output=cfg.output)
    spec = own_encoder(Encoder, arguments=arguments, image_size=cfg.image_size, mean=mean, std=std)
    torch.manual_seed(cfg.seed)
    weights = {name: weight for name, weight in (("local", cfg.beta), ("global", cfg.alpha)) if weight}
    model = DIM(create_backbone(spec), cfg.mi_units, tuple(weights)).to(memory_format=torch.channels_last)
    discriminator = Discriminator(cfg.y_dim)
    if cfg.compile:
        model.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=cfg.discriminator_lr)
    total_steps = cfg.epochs * loader.steps_per_epoch
    model, optimizer = accelerator.prepare(model, optimizer)
    discriminator, d_optimizer = accelerator.prepare(discriminator, d_optimizer)
    plain, plain_d = accelerator.unwrap_model(model), accelerator.unwrap_model(discriminator)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    side = map_size(LAYOUTS[cfg.layout], cfg.image_size, LAYOUTS[cfg.layout].local)
    locations = {"local": side**2, "global": 1}
    chance = {name: chance_level(cfg.estimator, cfg.batch_size, locations[name]) for name in weights}
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "terms": ", ".join(f"{name} x {weights[name]:g}, chance {chance[name]:.2f}" for name in weights),
            "local map": f"{side} x {side}; {(cfg.batch_size - 1) * side**2} negatives for each of its places",
            "views": recipe.describe(),
        },
    )
    run.watch(
        Watch(
            "retrieval",
            below=3 / cfg.batch_size,
            after=2 * loader.steps_per_epoch,
            message=f"Summaries find their own image's parts hardly more often than by chance (1 in {cfg.batch_size}): "
            "nothing is learnt. Try another --lr, a smaller --gamma, or --estimator infonce.",
        ),
        Watch(
            "y_std",
            below=0.02,
            after=2 * loader.steps_per_epoch,
            message="All images get the same summary y: it collapses. Lower --lr or --gamma.",
        ),
    )
    trained = dict(model=plain, optimizer=optimizer, scaler=accelerator.scaler)
    run.resume(**trained, discriminator=plain_d, d_optimizer=d_optimizer)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        fall = warmup_cosine(step, peak=1.0, total=total_steps) if cfg.decay == "cosine" else 1.0
        set_lr(optimizer, fall * cfg.lr)
        set_lr(d_optimizer, fall * cfg.discriminator_lr)
        (images,) = loader(step).views
        y, pairs = model(images)  # [n, 64], {term: ([n, U], [n, L, U])}
        loss, told = 0.0, {}
        for name, (summaries, parts) in pairs.items():
            term, signals = information_loss(summaries, parts, cfg.estimator)
            loss = loss + weights[name] * term
            told = {**signals, **told, f"{name}_loss": term.detach()}  # with both terms, signals are the local one's
        if cfg.gamma:
            codes = y.sigmoid()
            stream = generator(cfg.seed, "prior", step)
            prior = torch.rand(cfg.batch_size, cfg.y_dim, generator=stream)[part]
            d_loss, d_told = discriminator_loss(discriminator, prior.to(device, non_blocking=True), codes, cfg.penalty)
            d_optimizer.zero_grad(set_to_none=True)
            accelerator.backward(d_loss)
            d_optimizer.step()
            plain_d.requires_grad_(False)  # the encoder's turn
            fooled = fooling_loss(plain_d(codes))
            plain_d.requires_grad_(True)
            loss = loss + cfg.gamma * fooled
            told |= {"prior_loss": fooled.detach(), "discriminator_loss": d_loss.detach(), **d_told}
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss.detach(), **told, y_std=feature_std(y.detach()), lr=fall * cfg.lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, probed, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            report = LayerReport(run, spec, probed, test, mlp_epochs=cfg.mlp_epochs)
            report.measure(plain, batch=cfg.batch_size)
            marks = {f"{name}_loss": (level, f"chance level, {cfg.estimator}") for name, level in chance.items()}
            marks |= {
                "prior_loss": (math.log(2), "ln 2: matches the prior"),
                "retrieval": (1 / cfg.batch_size, "1 / B"),
            }
            level = sum(weights[name] * chance[name] for name in weights) + cfg.gamma * math.log(2)
            marks["loss"] = level, "chance level, codes as the prior"
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS, references=marks)
            finish(run, train=probed, test=test, recipe=recipe, **told, extra_sections=report.sections())
            report.add_to_card()
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
