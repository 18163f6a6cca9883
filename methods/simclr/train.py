"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv:2002.05709).

Two random views of each image; every projection must find its partner among the 2B - 1 others of the batch.

    python -m methods.simclr.train quickstart                  # embedded data, minutes on two cores
    python -m methods.simclr.train cifar10-r18                 # official README command: about 91 % linear
    accelerate launch -m methods.simclr.train imagenet-r50     # the paper: 69.3 % linear, batch 4096, 1000 epochs
    python -m methods.simclr.train                             # all presets; add --plan to any to see before you run
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.memory import cached_backward, checkpoint_blocks, couples_samples
from common.optim import LARS, decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from common.vit import (
    StochasticDepth,
    fix_sincos_positions,
    freeze_patch_projection,
    is_vit,
    layer_groups,
    vit_arguments,
)
from eval.finish import finish, online_knn

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .loss import nt_xent

METHOD = Path(__file__).parent.name
SIGNALS = {
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
    "retrieval": "share of views whose partner is the nearest of the 2B - 1 candidates",
    "alignment": "similarity of the two views divided by the temperature: the term that pulls",
    "log_sum_exp": "log of the softmax denominator: the term that pushes; loss = log_sum_exp - alignment",
}


class SimCLR(nn.Module):
    """Backbone and projector: images [N, 3, H, W] -> projections [N, projector_dim], not normalised.

    Without projector (`layers` 0) the features, or the first `subvector` of them.
    """

    def __init__(self, backbone: nn.Module, projector_dim: int, norm: str, layers: int = 2, subvector: int = 0):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        if subvector and (layers or not 0 < subvector <= width):
            raise UserError(f"--subvector takes 1 to {width} of the features, and needs --projector-layers 0")
        self.subvector = subvector or width
        norm_layer = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        # Code model_util.py: no bias before a norm, a norm on the output too, but without shift; weights N(0, 0.01).
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(width, width, bias=False), norm_layer(width), nn.ReLU(inplace=True)]
        if layers:
            parts += [nn.Linear(width, projector_dim, bias=False), norm_layer(projector_dim)]
            parts[-1].bias.requires_grad_(False)
        self.projector = nn.Sequential(*parts)
        for layer in (part for part in parts if isinstance(part, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.projector(features) if len(self.projector) else features[:, : self.subvector]


def build(cfg: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[SimCLR, BackboneSpec]:
    """The network and the description of its backbone."""
    vit = dict(patch_size=cfg.patch_size, width=cfg.width, depth=cfg.depth, heads=cfg.heads)
    vit |= dict(layer_scale=cfg.layer_scale, qk_norm=cfg.qk_norm)
    arguments = vit_arguments(cfg.backbone, sizes=(cfg.image_size,), **vit)
    norm = "batch" if is_vit(cfg.backbone) else cfg.norm  # a ViT has LayerNorm
    resnet = dict(stem=cfg.stem, layers=cfg.layers, channels=cfg.channels, stem_width=cfg.stem_width, norm=norm)
    shape = dict(image_size=cfg.image_size, mean=mean, std=std)
    spec = BackboneSpec(cfg.backbone, **resnet, arguments=arguments, **shape)
    backbone = create_backbone(spec)
    if cfg.frozen_patch_projection:
        freeze_patch_projection(backbone)
    if cfg.sincos_positions:
        fix_sincos_positions(backbone)
    model = SimCLR(backbone, cfg.projector_dim, cfg.norm, cfg.projector_layers, cfg.subvector)
    return model.to(memory_format=torch.channels_last), spec


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.micro_batch and cfg.activation_checkpointing:
        raise UserError("choose one of --micro-batch and --activation-checkpointing: the second makes the first idle")
    if cfg.micro_batch and cfg.drop_path:
        raise UserError("--drop-path has masks for whole batches: take --activation-checkpointing, not --micro-batch")
    if cfg.micro_batch and local_batch % cfg.micro_batch:
        raise UserError(f"--micro-batch {cfg.micro_batch} does not divide the {local_batch} images of each process")

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    mean, std = mean_std(cfg.normalize)
    recipe = two_views(
        cfg.image_size,
        crop_scale=cfg.crop_scale,
        color_strength=cfg.color_strength,
        hue=cfg.hue,
        grey=cfg.grey,
        blur=cfg.blur,
        interpolation=cfg.interpolation,
        mean=mean,
        std=std,
        compile=cfg.compile,
    )
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- model -----------------------------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg, mean, std)
    depth = StochasticDepth(model.backbone, cfg.drop_path, seed=cfg.seed, views=2, batch_size=cfg.batch_size)
    if cfg.activation_checkpointing:
        checkpoint_blocks(model.backbone)
    if cfg.compile:
        model.backbone.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    groups = layer_groups(decay_groups(model, cfg.weight_decay), model.backbone, cfg.layer_decay)
    match cfg.optimizer:
        case "lars":
            optimizer = LARS(groups, lr=0.0, momentum=cfg.momentum, momentum_form="lr-inside")
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=0.0)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * len(train) / cfg.batch_size)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, cfg.lr_scaling)
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
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}; {2 * cfg.batch_size - 2} negatives",
            "peak learning rate": f"{peak_lr:.4g} ({cfg.lr_scaling} scaling of {cfg.base_lr:g})",
            "views": recipe.describe(),
        },
    )
    if cfg.micro_batch and couples_samples(model):
        run.say(
            f"--micro-batch with BatchNorm: statistics are taken over {cfg.micro_batch} images, as "
            f"{local_batch // cfg.micro_batch} ranks without SyncBN would; the gradient is not the whole batch's. "
            "--activation-checkpointing is exact."
        )
    chance = math.log(2 * cfg.batch_size - 1)
    run.watch(
        Watch(
            "retrieval",
            below=4 / (2 * cfg.batch_size - 1),
            after=warmup_steps + loader.steps_per_epoch,
            message=f"Partners are found hardly more often than by chance (loss at chance: ln(2B - 1) = {chance:.2f}): "
            "nothing is learnt. Try another learning rate, a longer warm-up, or views that share more (larger crop "
            "scale, less colour jitter).",
        ),
        Watch(
            "projection_std",
            below=0.1,
            after=warmup_steps,
            message="All projections point the same way (1 would be uniform): the representation collapses. Lower the "
            "learning rate or raise the temperature.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    def loss_of(projections: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the rank's batch from its micro-batches' projections, each [2m, D] with view 1 first."""
        halves = [z.chunk(2) for z in projections]
        z1, z2 = (torch.cat([pair[i] for pair in halves]) for i in (0, 1))
        loss, parts = nt_xent(z1, z2, cfg.temperature, decoupled=cfg.decoupled)
        return cfg.loss_weight * loss, {**parts, "projection_std": feature_std(torch.cat([z1, z2]).detach())}

    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        view1, view2 = loader(step).views  # [n, 3, H, W] each
        optimizer.zero_grad(set_to_none=True)
        if cfg.micro_batch:
            pairs = zip(view1.split(cfg.micro_batch), view2.split(cfg.micro_batch), strict=True)
            batches = [torch.cat(pair).contiguous(memory_format=torch.channels_last) for pair in pairs]
            loss, parts = cached_backward(
                model, batches, loss_of, backward=accelerator.backward, no_sync=accelerator.no_sync, seed=step
            )
        else:
            depth.draw(step, device)
            depth.select(first=0, count=2)
            views = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)
            loss, parts = loss_of([model(views)])  # both views in one pass: BatchNorm over 2B rows
            accelerator.backward(loss)
        if cfg.clip:
            accelerator.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        run.log(loss=loss / cfg.loss_weight, **parts, lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            marks = dict(references={"loss": (chance, "chance level, ln(2B - 1)")})
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            finish(run, train=train, test=test, recipe=recipe, **told, **marks)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
