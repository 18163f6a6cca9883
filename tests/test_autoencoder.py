"""Autoencoders: loss and processes against slow versions, what is removed is not seen, reconstructions, presets."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone, load_backbone, multiply_adds
from common.data import open_data
from common.distributed import rank, sync_batchnorm, world_size
from common.html import image_tag
from common.log import read_metrics
from common.optim import decay_groups
from common.vit import vit_arguments
from methods.autoencoder.augment import Corruption, block_mask, one_view
from methods.autoencoder.config import PRESETS
from methods.autoencoder.health import health_checks
from methods.autoencoder.loss import reconstruction_loss
from methods.autoencoder.model import Decoder
from methods.autoencoder.reconstruct import levels, reconstruction_section
from methods.autoencoder.train import Autoencoder, compute_loss
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)
VARIANTS = ("vanilla", "denoising", "masked")
MODULE = "methods.autoencoder.train"


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(bottleneck: int = 12, latent_from: str = "map", size: int = 16) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(create_backbone(BackboneSpec("resnet18", **TINY)), bottleneck, latent_from, size, 16)


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, error of the mean image), one number at a time."""
    n, channels, side, _ = target.shape
    total, blind, count = 0.0, 0.0, 0
    for c in range(channels):
        for y in range(side):
            for x in range(side):
                mean = sum(target[i, c, y, x] for i in range(n)) / n
                for i in range(n):
                    if mask is None or mask[i, 0, y, x] == 1:
                        total = total + (pred[i, c, y, x] - target[i, c, y, x]) ** 2
                        blind, count = blind + (target[i, c, y, x] - mean) ** 2, count + 1
    return total / count, blind / count


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_equal_the_slow_version(masked):
    pred, target = images(4, 3, 4, 4).requires_grad_(), images(4, 3, 4, 4, seed=1)
    mask = block_mask(images(4, 4, seed=2), 1, 2, 2).double() if masked else None
    loss, parts = reconstruction_loss(pred, target, mask)
    expected, mean_image = slow_loss(pred, target, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["mean_image"], mean_image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["relative_error"], (expected / mean_image).detach())
    ours, theirs = torch.autograd.grad(loss, pred)[0], torch.autograd.grad(expected, pred)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    if masked:
        assert not (ours * (1 - mask)).any() and not parts["mean_image"].requires_grad


def test_the_mean_image_has_relative_error_one_and_the_target_none():
    target = images(8, 3, 4, 4)
    mean = target.mean(0, keepdim=True).expand_as(target)
    assert float(reconstruction_loss(mean, target)[1]["relative_error"]) == pytest.approx(1)
    assert float(reconstruction_loss(target, target)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    pred, target = images(4, 3, 8, 8).to(dtype), images(4, 3, 8, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = reconstruction_loss(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reconstruction_loss(pred.float(), target)[0])


# ---- what the encoder sees -------------------------------------------------------------------------------------------


def test_noise_is_in_units_of_pixels():
    std = (0.2, 0.5, 1.0)
    corruption = Corruption("denoising", 32, noise=0.25, std=std)
    views = images(64, 3, 32, 32).float()
    inputs, mask = corruption(views, corruption.draw(64, 0, 3))
    added = (inputs - views) * torch.tensor(std).view(3, 1, 1)  # back in [0, 1] units
    torch.testing.assert_close(added.std((0, 2, 3)), torch.full((3,), 0.25), rtol=0.01, atol=0)
    assert mask is None and abs(added.mean()) < 2e-3


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_masks_remove_whole_blocks_and_equally_many_in_every_sample(ratio):
    corruption = Corruption("masked", 32, mask_ratio=ratio, patch=4)
    views = images(16, 3, 32, 32).float()
    inputs, mask = corruption(views, corruption.draw(16, 0, 3))
    assert (
        corruption.removed == {0.25: 16, 0.5: 32, 0.9: 58}[ratio]
    )  # round, and int(64 * (1 - .9)) would keep 6 as well
    assert bool((mask.sum((1, 2, 3)) == 16 * corruption.removed).all())
    blocks = mask.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert bool((blocks == blocks[..., :1]).all()) and mask.unique().tolist() == [0, 1]
    assert not (inputs * mask).any()
    assert torch.equal(inputs * (1 - mask), views * (1 - mask))  # kept pixels as they are: no 1 / keep
    assert not torch.equal(mask[0], mask[1])


def test_every_block_is_removed_equally_often():
    counts = block_mask(torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)), 4, 4, 1).float().mean((0, 1))
    assert (counts - 0.25).abs().max() < 0.03


