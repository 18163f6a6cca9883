"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al. 2021, arXiv:2111.06377).

A ViT encodes the visible quarter of the patches; a small decoder reconstructs the rest.

    python -m methods.mae.train quickstart                     # embedded data, minutes on two cores
    python -m methods.mae.train cifar10-vit-p2                 # IcarusWizard's recipe: 89.77 % fine-tuned
    accelerate launch -m methods.mae.train imagenet-vitb       # the paper: 83.6 % fine-tuned after 1600 epochs
    python -m methods.mae.train                                # all presets; add --plan to any to see before you run
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone
from common.cli import parse, run_cli
from common.distributed import all_reduce
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.rng import generator
from common.schedules import cosine_schedule, scaled_lr
from common.transfer import to_device
from common.vit import is_vit
from eval.finetune.recipe import DEFAULTS, Recipe
from eval.protocols import DEFAULT
from eval.session import ImageSession

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import make_targets, masked_error, visible_mean_error
from .masking import keep_count, mask_noise
from .model import MAE
from .official import decoder_tensors
from .reconstruct import Gallery, snapshot_steps

METHOD = Path(__file__).parent.name


def build(cfg: Config) -> tuple[MAE, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError where sizes do not fit each other."""
    if not is_vit(cfg.backbone):
        raise UserError(f"MAE drops patches, so it needs a ViT of timm: --backbone vit_..., not {cfg.backbone}")
    spec = cfg.vit_spec()
    model = MAE(
        create_backbone(spec),
        decoder_dim=cfg.decoder_dim,
        decoder_depth=cfg.decoder_depth,
        decoder_heads=cfg.decoder_heads,
        learned_positions=cfg.learned_positions,
    )
    return model, spec


def compute_loss(
    model: nn.Module, images: Tensor, noise: Tensor, *, keep: int, patch: int, norm_pix: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of images [m, 3, S, S] under masks from `noise` [m, L], what is logged, and mean tokens [m, D]."""
    predictions, mask, tokens = model(images, noise, keep)  # [m, L, P], [m, L], [m, 1 + keep, D]
    targets = make_targets(images, patch, norm_pix)
    loss = masked_error(predictions, targets, mask)
    parts = {"loss": loss.detach(), "visible_mean": visible_mean_error(targets, mask)}
    return loss, parts, tokens.detach().mean(1)


def main(preset: str, cfg: Config) -> None:
    # ---- network (before the data: a patch that does not fit is reported first) ------------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg)
    rows, columns = model.backbone.patch_embed.grid_size
    keep, *_ = [keep_count(rows * columns, ratio) for ratio in (cfg.mask_ratio, *cfg.report_ratios)]

    session = ImageSession(
        cfg,
        METHOD,
        preset,
        PRESETS,
        one_view(cfg),
        published=PUBLISHED,
        protocols=(*DEFAULT, "lowshot") if cfg.lowshot else DEFAULT,  # MAE is judged by fine-tuning
        finetuning=Recipe(labels=cfg.lowshot, epochs=cfg.lowshot_epochs) if cfg.lowshot else DEFAULTS,
    )
    session.init_from(model.backbone, decoder_tensors(model))
    session.speed_up(model)
    micro_batch = cfg.micro_batch or session.local_batch
    if session.local_batch % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} does not divide the {session.local_batch} images of a process")

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    # As in MAE's code: no decay for 1-D tensors; CLS and mask token have three dimensions and are decayed.
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0, betas=cfg.betas)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
            "patches": f"{rows * columns} of {unwrapped.patch} px; {keep} visible, {rows * columns - keep} predicted "
            f"({cfg.masking} masks)",
        },
        checks=health_checks(warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    gallery = None
    if session.test is not None and session.is_main and not cfg.plan:
        gallery = Gallery(
            session.run.directory / "reconstructions",
            session.test,
            spec,
            masking=cfg.masking,
            window=cfg.mask_window,
            mask_ratio=cfg.mask_ratio,
            norm_pix=cfg.norm_pix,
            seed=cfg.seed,
            device=session.device,
        )
    model.train()
    for step in session.steps():
        if gallery and step in snapshot_steps(session.total_steps):
            with session.run.untimed():
                gallery.snapshot(unwrapped, step)
        lr = cosine_schedule(step, base=peak_lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        (images,) = session.loader(step).views  # [n, 3, S, S]
        stream = generator(cfg.seed, "mask", step)
        noise = mask_noise(cfg.masking, cfg.batch_size, rows, columns, stream, cfg.mask_window)  # [B, L]
        noise = to_device(noise[session.local_slice], session.device)  # [n, L]

        optimizer.zero_grad(set_to_none=True)
        logged, pooled = [], []  # one entry per micro-batch
        for chunk, chunk_noise in zip(images.split(micro_batch), noise.split(micro_batch), strict=True):
            last = len(logged) == session.local_batch // micro_batch - 1
            with nullcontext() if last else session.no_sync(model):
                loss, parts, features = compute_loss(
                    model, chunk, chunk_noise, keep=keep, patch=unwrapped.patch, norm_pix=cfg.norm_pix
                )
                session.backward(loss * (micro_batch / session.local_batch))
            logged.append(parts)
            pooled.append(features)
        optimizer.step()
        means = {name: all_reduce(torch.stack([parts[name] for parts in logged]).mean()) for name in logged[0]}
        session.log(
            loss=means["loss"] / session.num_processes,
            visible_mean=means["visible_mean"] / session.num_processes,
            relative_error=means["loss"] / means["visible_mean"],
            feature_std=feature_std(torch.cat(pooled)),
            lr=lr,
        )
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation (of the encoder) -------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        gallery.snapshot(unwrapped, session.run.last_step)
        session.evaluate(
            signals=SIGNALS,
            references={"relative_error": (1.0, "each image's visible mean")},
            extra_sections=gallery.sections(unwrapped, cfg.report_ratios),
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
