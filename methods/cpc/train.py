"""CPC for images: Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018, 1807.03748).

Encode the overlapping patches of an image separately; from the rows above, identify the patch several rows below among
patches from elsewhere.

    python -m methods.cpc.train quickstart                     # embedded data, minutes on two cores
    python -m methods.cpc.train stl10                          # GIM's recipe: 80.5 % linear (unverified)
    accelerate launch -m methods.cpc.train imagenet            # the paper (v1): 48.7 % linear
    python -m methods.cpc.train                                # all presets; add --plan to any to see before you run
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec, create_backbone, custom_encoder_spec
from common.cli import parse, run_cli
from common.errors import UserError
from common.health import feature_std
from common.optim import set_lr
from common.rng import generator
from common.schedules import cosine_schedule
from common.transfer import to_device
from eval.session import ImageSession

from .augment import PatchJitter, grid_side, one_view, statistics
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, health_checks
from .loss import cpc_loss, draw_negatives
from .model import CPC, Encoder
from .retrieval import held_out, rows_of, section, sentence

METHOD = Path(__file__).parent.name


def build(cfg: Config) -> tuple[CPC, BackboneSpec]:
    """The network and the description of its encoder. Raises UserError where sizes do not fit each other."""
    if cfg.color_drop and cfg.grayscale:
        raise UserError("--color-drop drops channels of color patches: use it with --no-grayscale")
    side = grid_side(cfg.crop_size, cfg.patch, cfg.stride)
    offsets = tuple(range(cfg.skip_step + 1, cfg.skip_step + cfg.prediction_steps + 1))
    if offsets[-1] >= side:
        raise UserError(
            f"a view of {cfg.crop_size} px has {max(side, 0)} rows of patches ({cfg.patch} px, stride {cfg.stride}), "
            f"but --skip-step {cfg.skip_step} and --prediction-steps {cfg.prediction_steps} need {offsets[-1] + 1}: "
            "predict fewer rows, or make patches or strides smaller"
        )
    mean, std = statistics(cfg.normalize, cfg.grayscale)
    spec = custom_encoder_spec(
        Encoder,
        arguments={
            "patch": cfg.patch,
            "stride": cfg.stride,
            "patch_crop": cfg.patch_crop,
            "grayscale": cfg.grayscale,
            "norm": cfg.norm,
            "stem_width": cfg.stem_width,
            "stem_kernel": cfg.stem_kernel,
            "stem_stride": cfg.stem_stride,
            "stem_pool": cfg.stem_pool,
            "layers": cfg.layers,
            "channels": cfg.channels,
            "hidden": cfg.hidden,
        },
        image_size=cfg.image_size,
        mean=mean,
        std=std,
    )
    jitter = PatchJitter(
        cfg.patch,
        cfg.stride,
        cfg.patch_crop,
        brightness=cfg.patch_brightness,
        contrast=cfg.patch_contrast,
        color_drop=cfg.color_drop,
    )
    model = CPC(
        create_backbone(spec),
        context=cfg.context,
        width=cfg.context_width,
        depth=cfg.context_depth,
        directions=cfg.directions,
        offsets=offsets,
        embedding=cfg.embedding,
        scale=cfg.embedding_scale,
        jitter=jitter,
    )
    return model, spec


def compute_loss(
    model: nn.Module, images: Tensor, params: Tensor, negatives: Sequence[Tensor] | None, cfg: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of images [n, 3, S, S] and what is logged of it.

    params: random numbers of the patches [n, L, ...]; negatives: of each direction, None where all patches serve.
    """
    compared, predictions, z = model(images, params)  # [n, R, Q, E], [A, E] each, [n, R, Q, D]
    offsets = tuple(range(cfg.skip_step + 1, cfg.skip_step + cfg.prediction_steps + 1))
    loss, parts = cpc_loss(compared, predictions, offsets, negatives, everywhere=cfg.pool == "global")
    return loss, {**parts, "feature_std": feature_std(z.detach().mean((1, 2)))}


def main(preset: str, cfg: Config) -> None:
    # ---- network (before the data: sizes that do not fit are reported first) ---------------------------------------
    torch.manual_seed(cfg.seed)
    model, spec = build(cfg)
    jitter, offsets = model.jitter, model.offsets
    side = grid_side(cfg.crop_size, cfg.patch, cfg.stride)

    session = ImageSession(cfg, METHOD, preset, PRESETS, one_view(cfg), split=cfg.split, published=PUBLISHED)
    session.init_from(model.backbone)
    model = session.place(model, sync_bn=False)
    session.speed_up(model.backbone.blocks)

    # ---- optimizer and schedule ------------------------------------------------------------------------------------
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=cfg.weight_decay)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    final_lr = cfg.lr if cfg.schedule == "constant" else 0.0

    # ---- training --------------------------------------------------------------------------------------------------
    pooled = cfg.batch_size if cfg.pool == "global" else session.local_batch  # images whose patches can be negatives
    candidates = 1 + cfg.num_negatives if cfg.negatives == "sampled" else pooled * side**2
    session.start(
        plan={
            "warm-up": f"{warmup_steps} steps",
            "patches": f"{side} x {side} of {jitter.describe()}",
            "predicted rows": f"{', '.join(map(str, offsets))} below, in {cfg.directions} direction(s)",
            "candidates": f"{candidates} per anchor ({cfg.negatives}), of {pooled} images; chance level "
            f"{math.log(candidates):.3f}",
        },
        checks=health_checks(candidates, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        optimizer=optimizer,
    )
    if (shared := cfg.patch - offsets[0] * cfg.stride) > 0:
        session.print(
            f"the nearest predicted row shares {shared} of {cfg.patch} rows of pixels with its anchor: that much can "
            "be copied, the loss falls fast and the features are poor. A larger --skip-step prevents it."
        )
    model.train()
    for step in session.steps():
        lr = cosine_schedule(step, base=cfg.lr, total=session.total_steps, warmup=warmup_steps, final=final_lr)
        set_lr(optimizer, lr)
        (images,) = session.loader(step).views  # [n, 3, S, S]
        params = jitter.sample(cfg.batch_size, side**2, generator(cfg.seed, "patches", step))  # of the global batch
        params = to_device(params[session.local_slice], session.device)
        negatives = None
        if cfg.negatives == "sampled":
            stream = generator(cfg.seed, "negatives", step)
            negatives = [
                to_device(
                    draw_negatives(
                        cfg.batch_size, pooled, side, side, offsets, cfg.num_negatives, stream, session.local_slice
                    ),
                    session.device,
                )
                for _ in range(cfg.directions)
            ]

        loss, parts = compute_loss(model, images, params, negatives, cfg)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss.detach(), **parts, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation (of the patch encoder) -------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)
    if session.evaluates:
        found = held_out(
            unwrapped,
            session.test,
            spec,
            crop=cfg.crop_size,
            batch=cfg.batch_size,
            count=cfg.num_negatives,
            seed=cfg.seed,
        )
        session.print(sentence(found))
        session.evaluate(
            signals=SIGNALS,
            references={"loss": (math.log(candidates), "chance level, ln of the candidates")},
            extra_rows=rows_of(found),
            extra_sections=[section(found, cfg.stride, cfg.patch)],
        )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
