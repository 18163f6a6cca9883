"""CPC on sound: Representation Learning with Contrastive Predictive Coding (Oord et al. 2018, arXiv:1807.03748).

Strided convolutions turn the wave into frames, a GRU sums up the past, and from the sum one matrix a step predicts the
frames 1 to 12 ahead: each prediction must find its frame among others of the batch.

    python -m methods.cpc.train_audio fsdd-cpu --data DIRECTORY     # spoken digits, at most 20 CPU minutes
    accelerate launch -m methods.cpc.train_audio librispeech        # the paper: 97.4 % speaker, 64.6 % phones
    python -m methods.cpc.train_audio                               # all presets; --plan shows one before you run
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from common.audio import WindowLoader, open_audio
from common.backbones import create_backbone, export_backbone, own_encoder
from common.cli import guarded, parse
from common.distributed import sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.rng import generator
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine

from .config_audio import PRESETS, PUBLISHED, AudioConfig
from .loss_audio import draw_negatives, info_nce, pool_matrix
from .model_audio import CPC, AudioEncoder
from .report_audio import finish

METHOD = f"{Path(__file__).parent.name}-audio"


def main(preset: str, cfg: AudioConfig) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.steps < 1 or cfg.negative_count < 1:
        raise UserError("--steps and --negative-count are at least 1")
    if cfg.eval_protocols or not cfg.eval_baselines:
        raise UserError("sound has one fixed evaluation: --eval-protocols and --no-eval-baselines are for images")

    # ---- data ------------------------------------------------------------------------------------------------------
    same_speaker = cfg.negatives.startswith("same-speaker")
    columns = tuple(dict.fromkeys((*cfg.labels, *([cfg.speaker_column] if same_speaker else []))))
    source = dict(sample_rate=cfg.sample_rate, audio_column=cfg.audio_column, device=device, workers=cfg.workers)
    parts = ("train", "test") if cfg.train_split == cfg.test_split else (None, None)
    source |= dict(labels=columns, log=accelerator.print)
    train = open_audio(cfg.data, cfg.train_split, part=parts[0], limit=cfg.limit, **source)
    test = open_audio(cfg.data, cfg.test_split, part=parts[1], **source) if cfg.eval else None
    speakers = train.labels[cfg.speaker_column] if same_speaker else None
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    grouping = dict(groups=speakers, group_size=cfg.group_size if same_speaker else 1)
    loader = WindowLoader(train, window=cfg.window, batch_size=cfg.batch_size, seed=cfg.seed, **place, **grouping)

    # ---- model -----------------------------------------------------------------------------------------------------
    shape = dict(kernels=cfg.kernels, strides=cfg.strides, paddings=cfg.paddings, norm=cfg.norm)
    shape |= dict(channels=cfg.channels, context=cfg.context, sample_rate=train.rate, level=train.level())
    spec = own_encoder(AudioEncoder, arguments=shape)
    torch.manual_seed(cfg.seed)
    model = CPC(create_backbone(spec), cfg.steps)
    encoder = model.encoder
    size = int(encoder.frames(torch.tensor(cfg.window)))
    if size <= cfg.steps:
        raise UserError(
            f"a window of {cfg.window} samples has {size} frames, which is too few to look {cfg.steps} ahead: use a "
            f"--window of at least {(cfg.steps + 2) * encoder.hop + encoder.receptive_field[1]} or fewer --steps"
        )
    if cfg.compile:
        encoder.latents = torch.compile(encoder.latents)
    model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0)  # Adam where the decay is 0
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    milliseconds = 1000 / train.rate
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "recordings": f"{len(train)} of {train.name}, {train.seconds / 3600:.2f} h at {train.rate} Hz",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} windows = {ranks} processes x {cfg.batch_size // ranks}",
            "window": f"{cfg.window * milliseconds:.0f} ms, {size} frames of {encoder.hop * milliseconds:g} ms",
            "receptive field": f"{encoder.receptive_field[1] * milliseconds:.0f} ms a frame",
            "negatives": f"{cfg.negative_count}, {cfg.negatives}",
        },
    )
    chance = math.log(1 + cfg.negative_count)
    settled = max(warmup_steps + loader.steps_per_epoch, 200)
    run.watch(
        Watch(
            "retrieval",
            below=2 / (1 + cfg.negative_count),
            after=settled,
            message=f"Future frames are found hardly more often than by chance (loss at chance: ln(1 + N) = "
            f"{chance:.2f}): nothing is learnt. Try another learning rate, a longer warm-up or --norm channel.",
        ),
        Watch(
            "context_std",
            below=0.02,
            after=settled,
            message="The context is the same at every frame (1 would be spread evenly): it has collapsed. Lower "
            "--base-lr.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = cfg.base_lr * min(1.0, (step + 1) / max(warmup_steps, 1))
        if cfg.schedule == "cosine":
            lr = warmup_cosine(step, peak=cfg.base_lr, total=total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        batch = loader(step)
        frames = encoder.frames(batch.lengths)  # [B], of the global batch, as all that is drawn
        allowed = pool_matrix(cfg.negatives, len(frames), None if speakers is None else speakers[batch.indices])
        draw = generator(cfg.seed, "negatives", step)
        negatives = draw_negatives(allowed, frames, size, cfg.negative_count, draw)  # [B, N]
        z, c, predictions = model(batch.waves, batch.lengths[loader.part])  # [n, T, D], [n, T, C], [n, T, K, D]
        loss, parts = info_nce(z, predictions, frames, negatives, complete=cfg.complete_anchors)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        spread = feature_std(c.detach().flatten(0, 1))  # frames of padding included: the GRU runs on
        run.log(loss=loss.detach(), chance=parts["chance"], retrieval=parts["retrieval"], context_std=spread, lr=lr)
    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.encoder, spec)
        if cfg.eval:
            finish(run, plain, cfg, train=train, test=test, published=PUBLISHED.get(preset, []))
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{Path(__file__).parent.name}.train_audio")))
