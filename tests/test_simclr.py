"""SimCLR: the loss against slow versions and the official one, N processes against one, gradient caching, presets."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.memory import checkpoint_blocks, grad_cache_backward, uses_batch_statistics
from common.schedules import cosine_schedule, scaled_lr
from methods.simclr.augment import two_views
from methods.simclr.config import PRESETS
from methods.simclr.loss import nt_xent
from methods.simclr.train import SimCLR, compute_loss, contrast
from tests.processes import run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)
CFG = PRESETS["smoke"][1]


def slow_nt_xent(z1, z2, temperature, decoupled=False):
    """Equation 1 of the paper, one pair at a time."""
    z = normalize(torch.cat([z1, z2]), dim=1)
    total = 0.0
    for i in range(len(z)):
        partner = (i + len(z1)) % len(z)
        others = [k for k in range(len(z)) if k != i and not (decoupled and k == partner)]
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in others)
        total = total - torch.log(torch.exp(z[i] @ z[partner] / temperature) / denominator)
    return total / len(z)


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_loss_and_gradient_equal_the_slow_version(n, temperature, decoupled, chunk):
    generator = torch.Generator().manual_seed(n)
    z1, z2 = (torch.randn(n, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, parts = nt_xent(z1, z2, temperature, decoupled=decoupled, chunk=chunk)
    expected = slow_nt_xent(z1, z2, temperature, decoupled)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["log_sum_exp"] - parts["alignment"], loss.detach())
    for ours, theirs in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_is_the_official_cross_entropy():
    """objective.py of the code: two softmax problems with the row's own column at -1e9; its sum is twice our mean."""
    z1, z2 = normalize(torch.randn(6, 8), dim=1), normalize(torch.randn(6, 8), dim=1)
    own, labels = torch.eye(6) * 1e9, torch.arange(6)
    first = cross_entropy(torch.cat([z1 @ z2.T, z1 @ z1.T - own], 1) / 0.5, labels)
    second = cross_entropy(torch.cat([z2 @ z1.T, z2 @ z2.T - own], 1) / 0.5, labels)
    torch.testing.assert_close(2 * nt_xent(z1, z2, 0.5)[0], first + second)


def test_known_values():
    identical = torch.ones(8, 4)  # every similarity 1: each of the 2B - 1 candidates is equally likely
    torch.testing.assert_close(nt_xent(identical, identical, 0.5)[0], torch.tensor(math.log(15)))
    same = torch.randn(1, 100).expand(64, 100)  # collapsed: equal up to rounding, and no positive is found
    assert nt_xent(same, same * 1.7, 0.5)[1]["retrieval"] == 0
    z = torch.eye(64)  # orthogonal images, equal views: -1/t + ln(e^(1/t) + 2B - 2)
    loss, parts = nt_xent(z, z, 0.5)
    torch.testing.assert_close(loss, torch.tensor(-2 + math.log(math.exp(2) + 126)))
    assert parts["retrieval"] == 1
    random = nt_xent(torch.randn(512, 4096), torch.randn(512, 4096), 0.5)[0]  # near ln(2B - 1)
    assert abs(random - math.log(1023)) < 0.01


def test_scale_of_projections_is_irrelevant_and_self_similarity_is_out():
    z1, z2 = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(nt_xent(z1, z2, 0.1)[0], nt_xent(3 * z1, 0.2 * z2, 0.1)[0])
    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # own similarity 1 would dominate the softmax if it were counted
    assert nt_xent(far, far, 0.01)[0] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nt_xent(z1.to(dtype), z2.to(dtype), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z1.to(dtype).float(), z2.to(dtype).float(), 0.1)[0])


