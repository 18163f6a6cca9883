"""Deep InfoMax: Learning Deep Representations by Mutual Information Estimation and Maximization (Hjelm et al. 2018,
arXiv:1808.06670).

A summary of 64 numbers must distinguish the parts of its image from the parts of all others.

    python -m methods.dim.train quickstart                     # embedded data, minutes on two cores
    python -m methods.dim.train cifar10                        # the paper, Jensen-Shannon: 73.25 % (conv, MLP probe)
    accelerate launch -m methods.dim.train cifar10-infonce     # the paper, infoNCE: 75.21 %
    python -m methods.dim.train                                # all presets; add --plan to any to see before you run
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, custom_encoder_spec
from common.cli import parse, run_cli
from common.health import feature_std
from common.optim import set_lr
from common.rng import generator
from common.schedules import cosine_schedule
from common.transfer import to_device
from eval.session import ImageSession

from .augment import one_view
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_levels, check, health_checks, local_side, references, term_weights
from .layers import LayerReport
from .loss import discriminator_loss, fooling_loss, information_loss
from .model import DIM, Discriminator, Encoder

METHOD = Path(__file__).parent.name


def build(cfg: Config) -> tuple[DIM, BackboneSpec]:
    """The encoder with its scorers, and the description of the encoder."""
    spec = custom_encoder_spec(
        Encoder,
        arguments={
            "layout": cfg.layout,
            "image_size": cfg.image_size,
            "width": cfg.width,
            "y_dim": cfg.y_dim,
            "grayscale": cfg.grayscale,
            "contrast": cfg.contrast,
            "output": cfg.output,
        },
        image_size=cfg.image_size,
        mean=cfg.mean,
        std=cfg.std,
    )
    return DIM(create_backbone(spec), cfg.mi_units, tuple(term_weights(cfg))), spec


def compute_loss(model: nn.Module, images: Tensor, cfg: Config) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The weighted information terms of images [n, 3, S, S], what is logged of them, and the summaries y [n, y_dim]."""
    y, pairs = model(images)  # [n, y_dim], {term: ([n, U], [n, L, U])}
    loss, parts = images.new_zeros(()), {}
    for name, (summaries, locations) in pairs.items():
        term, signals = information_loss(summaries, locations, cfg.estimator)
        loss = loss + term_weights(cfg)[name] * term
        parts = signals | parts | {f"{name}_loss": term.detach()}  # with both terms, signals are the local one's
    return loss, parts | {"y_std": feature_std(y.detach())}, y


def main(preset: str, cfg: Config) -> None:
    check(cfg)
    session = ImageSession(cfg, METHOD, preset, PRESETS, one_view(cfg), split=cfg.split, published=PUBLISHED)

    # ---- networks --------------------------------------------------------------------------------------------------
    model, spec = build(cfg)
    discriminator = Discriminator(cfg.y_dim)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model)

    # ---- optimizers ------------------------------------------------------------------------------------------------
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=cfg.discriminator_lr)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    discriminator, unwrapped_discriminator, d_optimizer = session.prepare(discriminator, d_optimizer)

    # ---- training --------------------------------------------------------------------------------------------------
    side, levels = local_side(cfg), chance_levels(cfg)
    session.start(
        plan={
            "terms": ", ".join(f"{name} x {w:g}, chance {levels[name]:.2f}" for name, w in term_weights(cfg).items()),
            "local map": f"{side} x {side}; {(cfg.batch_size - 1) * side**2} negatives for each of its positions",
        },
        checks=health_checks(cfg.batch_size, session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
        discriminator=unwrapped_discriminator,
        d_optimizer=d_optimizer,
    )
    model.train()
    for step in session.steps():
        decay = cosine_schedule(step, base=1.0, total=session.total_steps) if cfg.decay == "cosine" else 1.0
        set_lr(optimizer, decay * cfg.lr)
        set_lr(d_optimizer, decay * cfg.discriminator_lr)
        (images,) = session.views(step)  # [n, 3, S, S]

        loss, parts, y = compute_loss(model, images, cfg)
        if cfg.gamma:
            codes = y.sigmoid()
            prior = torch.rand(cfg.batch_size, cfg.y_dim, generator=generator(cfg.seed, "prior", step))
            prior = to_device(prior[session.local_slice], session.device)
            d_loss, d_parts = discriminator_loss(discriminator, prior, codes, cfg.penalty)
            d_optimizer.zero_grad(set_to_none=True)
            session.backward(d_loss)
            d_optimizer.step()
            prior_loss = fooling_loss(unwrapped_discriminator, codes)  # the encoder's turn
            loss = loss + cfg.gamma * prior_loss
            parts |= {"prior_loss": prior_loss.detach(), "discriminator_loss": d_loss.detach()} | d_parts
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss.detach(), **parts, lr=decay * cfg.lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        report = LayerReport(session.run, spec, session.probed, session.test, mlp_epochs=cfg.mlp_epochs)
        report.measure(unwrapped, batch=cfg.batch_size)
        session.evaluate(
            signals=SIGNALS,
            references=references(cfg),
            extra_sections=report.sections(),
        )
        report.add_to_card()


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
