"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al. 2021, arXiv:2104.14294).

A student, given all crops of an image, predicts the centred, sharpened output of its own moving average on two of them.

    python -m methods.dino.train quickstart                    # embedded data, minutes on two cores
    python -m methods.dino.train cifar10-r18                   # solo-learn's recipe: 89.5 % online linear
    accelerate launch -m methods.dino.train imagenet-vits-100  # official README: kNN 69.3 %, linear 74.0 %
    accelerate launch -m methods.dino.train imagenet-vits      # the paper: kNN 74.5 %, linear 77.0 %, batch 1024
    python -m methods.dino.train                               # all presets; add --plan to any to see before you run
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.ema import ema_update, make_teacher
from common.health import feature_std
from common.optim import LARC, LARS, decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from common.vit import StochasticDepth, fix_sincos_positions, freeze_patch_projection, layer_groups, vit_arguments
from eval.finish import finish, online_knn

from .attention import attention_section
from .augment import multi_crop
from .config import PRESETS, PUBLISHED, Config
from .loss import GLOBAL_VIEWS, dino_loss, teacher_temperature, update_center
from .model import DINO, DINOHead

METHOD = Path(__file__).parent.name
SIGNALS = {
    "teacher_entropy": "entropy of the teacher's output for one view; ln K: it says the same of every image",
    "kl": "divergence of the student from the teacher, loss - teacher_entropy; 0 for long: nothing left to learn",
    "agreement": "share of images where student and teacher, from different views, choose the same dimension",
    "largest_share": "share of the batch that the most chosen dimension takes; 1: one dimension has won",
    "feature_std": "spread of the teacher's outputs over the sphere: 0 if all images get the same",
}