def test_vanilla_is_the_identity():
    corruption = Corruption("vanilla", 32)
    views = images(2, 3, 32, 32)
    assert corruption.draw(2, 0, 0) is None and corruption(views, None) == (views, None)


def test_draws_depend_on_seed_and_step_alone():
    for variant in VARIANTS[1:]:
        corruption = Corruption(variant, 16)
        first = corruption.draw(8, 0, 5)
        torch.rand(3)  # the global generator is not involved
        assert torch.equal(first, corruption.draw(8, 0, 5))
        assert not torch.equal(first, corruption.draw(8, 0, 6)) and not torch.equal(first, corruption.draw(8, 1, 5))


def test_the_encoder_sees_no_removed_pixel():
    model, corruption = tiny().double().eval(), Corruption("masked", 16, mask_ratio=0.5, patch=4)
    views, drawn = images(4, 3, 16, 16).requires_grad_(), corruption.draw(4, 0, 0)
    inputs, mask = corruption(views, drawn)
    output, _ = model(inputs)
    (output.square().sum()).backward()
    assert not (views.grad * mask).any() and (views.grad * (1 - mask)).abs().sum() > 0
    other = views.detach() + 1e3 * mask * images(4, 3, 16, 16, seed=1)
    torch.testing.assert_close(model(corruption(other, drawn)[0])[0], output)


@pytest.mark.parametrize("latent_from", ["map", "pooled"])
def test_nothing_passes_the_bottleneck_by(latent_from):
    """With the latent held still the output is the same for every image; and it has the width asked for."""
    model = tiny(latent_from=latent_from).eval()
    assert model.encode(torch.randn(2, 3, 16, 16))[0].shape == (2, 12)
    with torch.no_grad():
        model.to_latent.weight.zero_()
        output, features = model(torch.randn(5, 3, 16, 16))
    torch.testing.assert_close(output, output[:1].expand_as(output))  # to rounding: threads share a batch in parts
    assert features.std(0).sum() > 0
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(x)[1], model.backbone(x))  # the features are what evaluation sees


@pytest.mark.parametrize("size", [8, 12, 16, 20, 32, 33, 96, 128, 224])
def test_decoder_makes_every_size(size):
    with torch.device("meta"):
        decoder = Decoder(6, size, 32)
        assert decoder(torch.empty(2, 6)).shape == (2, 3, size, size)
    assert decoder.shape[1] <= 7 or size in (33, 20, 12, 8)


def test_decoder_is_lighter_than_the_encoder():
    for preset in ("quickstart", "cifar10-r18", "imagenette-r18"):
        cfg = PRESETS[preset][1]
        with torch.device("meta"):
            model = build(cfg)
            both = multiply_adds(model, cfg.image_size)
            assert both - multiply_adds(model.backbone, cfg.image_size) < 0.5 * both, preset


