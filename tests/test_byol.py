"""BYOL: loss and gradient against a slow version, N processes against one, the target's life, collapse, presets."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.backbones import BackboneSpec, create_backbone
from common.distributed import SyncBatchNorm, rank, sync_batchnorm, world_size
from common.ema import ema_update, make_teacher
from common.log import read_metrics
from common.optim import LARS, decay_groups
from common.schedules import cosine_schedule, scaled_lr
from methods.byol.augment import two_views
from methods.byol.config import PRESETS
from methods.byol.loss import byol_loss
from methods.byol.train import Encoder, Online, compute_loss, mlp
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)


def online_of(predictor: bool = True) -> Online:
    torch.manual_seed(0)
    return Online(Encoder(create_backbone(BackboneSpec("resnet18", **TINY)), 32, 16), 32, predictor).train()


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(p1, p2, z1, z2):
    """Equation 2 of the paper and its mirror image, one row at a time."""
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p, z, strict=True):
            total = total + ((a / a.norm() - b / b.norm()) ** 2).sum() / len(p)
    return total


@pytest.mark.parametrize("n, d", [(1, 3), (5, 7), (16, 4)])
def test_loss_and_gradient_equal_the_slow_version(n, d):
    generator = torch.Generator().manual_seed(n)
    p1, p2, z1, z2 = (torch.randn(n, d, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4))
    loss, parts = byol_loss(p1, p2, z1, z2)
    expected = slow_loss(p1, p2, z1.detach(), z2.detach())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(4 - 4 * parts["agreement"], loss.detach())
    for ours, theirs in zip(
        torch.autograd.grad(loss, (p1, p2), retain_graph=True), torch.autograd.grad(expected, (p1, p2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(loss, (z1, z2), allow_unused=True) == (None, None)  # stop-gradient, whoever calls it


def test_known_values():
    z = torch.randn(8, 6)
    torch.testing.assert_close(byol_loss(z, z, 3 * z, 0.1 * z)[0], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(byol_loss(z, z, -z, -z)[0], torch.tensor(8.0))
    torch.testing.assert_close(byol_loss(z, -z, -z, z)[0], torch.tensor(0.0), atol=1e-6, rtol=0)  # 1 meets 2, not 1
    random = byol_loss(*(torch.randn(4096, 256) for _ in range(4)))[0]
    assert abs(random - 4) < 0.02
    assert torch.isfinite(byol_loss(*(torch.zeros(4, 6) for _ in range(4)))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    x = [torch.randn(8, 16).to(dtype) for _ in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = byol_loss(*x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, byol_loss(*(v.float() for v in x))[0])


# ---- networks --------------------------------------------------------------------------------------------------------


def test_heads_as_in_the_paper():
    online = online_of()
    target = make_teacher(online.encoder)
    for head in (online.encoder.projector, online.predictor):
        first, norm, act, second = head  # no norm on the output
        assert isinstance(norm, nn.BatchNorm1d) and isinstance(act, nn.ReLU)
        assert first.bias is not None and second.bias is None and not first.bias.any()
    assert not any("predictor" in name for name, _ in target.named_parameters())
    assert not any(p.requires_grad for p in target.parameters())
    big = mlp(2048, 4096, 256)
    assert big[0].weight.std().item() == pytest.approx(0.88 * 2048**-0.5, rel=0.01)  # a normal cut at two deviations
    assert big[0].weight.abs().max() <= 2 * 2048**-0.5


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_projectors_of_other_depths(layers):
    encoder = Encoder(create_backbone(BackboneSpec("resnet18", **TINY)), 32, 16, layers)
    linear = [part.out_features for part in encoder.projector if isinstance(part, nn.Linear)]
    assert linear == [32] * (layers - 1) + [16] * (layers > 0)
    online, view = Online(encoder, 32), torch.randn(4, 3, 16, 16)
    assert online(view)[0].shape == encoder(view).shape == (4, 16 if layers else 64)


def test_each_view_is_a_pass_of_its_own():
    """BatchNorm's statistics are per view: what view 2 holds changes nothing in view 1's predictions."""
    online, views = online_of(), torch.randn(3, 4, 3, 16, 16)
    first, second = online(views[0], views[1])
    assert torch.equal(first, online(views[0], 5 * views[2])[0]) and not torch.equal(first, second)


def test_biases_and_norms_have_neither_decay_nor_adaptation():
    groups = decay_groups(online_of(), 0.1)
    names = dict(online_of().named_parameters())
    assert sorted(n for g in groups for n in g["names"]) == sorted(names)
    for name, value in names.items():
        group = next(g for g in groups if name in g["names"])
        assert group["adapt"] == (value.ndim > 1) == (group["weight_decay"] == 0.1), name


# ---- N processes -----------------------------------------------------------------------------------------------------


def one_step(dtype: torch.dtype, global_batch: int = 16) -> dict[str, torch.Tensor]:
    """Loss, gradients, target after LARS and EMA, both networks' BatchNorm buffers: this process's, after DDP."""
    online = online_of().to(dtype)
    online = sync_batchnorm(online)
    target = make_teacher(online.encoder)
    assert any(isinstance(m, SyncBatchNorm) for m in target.modules()) == (world_size() > 1)
    generator = torch.Generator().manual_seed(1)
    n = global_batch // world_size()
    views = torch.randn(2, global_batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = LARS(decay_groups(online, 1e-4), lr=0.5, momentum_form="lr-outside")
    trained = DistributedDataParallel(online) if world_size() > 1 else online
    loss, _ = compute_loss(trained, target, views[:, rank() * n : (rank() + 1) * n])
    loss.backward()
    optimizer.step()
    ema_update(target, online.encoder, 0.9)
    loss = loss.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(loss)
    found = {"loss": loss / world_size()}
    found |= {name: p.grad for name, p in online.named_parameters()}
    found |= {f"target.{name}": p for name, p in target.named_parameters()}
    for network, module in (("online", online), ("target", target)):
        found |= {f"{network}.{name}": b for name, b in module.named_buffers() if "running" in name}
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    for dtype in (torch.float64, torch.float32):
        one, several = one_step(dtype), run_ranks(one_step, ranks, dtype)
        for many in several:
            assert many.keys() == one.keys() and len(one) > 60
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                # A bias before a norm has no gradient but rounding.
                small = name.endswith(("projector.0.bias", "predictor.0.bias"))
                assert worst < (1e-10 if dtype == torch.float64 else 1e-5) or small, (name, dtype, worst)
                assert not name.startswith("target.") or torch.equal(many[name], several[0][name]), name


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_target_follows_after_each_step_by_parameters_only(tmp_path):
    """Every step: target = momentum * target + (1 - momentum) * the new online weights; buffers are its own."""
    flags = ("--no-eval", "--save-every", 1, "--keep", 20, "--log-every", 1, "--max-steps", 6)
    code, text = run_command("methods.byol.train", "smoke", "--out", tmp_path, *flags, log=tmp_path / "log")
    assert code == 0, text
    directory = tmp_path / "byol-smoke"
    found = []
    for step in checkpoint.steps(directory / "checkpoints"):
        path = directory / "checkpoints" / f"step-{step:08d}" / "state.pt"
        found.append(torch.load(path, weights_only=False)["stateful"])
    cfg, lines = PRESETS["smoke"][1], [m for m in read_metrics(directory / "metrics.jsonl") if "loss" in m]
    assert len(found) == len(lines) == 6
    total = cfg.epochs * (cfg.limit // cfg.batch_size)
    for step, line in enumerate(lines):  # per step, from the first value on, without warm-up
        expected = 1 - (1 - cfg.ema_momentum) * (math.cos(math.pi * step / total) + 1) / 2
        assert line["ema_momentum"] == pytest.approx(expected)
    parameters = dict(online_of().encoder.named_parameters())
    for (before, after), line in zip(pairwise(found), lines[1:], strict=True):
        m = line["ema_momentum"]
        for name in parameters:
            old, new, online = before["target"][name], after["target"][name], after["model"][f"encoder.{name}"]
            torch.testing.assert_close(new, m * old + (1 - m) * online, rtol=1e-5, atol=1e-7)
    counts = {n: int(v) for n, v in found[-1]["target"].items() if n.endswith("num_batches_tracked")}
    assert len(counts) > 5 and set(counts.values()) == {12}  # train mode: moved by each of two passes a step
    # the second network sees the same images with other weights: separate buffers, not an average of the online's
    mean = "backbone.layer4.0.bn1.running_mean"
    assert not torch.equal(found[-1]["target"][mean], found[-1]["model"][f"encoder.{mean}"])


def test_without_predictor_it_collapses_and_the_run_says_so(tmp_path):
    flags = ("--out", tmp_path, "--no-eval", "--no-predictor", "--ema-momentum", 0.5, "--epochs", 24, "--max-steps", 48)
    code, text = run_command("methods.byol.train", "smoke", *flags, log=tmp_path / "log")
    assert code == 0 and "WARNING" in text and "Is the predictor there?" in text, text


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: images, batch, epochs, peak rate, momentum of the target, weight decay, loss weight
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, 1.0, 0.99, 1e-5, 0.5),
    "imagenette-r18": (IMAGENETTE, 256, 1000, 2.0, 0.996, 1e-6, 1.0),
    "imagenet-r50": (IMAGENET, 4096, 1000, 3.2, 0.996, 1.5e-6, 1.0),
    "imagenet-r50-e300": (IMAGENET, 4096, 300, 4.8, 0.99, 1e-6, 1.0),
    "imagenet-r50-e100": (IMAGENET, 4096, 100, 7.2, 0.99, 1e-6, 1.0),
    "imagenet-r50-b512": (IMAGENET, 512, 1000, 0.8, 0.9995, 1.5e-6, 1.0),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, peak, momentum, decay, weight = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.ema_momentum, cfg.weight_decay) == (batch, epochs, momentum, decay)
    assert (cfg.hidden_dim, cfg.projector_dim, cfg.predictor, cfg.momentum) == (4096, 256, True, 0.9)
    assert (cfg.loss_weight, cfg.warmup_epochs) == (weight, 10)
    assert cfg.optimizer == ("larc" if preset == "cifar10-r18" else "lars")
    assert scaled_lr(cfg.base_lr, cfg.batch_size, "linear") == pytest.approx(peak)
    total, warmup = epochs * (images // batch), int(10 * images / batch)
    rate = [cosine_schedule(s, base=peak, total=total, warmup=warmup) for s in (0, warmup, total - 1)]
    assert rate[0] == 0 and rate[1] == pytest.approx(peak) and 0 < rate[2] < 1e-5 * peak
    ema = [cosine_schedule(s, base=momentum, final=1.0, total=total) for s in (0, total // 2, total - 1)]
    assert ema == pytest.approx([momentum, 1 - (1 - momentum) / 2, 1], abs=1e-4) and ema[2] < 1


@pytest.mark.parametrize(
    "preset, blur", [("imagenet-r50", (1.0, 0.1)), ("imagenette-r18", (1.0, 0.1)), ("cifar10-r18", (0.0, 0.0))]
)
def test_views_equal_the_reference(preset, blur):
    cfg = PRESETS[preset][1]
    one, two = two_views(cfg).views
    assert (one.blur, two.blur) == blur and (one.solarize, two.solarize) == (0.0, 0.2)
    for view in (one, two):
        assert (view.scale, view.interpolation, view.flip, view.grayscale) == ((0.08, 1.0), "bicubic", 0.5, 0.2)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert view.color_jitter_prob == 0.8
    assert cfg.image_size != 224 or one.blur_kernel == 23


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        backbone = create_backbone(cfg.resnet_spec(zero_init_last=cfg.zero_init_last))
        encoder = Encoder(backbone, cfg.hidden_dim, cfg.projector_dim, cfg.projector_layers)
        online = Online(encoder, cfg.hidden_dim, cfg.predictor)
        image = torch.empty(2, 3, cfg.image_size, cfg.image_size)
        assert [p.shape for p in online(image, image)] == [(2, cfg.projector_dim)] * 2
