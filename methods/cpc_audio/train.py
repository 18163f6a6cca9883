"""CPC on sound: Representation Learning with Contrastive Predictive Coding (Oord et al. 2018, arXiv:1807.03748).

Strided convolutions turn the wave into frames, a GRU sums up the past, and from the sum one matrix a step predicts the
frames 1 to 12 ahead: each prediction must find its frame among others of the batch.

    python -m methods.cpc_audio.train quickstart                    # synthetic tones, minutes on two cores
    python -m methods.cpc_audio.train fsdd-cpu --data DIRECTORY     # spoken digits, at most 20 CPU minutes
    accelerate launch -m methods.cpc_audio.train librispeech        # the paper: 97.4 % speaker, 64.6 % phones
    python -m methods.cpc_audio.train                               # all presets; --plan shows one before you run
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, custom_encoder_spec
from common.cli import parse, run_cli
from common.distributed import sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.rng import generator
from common.schedules import cosine_schedule
from eval.session import Session

from .audio import AudioStore, open_audio
from .augment import WindowLoader
from .config import PRESETS, PUBLISHED, Config
from .health import health_checks
from .loss import draw_negatives, info_nce, pool_matrix
from .model import CPC, AudioEncoder
from .report import finish

METHOD = Path(__file__).parent.name


def open_split(cfg: Config, split: str, session: Session) -> AudioStore:
    """The training ("train") or test recordings; where both are one split of the data, a tenth of it is held out."""
    own_split = cfg.train_split != cfg.test_split
    columns = [*cfg.labels, *([cfg.speaker_column] if cfg.negatives.startswith("same-speaker") else [])]
    return open_audio(
        cfg.data,
        cfg.train_split if split == "train" else cfg.test_split,
        part=None if own_split else split,
        limit=cfg.limit if split == "train" else 0,
        sample_rate=cfg.sample_rate,
        audio_column=cfg.audio_column,
        labels=tuple(dict.fromkeys(columns)),
        device=session.device,
        workers=cfg.workers,
        log=session.print,
    )


def build(cfg: Config, train: AudioStore) -> tuple[CPC, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError for a window too short to look ahead."""
    spec = custom_encoder_spec(
        AudioEncoder,
        arguments={
            "kernels": cfg.kernels,
            "strides": cfg.strides,
            "paddings": cfg.paddings,
            "norm": cfg.norm,
            "channels": cfg.channels,
            "context": cfg.context,
            "sample_rate": train.rate,
            "level": train.level(),
        },
    )
    model = CPC(create_backbone(spec), cfg.steps)
    frames = int(model.encoder.frames(torch.tensor(cfg.window)))
    if frames <= cfg.steps:
        needed = (cfg.steps + 2) * model.encoder.hop + model.encoder.receptive_field[1]
        raise UserError(
            f"a window of {cfg.window} samples has {frames} frames, which is too few to look {cfg.steps} ahead: use a "
            f"--window of at least {needed} or fewer --steps"
        )
    return model, spec


def compute_loss(
    model: nn.Module, waves: Tensor, lengths: Tensor, frames: Tensor, negatives: Tensor, *, complete_anchors: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's windows and what is logged of it.

    waves [n, window] and lengths [n]: this process's; frames [B] and negatives [B, N]: of the global batch.
    """
    z, c, predictions = model(waves, lengths)  # [n, T, D], [n, T, C], [n, T, K, D]
    loss, parts = info_nce(z, predictions, frames, negatives, complete=complete_anchors)
    spread = feature_std(c.detach().flatten(0, 1))  # frames of padding included: the GRU runs on
    return loss, {"chance": parts["chance"], "retrieval": parts["retrieval"], "context_std": spread}


def main(preset: str, cfg: Config) -> None:
    if cfg.eval_protocols or not cfg.eval_baselines:
        raise UserError("sound has one fixed evaluation: --eval-protocols and --no-eval-baselines are for images")
    session = Session(cfg, METHOD, preset, PRESETS, published=PUBLISHED)
    train = open_split(cfg, "train", session)
    test = open_split(cfg, "test", session) if cfg.eval else None
    speakers = train.labels[cfg.speaker_column] if cfg.negatives.startswith("same-speaker") else None
    loader = WindowLoader(
        train,
        window=cfg.window,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        rank=session.process_index,
        world_size=session.num_processes,
        groups=speakers,
        group_size=1 if speakers is None else cfg.group_size,
        device=session.device,
        workers=cfg.workers,
    )
    session.set_length(cfg.epochs * loader.steps_per_epoch, loader.steps_per_epoch)

    # ---- network ---------------------------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg, train)
    encoder = model.encoder
    session.init_from(encoder)
    if cfg.compile:
        encoder.latents = torch.compile(encoder.latents)
    model = sync_batchnorm(model)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0)  # Adam where the decay is 0
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)

    # ---- training --------------------------------------------------------------------------------------------------
    window_frames, milliseconds = int(encoder.frames(torch.tensor(cfg.window))), 1000 / train.rate
    session.start(
        plan={
            "recordings": f"{len(train)} of {train.name}, {train.seconds / 3600:.2f} h at {train.rate} Hz",
            "steps": f"{session.total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} windows = {session.num_processes} processes x {session.local_batch}",
            "window": f"{cfg.window * milliseconds:.0f} ms, {window_frames} x {encoder.hop * milliseconds:g} ms",
            "receptive field": f"{encoder.receptive_field[1] * milliseconds:.0f} ms per frame",
            "negatives": f"{cfg.negative_count}, {cfg.negatives}",
        },
        data={"training recordings": train, **({"test recordings": test} if test else {})},
        checks=health_checks(cfg.negative_count, warmup_steps, loader.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = cfg.base_lr * min(1.0, (step + 1) / max(warmup_steps, 1))
        if cfg.schedule == "cosine":
            lr = cosine_schedule(step, base=cfg.base_lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        batch = loader(step)
        frames = encoder.frames(batch.lengths)  # [B], of the global batch, like everything sampled
        allowed = pool_matrix(cfg.negatives, len(frames), None if speakers is None else speakers[batch.indices])
        stream = generator(cfg.seed, "negatives", step)
        negatives = draw_negatives(allowed, frames, window_frames, cfg.negative_count, stream)  # [B, N]

        loss, parts = compute_loss(
            model,
            batch.waves,
            batch.lengths[session.local_slice],
            frames,
            negatives,
            complete_anchors=cfg.complete_anchors,
        )
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss.detach(), **parts, lr=lr)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    loader.close()
    session.export(unwrapped.encoder, spec)
    if session.evaluates:
        finish(session.run, unwrapped, cfg, train=train, test=test, published=session.published)


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
