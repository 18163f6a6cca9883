"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He 2020, arXiv:2011.10566).

Predict one view's projection from the other's, and let no gradient flow through what is predicted. No negatives, no
moving average, no large batch: the predictor and the stop-gradient alone keep it from collapsing.

    python -m methods.simsiam.train quickstart                  # embedded data, minutes on two cores
    python -m methods.simsiam.train cifar10-r18                 # the paper: 91.8 % linear after 800 epochs
    accelerate launch -m methods.simsiam.train imagenet-r50     # the official command: 68.1 % linear, 100 epochs
    python -m methods.simsiam.train                             # all presets; add --plan to any to see before you run
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.health import feature_std
from common.memory import checkpoint_blocks
from common.optim import LARS, decay_groups
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from eval.finish import finish, online_knn

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .loss import simsiam

METHOD = Path(__file__).parent.name
SIGNALS = {
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
    "agreement": "cosine of the two views' projections, without the predictor's help",
}


class SimSiam(nn.Module):
    """Backbone, projector and predictor: two views [n, 3, H, W] -> predictions p1, p2 and projections z1, z2 [n, D]."""

    def __init__(self, backbone: nn.Module, projector: tuple[int, ...], predictor_hidden: int, predictor: bool = True):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.num_features
        for width in projector[:-1]:
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            inputs = width
        dim = projector[-1]
        # A norm on the output too, without scale and shift (code builder.py); no linear layer before a norm has a bias.
        self.projector = nn.Sequential(*layers, nn.Linear(inputs, dim, bias=False), nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_hidden, bias=False),
            nn.BatchNorm1d(predictor_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(predictor_hidden, dim),  # no norm: with one, training is unstable (paper Table 3d)
        )
        if not predictor:
            self.predictor = nn.Identity()

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # One pass a view, as in the code: BatchNorm takes each view's own statistics.
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2


def parameter_groups(model: SimSiam, *, weight_decay: float, decay_vectors: bool) -> list[dict]:
    """Backbone and projector, whose rate follows the schedule, and the predictor, whose rate may stay; each as
    matrices and vectors, for LARS, which leaves vectors alone."""
    groups = []
    for part in (nn.ModuleList([model.backbone, model.projector]), model.predictor):
        groups += [{**group, "predictor": part is model.predictor} for group in decay_groups(part, weight_decay)]
    for group in groups:
        group["weight_decay"] = weight_decay if group["adapt"] or decay_vectors else 0.0
    return groups


def set_rates(optimizer: torch.optim.Optimizer, encoder_lr: float, predictor_lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = predictor_lr if group["predictor"] else encoder_lr


def health_rules(after: int) -> list[Watch]:
    return [
        Watch(
            "projection_std",
            below=0.1,
            after=after,
            message="All projections point the same way (1 would be uniform): the representation collapses. Is the "
            "predictor there, and the stop-gradient? Else lower the learning rate.",
        ),
        Watch(
            "loss",
            below=-0.99,
            after=after,
            message="Predictions equal their targets: the views have become indistinguishable, by collapse or because "
            "the augmentation changes nothing. Look at online_knn; strengthen the views.",
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
    model = SimSiam(create_backbone(spec), cfg.projector, cfg.predictor_hidden, cfg.predictor)
    model = model.to(memory_format=torch.channels_last)
    if cfg.activation_checkpointing:
        checkpoint_blocks(model.backbone)
    if cfg.compile:
        model.backbone.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    # SGD decays everything, biases and norms too (code); LARS leaves those alone.
    groups = parameter_groups(model, weight_decay=cfg.weight_decay, decay_vectors=cfg.optimizer == "sgd")
    match cfg.optimizer:
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
        case "lars":
            optimizer = LARS(groups, lr=0.0, momentum=cfg.momentum, momentum_form="lr-outside")
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=0.0)
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
            "peak learning rate": f"{peak_lr:.4g}; predictor {'constant' if cfg.fix_predictor_lr else 'decays too'}",
            "views": recipe.describe(),
        },
    )
    run.watch(*health_rules(after=warmup_steps))
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
        set_rates(optimizer, lr, peak_lr if cfg.fix_predictor_lr and step >= warmup_steps else lr)
        views = [v.contiguous(memory_format=torch.channels_last) for v in loader(step).views]  # [n, 3, H, W] each
        optimizer.zero_grad(set_to_none=True)
        p1, p2, z1, z2 = model(*views)
        loss, parts = simsiam(p1, p2, z1, z2, stop_gradient=cfg.stop_gradient)
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss, **parts, projection_std=feature_std(torch.cat([z1, z2]).detach()), lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            finish(
                run,
                train=train,
                test=test,
                recipe=recipe,
                published=PUBLISHED.get(preset, []),
                signals=SIGNALS,
                references={"loss": (-1.0, "all projections equal: collapse")},
            )
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
