"""MoCo v3: loss and gradient, heads, frozen patches, momentum encoder, N processes against one, presets."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.ema import ema_update, make_teacher
from common.log import read_metrics
from common.optim import build_optimizer
from common.schedules import cosine_schedule, scaled_lr
from common.vit import sincos_positions
from methods.moco_v3.augment import two_views
from methods.moco_v3.config import PRESETS, Config
from methods.moco_v3.health import chance_level, health_checks
from methods.moco_v3.loss import contrast, moco_v3
from methods.moco_v3.train import Base, Encoder, build, compute_loss, mlp, parameter_groups
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(q1, q2, k1, k2, temperature):
    """Algorithm 1 of the paper, one query at a time."""
    total = 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        for i, q in enumerate(queries):
            scores = [torch.exp((q @ k) / q.norm() / k.norm() / temperature) for k in keys]
            total = total - 2 * temperature * torch.log(scores[i] / sum(scores)) / len(queries)
    return total


@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 7), (16, 4)])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_and_gradient_equal_the_slow_version(n, d, temperature):
    q1, q2, k1, k2 = (normal(n, d, seed=i).requires_grad_() for i in range(4))
    loss, parts = moco_v3(q1, q2, k1, k2, temperature)
    expected = slow_loss(q1, q2, k1.detach(), k2.detach(), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(x, (q1, q2), retain_graph=True) for x in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(loss, (k1, k2), allow_unused=True) == (None, None)  # keys are constants
    cosine = nn.functional.cosine_similarity
    positive = (cosine(q1, k2).mean() + cosine(q2, k1).mean()) / 2
    torch.testing.assert_close(parts["positive"], positive.detach())
    if n > 1:
        matrix = torch.stack([cosine(q[:, None], k[None], dim=2) for q, k in ((q1, k2), (q2, k1))])
        others = matrix[:, ~torch.eye(n, dtype=torch.bool)].mean()
        torch.testing.assert_close(parts["negative"], others.detach())


def test_known_values():
    same = torch.ones(64, 8)
    loss, parts = moco_v3(same, same, same, same, 0.2)  # all images in one point: chance, exactly
    torch.testing.assert_close(loss, torch.tensor(chance_level(64, 0.2)))
    assert parts["retrieval"] == 0  # a tie is a miss
    assert chance_level(4096, 0.2) == pytest.approx(6.65, abs=0.01)
    q, k = normal(64, 32).float(), normal(64, 32, seed=1).float()
    assert contrast(q, k, 1e3)[0] / 2e3 == pytest.approx(math.log(64), rel=1e-3)  # T to infinity
    found, parts = contrast(q, 3 * q, 0.05)
    assert found < 1e-2 and parts["retrieval"] == 1 and parts["positive"].item() == pytest.approx(1)
    x = q.clone().requires_grad_()
    gradient = [torch.autograd.grad(contrast(x, k, temperature)[0], x)[0].norm() for temperature in (50.0, 100.0)]
    assert gradient[0] == pytest.approx(gradient[1].item(), rel=0.02)  # 2 T: of a size independent of T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    x = [normal(8, 16, seed=i).to(dtype) for i in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = moco_v3(*x, 0.2)
    assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    torch.testing.assert_close(loss, moco_v3(*(v.float() for v in x), 0.2)[0])


def test_forced_failures_trip_the_watch():
    def tripped(line: dict, step: int) -> set[str]:
        return {rule.metric for rule in health_checks(256, 0.2, 39, 39) if rule.trips({**line, "step": step})}

    assert tripped({"retrieval": 0.5, "prediction_std": 0.9}, 500) == set()
    assert tripped({"retrieval": 0.01, "prediction_std": 0.9}, 500) == {"retrieval"}
    assert tripped({"retrieval": 0.5, "prediction_std": 0.05}, 500) == {"prediction_std"}
    assert tripped({"retrieval": 0.0, "prediction_std": 0.0}, 39) == set()


# ---- networks --------------------------------------------------------------------------------------------------------


def base_of() -> Base:
    torch.manual_seed(0)
    return Base(Encoder(create_backbone(BackboneSpec("resnet18", **TINY)), 32, 16, 2), 32, False).train()


def test_heads_as_in_the_code():
    """No biases; BatchNorm and ReLU between; a norm without scale and shift ends all but the ResNet's predictor."""
    for preset, layers, norm in (("imagenet-r50", 2, False), ("imagenet-vits", 3, True)):
        cfg = PRESETS[preset][1]
        with torch.device("meta"):
            encoder, _ = build(cfg)
            base = Base(encoder, cfg.hidden_dim, cfg.predictor_norm)
        for head, depth, ends in ((encoder.projector, layers, True), (base.predictor, 2, norm)):
            linear = [part for part in head if isinstance(part, nn.Linear)]
            assert [part.out_features for part in linear] == [4096] * (depth - 1) + [256]
            assert all(part.bias is None for part in linear)
            norms = [part.affine for part in head if isinstance(part, nn.BatchNorm1d)]
            assert norms == [True] * (depth - 1) + [False] * ends
        momentum_encoder = make_teacher(encoder)
        assert not any("predictor" in name for name, _ in momentum_encoder.named_parameters())
        assert not any(p.requires_grad for p in momentum_encoder.parameters())
    assert len(mlp(0, 8, 4, 4)) == 0  # no projector: the features themselves


