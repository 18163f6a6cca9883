"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733).

An online network predicts, from one view, what a slowly following copy of itself projects from the other. No negatives.

    python -m methods.byol.train quickstart                    # embedded data, minutes on two cores
    python -m methods.byol.train cifar10-r18                   # solo-learn's recipe: 92.6 % online linear
    accelerate launch -m methods.byol.train imagenet-r50       # the paper: 74.3 % linear, batch 4096, 1000 epochs
    python -m methods.byol.train                               # all presets; add --plan to any to see before you run
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.ema import ema_update, make_teacher
from common.memory import checkpoint_blocks
from common.optim import LARC, LARS, decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import scaled_lr, warmup_cosine
from eval.finish import finish, online_knn

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .loss import byol_loss

METHOD = Path(__file__).parent.name
SIGNALS = {
    "agreement": "cosine of prediction and target: loss = 4 - 4 agreement; 1 at once means collapse, not success",
    "target_std": "1 if the target's projections spread evenly over the sphere, 0 if all of them point one way",
    "prediction_std": "the same of the online network's predictions",
    "ema_momentum": "how slowly the target follows: from its first value to 1 along a cosine",
}


def mlp(width: int, hidden: int, out: int, layers: int = 2) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear without bias: no norm on the output (paper section 3.2)."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    parts += [nn.Linear(width, out, bias=False)] * (layers > 0)
    for layer in (p for p in parts if isinstance(p, nn.Linear)):  # Haiku's: a normal of std 1 / sqrt(fan-in), cut at 2
        std = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """Backbone and projector, what online and target network have in common: [n, 3, H, W] -> projections [n, D]."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int, layers: int = 2):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, hidden_dim, projector_dim, layers)
        self.width = projector_dim if layers else backbone.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class Online(nn.Module):
    """Encoder and predictor: views -> predictions [n, D] of each. One pass a view: BatchNorm never mixes the two."""

    def __init__(self, encoder: Encoder, hidden_dim: int, predictor: bool = True):
        super().__init__()
        self.encoder = encoder
        self.predictor = mlp(encoder.width, hidden_dim, encoder.width) if predictor else nn.Identity()

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.predictor(self.encoder(view)) for view in views]


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
        zero_init_last=cfg.zero_init_last,
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    torch.manual_seed(cfg.seed)
    encoder = Encoder(create_backbone(spec), cfg.hidden_dim, cfg.projector_dim, cfg.projector_layers)
    online = Online(encoder, cfg.hidden_dim, cfg.predictor).to(memory_format=torch.channels_last)
    if cfg.sync_bn:
        online = sync_batchnorm(online, device)
    # The target: a copy made after the norms are converted and outside of DDP, which would neither update nor need it.
    # All ranks start from the same seed and apply the same averages, so their targets agree to the bit. It stays in
    # train mode (statistics of the batch) with running buffers of its own.
    target = make_teacher(online.encoder).to(device)
    if cfg.activation_checkpointing:
        checkpoint_blocks(online.encoder.backbone)
    if cfg.compile:
        online.encoder.backbone.compile()
        target.backbone.compile()

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    groups = decay_groups(online, cfg.weight_decay)  # biases and norms: no decay, no adaptation
    match cfg.optimizer:
        case "lars":
            optimizer = LARS(groups, lr=0.0, momentum=cfg.momentum, momentum_form="lr-outside")
        case "larc":
            optimizer = LARC(groups, lr=0.0, momentum=cfg.momentum, trust=0.02, clip=True)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=0.0)
    total_steps = cfg.epochs * loader.steps_per_epoch
    warmup_steps = int(cfg.warmup_epochs * len(train) / cfg.batch_size)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")
    online, optimizer = accelerator.prepare(online, optimizer)
    plain = accelerator.unwrap_model(online)

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
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "views": recipe.describe(),
        },
    )
    run.watch(
        Watch(
            "target_std",
            below=0.1,
            after=warmup_steps,
            message="The target's projections all point one way (1 would be uniform): collapse, however low the loss. "
            "Is the predictor there? Lower the learning rate, or raise --ema-momentum: small batches need a slow one.",
        ),
        Watch(
            "prediction_std",
            below=0.05,
            after=warmup_steps + loader.steps_per_epoch,
            message="The predictor gives every image the same answer, the mean of all targets: one view says nothing "
            "about the other yet. Views that share more, or another learning rate, may get it going.",
        ),
        Watch(
            "agreement",
            below=0.1,
            after=warmup_steps + loader.steps_per_epoch,
            message="Predictions hardly resemble their targets (0 is chance): nothing is learnt. Try another learning "
            "rate, a longer warm-up, or views that share more (larger crop scale, less colour jitter).",
        ),
    )
    run.resume(model=plain, target=target, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    online.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
        ema_momentum = warmup_cosine(step, peak=cfg.ema_momentum, end=1.0, total=total_steps)  # no warm-up
        set_lr(optimizer, lr)
        view1, view2 = (v.contiguous(memory_format=torch.channels_last) for v in loader(step).views)  # [n, 3, H, W]
        with torch.no_grad(), accelerator.autocast():
            z1, z2 = target(view1), target(view2)  # [n, D]
        p1, p2 = online(view1, view2)  # [n, D]
        loss, parts = byol_loss(p1, p2, z1, z2)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(cfg.loss_weight * loss)
        optimizer.step()
        ema_update(target, plain.encoder, ema_momentum)  # after the step, from the new weights; parameters only
        run.log(loss=loss.detach(), **parts, lr=lr, ema_momentum=ema_momentum)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.encoder.backbone, spec, train, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.encoder.backbone, spec)  # the online network is the paper's result
        if cfg.eval:
            finish(
                run,
                train=train,
                test=test,
                recipe=recipe,
                published=PUBLISHED.get(preset, []),
                signals=SIGNALS,
                references={"loss": (4.0, "unrelated directions")},
            )
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
