"""SimSiam: loss and gradient against a slow version, stop-gradient, N processes against one, rates and presets."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.health import feature_std
from common.schedules import cosine_schedule, scaled_lr
from methods.simsiam.augment import two_views
from methods.simsiam.config import PRESETS
from methods.simsiam.health import health_checks
from methods.simsiam.loss import simsiam
from methods.simsiam.train import SimSiam, compute_loss, parameter_groups, set_rates
from tests.processes import run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)
CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(p1, p2, z1, z2):
    """Equations 1 and 2, one image at a time; the targets are constants."""
    total = 0.0
    for p, z in ((p1, z2.tolist()), (p2, z1.tolist())):
        for i in range(len(p)):
            length_p = sum(x * x for x in p[i]).sqrt()
            length_z = math.sqrt(sum(x * x for x in z[i]))
            total = total - sum(a * b for a, b in zip(p[i], z[i], strict=True)) / (length_p * length_z)
    return total / (2 * len(p1))


def four(n: int, d: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    return [torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize(("n", "d"), [(1, 2), (4, 3), (7, 16)])
def test_loss_and_gradient_equal_the_slow_version(n, d):
    p1, p2, z1, z2 = four(n, d)
    loss, _ = simsiam(p1, p2, z1, z2)
    expected = slow_loss(p1, p2, z1, z2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, (p1, p2)), torch.autograd.grad(expected, (p1, p2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_no_gradient_flows_through_the_targets():
    p1, p2, z1, z2 = four(5, 8)
    simsiam(p1, p2, z1, z2)[0].backward()
    assert p1.grad is not None and p2.grad is not None and z1.grad is None and z2.grad is None
    simsiam(p1, p2, z1, z2, stop_gradient=False)[0].backward()
    assert z1.grad.abs().max() > 0 and z2.grad.abs().max() > 0


def test_known_values():
    z = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    assert simsiam(z, z, 3 * z, 0.1 * z)[0] == pytest.approx(-1)  # lengths do not matter
    assert simsiam(z, z, -z, -z)[0] == pytest.approx(1)
    assert abs(simsiam(*four(64, 2048, torch.float32))[0]) < 0.01  # random directions
    assert simsiam(z, -z, z, z)[1]["agreement"] == pytest.approx(1)
    a, b = torch.eye(4)[:2]  # view 1 predicts view 2: crossing the pairs would give 0
    p1, p2, z1, z2 = (x.expand(3, 4) for x in (a, b, b, a))
    assert simsiam(p1, p2, z1, z2)[0] == pytest.approx(-1) and simsiam(p1, p2, z2, z1)[0] == pytest.approx(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    tensors = [x.detach().to(dtype) for x in four(8, 16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = simsiam(*tensors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, simsiam(*(x.float() for x in tensors))[0])


# ---- model and optimizer ---------------------------------------------------------------------------------------------


def build(projector=(24, 24, 16), hidden=4, predictor=True) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(create_backbone(BackboneSpec("resnet18", **TINY)), projector, hidden, predictor)


def test_heads_as_in_the_code():
    model = build()
    linear1, norm1, _, linear2, norm2, _, linear3, norm3 = model.projector
    assert [(x.in_features, x.out_features) for x in (linear1, linear2, linear3)] == [(64, 24), (24, 24), (24, 16)]
    assert all(x.bias is None for x in (linear1, linear2, linear3))
    assert norm1.affine and norm2.affine and not norm3.affine
    first, norm, relu, second = model.predictor
    assert first.bias is None and norm.affine and isinstance(relu, torch.nn.ReLU)
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (16, 4, 4, 16)
    assert second.bias is not None  # no norm after it
    z = model.train()(*torch.randn(2, 8, 3, 16, 16))[2]
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(16), rtol=1e-2, atol=1e-2)


def test_each_view_has_its_own_batch_statistics():
    model = build().double().train()
    view1, view2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    p1, _, z1, _ = model(view1, 3 * view2 + 1)
    assert model.backbone.bn1.num_batches_tracked == 2
    again = model(view1, view1)
    torch.testing.assert_close(p1, again[0])
    torch.testing.assert_close(z1, again[2])


def test_predictor_keeps_its_rate_and_everything_decays():
    """Code main_simsiam.py: two groups, one weight decay on all parameters, the predictor's rate fixed."""
    cfg = PRESETS["imagenet-r50"][1]
    model = build()
    groups = parameter_groups(model, weight_decay=cfg.weight_decay, decay_vectors=True)
    predictor = {id(p) for g in groups if g["predictor"] for p in g["params"]}
    assert predictor == {id(p) for p in model.predictor.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
    assert all(g["weight_decay"] == 1e-4 for g in optimizer.param_groups)
    set_rates(optimizer, 0.03, 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.03, 0.03, 0.1, 0.1]
    vectors = [g for g in parameter_groups(model, weight_decay=1e-4, decay_vectors=False) if not g["adapt"]]
    assert len(vectors) == 2 and all(g["weight_decay"] == 0 and p.ndim == 1 for g in vectors for p in g["params"])
    without = parameter_groups(build(predictor=False), weight_decay=1e-4, decay_vectors=True)
    assert len(without) == 2 and not any(g["predictor"] for g in without)


def trained(stop_gradient: bool, steps: int = 60) -> set[str]:
    """Health rules that trip after some steps on random images whose views are noisy copies."""
    model = build(projector=(32, 32), hidden=8).train()
    groups = parameter_groups(model, weight_decay=0.0, decay_vectors=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    set_rates(optimizer, 0.2, 0.2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    for _ in range(steps):
        views = [images + 0.5 * torch.randn(images.shape, generator=generator) for _ in range(2)]
        loss, parts = compute_loss(model, views, stop_gradient=stop_gradient)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    line = {"step": steps, "loss": loss.item(), "projection_std": parts["projection_std"].item()}
    return {rule.metric for rule in health_checks(after=10) if rule.trips(line)}


def test_forced_collapse_trips_the_watch():
    assert trained(stop_gradient=True) == set()
    # The output norm keeps the spread even as the views become one: only the loss shows it.
    assert trained(stop_gradient=False) == {"loss"}
    same = {"step": 11, "loss": -0.5, "projection_std": float(feature_std(torch.ones(8, 4)))}
    assert [rule.metric for rule in health_checks(after=10) if rule.trips(same)] == ["projection_std"]


# ---- N processes -----------------------------------------------------------------------------------------------------


def gradients(dtype: torch.dtype, global_batch: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and running averages of one step on this process's part of a fixed global batch, after DDP."""
    model = build().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, global_batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    n = global_batch // world_size()
    views = views[:, rank() * n : (rank() + 1) * n]
    trained = sync_batchnorm(model)
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    loss, _ = compute_loss(trained, views)
    loss.backward()
    if world_size() > 1:
        torch.distributed.all_reduce(loss := loss.detach())
        loss = loss / world_size()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    for dtype in (torch.float64, torch.float32):
        one = gradients(dtype, 16)
        for many in run_ranks(gradients, ranks, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 20
            for name, value in one.items():
                # z is centered, so the mean of predictor.1's input is zero but for rounding: measure it against 1.
                scale = 1.0 if name == "predictor.1.running_mean" else value.abs().max().clamp_min(1e-30)
                worst = (many[name] - value).abs().max() / scale
                assert worst < (1e-10 if dtype == torch.float64 else 3e-5), (name, dtype, worst)


# ---- presets ---------------------------------------------------------------------------------------------------------

# preset: (training images, batch, epochs, peak rate, weight decay, projector layers, blur, crop scale)
EXPECTED = {
    "cifar10-r18": (CIFAR, 512, 800, 0.06, 5e-4, 2, 0.0),
    "imagenette-r18": (IMAGENETTE, 256, 800, 0.06, 5e-4, 3, 0.5),
    "imagenet-r50": (IMAGENET, 512, 100, 0.1, 1e-4, 3, 0.5),
    "imagenet-r50-b256": (IMAGENET, 256, 100, 0.05, 1e-4, 3, 0.5),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_paper(preset):
    images, batch, epochs, peak, decay, layers, blur = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.weight_decay, cfg.blur) == (batch, epochs, decay, blur)
    assert cfg.projector == (2048,) * layers and (cfg.predictor_hidden, cfg.momentum) == (512, 0.9)
    assert (cfg.crop_scale, cfg.color_jitter, cfg.grayscale) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.2)
    assert cfg.predictor and cfg.stop_gradient and cfg.optimizer == "sgd"
    assert scaled_lr(cfg.base_lr, batch, "linear") == pytest.approx(peak)
    total = epochs * (images // batch)
    rate = [cosine_schedule(s, base=peak, total=total) for s in (0, total // 2, total - 1)]
    assert rate[0] == peak and rate[1] == pytest.approx(peak / 2, rel=1e-3) and 0 < rate[2] < 1e-5 * peak


@pytest.mark.parametrize(("preset", "blur"), [("cifar10-r18", 0.0), ("imagenette-r18", 0.5), ("imagenet-r50", 0.5)])
def test_views_equal_the_reference(preset, blur):
    one, two = two_views(PRESETS[preset][1]).views
    assert one == two and (one.scale, one.interpolation, one.flip) == ((0.2, 1.0), "bilinear", 0.5)
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (one.color_jitter_prob, one.grayscale, one.blur) == (0.8, 0.2, blur)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model = SimSiam(create_backbone(cfg.resnet_spec()), cfg.projector, cfg.predictor_hidden, cfg.predictor)
        view = torch.empty(4, 3, cfg.image_size, cfg.image_size)
        assert [x.shape for x in model(view, view)] == [(4, cfg.projector[-1])] * 4
