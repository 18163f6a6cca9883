"""Is dropout an implicit contrastive objective? A test of the post "Dropout Inherently Enables Contrastive Self
Supervised Pretraining" (Pawan): one network, one arm, one seed per run; the arms differ in nothing but their noise.

    python -m methods.dropout_ssl.train quickstart                    # embedded data, the claim's arm A1
    python -m methods.dropout_ssl.train cifar10-cpu --arm A2          # arms A0 to A10 are in README.md
    python -m methods.dropout_ssl.train shapes-contrastive            # two masks of an image as the only views
    python -m methods.dropout_ssl.train                               # all presets; add --plan to any
    python -m studies dropout-diamonds                                # all arms compared, and a verdict
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbones import BackboneSpec, create_backbone, custom_encoder_spec
from common.cli import parse, run_cli
from common.errors import UserError
from common.health import feature_std
from common.memory import checkpoint_blocks, uses_batch_statistics
from common.optim import decay_groups, set_lr
from common.schedules import cosine_schedule
from common.transfer import to_device
from common.vit import vit_arguments
from eval.finish import finish
from eval.session import Session

from .augment import one_view
from .config import ARMS, PRESETS, PUBLISHED, Arm, Config
from .data import TABLES, Inputs, Order, Records, labeled_rows, open_records, random_labels
from .evaluate import add_to_card, measured_section, study_rows, write_card
from .health import SIGNALS, health_checks
from .loss import nt_xent, r_drop
from .measure import Measure, measured_steps
from .model import MLP, Network, copies_of, make_noise
from .noise import mask_keys

METHOD = Path(__file__).parent.name


def check(cfg: Config) -> None:
    """Raise UserError for settings that do not fit each other."""
    copies, tabular = ARMS[cfg.arm].copies or cfg.copies, cfg.data in TABLES
    if cfg.batch_size % copies:
        raise UserError(f"--batch-size {cfg.batch_size} counts masked copies: {copies} per record do not divide it")
    if cfg.protocol == "study" and (cfg.eval_protocols or not cfg.eval_baselines):
        raise UserError("--eval-protocols and --no-eval-baselines belong to --protocol common: the study's is fixed")
    if tabular and (ARMS[cfg.arm].crop_flip or cfg.protocol == "common"):
        raise UserError("--arm A8 and --protocol common are for images: a row of a table cannot be cropped")


def open_split(cfg: Config, split: str, session: Session) -> Records:
    """The training or test records."""
    if cfg.data in TABLES:
        return open_records(cfg.data, split, device=session.device, limit=cfg.limit, log=session.print)
    return open_records(
        cfg.data,
        split,
        image_size=cfg.image_size,
        workers=cfg.workers,
        image_column=cfg.image_column or None,
        label_column=cfg.label_column or None,
        device=session.device,
        limit=cfg.limit,
        log=session.print,
    )


def build(cfg: Config, train: Records) -> tuple[Network, BackboneSpec]:
    """The network with the arm's noise, and the description of its backbone: an MLP for tables."""
    if cfg.data in TABLES:
        arguments = {"inputs": train.inputs.shape[1], "width": cfg.width, "norm": cfg.norm}
        spec = custom_encoder_spec(MLP, arguments=arguments)
    else:
        arguments = vit_arguments(cfg.backbone, sizes=(cfg.image_size,), patch_size=cfg.patch_size)
        spec = cfg.resnet_spec(norm=cfg.norm, arguments=arguments)
    model = Network(create_backbone(spec), train.classes, cfg.p, cfg.projector_dim)
    model.set_noise(*make_noise(ARMS[cfg.arm].noise, model.backbone, p=cfg.p, sigma=cfg.sigma, patch=cfg.patch))
    return model, spec


