"""Is dropout an implicit contrastive objective? A test of the post "Dropout Inherently Enables Contrastive Self
Supervised Pretraining" (Pawan): one network, one arm, one seed a run; the arms differ in nothing but their noise.

    python -m methods.dropout_ssl.train quickstart                    # a whole small study and its page, two cores
    python -m methods.dropout_ssl.train cifar10-cpu --arm A2          # one run; arms A0 to A10 are in README.md
    python -m methods.dropout_ssl.train shapes-contrastive            # two masks of an image as the only views
    python -m methods.dropout_ssl.study --grid tabular                # a resumable queue of runs, and the page
    python -m methods.dropout_ssl.train                               # all presets; add --plan to any
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from common.backbones import BackboneSpec, create_backbone, export_backbone, own_encoder
from common.cli import guarded, parse
from common.data import mean_std
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.health import feature_std
from common.memory import couples_samples
from common.optim import decay_groups, set_lr
from common.run import Run, Watch, make_accelerator
from common.schedules import warmup_cosine
from common.vit import vit_arguments
from eval.finish import finish

from .augment import one_view
from .config import ARMS, PRESETS, PUBLISHED, Config
from .data import TABLES, Inputs, Order, labelled_rows, open_records, random_labels
from .evaluate import add_to_card, measured_section, study_rows, write_card
from .loss import nt_xent, r_drop
from .measure import Measure, measured_steps
from .model import MLP, Network, copies_of, make_noise
from .noise import mask_keys

METHOD = Path(__file__).parent.name
SIGNALS = {
    "supervised": "cross-entropy of the noisy predictions; 0 while A7 trains without labels",
    "auxiliary": "NT-Xent, R-Drop or the VAE's KL before its weight; 0 in arms without one",
    "sigma": "mean sigma of the VAE layer; falling to 0 means that the layer switches its noise off",
    "feature_std": "spread of the features over the sphere; 0 if all inputs get the same ones",
}


def main(preset: str, cfg: Config) -> None:
    if cfg.study:
        from .study import Arguments, run_study  # which imports this module

        own = PRESETS[preset][1]
        if replace(cfg, study=own.study, out=own.out, plan=own.plan) != own:
            raise UserError(
                f"{preset} runs the study {cfg.study!r}, whose runs have their own settings: it takes "
                "--out and --plan alone. For a single run choose another preset."
            )
        return run_study(Arguments(grid=cfg.study, out=Path(cfg.out) / f"{METHOD}-study-{cfg.study}", plan=cfg.plan))

    # ---- processes -------------------------------------------------------------------------------------------------
    accelerator = make_accelerator(cfg.precision)
    device, ranks = accelerator.device, accelerator.num_processes
    arm = ARMS[cfg.arm]
    copies = arm.copies or cfg.copies
    if copies < 1 or cfg.batch_size % copies:
        raise UserError(f"--batch-size {cfg.batch_size} counts masked copies: {copies} a record do not divide it")
    records = cfg.batch_size // copies  # of a step, so that all arms cost the same forward passes
    per_rank(records, ranks)  # or says that they do not divide
    torch.use_deterministic_algorithms(cfg.deterministic)

    # ---- data ------------------------------------------------------------------------------------------------------
    tabular = cfg.data in TABLES
    if cfg.protocol == "study" and (cfg.eval_protocols or not cfg.eval_baselines):
        raise UserError("--eval-protocols and --no-eval-baselines belong to --protocol common: the study's is fixed")
    if tabular and (arm.crop_flip or cfg.protocol == "common"):
        raise UserError("--arm A8 and --protocol common are for images: a row of a table cannot be cropped")
    columns = dict(image_column=cfg.image_column or None, label_column=cfg.label_column or None)
    source = {} if tabular else dict(image_size=cfg.image_size, workers=cfg.workers, **columns)
    source |= dict(device=device, limit=cfg.limit, log=accelerator.print)
    train, test = (open_records(cfg.data, split, **source) for split in ("train", "test"))
    mean, std = mean_std(cfg.normalize)
    look = dict(crop_scale=cfg.crop_scale, mean=mean, std=std)
    recipes = [None if tabular else one_view(cfg.image_size, crop_flip=crop, **look) for crop in (arm.crop_flip, False)]
    inputs, plain_inputs, test_inputs = (
        Inputs(of, recipe, cfg.seed) for of, recipe in ((train, recipes[0]), (train, recipes[1]), (test, recipes[1]))
    )
    labelled = labelled_rows(len(train), cfg.labels, cfg.seed)
    pool = labelled_rows(len(train), 0, cfg.seed)  # begins with the labelled ones
    targets = random_labels(len(train), train.classes, cfg.seed).to(device) if arm.random_labels else train.labels
    pretraining = round(cfg.pretrain_share * cfg.steps) if arm.pretrained else 0
    visited = pool[: cfg.steps * records] if arm.single_pass else labelled
    if (pretraining or arm.auxiliary == "nt_xent") and records > len(pool if pretraining else visited):
        raise UserError(f"--labels {cfg.labels}: the {records} records of a step would repeat among the negatives")
    # A7 fine-tunes as A1 trains, on one mask of twice as many records.
    orders = {True: Order(pool, records, cfg.seed),
              False: Order(visited, cfg.batch_size if arm.pretrained else records, cfg.seed)}  # fmt: skip

    # ---- model -----------------------------------------------------------------------------------------------------
    if tabular:
        spec = own_encoder(MLP, arguments=dict(inputs=train.inputs.shape[1], width=cfg.width, norm=cfg.norm))
    else:
        spec = BackboneSpec(
            cfg.backbone,
            stem=cfg.stem,
            layers=cfg.layers,
            channels=cfg.channels,
            stem_width=cfg.stem_width,
            norm=cfg.norm,
            arguments=vit_arguments(cfg.backbone, sizes=(cfg.image_size,), patch_size=cfg.patch_size),
            image_size=cfg.image_size,
            mean=mean,
            std=std,
        )
    torch.manual_seed(cfg.seed)
    model = Network(create_backbone(spec), train.classes, cfg.p, cfg.projector_dim)
    model.set_noise(*make_noise(arm.noise, model.backbone, p=cfg.p, sigma=cfg.sigma, patch=cfg.patch))
    model = model.to(memory_format=torch.channels_last)
    model = sync_batchnorm(model, device) if cfg.sync_bn else model
    coupled = copies > 1 and couples_samples(model)

    # ---- optimiser and schedule ------------------------------------------------------------------------------------
    groups = decay_groups(model, cfg.weight_decay)
    if cfg.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    # ---- measurements: held-out records, and labelled ones, never augmented -----------------------------------------
    held_out = torch.arange(min(cfg.measured, len(test)))
    seen = labelled[: cfg.measured]
    sets = {
        "held-out": (test_inputs(held_out), test.labels[: len(held_out)], held_out.to(device)),
        "train, measured": (plain_inputs(seen), targets[seen.to(device)], seen.to(device)),
    }
    own = arm.noise not in ("none", "element", "head")
    measure = Measure(plain, sets, seed=cfg.seed, masks=cfg.masks, own=own, batch=cfg.batch_size)
    measured = measured_steps(len(labelled), len(train), cfg.batch_size, cfg.steps)

    # ---- run -------------------------------------------------------------------------------------------------------
    about = dict(method=METHOD, preset=preset, seed=cfg.seed, config=asdict(cfg), accelerator=accelerator)
    length = dict(total_steps=cfg.steps, steps_per_epoch=len(visited) / records, batch_size=cfg.batch_size)
    run = Run(cfg, **about, **length)
    passes = cfg.steps * records / len(visited)
    run.show_plan(
        cfg,
        PRESETS[preset][1],
        {
            "arm": f"{cfg.arm}: {arm.about}",
            "labelled records": f"{len(labelled)} of {len(train)} of {train.name}",
            "a step": f"{records} records x {copies} masks = {cfg.batch_size} forward passes on {ranks} processes",
            "passes": f"{passes:.4g} over {len(visited)} records; without labels before: {pretraining} steps",
            "measured after": f"{', '.join(map(str, measured))} steps",
        },
    )
    if coupled:
        run.say("BatchNorm: the copies of a record share batch statistics, which helps them agree; prefer --norm group")
    if arm.single_pass and passes > 1:
        run.say(
            f"{cfg.arm}: the data has {len(visited)} records for {cfg.steps * records} visits: {passes:.3g} passes, "
            f"not one; compare at the measurements up to step {len(visited) // records}"
        )
    message = "All inputs get nearly the same features: they collapse. Lower --lr or the auxiliary loss's weight."
    run.watch(Watch("feature_std", below=0.02, after=cfg.steps // 10, message=message))
    run.resume(model=plain, optimizer=optimizer, scaler=accelerator.scaler, measure=measure)

    def take_measurements(step: int) -> None:
        if not accelerator.is_main_process or cfg.plan:
            return
        with run.untimed():
            epoch = step / run.steps_per_epoch
            for kind, values in measure(epoch).items():
                run.metrics.event(step, kind, epoch=epoch, **values)

    if run.start_step == 0:
        take_measurements(0)

    # ---- training --------------------------------------------------------------------------------------------------
    model.train()
    for step in run.steps():
        unlabelled = step < pretraining
        phase = dict(total=pretraining) if unlabelled else dict(total=cfg.steps - pretraining)
        since = step if unlabelled else step - pretraining
        lr = warmup_cosine(since, peak=cfg.lr, warmup=cfg.warmup_steps, **phase)
        set_lr(optimizer, lr)
        rows, epochs = orders[unlabelled](since)  # of the global batch
        n, k = len(rows) // ranks, cfg.batch_size // len(rows)
        part = slice(accelerator.process_index * n, (accelerator.process_index + 1) * n)
        x = copies_of(inputs(rows, step, part), k)  # [k * n, ...]
        chosen, epochs = rows[part].to(device), epochs[part].to(device) * (not arm.frozen)
        keys = torch.cat([mask_keys(cfg.seed, "train", epochs, chosen, copy) for copy in range(k)])
        optimizer.zero_grad(set_to_none=True)
        out = model(x, keys)
        zero = 0 * (out.logits.float().sum() + out.projections.float().sum() + out.kl)  # DDP wants every weight used
        supervised = auxiliary = zero
        if not unlabelled:
            supervised = F.cross_entropy(out.logits.float(), targets[chosen].repeat(k))
        weight = 0.0
        if unlabelled or arm.auxiliary == "nt_xent":
            weight = 1.0 if unlabelled else cfg.lambd
            auxiliary = nt_xent(*out.projections.chunk(2), cfg.temperature)
        elif arm.auxiliary == "r_drop":
            weight, auxiliary = cfg.alpha, r_drop(*out.logits.chunk(2))
        elif arm.kl:
            weight, auxiliary = cfg.beta, out.kl
        loss = supervised + weight * auxiliary + zero
        accelerator.backward(loss)
        # A zero gradient would still decay the weights; without one the optimiser leaves them as they are.
        idle = [plain.head] if unlabelled else [] if arm.auxiliary == "nt_xent" else [plain.projector]
        for parameter in (p for module in idle for p in module.parameters()):
            parameter.grad = None
        optimizer.step()
        run.log(loss=loss, supervised=supervised, auxiliary=auxiliary, sigma=getattr(plain.noise, "sigma", None) or 0.0,
                feature_std=feature_std(out.features.detach()), lr=lr)  # fmt: skip
        if step + 1 in measured:
            take_measurements(step + 1)

    # ---- export, evaluation, result card, report -------------------------------------------------------------------
    if accelerator.is_main_process:
        export_backbone(run.directory, plain.backbone, spec)
        if cfg.eval:
            ends = study_rows(plain, train, test, labelled, (plain_inputs, test_inputs), seed=cfg.seed, device=device)
            if cfg.protocol == "common":
                told = dict(published=PUBLISHED.get(preset, []), signals=SIGNALS, recipe=recipes[0])
                card = finish(run, train=train.store, test=test.store, **told, extra_sections=[measured_section(run)])
                add_to_card(run, card, ends)
            else:
                write_card(run, train, test, plain, ends)
    accelerator.end_training()


if __name__ == "__main__":
    guarded(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