def test_vit_starts_as_in_the_code():
    torch.manual_seed(0)
    encoder, spec = build(PRESETS["smoke"][1])
    vit, width = encoder.backbone, 64
    patch, qkv = vit.patch_embed.proj, vit.blocks[0].attn.qkv
    bound = math.sqrt(6 / (3 * 8 * 8 + width))
    assert 0.95 * bound < patch.weight.abs().max() <= bound and not patch.bias.any()
    assert not patch.weight.requires_grad and not patch.bias.requires_grad
    limit = math.sqrt(6 / (width + width))  # queries, keys and values as matrices of their own
    assert 0.95 * limit < qkv.weight.abs().max() <= limit and not qkv.bias.any()
    mixed = vit.blocks[0].mlp.fc1.weight
    assert 0.95 * math.sqrt(6 / (width + 4 * width)) < mixed.abs().max() <= math.sqrt(6 / (width + 4 * width))
    assert not vit.pos_embed.requires_grad and not vit.pos_embed[:, 0].any()
    torch.testing.assert_close(vit.pos_embed[0, 1:], sincos_positions(width, 4, 4))
    assert vit.cls_token.abs().max() < 1e-5
    assert [block.attn.num_heads for block in vit.blocks] == [4] * 4
    with torch.device("meta"):
        official, _ = build(PRESETS["imagenet-vits"][1])
    assert [block.attn.num_heads for block in official.backbone.blocks] == [12] * 12
    assert create_backbone(spec).state_dict().keys() == vit.state_dict().keys()


def test_each_view_is_a_pass_of_its_own():
    base, views = base_of(), torch.randn(3, 4, 3, 16, 16)
    first, second = base(views[0], views[1])
    assert torch.equal(first, base(views[0], 5 * views[2])[0]) and not torch.equal(first, second)