def compute_loss(
    model: nn.Module, x: Tensor, keys: Tensor, targets: Tensor, arm: Arm, cfg: Config, *, unlabeled: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of k masked copies of n records and what is logged of it.

    x: [k * n, ...], copy by copy; keys: [k * n], what the masks depend on; targets: long [n]; `unlabeled`: A7's first
    phase.
    """
    out = model(x, keys)
    logits, projections = (z if z.dtype == torch.float64 else z.float() for z in (out.logits, out.projections))
    zero = 0 * (logits.sum() + projections.sum() + out.kl)  # DDP wants every weight used
    supervised = auxiliary = zero
    if not unlabeled:
        supervised = F.cross_entropy(logits, targets.repeat(len(x) // len(targets)))
    weight = 0.0
    if unlabeled or arm.auxiliary == "nt_xent":
        weight = 1.0 if unlabeled else cfg.lambd
        auxiliary = nt_xent(*out.projections.chunk(2), cfg.temperature)
    elif arm.auxiliary == "r_drop":
        weight, auxiliary = cfg.alpha, r_drop(*out.logits.chunk(2))
    elif arm.kl:
        weight, auxiliary = cfg.beta, out.kl
    loss = supervised + weight * auxiliary + zero
    return loss, {"supervised": supervised, "auxiliary": auxiliary, "feature_std": feature_std(out.features)}


def main(preset: str, cfg: Config) -> None:
    check(cfg)
    arm = ARMS[cfg.arm]
    copies = arm.copies or cfg.copies
    records = cfg.batch_size // copies  # of a step, so that all arms cost the same forward passes
    session = Session(cfg, METHOD, preset, PRESETS, published=PUBLISHED, batch_size=records)
    train, test = (open_split(cfg, split, session) for split in ("train", "test"))

    # ---- records: labeled ones, and in which order a step visits them ----------------------------------------------
    tabular = cfg.data in TABLES
    views = None if tabular else one_view(cfg, crop_flip=arm.crop_flip)
    plain_views = None if tabular else one_view(cfg, crop_flip=False)
    inputs, plain_inputs = Inputs(train, views, cfg.seed), Inputs(train, plain_views, cfg.seed)
    test_inputs = Inputs(test, plain_views, cfg.seed)
    labeled = labeled_rows(len(train), cfg.labels, cfg.seed)
    pool = labeled_rows(len(train), 0, cfg.seed)  # begins with the labeled ones
    targets = train.labels
    if arm.random_labels:
        targets = random_labels(len(train), train.classes, cfg.seed).to(session.device)
    pretraining = round(cfg.pretrain_share * cfg.steps) if arm.pretrained else 0
    visited = pool[: cfg.steps * records] if arm.single_pass else labeled
    if (pretraining or arm.auxiliary == "nt_xent") and records > len(pool if pretraining else visited):
        raise UserError(f"--labels {cfg.labels}: the {records} records of a step would repeat among the negatives")
    unlabeled_order = Order(pool, records, cfg.seed)
    # A7 fine-tunes as A1 trains, on one mask of twice as many records.
    labeled_order = Order(visited, cfg.batch_size if arm.pretrained else records, cfg.seed)
    session.set_length(cfg.steps, len(visited) / records)

    # ---- network ---------------------------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg, train)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    if cfg.activation_checkpointing:
        checkpoint_blocks(model.backbone)
    coupled = copies > 1 and uses_batch_statistics(model)

    # ---- optimizer -------------------------------------------------------------------------------------------------
    groups = decay_groups(model, cfg.weight_decay)
    if cfg.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0)
    model, unwrapped, optimizer = session.prepare(model, optimizer)

    # ---- measurements: held-out records, and labeled ones, never augmented -----------------------------------------
    held_out, seen = torch.arange(min(cfg.measured, len(test))), labeled[: cfg.measured]
    measure = Measure(
        unwrapped,
        {
            "held-out": (test_inputs(held_out), test.labels[: len(held_out)], held_out.to(session.device)),
            "train, measured": (plain_inputs(seen), targets[seen.to(session.device)], seen.to(session.device)),
        },
        seed=cfg.seed,
        masks=cfg.masks,
        own=arm.noise not in ("none", "element", "head"),
        batch=cfg.batch_size,
    )
    measured = measured_steps(len(labeled), len(train), cfg.batch_size, cfg.steps)

    def take_measurements(step: int) -> None:
        if session.is_main and not cfg.plan:
            with session.run.untimed():
                epoch = step / session.steps_per_epoch
                for kind, values in measure(epoch).items():
                    session.run.metrics.event(step, kind, epoch=epoch, **values)

    # ---- training --------------------------------------------------------------------------------------------------
    passes = cfg.steps * records / len(visited)
    session.start(
        plan={
            "arm": f"{cfg.arm}: {arm.about}",
            "labeled records": f"{len(labeled)} of {len(train)} of {train.name}",
            "a step": f"{records} records x {copies} masks = {cfg.batch_size} forward passes on "
            f"{session.num_processes} processes",
            "passes": f"{passes:.4g} over {len(visited)} records; without labels before: {pretraining} steps",
            "measured after": f"{', '.join(map(str, measured))} steps",
        },
        data={"training records": train},
        checks=health_checks(cfg.steps),
        model=unwrapped,
        optimizer=optimizer,
        measure=measure,
    )
    if coupled:
        session.print(
            "BatchNorm: the copies of a record share batch statistics, which helps them agree; prefer --norm group"
        )
    if arm.single_pass and passes > 1:
        session.print(
            f"{cfg.arm}: the data has {len(visited)} records for {cfg.steps * records} visits: {passes:.3g} passes, "
            f"not one; compare at the measurements up to step {len(visited) // records}"
        )
    if session.run.start_step == 0:
        take_measurements(0)
    model.train()
    for step in session.steps():
        unlabeled = step < pretraining
        since, total = (step, pretraining) if unlabeled else (step - pretraining, cfg.steps - pretraining)
        lr = cosine_schedule(since, base=cfg.lr, warmup=cfg.warmup_steps, total=total)
        set_lr(optimizer, lr)
        rows, epochs = (unlabeled_order if unlabeled else labeled_order)(since)  # of the global batch
        n, k = len(rows) // session.num_processes, cfg.batch_size // len(rows)
        part = slice(session.process_index * n, (session.process_index + 1) * n)
        x = copies_of(inputs(rows, step, part), k)  # [k * n, ...]
        chosen = to_device(rows[part], session.device)
        visits = to_device(epochs[part], session.device) * (not arm.frozen)
        keys = torch.cat([mask_keys(cfg.seed, "train", visits, chosen, copy) for copy in range(k)])

        optimizer.zero_grad(set_to_none=True)
        loss, parts = compute_loss(model, x, keys, targets[chosen], arm, cfg, unlabeled=unlabeled)
        session.backward(loss)
        # A zero gradient would still decay the weights; without one the optimizer leaves them as they are.
        idle = [unwrapped.head] if unlabeled else [] if arm.auxiliary == "nt_xent" else [unwrapped.projector]
        for parameter in (p for module in idle for p in module.parameters()):
            parameter.grad = None
        optimizer.step()
        sigma = getattr(unwrapped.noise, "sigma", 0.0)  # a tensor where it is learned: no `or`, which would wait for it
        session.log(loss=loss, **parts, sigma=sigma, lr=lr)
        if step + 1 in measured:
            take_measurements(step + 1)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        ends = study_rows(
            unwrapped, train, test, labeled, (plain_inputs, test_inputs), seed=cfg.seed, device=session.device
        )
        if cfg.protocol == "common":
            card = finish(
                session.run,
                train=train.store,
                test=test.store,
                recipe=views,
                published=session.published,
                signals=SIGNALS,
                extra_sections=[measured_section(session.run)],
            )
            add_to_card(session.run, card, ends)
        else:
            write_card(session.run, train, test, unwrapped, ends)


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
