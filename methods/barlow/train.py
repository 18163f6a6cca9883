"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al. 2021, arXiv:2103.03230).

The cross-correlation matrix of two views' projections should be the identity: each dimension agrees with itself across
views (nothing of the distortion remains) and with no other (no collapse).

    python -m methods.barlow.train quickstart                  # embedded data, minutes on two cores
    python -m methods.barlow.train cifar10-r18                 # solo-learn's recipe: 92.1 % online linear
    accelerate launch -m methods.barlow.train imagenet-r50     # the paper: 73.2 % linear, batch 2048, 1000 epochs
    python -m methods.barlow.train                             # all presets; add --plan to any to see before you run
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.memory import checkpoint_blocks
from common.optim import LARC, LARS, decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from eval.finish import finish, online_knn

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .loss import barlow_twins

METHOD = Path(__file__).parent.name
SIGNALS = {
    "on_diagonal": "mean correlation of a dimension with itself across views: 1 when nothing of the distortion remains",
    "off_diagonal": "root mean square correlation of different dimensions: 0 when each says something of its own",
    "invariance": "the loss's first term, sum of (1 - C_ii)^2",
    "redundancy": "the loss's second term, lambd * sum of the other C_ij^2",
}


class BarlowTwins(nn.Module):
    """Backbone and projector: two views [n, 3, H, W] -> their projections [n, D], before any normalisation."""

    def __init__(self, backbone: nn.Module, widths: tuple[int, ...]):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.num_features
        for width in widths[:-1]:
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            inputs = width
        if widths:  # nothing behind the last layer: the loss normalises, and a bias would cancel there
            layers.append(nn.Linear(inputs, widths[-1], bias=False))
        self.projector = nn.Sequential(*layers)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        # One pass a view, as in the code: BatchNorm takes each view's own statistics, and running averages move twice.
        return self.projector(self.backbone(view1)), self.projector(self.backbone(view2))


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_vectors: bool, vector_lr_scale: float
) -> list[dict]:
    """Matrices and kernels at the full rate; biases and norms at `vector_lr_scale` of it, without LARS's ratio."""
    matrices, vectors = decay_groups(model, weight_decay)
    vectors |= {"lr_scale": vector_lr_scale, "weight_decay": weight_decay if decay_vectors else 0.0}
    return [matrices, vectors]


def health_rules(after: int) -> list[Watch]:
    return [
        Watch(
            "on_diagonal",
            below=0.1,
            after=after,
            message="The two views' projections are hardly correlated: either nothing is learnt, or they have become "
            "constant. Try another learning rate, a longer warm-up, milder views, or a smaller --lambd.",
        ),
        Watch(
            "off_diagonal",
            above=0.5,
            after=after,
            message="Different dimensions say the same thing: the representation collapses to few directions. Raise "
            "--lambd, enlarge the batch, or lower the learning rate.",
        ),
    ]


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
    recipe = two_views(
        cfg.image_size,
        crop_scale=cfg.crop_scale,
        jitter=cfg.jitter,
        grey=cfg.grey,
        blur=cfg.blur,
        solarize=cfg.solarize,
        interpolation=cfg.interpolation,
        mean=mean,
        std=std,
        compile=cfg.compile,
    )
    loader = ViewLoader(
        train,
        recipe,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        rank=accelerator.process_index,
        world_size=ranks,
        device=device,
        workers=cfg.workers,
    )

    # ---- model -----------------------------------------------------------------------------------------------------
    spec = BackboneSpec(
        cfg.backbone,
        stem=cfg.stem,
        layers=cfg.layers,
        channels=cfg.channels,
        stem_width=cfg.stem_width,
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    torch.manual_seed(cfg.seed)
    model = BarlowTwins(create_backbone(spec), cfg.projector).to(memory_format=torch.channels_last)
    if cfg.activation_checkpointing:
        checkpoint_blocks(model.backbone)
    if cfg.compile:
        model.backbone.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    groups = parameter_groups(
        model,
        weight_decay=cfg.weight_decay,
        decay_vectors=cfg.decay_vectors,
        vector_lr_scale=cfg.base_lr_biases / cfg.base_lr,
    )
    match cfg.optimizer:
        case "lars":
            optimizer = LARS(groups, lr=0.0, momentum=cfg.momentum, momentum_form="lr-outside")
        case "larc":
            optimizer = LARC(groups, lr=0.0, momentum=cfg.momentum, trust=0.02, clip=True)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * loader.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    run = Run(
        cfg,
        method=METHOD,
        preset=preset,
        seed=cfg.seed,
        config=asdict(cfg),
        accelerator=accelerator,
        total_steps=total_steps,
        steps_per_epoch=loader.steps_per_epoch,
        batch_size=cfg.batch_size,
    )
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "peak learning rate": f"{peak_lr:.4g}; biases and norms {peak_lr * cfg.base_lr_biases / cfg.base_lr:.4g}",
            "views": recipe.describe(),
        },
    )
    run.watch(*health_rules(after=warmup_steps + loader.steps_per_epoch))
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps, end=cfg.lr_floor * peak_lr)
        set_lr(optimizer, lr)
        views = [v.contiguous(memory_format=torch.channels_last) for v in loader(step).views]  # [n, 3, H, W] each
        optimizer.zero_grad(set_to_none=True)
        loss, parts = barlow_twins(*model(*views), cfg.lambd)
        accelerator.backward(cfg.loss_weight * loss)
        optimizer.step()
        run.log(loss=loss, **parts, lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            dimensions = cfg.projector[-1] if cfg.projector else plain.backbone.num_features
            finish(
                run,
                train=train,
                test=test,
                recipe=recipe,
                published=PUBLISHED.get(preset, []),
                signals=SIGNALS,
                references={"invariance": (float(dimensions), "uncorrelated views, D")},
            )
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
