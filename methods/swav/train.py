"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020, 2006.09882).

Predict the cluster of one view from another view; clusters are kept equally large, so that they cannot all be one.

    python -m methods.swav.train quickstart                    # embedded data, minutes on two cores
    python -m methods.swav.train cifar10-r18                   # solo-learn's recipe: 89.2 % online linear
    accelerate launch -m methods.swav.train imagenet-r50       # the paper: 75.3 % linear, batch 4096, 800 epochs
    python -m methods.swav.train                               # all presets; add --plan to any to see before you run
"""

import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.cli import guarded, parse
from common.data import ViewLoader, mean_std, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.memory import checkpoint_blocks
from common.optim import LARC, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from eval.finish import finish, online_knn

from .augment import multi_crop
from .config import PRESETS, PUBLISHED, Config
from .loss import Queue, sinkhorn, swapped_prediction

METHOD = Path(__file__).parent.name
SIGNALS = {
    "code_entropy": "mean entropy of a code in nats: ln K if codes say nothing, 0 if each names one prototype",
    "prototypes_used": "perplexity of the mean prediction: how many of the K prototypes do the work",
    "projection_std": "1 if the projections spread evenly over the sphere, 0 if all of them point one way",
}


class SwAV(nn.Module):
    """Views -> projections [V * n, D] of unit length, view after view, and their scores [V * n, K]."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int, prototypes: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        hidden = [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)] if hidden_dim else []
        self.projector = nn.Sequential(*hidden, nn.Linear(hidden_dim or width, projector_dim))
        self.prototypes = nn.Linear(projector_dim, prototypes, bias=False)
        self.normalize_prototypes()

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Unit rows. Call at the start of every step: no gradient, and the optimiser's momentum stays as it is."""
        self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))

    def scores(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # half precision would round
            return linear(z, self.prototypes.weight)

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        # Views of one size in one pass, so BatchNorm's statistics are per size; the projector sees all of them at once.
        sizes = [list(same) for _, same in groupby(views, key=lambda view: view.shape[-1])]
        features = [self.backbone(torch.cat(s).contiguous(memory_format=torch.channels_last)) for s in sizes]
        z = self.projector(torch.cat(features))
        z = normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        return z, self.scores(z)


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.epsilon < 0.025:
        raise UserError(f"--epsilon {cfg.epsilon}: below 0.025 exp(score / epsilon) leaves the range of float32")

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    mean, std = mean_std(cfg.normalize)
    recipe = multi_crop(
        cfg.image_size,
        crop_scale=cfg.crop_scale,
        local_views=cfg.local_views,
        local_size=cfg.local_size,
        local_scale=cfg.local_scale,
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
        zero_init_last=False,
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    torch.manual_seed(cfg.seed)
    backbone = create_backbone(spec).to(memory_format=torch.channels_last)
    model = SwAV(backbone, cfg.hidden_dim, cfg.projector_dim, cfg.prototypes)
    queue_batches = cfg.queue_length // cfg.batch_size  # whole batches
    queue = Queue(queue_batches * cfg.batch_size, cfg.projector_dim).to(device)
    if cfg.activation_checkpointing:
        checkpoint_blocks(model.backbone)
    if cfg.compile:
        model.backbone.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    rule = dict(lr=0.0, weight_decay=cfg.weight_decay)  # one group: biases and norms are adapted and decayed too
    match cfg.optimizer:
        case "larc":
            optimizer = LARC(model.parameters(), momentum=cfg.momentum, trust=cfg.trust, clip=cfg.larc_clip, **rule)
        case "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), **rule)
    steps_per_epoch = loader.steps_per_epoch
    total_steps, warmup_steps = cfg.epochs * steps_per_epoch, cfg.warmup_epochs * steps_per_epoch
    queue_step = cfg.queue_start * steps_per_epoch
    schedule = dict(total=total_steps, warmup=warmup_steps, start=cfg.lr_start, end=cfg.lr_end, endpoint=True)
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
        steps_per_epoch=steps_per_epoch,
        batch_size=cfg.batch_size,
    )
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {steps_per_epoch}; warm-up {warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}",
            "queue": f"{queue_batches} batches, filled from step {queue_step}" if queue_batches else "none",
            "views": recipe.describe(),
        },
    )
    chance = math.log(cfg.prototypes)
    settled = max(warmup_steps, cfg.freeze_prototypes) + steps_per_epoch
    run.watch(
        Watch(
            "loss",
            above=0.98 * chance,
            after=settled,
            message=f"The loss stays at ln K = {chance:.2f}: codes cannot be predicted. Try --epsilon 0.03, a larger "
            "--freeze-prototypes, fewer small views or milder colour jitter.",
        ),
        Watch(
            "prototypes_used",
            below=0.1 * min(cfg.prototypes, cfg.batch_size),
            after=warmup_steps,
            message=f"Few of the {cfg.prototypes} prototypes get all images: collapse. Are --sinkhorn-iterations at 3? "
            "Lower --lr or freeze the prototypes longer.",
        ),
        Watch(
            "projection_std",
            below=0.1,
            after=warmup_steps,
            message="All projections point one way (1 would be uniform): the representation collapses. Lower --lr.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler, queue=queue if queue_batches else None)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, peak=cfg.lr, **schedule)
        set_lr(optimizer, lr)
        plain.normalize_prototypes()
        views = loader(step).views  # two [n, 3, S, S], then local_views of [n, 3, s, s]
        z, scores = model(*views)  # [V * n, D], [V * n, K]
        scores = scores.unflatten(0, (len(views), -1))  # [V, n, K]
        with torch.no_grad():
            samples = scores[:2].detach()
            if queue_batches and step >= queue_step + queue_batches:  # full; scored by the prototypes of today
                samples = torch.cat([plain.scores(queue.part()), samples], 1)
            codes = sinkhorn(samples, cfg.epsilon, cfg.sinkhorn_iterations)[:, -local_batch:]  # [2, n, K]
            if queue_batches and step >= queue_step:
                queue.push(z.unflatten(0, (len(views), -1))[:2])
        loss, parts = swapped_prediction(scores, codes, cfg.temperature)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        if step < cfg.freeze_prototypes:
            plain.prototypes.weight.grad = None  # not zero: momentum and weight decay would still move them
        optimizer.step()
        run.log(loss=loss.detach(), **parts, projection_std=feature_std(z.detach()), lr=lr)
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
                references={"loss": (chance, "chance level, ln K")},
            )
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
