"""VICReg: loss and gradient against slow versions, N processes against one, projector, groups, views, presets."""

from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.schedules import cosine_schedule, scaled_lr
from methods.vicreg.augment import two_views
from methods.vicreg.config import PRESETS
from methods.vicreg.health import health_checks
from methods.vicreg.loss import covariance, vicreg
from methods.vicreg.train import VICReg, compute_loss, parameter_groups
from tests.processes import run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)
WEIGHTS = dict(invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0)
CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(z1, z2, invariance_weight, variance_weight, covariance_weight):
    """The official code's three terms, one number at a time."""
    n, d = z1.shape
    s = sum((z1[b, j] - z2[b, j]) ** 2 for b in range(n) for j in range(d)) / (n * d)
    v = c = 0.0
    for z in (z1, z2):
        means = [sum(z[b, j] for b in range(n)) / n for j in range(d)]
        for i in range(d):
            for j in range(d):
                c_ij = sum((z[b, i] - means[i]) * (z[b, j] - means[j]) for b in range(n)) / (n - 1)
                if i == j:
                    v = v + torch.clamp(1 - torch.sqrt(c_ij + 1e-4), min=0) / d / 2  # halved: a mean over the views
                else:
                    c = c + c_ij**2 / d  # not halved
    return invariance_weight * s + variance_weight * v + covariance_weight * c


