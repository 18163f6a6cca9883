"""Vanilla, denoising and masked autoencoders with timm backbones (A. Sahai, CS 182/282A, lecture 16, 2022).

The encoder compresses an image, clean or corrupted, into a few numbers, from which a light decoder reconstructs it.

    python -m methods.autoencoder.train quickstart                               # embedded data, minutes on two cores
    python -m methods.autoencoder.train quickstart --variant masked --mask-ratio 0.75
    python -m methods.autoencoder.train cifar10-r18 --variant denoising --noise 0.25
    accelerate launch -m methods.autoencoder.train imagenette-r18 --variant masked
    python -m methods.autoencoder.train                                          # all presets; add --plan to any
    python -m studies autoencoder                                                # width, noise and mask ratio compared
    python -m studies linear-autoencoder                                         # the lecture's linear forms, measured
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.errors import UserError
from common.health import feature_std
from common.optim import decay_groups, set_lr
from common.schedules import cosine_schedule
from eval.session import ImageSession

from .augment import Corruption, one_view
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import reconstruction_loss
from .model import Decoder, map_size
from .reconstruct import reconstruction_section

METHOD = Path(__file__).parent.name


class Autoencoder(nn.Module):
    """Images [N, 3, s, s] -> (reconstructions [N, 3, s, s], features [N, backbone.num_features]).

    bottleneck: width of the latent l = E(x), a linear map of the last feature map or, `latent_from` "pooled", of
    the pooled features alone, which are what evaluation sees either way. No connection bypasses the bottleneck: a skip
    would let the input through and make denoising and completion trivial.
    """

    def __init__(self, backbone: nn.Module, bottleneck: int, latent_from: str, size: int, decoder_width: int):
        super().__init__()
        if decoder_width < 8:
            raise UserError(f"--decoder-width {decoder_width}: at least 8 channels are needed")
        self.backbone, self.latent_from = backbone, latent_from
        inputs = backbone.num_features if latent_from == "pooled" else map_size(backbone, size)
        self.to_latent = nn.Linear(inputs, bottleneck)
        self.decoder = Decoder(bottleneck, size, decoder_width)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [N, r], features [N, num_features])."""
        maps = self.backbone.forward_features(images)
        features = self.backbone.forward_head(maps)
        return self.to_latent(features if self.latent_from == "pooled" else maps.flatten(1)), features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents, features = self.encode(images)
        return self.decoder(latents), features


def compute_loss(
    model: nn.Module, target: Tensor, corruption: Corruption, drawn: Tensor | None, *, loss_on: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of views [n, 3, s, s] and the logged parts; `drawn`: the random numbers of `corruption` for them."""
    inputs, mask = corruption(target, drawn)
    output, features = model(inputs)
    loss, parts = reconstruction_loss(output, target, mask if loss_on == "masked" else None)
    return loss, {**parts, "feature_std": feature_std(features.detach())}


def main(preset: str, cfg: Config) -> None:
    if cfg.loss_on == "masked" and cfg.variant != "masked":
        raise UserError(f"--loss-on masked compares what was removed, and --variant {cfg.variant} removes nothing")
    corruption = Corruption(
        cfg.variant, cfg.image_size, noise=cfg.noise, mask_ratio=cfg.mask_ratio, patch=cfg.mask_patch, std=cfg.std
    )
    session = ImageSession(cfg, METHOD, preset, PRESETS, one_view(cfg), published=PUBLISHED)

    # ---- network ---------------------------------------------------------------------------------------------------
    spec = cfg.resnet_spec(arguments=cfg.vit_arguments())
    model = Autoencoder(
        create_backbone(spec), cfg.bottleneck, cfg.latent_from, size=cfg.image_size, decoder_width=cfg.decoder_width
    )
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=cfg.sync_bn)
    session.speed_up(model, checkpointed=model.backbone if cfg.activation_checkpointing else None)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=0.0)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "warm-up": f"{warmup_steps} steps",
            "latent": f"{cfg.bottleneck} of {3 * cfg.image_size**2} input numbers",
            "encoder's input": corruption.describe(),
        },
        checks=health_checks(after=warmup_steps + 2 * session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=cfg.lr, total=session.total_steps, warmup=warmup_steps)
        set_lr(optimizer, lr)
        (target,) = session.views(step)  # [n, 3, s, s]
        drawn = corruption.draw(cfg.batch_size, cfg.seed, step, session.device)  # of the global batch
        drawn = None if drawn is None else drawn[session.local_slice]

        optimizer.zero_grad(set_to_none=True)
        loss, parts = compute_loss(model, target, corruption, drawn, loss_on=cfg.loss_on)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss, **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation (of the backbone: the decoder was a means) -----------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        session.evaluate(
            signals=SIGNALS,
            references={"relative_error": (1.0, "the mean image")},
            extra_sections=reconstruction_section(
                unwrapped, corruption, spec, session.test, seed=cfg.seed, device=session.device
            ),
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