def build(cfg: Config, spec: BackboneSpec) -> DINO:
    """The student without stochastic depth, which is the teacher at the start."""
    backbone = create_backbone(spec)
    if cfg.frozen_patch_projection:
        freeze_patch_projection(backbone)
    if cfg.sincos_positions:
        fix_sincos_positions(backbone)
    sizes = dict(hidden=cfg.hidden_dim, bottleneck=cfg.bottleneck_dim, layers=cfg.head_layers)
    switches = dict(batch_norm=cfg.head_bn, norm_last_layer=cfg.norm_last_layer)
    head = DINOHead(backbone.num_features, cfg.out_dim, **sizes, **switches)
    return DINO(backbone, head).to(memory_format=torch.channels_last)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale every gradient on its own down to norm `limit` (code: clip_gradients); not the norm of all together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp_max(1.0).unbind()))


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    torch.use_deterministic_algorithms(cfg.deterministic)

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    mean, std = mean_std(cfg.normalize)
    crops = dict(global_scale=cfg.global_crop_scale, local_scale=cfg.local_crop_scale, interpolation=cfg.interpolation)
    local = dict(local_views=cfg.local_views, local_size=cfg.local_size)
    pixels = dict(color=cfg.color, grey=cfg.grey, blur=cfg.blur, solarize=cfg.solarize, mean=mean, std=std)
    recipe = multi_crop(cfg.image_size, **crops, **local, **pixels, compile=cfg.compile)
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- model -----------------------------------------------------------------------------------------------------
    sizes = [view.size for view in recipe.views]
    vit = dict(patch_size=cfg.patch_size, width=cfg.width, depth=cfg.depth, heads=cfg.heads)
    vit |= dict(layer_scale=cfg.layer_scale, qk_norm=cfg.qk_norm)
    resnet = dict(stem=cfg.stem, layers=cfg.layers, channels=cfg.channels, stem_width=cfg.stem_width)
    arguments = vit_arguments(cfg.backbone, sizes=sizes, **vit)
    shape = dict(image_size=cfg.image_size, mean=mean, std=std)
    spec = BackboneSpec(cfg.backbone, **resnet, arguments=arguments, zero_init_last=False, **shape)
    torch.manual_seed(cfg.seed)
    model = build(cfg, spec)
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)
    teacher = make_teacher(model).to(device)  # before stochastic depth, so that it has none; in train mode
    teacher.register_buffer("center", torch.zeros(cfg.out_dim, device=device))  # in the checkpoint with the teacher
    draws = dict(seed=cfg.seed, views=len(recipe.views), batch_size=cfg.batch_size)
    model.stochastic_depth = StochasticDepth(model.backbone, cfg.drop_path, **draws)
    if cfg.compile:
        model.backbone.compile()
        teacher.backbone.compile()

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    # As DINO's code: no decay for 1-D tensors only, so positions and CLS token are decayed.
    groups = layer_groups(decay_groups(model, cfg.weight_decay), model.backbone, cfg.layer_decay)
    match cfg.optimizer:
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=0.0)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
        case "lars":
            optimizer = LARS(groups, lr=0.0, momentum=cfg.momentum, momentum_form="lr-outside")
        case "larc":
            optimizer = LARC(groups, lr=0.0, momentum=cfg.momentum, trust=0.02, clip=True)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")
    student, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(student)

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
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "views": recipe.describe(),
        },
    )
    chance = math.log(cfg.out_dim)
    settled = warmup_steps + loader.steps_per_epoch
    run.watch(
        Watch(
            "teacher_entropy",
            above=0.99 * chance,
            after=settled,
            message=f"The teacher answers uniformly (entropy near ln K = {chance:.2f}): the same for every "
            "image. Sharpen it (lower --teacher-temperature), lower --ema-momentum, or lower the learning rate.",
        ),
        Watch(
            "largest_share",
            above=0.5,
            after=settled,
            message="One dimension of the teacher's output takes most images: collapse to one cluster. Check that "
            "--center-momentum is below 1, raise --teacher-temperature, or lower the learning rate.",
        ),
    )
    run.resume(model=plain, teacher=teacher, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    plain.train()
    for step in run.steps():
        epoch = step // loader.steps_per_epoch
        warm = dict(warmup=warmup_steps, endpoint=True)
        set_lr(optimizer, lr := warmup_cosine(step, peak=peak_lr, end=cfg.min_lr, total=total_steps, **warm))
        decay = warmup_cosine(step, peak=cfg.weight_decay, end=cfg.weight_decay_end, total=total_steps)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["adapt"] else 0.0  # "adapt" marks the tensors with ndim > 1
        heat = dict(start=cfg.warmup_teacher_temperature, final=cfg.teacher_temperature)
        temperature = teacher_temperature(epoch, **heat, warmup_epochs=cfg.warmup_teacher_epochs)

        views = loader(step).views  # two global [n, 3, S, S], then local [n, 3, s, s]
        plain.stochastic_depth.draw(step, device)
        with torch.no_grad(), accelerator.autocast():
            targets = teacher(views[:GLOBAL_VIEWS])  # [2n, K]
        outputs = student(views)  # [V * n, K]
        heat = dict(student_temperature=cfg.student_temperature, teacher_temperature=temperature)
        loss, parts = dino_loss(outputs, targets, teacher.center, **heat)
        update_center(teacher.center, targets, cfg.center_momentum)  # after the loss, which used the old one

        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        if cfg.clip:
            accelerator.unscale_gradients(optimizer)
            clip_each(plain.parameters(), cfg.clip)
        if epoch < cfg.freeze_last_layer:
            for parameter in plain.head.last_layer.parameters():
                parameter.grad = None  # not zero: AdamW would still decay it
        optimizer.step()
        ema = warmup_cosine(step, peak=cfg.ema_momentum, end=1.0, total=total_steps)
        ema_update(teacher, plain, ema)
        run.log(loss=loss, **parts, feature_std=feature_std(targets), temperature=temperature, lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, teacher.backbone, spec, train, test)

    loader.close()

    # ---- export (of the teacher), evaluation, result card, report ----------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, teacher.backbone, spec)
        if cfg.eval:
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS)
            marks = dict(references={"loss": (chance, "ln K"), "teacher_entropy": (chance, "ln K: uniform")})
            attention = attention_section(run.directory, test)
            finish(run, train=train, test=test, recipe=recipe, **told, **marks, extra_sections=attention)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