def pair(n: int, d: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    z1, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return [(scale * z + 1).requires_grad_() for z in (z1, 0.7 * z1 + 0.5 * noise)]


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 1), (8, 6)])
@pytest.mark.parametrize("scale", [0.005, 0.5, 3.0])  # near collapse, inside the hinge, outside
def test_loss_and_gradient_equal_the_slow_version(n, d, scale):
    z1, z2 = pair(n, d, scale)
    for weights in ((25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        loss, parts = vicreg(z1, z2, **dict(zip(WEIGHTS, weights, strict=True)))
        expected = slow_loss(z1, z2, *weights)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        terms = [parts[name] for name in ("invariance", "variance", "covariance")]
        torch.testing.assert_close(sum(w * t for w, t in zip(weights, terms, strict=True)), loss.detach())
        gradients = zip(*(torch.autograd.grad(x, (z1, z2)) for x in (loss, expected)), strict=True)
        for ours, theirs in gradients:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_covariance_is_unbiased_and_centered():
    z = pair(32, 7)[0]
    torch.testing.assert_close(covariance(z), torch.cov(z.T))


def orthogonal(n: int, d: int) -> torch.Tensor:
    """Rows [n, d] whose columns have mean 0, variance 1 and no covariance."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(z - z.mean(0))[0] * (n - 1) ** 0.5


def test_known_values():
    constant = torch.full((16, 8), 3.0, requires_grad=True)
    loss, parts = vicreg(constant, constant, **WEIGHTS)
    assert loss.item() == pytest.approx(25 * (1 - 0.01))  # full collapse: eps keeps the root's gradient finite
    assert torch.autograd.grad(loss, constant)[0].abs().max() == 0
    z = orthogonal(64, 8)
    loss, parts = vicreg(2 * z, 2 * z, **WEIGHTS)
    assert loss.abs() < 1e-12  # equal views, wide enough, uncorrelated: nothing above the hinge costs anything
    assert parts["agreement"] == 1 and parts["redundancy"] < 1e-7
    same = z[:, :1].expand(64, 8)
    loss, parts = vicreg(same, same, **WEIGHTS)
    assert loss.item() == pytest.approx(2 * 7) and parts["redundancy"].item() == pytest.approx(1)
    shifted = vicreg(z + 1, z, **WEIGHTS)[0] - vicreg(z, z, **WEIGHTS)[0]
    assert shifted.item() == pytest.approx(25)  # only the invariance sees the mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    z1, z2 = torch.randn(8, 16).to(dtype), torch.randn(8, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = vicreg(z1, z2, **WEIGHTS)
    assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in parts.values())
    torch.testing.assert_close(loss, vicreg(z1.float(), z2.float(), **WEIGHTS)[0])


def tripped(z1: torch.Tensor, z2: torch.Tensor) -> set[str]:
    line = {name: float(value) for name, value in vicreg(z1, z2, **WEIGHTS)[1].items()}
    return {rule.metric for rule in health_checks(after=10) if rule.trips({**line, "step": 11})}


def test_forced_collapse_trips_the_watch():
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(256, 64, generator=generator)
    assert tripped(healthy, healthy + 0.3 * torch.randn(256, 64, generator=generator)) == set()
    assert tripped(1 + 1e-3 * healthy, 1 + 1e-3 * healthy) == {"std"}
    assert tripped(healthy[:, :1].expand(256, 64), healthy[:, :1].expand(256, 64)) == {"redundancy"}
    assert tripped(healthy, torch.randn(256, 64, generator=generator)) == {"agreement"}
    early = {"std": 0.0, "redundancy": 1.0, "agreement": 0.0, "step": 10}
    assert not any(rule.trips(early) for rule in health_checks(10))


# ---- model, views, groups --------------------------------------------------------------------------------------------


def build(widths=(24, 24, 16)) -> VICReg:
    torch.manual_seed(0)
    return VICReg(create_backbone(BackboneSpec("resnet18", **TINY)), widths)


def test_projector_as_in_the_code():
    linear1, norm1, relu, linear2, norm2, _, linear3 = build().projector
    assert [(x.in_features, x.out_features) for x in (linear1, linear2, linear3)] == [(64, 24), (24, 24), (24, 16)]
    assert [x.bias is None for x in (linear1, linear2, linear3)] == [False, False, True]
    assert norm1.affine and norm2.affine and isinstance(relu, torch.nn.ReLU)
    model, view = build(()).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(view, view)[0], model.backbone(view))  # without: the features themselves


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
    assert first.color_jitter_prob == 0.8 and first.blur_sigma == (0.1, 2.0)


def test_biases_and_norms_have_neither_decay_nor_ratio_unless_asked():
    model = build()
    matrices, vectors = parameter_groups(model, weight_decay=1e-4, adapt_vectors=False)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert (matrices["weight_decay"], matrices["adapt"]) == (1e-4, True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)
    for group in parameter_groups(model, weight_decay=1e-4, adapt_vectors=True):
        assert (group["weight_decay"], group["adapt"]) == (1e-4, True)


# ---- N processes -----------------------------------------------------------------------------------------------------


def local_statistics(z1, z2):
    """The loss as it is without communication: each process looks at its own rows."""
    s = (z1 - z2).square().mean()
    c1, c2 = torch.cov(z1.T), torch.cov(z2.T)
    std = torch.stack([c1.diagonal(), c2.diagonal()]).add(1e-4).sqrt()
    c = sum((c - c.diagonal().diag()).square().sum() for c in (c1, c2)) / len(c1)
    return 25 * s + 25 * (1 - std).relu().mean() + c, {}


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
    cfg = PRESETS["imagenet-r50"][1]
    loss, _ = loss_of(*trained(*views)) if loss_of else compute_loss(trained, views, cfg)
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def worst_difference(ours: dict, theirs: dict) -> float:
    """Largest difference relative to a tensor's largest value; tensors that are 0 but for rounding do not count."""
    scale = {name: value.abs().max() for name, value in theirs.items()}
    return max(
        float((ours[name] - value).abs().max() / scale[name]) for name, value in theirs.items() if scale[name] > 1e-5
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    for dtype in (torch.float64, torch.float32):
        one = gradients(dtype, 16)
        for many in run_ranks(gradients, ranks, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 20
            assert worst_difference(many, one) < (1e-10 if dtype == torch.float64 else 1e-5), dtype


def test_local_statistics_would_not():
    """The gradient of each process's own variances and covariances, as some libraries have it, is another."""
    one = gradients(torch.float64, 16)
    torch.testing.assert_close(gradients(torch.float64, 16, local_statistics), one)  # one process: the same loss
    many = run_ranks(partial(gradients, loss_of=local_statistics), 2, torch.float64, 16)[0]
    assert worst_difference(many, one) > 0.01


# ---- presets ---------------------------------------------------------------------------------------------------------

# preset: (training images, batch, epochs, peak rate, variance weight, decay, warm-up, last over peak, optimizer)
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, 0.3, 50, 1e-4, 10, 0.0, "larc"),
    "imagenette-r18": (IMAGENETTE, 256, 800, 0.3, 25, 1e-4, 40, 0.0, "lars"),
    "imagenet-r50": (IMAGENET, 2048, 1000, 1.6, 25, 1e-6, 10, 1e-3, "lars"),
    "imagenet-r50-100": (IMAGENET, 512, 100, 0.6, 25, 1e-6, 10, 1e-3, "lars"),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, peak, variance, decay, warmup_epochs, floor, optimizer = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.weight_decay, cfg.optimizer) == (batch, epochs, decay, optimizer)
    assert (cfg.invariance_weight, cfg.variance_weight, cfg.covariance_weight) == (25, variance, 1)
    assert cfg.momentum == 0.9 and cfg.warmup_epochs == warmup_epochs and cfg.lr_floor == floor
    assert cfg.projector == ((8192,) * 3 if "imagenet-r50" in preset else (2048,) * 3)
    assert cfg.adapt_vectors == (preset == "imagenette-r18")
    assert scaled_lr(cfg.base_lr, batch, "linear") == pytest.approx(peak)
    total, warmup = epochs * (images // batch), warmup_epochs * (images // batch)
    rate = partial(cosine_schedule, base=peak, total=total, warmup=warmup, final=floor * peak)
    assert rate(0) == 0 and rate(warmup) == pytest.approx(peak)
    assert rate(total - 1) == pytest.approx(floor * peak, abs=1e-6 * peak)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model = VICReg(create_backbone(cfg.resnet_spec()), cfg.projector)
        view = torch.empty(4, 3, cfg.image_size, cfg.image_size)
        assert [z.shape for z in model(view, view)] == [(4, cfg.projector[-1])] * 2
