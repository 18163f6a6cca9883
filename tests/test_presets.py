"""Every preset builds, its rates are the reference's at the first step, after warm-up and at the last; it trains."""

from dataclasses import replace

import pytest
import torch

from common.backbones import multiply_adds
from common.optim import LARS
from common.schedules import scaled_lr, warmup_cosine
from methods.simclr.config import PRESETS
from methods.simclr.loss import nt_xent
from methods.simclr.train import build

CIFAR, IMAGENET, IMAGENETTE, SHAPES = 50_000, 1_281_167, 9_469, 10_000
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
    rate = [warmup_cosine(s, peak=peak, total=total, warmup=warmup) for s in (0, warmup, total - 1)]
    assert rate[0] == 0 and rate[1] == pytest.approx(peak) and 0 < rate[2] < 1e-5 * peak


def test_views_equal_the_reference():
    cifar, imagenet = PRESETS["cifar10-r18"][1], PRESETS["imagenet-r50"][1]
    assert (cifar.color_strength, cifar.hue, cifar.grey, cifar.blur, cifar.crop_scale) == (
        0.5,
        0.1,
        0.2,
        0.0,
        (0.08, 1.0),
    )
    assert (imagenet.color_strength, imagenet.hue, imagenet.grey, imagenet.blur) == (1.0, 0.2, 0.2, 0.5)
    assert cifar.normalize == imagenet.normalize == "none" and cifar.interpolation == "bicubic"


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    """On the meta device all of them; in earnest those below 5 GFLOP (2.5 GMAC) an image and pass, batch of 4."""
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, _ = build(cfg, (0.5,) * 3, (0.25,) * 3)
        assert model(torch.empty(2, 3, cfg.image_size, cfg.image_size)).shape == (2, 128)
        cost = multiply_adds(model.backbone, cfg.image_size)
    if cost > 2.5e9:
        assert "imagenet-r50" in preset
        return
    torch.manual_seed(0)
    model, _ = build(cfg, (0.5,) * 3, (0.25,) * 3)
    optimizer = LARS(model.parameters(), lr=0.1)
    before = model.projector[0].weight.detach().clone()
    for _ in range(2):
        loss, _ = nt_xent(*model(torch.rand(8, 3, cfg.image_size, cfg.image_size)).chunk(2), cfg.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert not torch.equal(before, model.projector[0].weight)


def test_presets_are_values_not_references():
    changed = replace(PRESETS["cifar10-r18"][1], epochs=1)
    assert PRESETS["cifar10-r18"][1].epochs == 1000 and changed.epochs == 1
