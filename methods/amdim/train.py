"""AMDIM: Learning Representations by Maximizing Mutual Information Across Views (Bachman et al. 2019, 1906.00910).

From the whole of one view, and from a part of it, tell the local features of the image's other view from those of all
other images, at two scales; encoders whose local features see little keep that from being trivial.

    python -m methods.amdim.train quickstart                   # embedded data, minutes on two cores
    python -m methods.amdim.train cifar10                      # the code's defaults for one GPU
    accelerate launch -m methods.amdim.train imagenet-128      # the paper: 68.1 % linear with the large encoder
    python -m methods.amdim.train                              # all presets; add --plan to any to see before you run
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import BackboneSpec, create_backbone, export_backbone, own_encoder
from common.cli import guarded, parse
from common.data import ViewLoader, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.optim import set_lr
from common.rng import generator
from common.run import Run, Watch, make_accelerator
from eval.features import frozen
from eval.finish import finish, online_knn
from eval.report import table

from .augment import statistics, two_views
from .config import PRESETS, PUBLISHED, Config
from .loss import PLACES5, chance, effective_dimensions, multi_scale, probe_loss
from .model import AMDIM, Encoder, Probes

METHOD = Path(__file__).parent.name
SIGNALS = {
    "loss": "nce_1_5 + nce_1_7 + nce_5_5 and, three times, the penalty on raw scores",
    "nce_1_5": "the whole image's vector against the 5x5 features of the other view",
    "nce_1_7": "the whole image's vector against the 7x7 features of the other view",
    "nce_5_5": "one place's 5x5 vector against the 5x5 features of the other view",
    "retrieval": "share of whole-image vectors whose best score in the batch is at a place of their own other view",
    "score_rms": "root mean square of the scores before clipping; near C they saturate and gradients stop",
    "dimensions": "directions that f1 uses (participation ratio of its covariance): 1 if all images lie on one line",
    "online_linear": "ONLINE: a linear probe's accuracy on the training views; not the result",
    "online_mlp": "ONLINE: an MLP probe's accuracy on the training views; not the result",
}


def build(cfg: Config, mean: tuple, std: tuple, classes: int = 0) -> tuple[AMDIM, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError where sizes do not fit each other."""
    sizes = dict(image_size=cfg.image_size, ndf=cfg.ndf, n_rkhs=cfg.n_rkhs, n_depth=cfg.n_depth)
    arguments = {**sizes, "hidden_bn": cfg.hidden_bn}
    spec = own_encoder(Encoder, arguments=arguments, image_size=cfg.image_size, mean=mean, std=std)
    return AMDIM(create_backbone(spec), hidden_bn=cfg.hidden_bn, classes=classes), spec


def learning_rate(step: int, cfg: Config, steps_per_epoch: int) -> float:
    """Linear warm-up from lr / warmup_steps, then lr times 0.2 for every milestone (in epochs) that is passed."""
    passed = sum(step >= epoch * steps_per_epoch for epoch in cfg.milestones)
    return cfg.lr * 0.2**passed * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))


def draw_places(seed: int, step: int, batch: int) -> Tensor:
    """The 5x5 feature that is an image's source in the pair 5-5, long [2, B]: one for each image and direction."""
    return torch.randint(PLACES5, (2, batch), generator=generator(seed, "places", step))


