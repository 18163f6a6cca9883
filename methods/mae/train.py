"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al. 2021, arXiv:2111.06377).

A ViT encodes the quarter of the patches that it is shown; a small decoder has to draw the rest.

    python -m methods.mae.train quickstart                     # embedded data, minutes on two cores
    python -m methods.mae.train cifar10-vit-p2                 # IcarusWizard's recipe: 89.77 % fine-tuned
    accelerate launch -m methods.mae.train imagenet-vitb       # the paper: 83.6 % fine-tuned after 1600 epochs
    python -m methods.mae.train                                # all presets; add --plan to any to see before you run
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
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.rng import generator
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from common.vit import is_vit, vit_arguments
from eval.finetune import NOTHING, Recipe
from eval.finish import finish, online_knn
from eval.protocols import DEFAULT

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .loss import make_targets, masked_error, visible_mean_error
from .masking import keep_count, mask_noise
from .model import MAE
from .official import load_official, read_weights
from .reconstruct import Gallery, snapshot_steps

METHOD = Path(__file__).parent.name
SIGNALS = {
    "loss": "mean squared error of the predicted numbers on removed patches (of normalised patches with norm_pix)",
    "visible_mean": "that error if every removed patch were painted in the mean of the image's visible ones",
    "relative_error": "loss / visible_mean: 1 means that nothing of the image's structure is used",
    "feature_std": "spread of the encoder's mean token over the sphere: 0 if all images get the same",
}


def build(cfg: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[MAE, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError where sizes do not fit each other."""
    if not is_vit(cfg.backbone):
        raise UserError(f"MAE drops patches, so it needs a ViT of timm: --backbone vit_..., not {cfg.backbone}")
    shape = dict(patch_size=cfg.patch_size, width=cfg.width, depth=cfg.depth, heads=cfg.heads)
    arguments = vit_arguments(cfg.backbone, sizes=(cfg.image_size,), **shape)
    spec = BackboneSpec(cfg.backbone, arguments=arguments, image_size=cfg.image_size, mean=mean, std=std)
    decoder = dict(decoder_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth, decoder_heads=cfg.decoder_heads)
    return MAE(create_backbone(spec), **decoder, learnt_positions=cfg.learnt_positions), spec


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
    grid = model.backbone.patch_embed.grid_size
    patches = grid[0] * grid[1]
    keep, *_ = [keep_count(patches, ratio) for ratio in (cfg.mask_ratio, *cfg.report_ratios)]
    if cfg.mask_window < 1:
        raise UserError(f"--mask-window {cfg.mask_window}: a cell has at least one patch")
    started = ""
    if cfg.init:
        whole = load_official(model, read_weights(cfg.init), cfg.init)
        started = f"{Path(cfg.init).name} ({'encoder and decoder' if whole else 'encoder alone'})"
    if cfg.compile:
        model.compile()

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

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    # As MAE's code: no decay for 1-D tensors; CLS and mask token have three dimensions and are decayed.
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0, betas=cfg.betas)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    config = {**asdict(cfg), "init": Path(cfg.init).name}  # a path says nothing elsewhere
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=config, accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "patches": f"{patches} of {plain.patch} px; {keep} are seen, {patches - keep} drawn ({cfg.masking} masks)",
            "start": started or "random weights",
            "views": recipe.describe(),
        },
    )
    settled = max(warmup_steps + loader.steps_per_epoch, 500)  # fresh weights are worse than the mean, then wait at it
    run.watch(
        Watch(
            "relative_error",
            above=0.98,
            after=settled,
            message="Removed patches are drawn no better than by the mean of the visible ones: nothing of the images' "
            "structure is learnt. Try another learning rate, a lower --mask-ratio, or more steps.",
        ),
        Watch(
            "feature_std",
            below=0.01,
            after=settled,
            message="The encoder gives all images the same tokens, so the decoder draws from position alone. Lower the "
            "learning rate or warm up longer.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)
    gallery = None
    if test is not None and run.main and not cfg.plan:
        masks = dict(masking=cfg.masking, window=cfg.mask_window, mask_ratio=cfg.mask_ratio, norm_pix=cfg.norm_pix)
        folder = run.directory / "reconstructions"
        gallery = Gallery(folder, test, spec, **masks, seed=cfg.seed, device=device)
    shots = snapshot_steps(total_steps)

    # ---- training --------------------------------------------------------------------------------------------------
    def loss_of(images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a micro-batch, what is logged of it, and the encoder's mean tokens [m, D]."""
        predictions, mask, tokens = model(images, noise, keep)  # [m, L, P], [m, L], [m, 1 + keep, D]
        targets = make_targets(images, plain.patch, cfg.norm_pix)
        loss, reference = masked_error(predictions, targets, mask), visible_mean_error(targets, mask)
        told = {"loss": loss.detach(), "visible_mean": reference, "relative_error": loss.detach() / reference}
        return loss, told, tokens.detach().mean(1)

    model.train()
    for step in run.steps():
        if gallery and step in shots:
            with run.untimed():
                gallery.snapshot(plain, step)
        lr = warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        (images,) = loader(step).views  # [n, 3, S, S]
        stream = generator(cfg.seed, "mask", step)
        noise = mask_noise(cfg.masking, cfg.batch_size, *grid, stream, cfg.mask_window)[part]  # [n, L]
        noise = noise.to(device, non_blocking=True)

        optimizer.zero_grad(set_to_none=True)
        logged, pooled = [], []  # of the micro-batches
        for chunk, chunk_noise in zip(images.split(micro_batch), noise.split(micro_batch), strict=True):
            last = len(logged) == local_batch // micro_batch - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, told, features = loss_of(chunk, chunk_noise)
                accelerator.backward(loss * (micro_batch / local_batch))
            logged.append(told), pooled.append(features)
        optimizer.step()
        means = {name: torch.stack([entry[name] for entry in logged]).mean() for name in logged[0]}
        run.log(**means, feature_std=feature_std(torch.cat(pooled)), lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export (of the encoder), evaluation, result card, report ----------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            gallery.snapshot(plain, run.last_step)
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            marks = dict(references={"relative_error": (1.0, "each image's visible mean")})
            sections = gallery.sections(plain, cfg.report_ratios)
            protocols = (*DEFAULT, "lowshot") if cfg.lowshot else DEFAULT  # MAE is judged by fine-tuning
            tuning = Recipe(labels=cfg.lowshot, epochs=cfg.lowshot_epochs) if cfg.lowshot else NOTHING
            judged = dict(protocols=protocols, finetuning=tuning, extra_sections=sections)
            finish(run, train=train, test=test, recipe=recipe, **told, **marks, **judged)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