def test_what_is_decayed():
    """LARS: neither decay nor ratio for biases and norms. AdamW: every parameter that is trained."""
    base = base_of()
    matrices, vectors = parameter_groups(base, "lars", 1e-6)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert (matrices["weight_decay"], matrices["adapt"]) == (1e-6, True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)
    encoder, _ = build(PRESETS["smoke"][1])
    (everything,) = parameter_groups(encoder, "adamw", 0.1)
    fixed = {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias", "backbone.pos_embed"}
    trained = [p for name, p in encoder.named_parameters() if name not in fixed]
    assert everything["weight_decay"] == 0.1
    assert list(map(id, everything["params"])) == list(map(id, trained)) and any(p.ndim == 1 for p in trained)


# ---- N processes -----------------------------------------------------------------------------------------------------


def one_step(dtype: torch.dtype, vit: bool, batch: int = 16) -> dict[str, torch.Tensor]:
    """Loss, signals, gradients, momentum encoder, BatchNorm buffers of this process after two steps under DDP."""
    cfg = PRESETS["smoke"][1] if vit else Config(temperature=0.2)
    torch.manual_seed(0)
    base = (Base(build(cfg)[0], cfg.hidden_dim, cfg.predictor_norm) if vit else base_of()).to(dtype)
    base = sync_batchnorm(base)
    momentum_encoder = make_teacher(base.encoder)
    optimizer = build_optimizer("lars", parameter_groups(base, "lars", 1e-4), momentum=0.9)
    trained = DistributedDataParallel(base) if world_size() > 1 else base
    generator = torch.Generator().manual_seed(1)
    n, size = batch // world_size(), 32 if vit else 16
    for _ in range(2):
        views = torch.randn(2, batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
        ema_update(momentum_encoder, base.encoder, 0.5)
        loss, parts = compute_loss(trained, momentum_encoder, views[:, rank() * n : (rank() + 1) * n], cfg)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    logged = torch.stack([loss.detach(), *parts.values()])
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
    found = dict(zip(("loss", *parts), logged / world_size(), strict=True))
    found |= {name: p.grad for name, p in base.named_parameters() if p.requires_grad}
    found |= {f"momentum.{name}": p for name, p in momentum_encoder.named_parameters()}
    return found | {name: b.clone() for name, b in base.named_buffers() if "running" in name}


@pytest.mark.parametrize("vit", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks, vit):
    for dtype in (torch.float64, torch.float32):
        one, several = one_step(dtype, vit), run_ranks(one_step, ranks, dtype, vit)
        for many in several:
            assert many.keys() == one.keys() and len(one) > 60
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                exact = dtype == torch.float64 and name not in ("retrieval", "prediction_std")  # float32 signals
                small = value.abs().max() < 1e-6  # what a BatchNorm or a softmax cancels is 0 but for rounding
                assert worst < (1e-9 if exact else 1e-4) or small, (name, dtype, worst)
                assert not name.startswith("momentum.") or torch.equal(many[name], several[0][name]), name


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_momentum_encoder_follows_and_the_patch_projection_does_not_move(tmp_path):
    flags = ("--no-eval", "--save-every", 1, "--keep", 20, "--log-every", 1, "--max-steps", 5)
    code, text = run_command("methods.moco_v3.train", "smoke", "--out", tmp_path, *flags, log=tmp_path / "log")
    assert code == 0, text
    directory, cfg = tmp_path / "moco_v3-smoke", PRESETS["smoke"][1]
    paths = [
        directory / "checkpoints" / f"step-{s:08d}" / "state.pt" for s in checkpoint.steps(directory / "checkpoints")
    ]
    found = [torch.load(path, weights_only=False)["stateful"] for path in paths]
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
    assert len(found) == len(lines) == 5 and all(line["gradient_norm"] > 0 for line in lines)
    total = cfg.epochs * (cfg.limit // cfg.batch_size)
    momenta = [1 - (1 - cfg.ema_momentum) * (1 + math.cos(math.pi * step / total)) / 2 for step in range(5)]
    assert [line["ema_momentum"] for line in lines] == pytest.approx(momenta)
    names = [name for name, _ in build(cfg)[0].named_parameters()]
    for (before, after), m in zip(pairwise(found), momenta[1:], strict=True):
        for name in names:
            old, new = (state["momentum_encoder"][name] for state in (before, after))
            base = before["model"][f"encoder.{name}"]
            torch.testing.assert_close(new, m * old + (1 - m) * base, rtol=1e-5, atol=1e-7)
    first, last = found[0], found[-1]
    torch.manual_seed(cfg.seed)
    start = build(cfg)[0].backbone.patch_embed.proj.weight
    for name in ("backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias", "backbone.pos_embed"):
        for state in found:
            assert torch.equal(state["model"][f"encoder.{name}"], first["momentum_encoder"][name]), name
    assert torch.equal(last["model"]["encoder.backbone.patch_embed.proj.weight"], start)
    assert not torch.equal(first["model"]["encoder.backbone.norm.bias"], last["model"]["encoder.backbone.norm.bias"])


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET = 50_000, 1_281_167
# preset: images, batch, epochs, base rate, decay, temperature, momentum, warm-up, smallest crop, optimizer
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, 0.3, 1e-6, 0.2, 0.99, 10, 0.08, "larc"),
    "imagenet-r50-e100": (IMAGENET, 4096, 100, 0.6, 1e-6, 1.0, 0.99, 10, 0.2, "lars"),
    "imagenet-r50-e300": (IMAGENET, 4096, 300, 0.3, 1e-6, 1.0, 0.99, 10, 0.2, "lars"),
    "imagenet-r50": (IMAGENET, 4096, 1000, 0.3, 1.5e-6, 1.0, 0.996, 10, 0.2, "lars"),
    "imagenet-vits": (IMAGENET, 4096, 300, 1.5e-4, 0.1, 0.2, 0.99, 40, 0.08, "adamw"),
    "imagenet-vits-b1024": (IMAGENET, 1024, 300, 1.5e-4, 0.1, 0.2, 0.99, 40, 0.08, "adamw"),
    "imagenet-vitb": (IMAGENET, 4096, 300, 1.5e-4, 0.1, 0.2, 0.99, 40, 0.08, "adamw"),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, base_lr, decay, temperature, momentum, warmup_epochs, crop, optimizer = EXPECTED[preset]
    cfg, vit = PRESETS[preset][1], "vit" in preset
    assert (cfg.batch_size, cfg.epochs, cfg.base_lr, cfg.weight_decay) == (batch, epochs, base_lr, decay)
    assert (cfg.temperature, cfg.ema_momentum, cfg.warmup_epochs) == (temperature, momentum, warmup_epochs)
    assert (cfg.crop_scale, cfg.optimizer, cfg.momentum) == ((crop, 1.0), optimizer, 0.9)
    assert (cfg.hidden_dim, cfg.projector_dim) == (4096, 256)
    assert (cfg.projector_layers, cfg.predictor_norm) == ((3, True) if vit else (2, False))
    assert cfg.frozen_patch_projection == cfg.sincos_positions == vit
    peak, steps = scaled_lr(cfg.base_lr, batch, "linear"), images // batch
    rate = [cosine_schedule(s, base=peak, total=epochs * steps, warmup=warmup_epochs * steps) for s in (0, steps)]
    assert rate == pytest.approx([0, peak / warmup_epochs])
    ema = [cosine_schedule(s, base=momentum, final=1.0, total=1000) for s in (0, 500, 1000)]
    assert ema == pytest.approx([momentum, (1 + momentum) / 2, 1])


def test_views_equal_the_reference():
    one, two = two_views(PRESETS["imagenet-vits"][1]).views
    assert ((one.blur, two.blur), (one.solarize, two.solarize)) == ((1.0, 0.1), (0.0, 0.2))
    for view in (one, two):
        assert (view.size, view.scale, view.interpolation, view.flip) == (224, (0.08, 1.0), "bilinear", 0.5)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.color_jitter_prob, view.grayscale, view.blur_sigma) == (0.8, 0.2, (0.1, 2.0))
    assert [view.blur for view in two_views(PRESETS["cifar10-r18"][1]).views] == [0.0, 0.0]
    assert PRESETS["cifar10-cpu"][1].crop_scale == (0.2, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        encoder, _ = build(cfg)
        base = Base(encoder, cfg.hidden_dim, cfg.predictor_norm)
        image = torch.empty(2, 3, cfg.image_size, cfg.image_size)
        assert [q.shape for q in base(image, image)] == [(2, cfg.projector_dim)] * 2