def test_views_are_the_whole_image_unless_cropped():
    store = open_data("shapes", "train", limit=4, image_size=32)
    cfg = dataclasses.replace(PRESETS["quickstart"][1], flip=0.0, normalize="none")
    recipe = one_view(dataclasses.replace(cfg, crop_scale=(1.0, 1.0)))
    view = recipe(store.images, recipe.sample(4, torch.Generator().manual_seed(0)))[0]
    torch.testing.assert_close(view, store.images.float() / 255, atol=1e-5, rtol=0)
    cropped = one_view(dataclasses.replace(cfg, crop_scale=(0.3, 0.6)))
    assert not torch.allclose(cropped(store.images, cropped.sample(4, torch.Generator().manual_seed(0)))[0], view)
    assert (
        recipe.views[0].color_jitter_prob
        == recipe.views[0].grayscale
        == recipe.views[0].blur
        == recipe.views[0].solarize
        == 0
    )


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(variant: str, dtype: torch.dtype, global_batch: int) -> dict[str, Tensor]:
    """One step on this process's part of a fixed global batch: loss, level, gradients after DDP, running statistics."""
    model = sync_batchnorm(tiny(latent_from="pooled" if variant == "vanilla" else "map").to(dtype).train())
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    n = global_batch // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    target = images(global_batch, 3, 16, 16, seed=2).to(dtype)[part]
    corruption = Corruption(variant, 16)
    drawn = corruption.draw(global_batch, 0, 7)
    loss_on = "masked" if variant == "masked" else "all"
    drawn = None if drawn is None else drawn[part]
    loss, parts = compute_loss(trained, target, corruption, drawn, loss_on=loss_on)
    loss.backward()
    loss = loss.detach()
    if world_size() > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / world_size()
    grads = {n: p.grad for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    return {"loss": loss, "mean_image": parts["mean_image"]} | grads | buffers


def both(variant: str, global_batch: int) -> dict[torch.dtype, dict[str, Tensor]]:
    return {dtype: gradients(variant, dtype, global_batch) for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks, variant):
    """Float32 within 1e-5, or within twice one process's rounding error on an ill-conditioned tensor. (A batch in which
    some ReLU's input is 0 up to rounding may differ by a percent in float32; this one has none.)"""
    one = both(variant, 16)
    exact = one[torch.float64]
    scales = {name: value.abs().max() for name, value in exact.items()}
    for name in ("to_latent.bias", "decoder.grid.bias"):  # no gradient but rounding where a BatchNorm follows
        scales[name] = scales[name.replace("bias", "weight")]
    for many in run_ranks(both, ranks, variant, 16):
        for dtype, expected in one.items():
            assert many[dtype].keys() == expected.keys() and len(expected) > 40
            for name, value in expected.items():
                own = float((value.double() - exact[name]).abs().max() / scales[name])
                worst = float((many[dtype][name].double() - value.double()).abs().max() / scales[name])
                limit = 1e-10 if dtype == torch.float64 else max(1e-5, min(2 * own, 1e-4))
                assert worst < limit, (name, dtype)


# ---- report ----------------------------------------------------------------------------------------------------------


class Copy(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.training
        return x, x.flatten(1)


def test_reconstructions_are_denormalized_and_show_every_level():
    store = open_data("shapes", "test", limit=3, image_size=16)
    spec = BackboneSpec("resnet18", image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = Copy().train()
    corruption = Corruption("vanilla", 16, std=spec.std)
    ((title, html),) = reconstruction_section(model, corruption, spec, store, seed=0, device="cpu")
    assert title == "Reconstructions" and model.training and "as it is (as trained): 0.0000" in html
    sources = re.findall(r'src="(.*?)"', html)
    assert len(sources) == 3 * 3
    for i, image in enumerate(store.eval_images(0, 3, 16)):
        expected = re.search(r'src="(.*?)"', image_tag(image, "")).group(1)
        assert sources[3 * i : 3 * i + 3] == [expected] * 3  # the pixels come back exactly
    masked = Corruption("masked", 16, mask_ratio=0.6, std=spec.std)
    ((_, html),) = reconstruction_section(model, masked, spec, store, seed=0, device="cpu")
    assert html.count("<img") == 3 * (1 + 2 * 4) and "60 % removed (as trained)" in html
    noisy = Corruption("denoising", 16, noise=0.2, std=spec.std)
    ((_, html),) = reconstruction_section(model, noisy, spec, store, seed=0, device="cpu")
    errors = [float(e) for e in re.findall(r": (0\.\d+)", html)]
    assert errors == pytest.approx([0.01, 0.04, 0.16], rel=0.1)  # the noise itself, in units of pixels


def test_levels():
    assert [name for name, _ in levels(Corruption("denoising", 16, noise=0.2))] == [
        "noise 0.1",
        "noise 0.2",
        "noise 0.4",
    ]
    assert len(levels(Corruption("masked", 16, mask_ratio=0.5))) == 3
    assert len(levels(Corruption("masked", 8, mask_ratio=0.5, patch=4))) == 3


# ---- runs ------------------------------------------------------------------------------------------------------------

SMOKE = ("smoke", "--no-eval", "--out")


@pytest.mark.parametrize("flags", [("--variant", "denoising"), ("--variant", "masked", "--loss-on", "masked")])
def test_variants_run_healthy_and_export_the_backbone(tmp_path, flags):
    code, text = run_command(MODULE, *SMOKE, tmp_path, *flags, "--latent-from", "pooled", log=tmp_path / "log")
    assert code == 0, text
    assert "WARNING" not in text
    lines = [line for line in read_metrics(tmp_path / "autoencoder-smoke" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["relative_error"] < min(0.99, lines[0]["relative_error"])
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["relative_error"] * lines[-1]["mean_image"], rel=0.05)
    weights = load_backbone(tmp_path / "autoencoder-smoke")[0].state_dict()
    assert not any("decoder" in name or "latent" in name for name in weights)


def test_a_run_that_learns_nothing_is_reported(tmp_path):
    code, text = run_command(MODULE, *SMOKE, tmp_path, "--lr", 1e-9, log=tmp_path / "log")
    assert code == 0 and "WARNING" in text and "no better than the mean image" in text


def test_health_checks():
    error, spread = health_checks(after=8)
    line = {"step": 10, "relative_error": 0.5, "feature_std": 0.3}
    assert not error.trips(line) and not spread.trips(line)
    assert error.trips({**line, "relative_error": 1.0}) and spread.trips({**line, "feature_std": 0.001})
    assert not error.trips({**line, "step": 8, "relative_error": 1.0})


def test_a_vit_of_timm_trains(tmp_path):
    flags = (
        "--data",
        "shapes",
        "--normalize",
        "shapes",
        "--limit",
        32,
        "--batch-size",
        8,
        "--max-steps",
        2,
        "--no-eval",
    )
    code, text = run_command(
        MODULE,
        "cifar10-r18",
        *flags,
        "--backbone",
        "vit_tiny_patch16_224",
        "--patch-size",
        8,
        "--stem",
        "timm",
        "--out",
        tmp_path,
        "--name",
        "vit",
        log=tmp_path / "log",
    )
    assert code == 0, text
    backbone, spec = load_backbone(tmp_path / "vit")
    assert spec.arguments["patch_size"] == 8 and backbone(torch.randn(2, 3, 32, 32)).shape == (2, 192)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variant", "denoising", "--noise", 0), "denoising needs noise above 0"),
        (("--variant", "masked", "--mask-patch", 5), "--mask-patch 5 does not divide the image of 32 px"),
        (("--variant", "masked", "--mask-ratio", 1), "removes 64 of 64 blocks: it must remove at least one and leave"),
        (("--variant", "masked", "--mask-ratio", 0.001), "removes 0 of 64 blocks"),
        (("--loss-on", "masked"), "--variant vanilla removes nothing"),
        (("--bottleneck", 0), "--bottleneck is 0: it must be at least 1"),
        (("--decoder-width", 4), "at least 8 channels"),
        (("--patch-size", 4), "--patch-size applies only to ViTs"),
        (("--backbone", "resnet81"), "timm has no model 'resnet81'"),
        (("--batch-size", 512), "larger than the data"),
        (("--variant", "contrastive"), "masked"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, flags, message):
    code, text = run_command(MODULE, *SMOKE, tmp_path, *flags, log=tmp_path / "log")
    assert code == 2 and message in text and "Traceback" not in text
    assert not (tmp_path / "autoencoder-smoke").exists()


# ---- presets ---------------------------------------------------------------------------------------------------------


def build(cfg) -> Autoencoder:
    resnet = dict(stem=cfg.stem, layers=cfg.layers, channels=cfg.channels, stem_width=cfg.stem_width)
    arguments = vit_arguments(cfg.backbone, sizes=(cfg.image_size,), patch_size=cfg.patch_size)
    backbone = create_backbone(BackboneSpec(cfg.backbone, **resnet, arguments=arguments))
    return Autoencoder(backbone, cfg.bottleneck, cfg.latent_from, cfg.image_size, cfg.decoder_width)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    cfg = PRESETS[preset][1]
    assert (cfg.lr, cfg.weight_decay, cfg.batch_size) == (1e-3, 0.05, 64 if preset == "smoke" else 256)
    torch.manual_seed(0)
    model = build(cfg)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=cfg.lr)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        for variant in VARIANTS:
            corruption = Corruption(variant, cfg.image_size, noise=cfg.noise, patch=cfg.mask_patch)
            target = torch.rand(4, 3, cfg.image_size, cfg.image_size)
            inputs, _ = corruption(target, corruption.draw(4, 0, step))
            loss, _ = reconstruction_loss(model(inputs)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not same
