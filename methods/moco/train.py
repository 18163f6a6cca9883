"""MoCo v2: Momentum Contrast (He et al. 2020, arXiv:1911.05722) with SimCLR's projector and views (arXiv:2003.04297).

Recognize the other view of the same image among tens of thousands of earlier images: their projections, the keys, wait
in a queue. A slowly moving copy of the network encodes the keys, so that old and new ones can be compared.

    python -m methods.moco.train quickstart                    # embedded data, minutes on two cores
    python -m methods.moco.train cifar10-r18                   # solo-learn's recipe: 92.9 % online linear
    accelerate launch -m methods.moco.train imagenet-r50       # the paper: 67.5 % linear, batch 256, 200 epochs
    python -m methods.moco.train                               # all presets; add --plan to any to see before you run
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.backbones import create_backbone
from common.cli import parse, run_cli
from common.distributed import all_gather, rank
from common.ema import ema_update, make_teacher
from common.health import feature_std
from common.optim import build_optimizer, set_lr
from common.schedules import cosine_schedule, scaled_lr
from eval.session import ImageSession

from .augment import two_views
from .config import PRESETS, PUBLISHED, Config
from .health import SIGNALS, chance_level, health_checks
from .loss import Queue, info_nce
from .shuffle import encode_shuffled, group_batchnorm

METHOD = Path(__file__).parent.name


class Encoder(nn.Module):
    """Backbone and projector, for queries and for keys: V views [n, 3, H, W] -> projections [V, n, D] of length 1."""

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        hidden = [nn.Linear(width, hidden_dim), nn.ReLU(inplace=True)] if hidden_dim else []
        self.projector = nn.Sequential(*hidden, nn.Linear(hidden_dim or width, projector_dim))  # no norm (code --mlp)

    def forward(self, *views: Tensor) -> Tensor:
        # One pass per view: BatchNorm never mixes the two.
        z = torch.stack([self.projector(self.backbone(view)) for view in views])
        return normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


@torch.no_grad()
def encode_keys(key_encoder: nn.Module, images: Tensor, cfg: Config, *key: int | str) -> Tensor:
    """Keys [B, D] of all processes' images, of which `images` are this one's; `key` gives the shuffled order."""
    if cfg.bn_groups:
        return encode_shuffled(key_encoder, images, *key)
    (keys,) = key_encoder(images)
    return all_gather(keys)


def compute_loss(
    model: nn.Module, key_encoder: nn.Module, queue: Queue, views: Sequence[Tensor], cfg: Config, step: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of this process's images, what is logged of it, and the keys [V, B, D] that the queue takes afterwards.

    views: two [n, 3, S, S]. View 1 is the query and view 2 the key; if `symmetric`, also the other way round (V = 2),
    with a queue of its own, and the loss is the mean of both.
    """
    pairs = list(zip(views, reversed(views), strict=True))[: 2 if cfg.symmetric else 1]
    queries = model(*(view for view, _ in pairs))  # [V, n, D]
    keys = torch.stack(
        [encode_keys(key_encoder, other, cfg, cfg.seed, "shuffle", step, i) for i, (_, other) in enumerate(pairs)]
    )
    n = len(views[0])
    positives = keys[:, rank() * n : (rank() + 1) * n]  # [V, n, D]
    losses, logged = zip(
        *(info_nce(*qkn, cfg.temperature) for qkn in zip(queries, positives, queue.keys, strict=True)), strict=True
    )
    parts = {name: torch.stack([part[name] for part in logged]).mean() for name in logged[0]}
    parts["projection_std"] = feature_std(queries.flatten(0, 1))
    return torch.stack(losses).mean(), parts, keys


def main(preset: str, cfg: Config) -> None:
    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)
    cfg.check(session.num_processes)

    # ---- networks and queue ----------------------------------------------------------------------------------------
    spec = cfg.resnet_spec(zero_init_last=False)
    encoder = Encoder(create_backbone(spec), cfg.hidden_dim, cfg.projector_dim)
    session.init_from(encoder.backbone)
    if cfg.bn_groups:
        group_batchnorm(encoder, cfg.bn_groups // session.num_processes)
    model = session.place(encoder, sync_bn=cfg.sync_bn and not cfg.bn_groups)
    # Outside of DistributedDataParallel: all processes start from one seed and apply the same averages, so their key
    # encoders agree to the bit. In train mode, with running buffers of its own, which nothing reads.
    key_encoder = make_teacher(model).to(session.device)
    session.speed_up(
        model.backbone, key_encoder.backbone, checkpointed=model.backbone if cfg.activation_checkpointing else None
    )
    directions = 2 if cfg.symmetric else 1
    queue = Queue(directions, cfg.queue_length, cfg.projector_dim, seed=cfg.seed).to(session.device)

    # ---- optimizer and schedules -----------------------------------------------------------------------------------
    everything = [{"params": list(model.parameters()), "weight_decay": cfg.weight_decay}]  # biases and norms too
    optimizer = build_optimizer(cfg.optimizer, everything, momentum=cfg.momentum)
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    warmup_steps = int(cfg.warmup_epochs * session.steps_per_epoch)
    peak_lr = scaled_lr(cfg.base_lr, cfg.batch_size, "linear")
    queue_steps = cfg.queue_length // cfg.batch_size

    # ---- training --------------------------------------------------------------------------------------------------
    session.start(
        plan={
            "queue": f"{cfg.queue_length} keys of the last {queue_steps} steps",
            "BatchNorm over": cfg.batch_norm_rows(session.num_processes),
            "peak learning rate": f"{peak_lr:.4g} (linear scaling of {cfg.base_lr:g})",
            "warm-up": f"{warmup_steps} steps",
        },
        checks=health_checks(cfg.queue_length, warmup_steps, session.steps_per_epoch),
        model=unwrapped,
        key_encoder=key_encoder,
        queue=queue,
        optimizer=optimizer,
    )
    model.train()
    for step in session.steps():
        total = session.total_steps
        set_lr(optimizer, cosine_schedule(step, base=peak_lr, total=total, warmup=warmup_steps))
        ema_momentum = cosine_schedule(step, base=cfg.ema_momentum, final=cfg.ema_momentum_end, total=total)
        views = session.views(step)  # two [n, 3, S, S]

        ema_update(key_encoder, unwrapped, ema_momentum)  # before the keys, by the weights of the queries; not buffers
        with session.autocast():
            loss, parts, keys = compute_loss(model, key_encoder, queue, views, cfg, step)
        optimizer.zero_grad(set_to_none=True)
        session.backward(loss)
        optimizer.step()
        queue.push(keys, step)  # after the loss: a key must not be a negative of its own query
        age = min(step, queue_steps) / session.steps_per_epoch
        lr = optimizer.param_groups[0]["lr"]
        session.log(loss=loss.detach(), **parts, queue_age=age, ema_momentum=ema_momentum, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)

    # ---- evaluation ------------------------------------------------------------------------------------------------
    session.export(unwrapped.backbone, spec)  # of the queries
    session.evaluate(
        signals=SIGNALS,
        references={"loss": (chance_level(cfg.queue_length), "chance level, ln(1 + K)")},
    )


if __name__ == "__main__":
    run_cli(lambda: main(*parse(PRESETS, f"python -m methods.{METHOD}.train")))