@torch.no_grad()
def held_out(model: AMDIM, test, recipe, cfg: Config, device: torch.device, limit: int = 2000) -> dict[str, float]:
    """The objective on views of test images, on one rank, in eval mode: means over batches as large as in training."""
    batch, rows = min(cfg.batch_size, len(test)), []
    with frozen(model):
        for number in range(min(limit, len(test)) // batch):
            images = test.eval_images(number * batch, (number + 1) * batch, cfg.image_size).to(device)
            params = recipe.sample(batch, generator(cfg.seed, "held out", number)).to(device)
            f1, f5, f7, _ = model(*recipe(images, params))
            places = draw_places(cfg.seed, -1 - number, batch).to(device)
            loss, parts = multi_scale(f1, f5, f7, places, clip=cfg.clip, penalty=cfg.penalty, alone=True)
            rows.append({"loss": loss, **parts})
    means = {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}
    return {"images": len(rows) * batch, "batch": batch, **means}


def held_out_section(found: dict[str, float]) -> tuple[str, str]:
    """(title, HTML) for the report: the objective on held-out images beside its chance levels."""
    levels = chance(found["batch"])
    rows = [(name, f"{found[name]:.4g}", f"{level:.4g}", SIGNALS[name]) for name, level in levels.items()]
    caption = (
        f"Views of {found['images']:,} test images, in batches of {found['batch']}, network in eval mode: retrieval is "
        f"{found['retrieval'] / levels['retrieval']:.0f} times chance. Chance of the loss is without the penalty."
    )
    return "Retrieval on held-out images", table(
        ("quantity", "test images", "by chance", "meaning"), rows, caption=caption, numeric=(1, 2)
    )


def held_out_row(found: dict[str, float]) -> dict:
    """Retrieval on held-out images as a row of the result card."""
    row = {"protocol": "retrieval", "target": "1-5", "metric": "top-1", "value": 100 * found["retrieval"]}
    text = f"Views of test images, eval mode: {SIGNALS['retrieval']}, among {found['batch']} images."
    settings = {"batch": found["batch"], "test_images": found["images"], "chance": 100 / found["batch"]}
    return {**row, "settings": settings, "text": text, "baselines": {}}


def main(preset: str, cfg: Config) -> None:
    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    local_batch = per_rank(cfg.batch_size, ranks)
    torch.use_deterministic_algorithms(cfg.deterministic)
    part = slice(accelerator.process_index * local_batch, (accelerator.process_index + 1) * local_batch)

    # ---- data ------------------------------------------------------------------------------------------------------
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = dict(image_size=cfg.image_size, device=device, workers=cfg.workers, log=accelerator.print, **columns)
    train = open_data(cfg.data, "train", limit=cfg.limit or None, **source)
    test = open_data(cfg.data, "test", **source) if cfg.eval or cfg.knn_every else None
    if cfg.online_probes and (train.labels is None or int(train.labels.max()) < 0):
        raise UserError(f"--online-probes needs labels, and the training images of {train.name!r} have none: leave it")
    mean, std = statistics(cfg.normalize)
    geometry = dict(translate=cfg.translate, crop_scale=cfg.crop_scale)
    colour = dict(jitter=cfg.jitter, jitter_p=cfg.jitter_p, grey=cfg.grey)
    recipe = two_views(cfg.image_size, **geometry, **colour, mean=mean, std=std, compile=cfg.compile)
    place = dict(rank=accelerator.process_index, world_size=ranks, device=device, workers=cfg.workers)
    loader = ViewLoader(train, recipe, batch_size=cfg.batch_size, seed=cfg.seed, **place)

    # ---- model -----------------------------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    classes = max(int(train.labels.max()) + 1, len(train.class_names or ())) if cfg.online_probes else 0
    model, spec = build(cfg, mean, std, classes)
    model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        for stage in (model.backbone.to7, model.backbone.to5, model.backbone.to1):
            stage.compile()
    if cfg.sync_bn:
        model = sync_batchnorm(model, device)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    # One group: the code decays biases and BatchNorm too. Adam's own decay is coupled (added to the gradient).
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=cfg.betas, eps=1e-8, weight_decay=cfg.weight_decay)
    total_steps = cfg.epochs * loader.steps_per_epoch
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    levels = chance(cfg.batch_size)
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "training images": f"{len(train)} of {train.name}",
            "steps": f"{total_steps} = {cfg.epochs} epochs x {loader.steps_per_epoch}; warm-up {cfg.warmup_steps}",
            "batch": f"{cfg.batch_size} = {ranks} processes x {local_batch}; {cfg.batch_size - 1} images are negatives",
            "loss by chance": f"{levels['loss']:.2f}, which bounds what can be learnt: larger batches raise it",
            "views": recipe.describe(),
        },
    )
    # Scores of colour alone come first, and small networks stay with them for a thousand steps.
    settled = max(cfg.warmup_steps + loader.steps_per_epoch, min(total_steps // 2, 2000))
    run.watch(
        Watch(
            "retrieval",
            below=4 * levels["retrieval"],
            after=settled,
            message="An image's vector finds its other view hardly more often than by chance (loss at chance: "
            f"{levels['loss']:.2f}): nothing is learnt. Try another learning rate, a longer warm-up, or milder views.",
        ),
        Watch(
            "score_rms",
            above=cfg.clip,
            after=cfg.warmup_steps,
            message="Scores lie beyond the clip, where tanh is flat and gradients stop. Raise --penalty or lower --lr.",
        ),
        Watch(
            "dimensions",
            below=1.2,
            after=settled,
            message="All images lie on one line: the representation collapses. Lower --lr or warm up longer.",
        ),
    )
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        lr = learning_rate(step, cfg, loader.steps_per_epoch)
        set_lr(optimizer, lr)
        batch = loader(step)
        views = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]  # [n, 3, S, S] each
        places = draw_places(cfg.seed, step, cfg.batch_size)[:, part].to(device, non_blocking=True)  # [2, n]
        noise = None
        if classes:
            width = cfg.n_rkhs + Probes.hidden
            noise = torch.rand(2, cfg.batch_size, width, generator=generator(cfg.seed, "probes", step))[:, part]
            noise = noise.flatten(0, 1).to(device, non_blocking=True)  # [2n, R + hidden]

        f1, f5, f7, logits = model(*views, noise)  # [2, n, R], [2, n, 25, R], [2, n, 49, R]
        loss, parts = multi_scale(f1, f5, f7, places, clip=cfg.clip, penalty=cfg.penalty)
        total = loss
        if classes:
            probes, online = probe_loss(logits, batch.labels)
            total, parts = loss + probes, {**parts, **online}
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(total)
        optimizer.step()
        run.log(loss=loss.detach(), **parts, dimensions=effective_dimensions(f1[0].detach()), lr=lr)
        if run.epoch_ends(step, cfg.knn_every):
            with run.untimed():
                online_knn(run, step, plain.backbone, spec, train, test)

    loader.close()

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            found = held_out(plain, test, recipe, cfg, device)
            said = {name: f"{found[name]:.4g} (chance {level:.4g})" for name, level in levels.items()}
            run.say("held-out images: " + ", ".join(f"{name} {text}" for name, text in said.items()))
            marks = {name: (level, "chance level") for name, level in levels.items()}
            told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS, references=marks)
            extra = dict(extra_rows=[held_out_row(found)], extra_sections=[held_out_section(found)])
            finish(run, train=train, test=test, recipe=recipe, **told, **extra)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
