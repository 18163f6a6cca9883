"""Barlow Twins: loss and gradient against slow versions, N processes against one, rates, groups, presets."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.optim import LARS, set_lr
from common.schedules import cosine_schedule, scaled_lr
from methods.barlow.augment import two_views
from methods.barlow.config import PRESETS
from methods.barlow.health import health_checks
from methods.barlow.loss import barlow_twins, cross_correlation
from methods.barlow.train import BarlowTwins, compute_loss, parameter_groups
from tests.processes import run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)
CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(z1, z2, lambd, eps=1e-5):
    """Equations 1 and 2, one pair of dimensions at a time."""
    total = 0.0
    columns = [[(c - c.mean()) / torch.sqrt(((c - c.mean()) ** 2).sum() / len(c) + eps) for c in z.T] for z in (z1, z2)]
    for i, a in enumerate(columns[0]):
        for j, b in enumerate(columns[1]):
            c = sum(x * y for x, y in zip(a, b, strict=True)) / len(z1)
            total = total + ((1 - c) ** 2 if i == j else lambd * c**2)
    return total


def pair(n: int, d: int, *, related: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    z1, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    z2 = 0.7 * z1 + noise if related else noise
    return [(3 * z + 1).requires_grad_() for z in (z1, z2)]


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 1), (9, 6)])
@pytest.mark.parametrize("lambd", [0.0051, 1.0])
def test_loss_and_gradient_equal_the_slow_version(n, d, lambd):
    z1, z2 = pair(n, d)
    loss, parts = barlow_twins(z1, z2, lambd)
    expected = slow_loss(z1, z2, lambd)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["invariance"] + parts["redundancy"], loss.detach())
    for ours, theirs in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_normalization_is_batchnorm_without_affine_and_off_diagonal_is_all_but_the_diagonal():
    z1, z2 = pair(32, 7)
    norm = torch.nn.BatchNorm1d(7, affine=False).double()  # as in the official code: biased variance, eps 1e-5
    c = norm(z1).T @ norm(z2) / 32
    torch.testing.assert_close(cross_correlation(z1, z2), c)
    assert not torch.allclose(c, c.T)  # rows are view 1, columns view 2
    mask = ~torch.eye(7, dtype=bool)
    loss, parts = barlow_twins(z1, z2, 0.1)
    torch.testing.assert_close(parts["redundancy"], 0.1 * c[mask].square().sum().detach())
    torch.testing.assert_close(parts["off_diagonal"], c[mask].square().mean().sqrt().detach())
    torch.testing.assert_close(parts["on_diagonal"], c.diagonal().mean().detach())


def test_known_values():
    z = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    loss, parts = barlow_twins(z, z, 0.0051)
    assert parts["on_diagonal"] == pytest.approx(1, abs=1e-4) and parts["invariance"] < 1e-6
    other = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    loss, parts = barlow_twins(z, other, 0.0051)  # about D for uncorrelated views
    assert parts["invariance"] == pytest.approx(64, rel=0.05)
    assert parts["off_diagonal"] == pytest.approx(512**-0.5, rel=0.05)
    torch.testing.assert_close(barlow_twins(5 * z - 3, 0.2 * other + 1, 0.0051)[0], loss, rtol=1e-4, atol=1e-4)
    same = torch.randn(512, 1, generator=torch.Generator().manual_seed(2)).expand(512, 8)  # one signal, eight times
    assert barlow_twins(same, same, 1.0)[0] == pytest.approx(8 * 7, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    z1, z2 = torch.randn(8, 16).to(dtype), torch.randn(8, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = barlow_twins(z1, z2, 0.1)
    assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in parts.values())
    torch.testing.assert_close(loss, barlow_twins(z1.float(), z2.float(), 0.1)[0])


def tripped(z1: torch.Tensor, z2: torch.Tensor) -> set[str]:
    line = {name: float(value) for name, value in barlow_twins(z1, z2, 0.0051)[1].items()}
    return {rule.metric for rule in health_checks(after=10) if rule.trips({**line, "step": 11})}


def test_forced_collapse_trips_the_watch():
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(256, 64, generator=generator)
    assert tripped(healthy, healthy + 0.3 * torch.randn(256, 64, generator=generator)) == set()
    one_signal = healthy[:, :1].expand(256, 64)  # what the first term alone allows
    assert tripped(one_signal, one_signal) == {"off_diagonal"}
    constant = 1 + 1e-5 * healthy  # below eps, the norm of the loss cannot blow a constant up
    assert tripped(constant, constant) == {"on_diagonal"}
    assert tripped(healthy, torch.randn(256, 64, generator=generator)) == {"on_diagonal"}  # nothing learned
    assert not any(rule.trips({"on_diagonal": 0.0, "off_diagonal": 1.0, "step": 10}) for rule in health_checks(10))


# ---- model, views, groups --------------------------------------------------------------------------------------------


def build(widths=(24, 24, 16)) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(create_backbone(BackboneSpec("resnet18", **TINY)), widths)


def test_projector_as_in_the_code():
    linear1, norm1, relu, linear2, norm2, _, linear3 = build().projector
    assert [(x.in_features, x.out_features) for x in (linear1, linear2, linear3)] == [(64, 24), (24, 24), (24, 16)]
    assert all(x.bias is None for x in (linear1, linear2, linear3))
    assert norm1.affine and norm2.affine and isinstance(relu, torch.nn.ReLU)


def test_without_projector_the_features_are_correlated():
    model, view = build(()).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(view, view)[0], model.backbone(view))


def test_each_view_has_its_own_batch_statistics():
    model = build().double().train()
    view1, view2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    z1, z2 = model(view1, 3 * view2 + 1)
    assert model.backbone.bn1.num_batches_tracked == 2
    torch.testing.assert_close(z1, model(view1, view1)[0])  # what the other view is does not matter
    torch.testing.assert_close(z2, model(view1, 3 * view2 + 1)[1])


def test_views_are_asymmetric():
    cfg = PRESETS["imagenet-r50"][1]
    assert (cfg.crop_scale, cfg.color_jitter, cfg.grayscale) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2)
    assert (cfg.blur, cfg.solarize, cfg.interpolation) == ((1.0, 0.1), (0.0, 0.2), "bicubic")
    first, second = two_views(cfg).views
    assert (first.blur, first.solarize) == (1.0, 0.0) and (second.blur, second.solarize) == (0.1, 0.2)
    assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.2, 0.1)
    assert first.color_jitter_prob == 0.8


def test_biases_and_norms_have_their_own_rate_and_neither_decay_nor_ratio():
    cfg = PRESETS["imagenet-r50"][1]
    model = build()
    groups = parameter_groups(
        model, weight_decay=1e-6, decay_vectors=False, vector_lr_scale=cfg.base_lr_biases / cfg.base_lr
    )
    matrices, vectors = groups
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert (matrices["weight_decay"], matrices["adapt"]) == (1e-6, True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)
    optimizer = LARS(groups, lr=0.0, momentum_form="lr-outside")
    set_lr(optimizer, scaled_lr(cfg.base_lr, cfg.batch_size, "linear"))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.6, 0.0384])  # 42 times apart
    everything = parameter_groups(model, weight_decay=5e-4, decay_vectors=True, vector_lr_scale=1.0)
    assert all(g["weight_decay"] == 5e-4 for g in everything)


def test_loss_weight_makes_the_published_rates_mean_what_they_meant():
    """A gradient of 1/16, as the official code has on 16 GPUs, is the exact one with bias rate / 16 and decay x 16."""

    def steps(loss_weight: float, decay: float, vector_lr_scale: float) -> list[torch.Tensor]:
        model = build().double().train()
        groups = parameter_groups(model, weight_decay=decay, decay_vectors=False, vector_lr_scale=vector_lr_scale)
        optimizer = LARS(groups, lr=0.0, momentum_form="lr-outside")
        for step in range(3):
            set_lr(optimizer, 0.5)
            views = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            (loss_weight * compute_loss(model, views, 0.01)[0]).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    published, exact = steps(1 / 16, 1e-6, 0.024), steps(1.0, 16e-6, 0.024 / 16)
    for ours, theirs in zip(published, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    literal = steps(1.0, 1e-6, 0.024)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(literal, published, strict=True))


# ---- N processes -----------------------------------------------------------------------------------------------------


def official_loss(z1, z2, lambd):
    """As the official code reduces: in place, so that no gradient flows through the sum over processes."""
    z1, z2 = (sync_batchnorm(torch.nn.BatchNorm1d(z.shape[1], affine=False).to(z.dtype))(z) for z in (z1, z2))
    c = z1.T @ z2 / (len(z1) * world_size())
    if world_size() > 1:
        dist.all_reduce(c)
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + lambd * off_diagonal, {}


def gradients(dtype: torch.dtype, global_batch: int, loss_of=None) -> dict[str, torch.Tensor]:
    """Loss, gradients and running averages of one step on this process's part of a fixed global batch, after DDP.

    `loss_of`: takes the place of the loss of train.py.
    """
    model = build().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, global_batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    n = global_batch // world_size()
    views = views[:, rank() * n : (rank() + 1) * n]
    trained = sync_batchnorm(model)
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    loss, _ = loss_of(*trained(*views), 0.01) if loss_of else compute_loss(trained, views, 0.01)
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    for dtype in (torch.float64, torch.float32):
        one = gradients(dtype, 16)
        for many in run_ranks(gradients, ranks, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 20
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                assert worst < (1e-10 if dtype == torch.float64 else 1e-5), (name, dtype, worst)


def test_the_official_reduction_gives_one_rank_th_of_the_gradient():
    """Why `loss_weight` exists: the same loss, and every gradient exactly 1 / processes of the true one."""
    one = gradients(torch.float64, 16)
    for many in run_ranks(partial(gradients, loss_of=official_loss), 4, torch.float64, 16):
        torch.testing.assert_close(many["loss"], one["loss"])
        for name in (n for n in one if n != "loss" and "running" not in n):
            assert (4 * many[name] - one[name]).abs().max() < 1e-9 * one[name].abs().max().clamp_min(1e-30), name


# ---- presets ---------------------------------------------------------------------------------------------------------

# preset: (training images, batch, epochs, peak rate of matrices and of vectors, lambda, decay, last over peak)
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, 0.3, 0.3, 5e-3, 1e-4, 0.0),
    "cifar10-r18-b128": (CIFAR, 128, 200, 0.06, 0.06, 5e-3, 5e-4, 0.0),
    "imagenette-r18": (IMAGENETTE, 256, 800, 0.06, 0.06, 5e-3, 5e-4, 0.0),
    "imagenet-r50": (IMAGENET, 2048, 1000, 1.6, 0.0384, 0.0051, 1e-6, 1e-3),
    "imagenet-r50-b256": (IMAGENET, 256, 300, 0.4, 0.0096, 0.0051, 1e-6, 1e-3),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, peak, vector_peak, lambd, decay, floor = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.lambd, cfg.weight_decay) == (batch, epochs, lambd, decay)
    assert cfg.momentum == 0.9 and cfg.lr_floor == floor
    assert scaled_lr(cfg.base_lr, batch, "linear") == pytest.approx(peak)
    assert scaled_lr(cfg.base_lr_biases, batch, "linear") == pytest.approx(vector_peak)
    per_epoch = images // batch
    total, warmup = epochs * per_epoch, int(cfg.warmup_epochs * per_epoch)
    rate = partial(cosine_schedule, base=peak, total=total, warmup=warmup, final=floor * peak)
    assert rate(warmup) == pytest.approx(peak) and rate(total - 1) == pytest.approx(floor * peak, abs=1e-6 * peak)
    assert (cfg.warmup_epochs == 0) == (cfg.optimizer == "sgd")
    if "imagenet-r50" in preset:
        assert (cfg.optimizer, cfg.warmup_epochs, cfg.projector) == ("lars", 10, (8192,) * 3)
        assert rate(0) == 0 and rate(warmup - 1) == pytest.approx(peak * (1 - 1 / warmup))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model = BarlowTwins(create_backbone(cfg.resnet_spec()), cfg.projector)
        view = torch.empty(4, 3, cfg.image_size, cfg.image_size)
        assert [z.shape for z in model(view, view)] == [(4, cfg.projector[-1])] * 2