def test_projector_as_in_the_code():
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 128, "batch")
    first, norm1, _, second, norm2 = model.projector
    assert (first.in_features, first.out_features, second.out_features) == (64, 64, 128)
    assert first.bias is None and second.bias is None
    assert norm1.bias.requires_grad and norm2.weight.requires_grad and not norm2.bias.requires_grad
    assert abs(first.weight.std() - 0.01) < 1e-3


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_projectors_of_other_depths(layers):
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 24, "batch", layers)
    linear = [part for part in model.projector if isinstance(part, torch.nn.Linear)]
    assert [part.out_features for part in linear] == [64] * (layers - 1) + [24] * (layers > 0)
    assert sum(isinstance(part, torch.nn.ReLU) for part in model.projector) == max(layers - 1, 0)
    images = torch.randn(4, 3, 16, 16)
    assert model.eval()(images).shape == (4, 24 if layers else 64)


# ---- N processes -----------------------------------------------------------------------------------------------------


def tiny_model(norm: str, dtype: torch.dtype = torch.float64) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(create_backbone(BackboneSpec("resnet18", norm=norm, **TINY)), 16, norm).to(dtype).train()


def two_of(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """This process's part of two views of n images, [2, n / processes, 3, 16, 16]."""
    views = torch.randn(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return views[:, rank() * n // world_size() : (rank() + 1) * n // world_size()]


def gradients_of(model: SimCLR) -> dict[str, torch.Tensor]:
    """Gradients and BatchNorm's running statistics."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def gradients(norm: str, dtype: torch.dtype, global_batch: int, sync: bool = True) -> dict[str, torch.Tensor]:
    """Loss, gradients and BatchNorm buffers of one step on this process's part of a fixed global batch, after DDP."""
    model = tiny_model(norm, dtype)
    trained = sync_batchnorm(model) if sync else model
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    loss, _ = compute_loss(trained, two_of(global_batch, dtype), CFG)
    loss.backward()
    loss = loss.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(loss)
    return {"loss": loss / world_size()} | gradients_of(model)


def assert_same(ours: dict, theirs: dict, tolerance: float, skip: str = "-"):
    for name, value in theirs.items():
        if skip not in name:
            worst = (ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
            assert worst < tolerance, (name, worst)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks, norm):
    for dtype in (torch.float64, torch.float32):
        one = gradients(norm, dtype, 16)
        for many in run_ranks(gradients, ranks, norm, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 20
            assert_same(many, one, 1e-10 if dtype == torch.float64 else 1e-5)


# ---- large batches in little memory ----------------------------------------------------------------------------------


def cached_gradients(norm: str, micro_batch: int, frozen: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gradients and BatchNorm buffers of one step with gradient caching.

    With several processes inside DistributedDataParallel, which reduces in the last micro-batch only.
    """
    model = tiny_model(norm)
    if frozen:
        model.eval()
    several = world_size() > 1
    loss, _ = grad_cache_backward(
        DistributedDataParallel(model) if several else model,
        two_of(16),
        partial(contrast, cfg=CFG),
        micro_batch,
        backward=torch.Tensor.backward,
        no_sync=DistributedDataParallel.no_sync if several else nullcontext,
    )
    return {"loss": loss} | gradients_of(model)


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_gradient_caching_equals_the_whole_batch_with_groupnorm(micro_batch):
    assert_same(cached_gradients("group", micro_batch), gradients("group", torch.float64, 16), 1e-10)


def test_gradient_caching_equals_the_whole_batch_with_frozen_batchnorm():
    model = tiny_model("batch").eval()
    loss, _ = compute_loss(model, two_of(16), CFG)
    loss.backward()
    assert_same(cached_gradients("batch", 4, frozen=True), {"loss": loss.detach()} | gradients_of(model), 1e-10)


def test_gradient_caching_on_ranks_equals_one_rank_with_the_whole_batch():
    whole = gradients("group", torch.float64, 16)
    for many in run_ranks(cached_gradients, 2, "group", 4):
        assert_same(many, {name: value for name, value in whole.items() if name != "loss"}, 1e-10)
        assert len(many) > 20


def test_gradient_caching_with_batchnorm_equals_ranks_with_local_batchnorm():
    ranks = run_ranks(partial(gradients, sync=False), 4, "batch", torch.float64, 16)
    cached = cached_gradients("batch", 4)
    assert_same(cached, ranks[0], 1e-10, skip="running")
    whole = gradients("batch", torch.float64, 16)
    apart = torch.cat([(cached[n] - g).flatten() for n, g in whole.items() if "running" not in n]).norm()
    total = torch.cat([g.flatten() for n, g in whole.items() if "running" not in n]).norm()
    assert apart / total > 0.01  # it is not the whole batch's gradient, and the run says so


def test_running_statistics_move_once_per_micro_batch():
    """In the second pass only: momentum 0.1 over four micro-batches, as four ordinary forward passes move them."""
    model = tiny_model("batch")
    assert uses_batch_statistics(model)
    with torch.no_grad():
        for part in two_of(16).split(4, dim=1):
            model(torch.cat(list(part)))
    expected = {n: b for n, b in model.named_buffers() if "running" in n}
    assert_same(cached_gradients("batch", 4), expected, 1e-12)


def test_activation_checkpointing_changes_nothing_with_batchnorm():
    def step(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = tiny_model("batch", torch.float32)
        if checkpointed:
            checkpoint_blocks(model.backbone)
        compute_loss(model, two_of(8, torch.float32), CFG)[0].backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())

    without, ours = step(False), step(True)
    assert all(torch.equal(ours[name], value) for name, value in without.items())


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: (training images, batch, epochs, peak rate, temperature, weight decay), from paper and README
EXPECTED = {
    "cifar10-r18": (CIFAR, 512, 1000, 2.0, 0.5, 1e-6),
    "cifar10-r50": (CIFAR, 1024, 1000, 4.0, 0.5, 1e-6),
    "imagenette-r18": (IMAGENETTE, 256, 800, 1.2, 0.1, 1e-6),
    "imagenet-r50": (IMAGENET, 4096, 1000, 4.8, 0.1, 1e-6),
    "imagenet-r50-b256": (IMAGENET, 256, 100, 1.2, 0.1, 1e-6),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, peak, temperature, decay = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.temperature, cfg.weight_decay) == (batch, epochs, temperature, decay)
    assert (cfg.optimizer, cfg.momentum, cfg.warmup_epochs, cfg.projector_dim) == ("lars", 0.9, 10, 128)
    assert scaled_lr(cfg.base_lr, cfg.batch_size, cfg.lr_scaling) == pytest.approx(peak)
    total, warmup = epochs * (images // batch), int(10 * images / batch)
    rate = [cosine_schedule(s, base=peak, total=total, warmup=warmup) for s in (0, warmup, total - 1)]
    assert rate[0] == 0 and rate[1] == pytest.approx(peak) and 0 < rate[2] < 1e-5 * peak


@pytest.mark.parametrize(
    ("preset", "strength", "hue", "blur"),
    [("cifar10-r18", 0.4, 0.1, 0.0), ("imagenette-r18", 0.8, 0.2, 0.5), ("imagenet-r50", 0.8, 0.2, 0.5)],
)
def test_views_equal_the_reference(preset, strength, hue, blur):
    one, two = two_views(PRESETS[preset][1]).views
    assert one == two and one.mean == ((0, 0, 0) if preset != "imagenette-r18" else (0.485, 0.456, 0.406))
    assert (one.scale, one.interpolation, one.flip, one.grayscale) == ((0.08, 1.0), "bicubic", 0.5, 0.2)
    assert (one.color_jitter_prob, one.hue, one.blur) == (0.8, hue, blur)
    assert one.brightness == one.contrast == one.saturation == pytest.approx(strength)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model = SimCLR(create_backbone(cfg.resnet_spec(norm=cfg.norm)), cfg.projector_dim, cfg.norm)
        assert model(torch.empty(2, 3, cfg.image_size, cfg.image_size)).shape == (2, 128)
