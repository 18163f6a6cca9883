"""MAE: patches, masks, targets against slow versions; no masked pixel in the encoder; processes; layout; runs."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn.parallel import DistributedDataParallel
from torchvision.io import read_image

from common.backbones import export_backbone, load_backbone, multiply_adds
from common.data import open_data
from common.distributed import rank, world_size
from common.errors import UserError
from common.log import read_metrics
from common.optim import decay_groups
from common.rng import generator
from common.schedules import cosine_schedule, scaled_lr
from common.vit import sincos_positions, take
from common.weights import Filled, fill, read_weights
from eval.features import normalizer
from methods.mae.augment import one_view
from methods.mae.config import PRESETS, Config
from methods.mae.loss import (
    make_targets,
    masked_error,
    patch_statistics,
    patchify,
    unpatchify,
    visible_mean_error,
)
from methods.mae.masking import BLOCKS, keep_count, mask_noise, split
from methods.mae.official import decoder_tensors, official_state
from methods.mae.reconstruct import Gallery, reconstruct, snapshot_steps
from methods.mae.train import build, compute_loss
from tests.processes import run_command, run_ranks

KINDS = ("random", "block", "grid", "window")


def small(**changes) -> Config:
    sizes = dict(image_size=16, width=24, depth=2, heads=3, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    return replace(PRESETS["quickstart"][1], **{**sizes, **changes})


def model_of(cfg: Config, seed: int = 0):
    torch.manual_seed(seed)
    return build(cfg)[0]


def pixels(n: int = 4, size: int = 16, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noise_of(n: int = 4, patches: int = 16, seed: int = 2) -> torch.Tensor:
    return torch.rand(n, patches, generator=torch.Generator().manual_seed(seed))


# ---- patches, targets, loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "height", "width"), [(2, 4, 4), (4, 8, 12), (3, 9, 6)])
def test_patchify_has_every_pixel_in_its_place(p, height, width):
    images = torch.arange(2 * 3 * height * width).view(2, 3, height, width)
    patches = patchify(images, p)
    rows, columns = height // p, width // p
    assert patches.shape == (2, rows * columns, 3 * p * p)
    for n in range(2):
        for l in range(rows * columns):  # noqa: E741
            top, left = l // columns * p, l % columns * p
            expected = [images[n, c, top + i, left + j] for i in range(p) for j in range(p) for c in range(3)]
            assert patches[n, l].tolist() == expected  # (row, column, channel)
    assert torch.equal(unpatchify(patches, p, rows), images)


@pytest.mark.parametrize("p", [2, 4])
def test_normalized_targets_are_the_formula(p):
    images = pixels(dtype=torch.float64)
    images[0, :, :p, :p] = 0.3  # a constant patch: divided by sqrt(1e-6), not by zero
    targets = make_targets(images, p, norm_pix=True)
    patches = patchify(images, p).numpy()
    for n in range(len(images)):
        for l, patch in enumerate(patches[n]):  # noqa: E741
            expected = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6)
            np.testing.assert_allclose(targets[n, l].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert targets[0, 0].abs().max() < 1e-9 and torch.isfinite(targets).all()
    mean, std = patch_statistics(patchify(images, p))
    torch.testing.assert_close(unpatchify(targets * std + mean, p, 16 // p), images)  # what the report does
    torch.testing.assert_close(make_targets(images, p, norm_pix=False), patchify(images, p))
    assert make_targets(images.bfloat16(), p, True).dtype == torch.float32


@pytest.mark.parametrize("keep", [1, 4, 15])
def test_loss_gradient_and_reference_equal_the_slow_version(keep):
    targets = make_targets(pixels(dtype=torch.float64), 4, norm_pix=False)
    predictions = torch.randn(targets.shape, generator=generator("p"), dtype=torch.float64).requires_grad_()
    mask = split(noise_of(), keep)[2]
    loss = masked_error(predictions, targets, mask)
    total, constant, count = 0.0, 0.0, 0
    for n in range(4):
        visible = targets[n][~mask[n]].view(-1, 3)
        for l in range(16):  # noqa: E741
            if mask[n, l]:
                total = total + ((predictions[n, l] - targets[n, l]) ** 2).mean()
                constant += float(((targets[n, l].view(-1, 3) - visible.mean(0)) ** 2).mean())
                count += 1
    assert count == 4 * (16 - keep)
    torch.testing.assert_close(loss, total / count, rtol=1e-12, atol=0)
    ours, theirs = torch.autograd.grad(loss, predictions)[0], torch.autograd.grad(total / count, predictions)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert not ours[~mask].any()  # visible patches get no loss
    assert float(visible_mean_error(targets, mask)) == pytest.approx(constant / count, rel=1e-12)


def test_loss_is_float32_under_autocast():
    targets, mask = make_targets(pixels(), 4, True), split(noise_of(), 4)[2]
    predictions = torch.randn(targets.shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_error(predictions, targets, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_error(predictions.float(), targets, mask))


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_two_argsorts_restore_the_order():
    noise = noise_of(6, 20)
    visible, restore, mask = split(noise, 7)
    for n in range(6):
        order = sorted(range(20), key=noise[n].tolist().__getitem__)
        assert visible[n].tolist() == order[:7]
        assert restore[n].tolist() == [order.index(l) for l in range(20)]  # noqa: E741
        assert mask[n].tolist() == [l not in order[:7] for l in range(20)]  # noqa: E741
    x = torch.randn(6, 20, 5)
    shuffled = torch.cat([take(x, visible), take(x, noise.argsort(1)[:, 7:])], 1)
    assert torch.equal(take(shuffled, restore), x)
    assert not torch.equal(take(shuffled, noise.argsort(1)), x)  # unshuffling with the shuffle
    assert torch.equal(take(x, visible), x.gather(1, visible[..., None].expand(-1, -1, 5)))


def test_equal_noise_is_settled_by_position():
    visible, _, mask = split(torch.zeros(2, 300), 75)
    assert visible.tolist() == [list(range(75))] * 2 and (mask.sum(1) == 225).all()


def test_keep_count_does_not_truncate():
    assert int(100 * (1 - 0.9)) == 9 and keep_count(100, 0.9) == 10  # a float would truncate
    counts = [keep_count(*a) for a in ((196, 0.75), (64, 0.75), (256, 0.75), (16, 0.5), (10, 0.3))]
    assert counts == [49, 16, 64, 8, 7]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "leaves no patch"),
        (0.99, "leaves no patch"),
        (1.5, "leaves no"),
        (0.0, "removes no patch"),
        (-1.0, "removes no"),
    ],
)
def test_ratios_without_patches_are_refused(ratio, words):
    with pytest.raises(UserError, match=f"--mask-ratio .* {words}.* of the 16 patches.* between 0.0312 and 0.969"):
        keep_count(16, ratio)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 5)])
def test_masks_are_per_sample_exact_in_number_and_keyed(kind, rows, columns):
    noise = mask_noise(kind, 200, rows, columns, generator(0, "mask", 3), 2)
    assert noise.shape == (200, rows * columns) and noise.dtype == torch.float32
    assert torch.equal(noise, mask_noise(kind, 200, rows, columns, generator(0, "mask", 3), 2))
    assert not torch.equal(noise, mask_noise(kind, 200, rows, columns, generator(0, "mask", 4), 2))
    for ratio in (0.5, 0.75, 0.9):
        keep = keep_count(rows * columns, ratio)
        mask = split(noise, keep)[2]
        assert (mask.sum(1) == rows * columns - keep).all()
        assert len(mask.unique(dim=0)) > (3 if kind == "grid" else 100)  # sampled per image, not per batch
    share = split(noise, keep_count(rows * columns, 0.75))[2].float().mean(0)
    assert 0.2 < share.min() and share.max() < 1  # corners of block masks stay more often, but none always


def test_grid_and_window_masks():
    grid, window = (
        ~split(mask_noise(kind, 300, 8, 8, generator(kind), 2), 16)[2].view(300, 8, 8) for kind in ("grid", "window")
    )
    for kept in (grid, window):
        cells = kept.view(300, 4, 2, 4, 2).sum((2, 4))
        assert (cells == 1).all()  # 75 %: one of every 2 x 2
    places = grid.view(300, 4, 2, 4, 2).float().argmax(2)
    assert (grid == grid[:, :2, :2].repeat(1, 4, 4)).all() and places.any()  # the same position in every cell
    assert not (window == window[:, :2, :2].repeat(1, 4, 4)).all()
    counts = window[:, :2, :2].float().mean(0)
    assert counts.min() > 0.17 and counts.max() < 0.33  # every position a quarter of the time
    half = ~split(mask_noise("window", 50, 8, 8, generator("w"), 2), 32)[2].view(50, 4, 2, 4, 2)
    assert (half.sum((2, 4)) == 2).all()
    wide = ~split(mask_noise("window", 50, 8, 8, generator("w"), 4), 4)[2].view(50, 2, 4, 2, 4)
    assert (wide.sum((2, 4)) == 1).all()


def test_block_noise_equals_rectangles_painted_one_by_one():
    count, rows, columns = 20, 5, 8
    noise = mask_noise("block", count, rows, columns, torch.Generator().manual_seed(3), 2).view(count, rows, columns)
    stream = torch.Generator().manual_seed(3)
    expected = torch.rand(count, rows, columns, generator=stream)
    area, aspect, y, x = torch.rand(4, count, BLOCKS, generator=stream)
    area, aspect = (0.08 + 0.32 * area) * rows * columns, 0.3 ** (1 - 2 * aspect)
    heights = (area * aspect).sqrt().round().clamp(1, rows)
    widths = (area / aspect).sqrt().round().clamp(1, columns)
    for image in range(count):
        painted = torch.zeros(rows, columns)
        for block in reversed(range(BLOCKS)):  # the first lies on top
            h, w = int(heights[image, block]), int(widths[image, block])
            top, left = int(y[image, block] * (rows - h + 1)), int(x[image, block] * (columns - w + 1))
            painted[top : top + h, left : left + w] = BLOCKS - block
        expected[image] += painted
    assert torch.equal(noise, expected)


def test_block_masks_are_blocks():
    def neighbors(kind: str) -> float:
        """Share of removed patches among the right-hand neighbors of removed ones."""
        mask = split(mask_noise(kind, 300, 14, 14, generator("b"), 2), 98)[2].view(300, 14, 14)
        return float(mask[:, :, 1:][mask[:, :, :-1]].float().mean())

    assert neighbors("random") == pytest.approx(0.5, abs=0.02)
    assert neighbors("block") > 0.8


# ---- the network -----------------------------------------------------------------------------------------------------


def test_positions_are_maes_not_timms():
    """Columns first, [sin, cos] of each; timm's build_sincos2d_pos_embed has the halves the other way round."""
    from timm.layers import build_sincos2d_pos_embed

    model = model_of(small(image_size=12))  # 3 x 3 patches
    for positions, dim in ((model.backbone.pos_embed, 24), (model.decoder.pos_embed, 16)):
        assert positions.shape == (1, 10, dim) and not positions.requires_grad and not positions[0, 0].any()
        for l in range(9):  # noqa: E741
            row, column = divmod(l, 3)
            omega = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
            expected = [f(index * w) for index in (column, row) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(positions[0, 1 + l], torch.tensor(expected))
    ours, theirs = sincos_positions(24, 3, 5), build_sincos2d_pos_embed([3, 5], 24, interleave_sin_cos=True)
    assert not torch.allclose(ours, theirs)
    torch.testing.assert_close(ours, theirs.roll(12, 1), rtol=1e-5, atol=1e-5)


def test_encoder_with_every_patch_is_timms_forward():
    model = model_of(small()).double()
    images, ids = pixels(dtype=torch.float64), torch.arange(16).expand(4, -1)
    torch.testing.assert_close(model.encode(images, ids), model.backbone.forward_features(images), rtol=1e-6, atol=1e-6)
    some = torch.tensor([[3, 7, 12]]).expand(4, -1)  # positions travel with their patches, order is no matter
    torch.testing.assert_close(model.encode(images, some)[:, 1:].flip(1), model.encode(images, some.flip(1))[:, 1:])
    blank = images.clone()
    blank[:] = 0
    assert not torch.allclose(model.encode(blank, some), model.encode(blank, some + 1))  # added before masking


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_sees_no_masked_pixel(kind):
    """Neither a change of removed pixels nor a gradient through them reaches the encoder or a prediction."""
    model, keep = model_of(small()).double(), 4
    noise = mask_noise(kind, 4, 4, 4, generator(kind), 2)
    images = pixels(dtype=torch.float64).requires_grad_()
    predictions, mask, tokens = model(images, noise, keep)
    assert tokens.shape == (4, 1 + keep, 24) and predictions.shape == (4, 16, 48)
    for output in (tokens, predictions):
        weights = torch.randn(output.shape, generator=generator("w"), dtype=torch.float64)
        gradient = torch.autograd.grad((output * weights).sum(), images, retain_graph=True)[0]
        by_patch = patchify(gradient, 4)
        assert not by_patch[mask].any() and (by_patch[~mask].abs().amax(-1) > 0).all()
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, 4)
    other = torch.where(hidden, torch.full_like(images, torch.nan), images)
    changed, _, seen = model(other, noise, keep)
    assert torch.equal(changed, predictions) and torch.equal(seen, tokens)
    visible = images.detach() + 0.1 * ~hidden
    assert not torch.allclose(model(visible, noise, keep)[0], predictions)


def test_decoder_puts_tokens_back_in_their_place():
    """With blocks that do nothing, the decoder's input can be read at its output."""
    model = model_of(small(decoder_dim=24))
    decoder = model.decoder
    decoder.blocks, decoder.norm, decoder.predict = (torch.nn.Identity() for _ in range(3))
    decoder.pos_embed.zero_()
    with torch.no_grad():
        decoder.embed.weight.copy_(torch.eye(24))
    noise, x = noise_of(), torch.randn(4, 16, 24)
    visible, restore, mask = split(noise, 5)
    out = decoder(torch.cat([torch.zeros(4, 1, 24), take(x, visible)], 1), restore)
    assert torch.equal(out[~mask], x[~mask])
    assert torch.equal(out[mask], decoder.mask_token[0].expand(4 * 11, -1))
    decoder.pos_embed.copy_(torch.arange(17.0)[None, :, None])  # added to every token, the CLS token's dropped
    moved = decoder(torch.cat([torch.zeros(4, 1, 24), take(x, visible)], 1), restore)
    torch.testing.assert_close(moved - out, torch.arange(1.0, 17)[None, :, None].expand(4, -1, 24))


def test_initialization_is_the_codes():
    model = model_of(replace(PRESETS["cifar10-vit"][1], depth=2))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            bound = math.sqrt(6 / (inputs + outputs))
            assert 0.97 * bound < module.weight.abs().max() <= bound and not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6
    kernel = model.backbone.patch_embed.proj.weight
    bound = math.sqrt(6 / (48 + 192))  # of the matrix [D, P], not of the kernel's fans
    assert 0.97 * bound < kernel.abs().max() <= bound
    for token in (model.backbone.cls_token, model.decoder.mask_token):
        assert float(token.detach().std()) == pytest.approx(0.02, rel=0.2) and token.ndim == 3
    assert model.backbone.blocks[0].attn.qkv.bias is not None and model.decoder.blocks[0].attn.qkv.bias is not None


def test_weight_decay_is_the_codes():
    """Every tensor with more than one dimension, tokens among them; fixed positions are no parameter."""
    for learned in (False, True):
        model = model_of(small(learned_positions=learned))
        decayed, free = (set(group["names"]) for group in decay_groups(model, 0.05))
        assert {"backbone.cls_token", "decoder.mask_token", "backbone.patch_embed.proj.weight"} <= decayed
        shapes = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
        assert decayed | free == shapes.keys() and all(shapes[name] == 1 for name in free)
        positions = {"backbone.pos_embed", "decoder.pos_embed"}
        assert positions <= decayed if learned else not positions & shapes.keys()


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(dtype: torch.dtype, global_batch: int, kind: str, chunks: int) -> dict[str, torch.Tensor]:
    """Loss, reference and gradients of one step on this process's part of a fixed batch, after DDP."""
    model = model_of(small()).to(dtype)
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    n = global_batch // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    images = pixels(global_batch, dtype=dtype)[part]
    noise = mask_noise(kind, global_batch, 4, 4, generator(0, "mask", 5), 2)[part]
    logged = torch.zeros(2, dtype=torch.float64)
    for i, (some, z) in enumerate(zip(images.chunk(chunks), noise.chunk(chunks), strict=True)):
        if world_size() > 1:
            trained.require_backward_grad_sync = i == chunks - 1
        loss, parts, _ = compute_loss(trained, some, z, keep=4, patch=4, norm_pix=True)
        (loss / chunks).backward()
        logged += torch.stack([parts["loss"], parts["visible_mean"]]).double() / chunks
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
        logged /= world_size()
    return {"loss": logged[0], "reference": logged[1]} | {
        name: p.grad for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(("ranks", "kind"), [(2, "random"), (4, "block")])
def test_processes_and_micro_batches_equal_one(ranks, kind):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        one = gradients(dtype, 16, kind, 1)
        many = run_ranks(gradients, ranks, dtype, 16, kind, 2)
        for other in [*many, gradients(dtype, 16, kind, 8)]:
            assert other.keys() == one.keys() and len(one) > 30
            for name in one:
                scale = one[name].abs().max().clamp_min(1e-3)
                assert float((other[name] - one[name]).abs().max() / scale) < limit, (name, dtype)


# ---- weights of others -----------------------------------------------------------------------------------------------


def test_encoder_is_a_plain_timm_vit_both_ways(tmp_path):
    cfg = small()
    model, spec = build(cfg)
    export_backbone(tmp_path, model.backbone, spec)
    scope: dict = {}
    exec("\n".join(json.loads((tmp_path / "backbone.json").read_text())["rebuild"]), scope)
    assert "common" not in str(spec.rebuild())
    plain = scope["model"]
    timm.models.load_checkpoint(plain, str(tmp_path / "backbone.safetensors"))
    loaded = load_backbone(tmp_path)[0]
    with torch.no_grad():
        expected = model.backbone.eval()(pixels())
        torch.testing.assert_close(plain.eval()(pixels()), expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded(pixels()), expected, rtol=0, atol=0)
    other = model_of(cfg, seed=1)  # and a timm ViT's weights into an MAE
    decoder = other.decoder.embed.weight.detach().clone()
    assert not load(other, tmp_path).with_others
    ids = torch.arange(16).expand(4, -1)
    torch.testing.assert_close(other.encode(pixels(), ids), plain.forward_features(pixels()))
    assert torch.equal(other.decoder.embed.weight, decoder)


def official_names(depth: int, decoder_depth: int) -> set[str]:
    """The keys of mae_visualize_vit_base.pth's "model", written out."""
    block = [
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    names = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    for layer in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"):
        names |= {f"{layer}.weight", f"{layer}.bias"}
    names |= {f"blocks.{i}.{key}" for i in range(depth) for key in block}
    return names | {f"decoder_blocks.{i}.{key}" for i in range(decoder_depth) for key in block}


def test_base_model_has_the_official_keys_and_shapes():
    with torch.device("meta"):
        state = official_state(build(PRESETS["imagenet-vitb"][1])[0])
        timms = timm.create_model("vit_base_patch16_224.mae", num_classes=0).state_dict()
    assert state.keys() == official_names(12, 8)
    assert {name: v.shape for name, v in timms.items()} == {name: state[name].shape for name in timms}
    assert state["decoder_pred.weight"].shape == (768, 512) and state["decoder_pos_embed"].shape == (1, 197, 512)
    assert state["mask_token"].shape == (1, 1, 512) and state["patch_embed.proj.weight"].shape == (768, 3, 16, 16)


def load(model, source) -> Filled:
    return fill(model.backbone, read_weights(str(source)), decoder_tensors(model))


def test_official_files_go_round(tmp_path):
    """As the official code saves them, with its arguments; and as safetensors. Same outputs, bit for bit."""
    source = model_of(small())
    state = official_state(source)
    torch.save({"model": state, "args": argparse.Namespace(lr=1), "epoch": 799}, tmp_path / "full.pth")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "full.safetensors")
    for file in ("full.pth", "full.safetensors"):
        other = model_of(small(), seed=7)
        assert not torch.equal(other(pixels(), noise_of(), 4)[0], source(pixels(), noise_of(), 4)[0])
        filled = load(other, tmp_path / file)
        assert filled.with_others and not filled.missing and not filled.left_over
        assert torch.equal(other(pixels(), noise_of(), 4)[0], source(pixels(), noise_of(), 4)[0])
        assert all(torch.equal(a, b) for a, b in zip(official_state(other).values(), state.values(), strict=True))


def test_a_decoder_is_taken_whole_or_not_at_all(tmp_path):
    """Another width: the encoder alone. Another image size: positions of both are resampled."""
    torch.save({"model": official_state(model_of(small(decoder_dim=32)))}, tmp_path / "wide.pth")
    model = model_of(small(), seed=1)
    before = {name: value.clone() for name, value in decoder_tensors(model).items()}
    filled = load(model, tmp_path / "wide.pth")
    assert not filled.with_others and not filled.missing and "beside it none of 20" in filled.notice()
    assert all(torch.equal(value, before[name]) for name, value in decoder_tensors(model).items())

    larger = model_of(small(image_size=32))
    torch.save({"model": official_state(larger)}, tmp_path / "larger.pth")
    filled = load(model, tmp_path / "larger.pth")
    assert filled.with_others and set(filled.resampled) == {"pos_embed", "decoder_pos_embed"}
    for ours, theirs in ((model.backbone, larger.backbone), (model.decoder, larger.decoder)):
        expected = resample_abs_pos_embed(theirs.pos_embed, [4, 4], num_prefix_tokens=1)
        torch.testing.assert_close(ours.pos_embed, expected, rtol=0, atol=1e-6)


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_the_image(norm_pix):
    """De-normalization: predictions equal to the targets must give back the true pixels, and visible ones are kept."""
    model, images = model_of(small()), pixels()
    targets = make_targets(images, 4, norm_pix)

    class Oracle(torch.nn.Module):
        patch = 4

        def forward(self, images, noise, keep):
            return targets, split(noise, keep)[2], None

    mask, made = reconstruct(Oracle(), images, noise_of(), 4, norm_pix)
    torch.testing.assert_close(made, images, rtol=1e-4, atol=1e-5)
    mask, made = reconstruct(model, images, noise_of(), 4, norm_pix)
    same = (patchify(made, 4) == patchify(images, 4)).all(-1)
    assert torch.equal(same, ~mask)


def gallery_of(tmp_path, model, spec, **changes) -> Gallery:
    store = open_data("shapes", "test", limit=5, image_size=16)
    settings = dict(masking="random", window=2, mask_ratio=0.75, norm_pix=True, seed=0, device=torch.device("cpu"))
    return Gallery(tmp_path / "reconstructions", store, spec, **{**settings, **changes}, count=3)


def test_gallery_shows_a_grid_of_ratios_and_the_way_there(tmp_path):
    model, spec = build(small())
    gallery = gallery_of(tmp_path, model, spec)
    for step in (0, 12):
        gallery.snapshot(model, step)
    assert sorted(p.name for p in gallery.directory.iterdir()) == ["step-00000000.png", "step-00000012.png"]
    strip = read_image(str(gallery.directory / "step-00000000.png"))
    assert strip.shape == (3, 16, 3 * 16)
    seen, made = gallery._pictures(model, 0.75)
    assert torch.equal(torch.cat(list(made), 2), strip)
    mask = split(gallery._noise(model, 3), 4)[2]
    originals = gallery.store.eval_images(0, 3, 16)
    for shown in (seen, made):  # de-normalized: what was seen is the photograph itself
        assert torch.equal(patchify(shown, 4)[~mask], patchify(originals, 4)[~mask])
    assert (patchify(seen, 4)[mask] == 128).all()
    sections = dict(gallery.sections(model, (0.5, 0.75)))
    assert list(sections) == ["Reconstructions", "Reconstructions over training"]
    assert sections["Reconstructions"].count("data:image/png") == 3 * (1 + 2 * 2)
    assert "contrast of the true one" in sections["Reconstructions"] and "75 %" in sections["Reconstructions"]
    assert sections["Reconstructions over training"].count("<img") == 3 * (1 + 2)
    assert "0, 12 steps" in sections["Reconstructions over training"]
    assert snapshot_steps(640) == {0, 10, 40, 160}


def test_gallery_errors_are_those_of_the_loss(tmp_path):
    model, spec = build(small())
    gallery = gallery_of(tmp_path, model, spec, norm_pix=False)
    images = normalizer(spec.mean, spec.std, torch.device("cpu"))(gallery.store.eval_images(0, 5, 16))
    with torch.no_grad():
        predictions, mask, _ = model(images, gallery._noise(model, 5), 8)
    targets = patchify(images, 4)
    expected = [float(masked_error(predictions, targets, mask)), float(visible_mean_error(targets, mask))]
    assert list(gallery.errors(model, 0.5, batch=2)) == pytest.approx(expected, rel=1e-5)


# ---- runs ------------------------------------------------------------------------------------------------------------

TRAIN = "methods.mae.train"
SMOKE = ("smoke", "--no-eval")
LITTLE = ("--image-size", 16, "--patch-size", 4, "--batch-size", 32, "--limit", 32)  # a step an epoch


def test_a_short_run_learns_and_warns_of_nothing(tmp_path):
    flags = ("--epochs", 600, "--warmup-epochs", 20, "--base-lr", 0.03, "--mask-ratio", 0.5, "--log-every", 100)
    flags = (*flags, *LITTLE, "--save-every", 1000)
    code, text = run_command(TRAIN, *SMOKE, *flags, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0 and "WARNING" not in text, text
    lines = [line for line in read_metrics(tmp_path / "mae-smoke" / "metrics.jsonl") if "loss" in line]
    for line in lines:
        assert line.keys() >= {"loss", "visible_mean", "relative_error", "feature_std", "lr"}
    assert lines[-1]["relative_error"] < 0.9


def test_a_run_that_does_not_learn_is_reported(tmp_path):
    flags = ("--epochs", 502, "--base-lr", 0, "--log-every", 251, "--save-every", 1000)
    code, text = run_command(TRAIN, *SMOKE, *flags, *LITTLE, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0 and "WARNING" in text and "predicted no better than by the mean of the visible ones" in text


def test_micro_batches_and_start_weights_and_every_mask(tmp_path):
    """--micro-batch follows the full batch's path; --init-from loads the file; all masks run."""
    flags = ("--out", tmp_path, "--max-steps", 3, "--log-every", 1)
    losses, spreads = {}, {}
    for name, extra in {"whole": (), "parts": ("--micro-batch", 16)}.items():
        code, text = run_command(TRAIN, *SMOKE, *flags, "--name", name, *extra, log=tmp_path / "log")
        assert code == 0, text
        lines = list(read_metrics(tmp_path / name / "metrics.jsonl"))
        losses[name], spreads[name] = ([line[key] for line in lines] for key in ("loss", "feature_std"))
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4) and len(set(losses["whole"])) == 3
    assert spreads["parts"] == pytest.approx(spreads["whole"], rel=1e-3)  # of all images, not of 16
    weights = tmp_path / "whole" / "backbone.safetensors"
    code, text = run_command(
        TRAIN, *SMOKE, *flags, "--name", "more", "--init-from", weights, "--masking", "block", log=tmp_path / "log"
    )
    assert code == 0, text
    config = (tmp_path / "more" / "config.json").read_text()
    assert json.loads(config)["config"]["init_from"] == "backbone.safetensors"  # never a path
    assert not list((tmp_path / "more").glob("reconstructions"))  # without evaluation no pictures


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image-size", 30), "views of 30 px do not divide into patches of 8 px"),
        (("--mask-ratio", 0.99), "leaves no patch of the 16 patches"),
        (("--report-ratios", 0.99), "leaves no patch of the 16 patches"),
        (("--backbone", "resnet18"), "needs a ViT of timm"),
        (("--backbone", "vit_base_patch16_siglip_224"), "CLS token"),
        (("--decoder-heads", 5), "--decoder-dim 32 does not divide among --decoder-heads 5"),
        (("--decoder-dim", 20), "--decoder-dim 20 does not divide among"),
        (("--width", 50), "--width 50 does not divide among --heads 3"),
        (("--micro-batch", 5), "--micro-batch 5 does not divide the 64 images"),
        (("--mask-window", 0), "--mask-window is 0: it must be at least 1"),
        (("--init-from", "nothing.pth"), "there is no such file"),
        (("--masking", "stripes"), "random"),
    ],
)
def test_every_mistake_is_one_sentence(tmp_path, flags, words):
    heads = ("--decoder-heads", 8) if flags[0] == "--decoder-dim" else ()
    code, text = run_command(TRAIN, *SMOKE, *flags, *heads, "--out", tmp_path / "run", log=tmp_path / "log")
    assert code == 2 and words in text and "Traceback" not in text, text
    assert not (tmp_path / "run").exists()


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: images, batch, epochs, warm-up epochs, peak rate, patches, width, depth, heads, decoder (width, depth, heads)
EXPECTED = {
    "imagenet-vitb": (IMAGENET, 4096, 800, 40, 2.4e-3, 196, 768, 12, 12, (512, 8, 16)),
    "imagenet-vitl": (IMAGENET, 4096, 800, 40, 2.4e-3, 196, 1024, 24, 16, (512, 8, 16)),
    "imagenette-vits": (IMAGENETTE, 256, 200, 20, 6e-4, 196, 384, 12, 6, (512, 8, 16)),
    "cifar10-vit": (CIFAR, 1024, 400, 40, 1.2e-3, 64, 192, 12, 3, (192, 4, 3)),
    "cifar10-vit-p2": (CIFAR, 4096, 2000, 200, 2.4e-3, 256, 192, 12, 3, (192, 4, 3)),
    "cifar10-cpu": (CIFAR, 256, 15, 2, 1.5e-3, 64, 96, 4, 3, (64, 2, 4)),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, warm, peak, patches, width, depth, heads, decoder = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs) == (batch, epochs, warm)
    assert (cfg.weight_decay, cfg.betas, cfg.mask_ratio, cfg.masking) == (0.05, (0.9, 0.95), 0.75, "random")
    assert (cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads) == decoder
    assert scaled_lr(cfg.base_lr, cfg.batch_size, "linear") == pytest.approx(peak)
    with torch.device("meta"):
        vit = build(cfg)[0].backbone
    assert vit.patch_embed.num_patches == patches and vit.embed_dim == width
    assert (len(vit.blocks), vit.blocks[0].attn.num_heads) == (depth, heads) and keep_count(
        patches, 0.75
    ) * 4 == patches
    per_epoch = images // batch
    total, warmup = epochs * per_epoch, int(cfg.warmup_epochs * per_epoch)
    for step in (0, 1, warmup // 2, warmup, (warmup + total) // 2, total - 1):  # code lr_sched.py, by epoch fraction
        epoch = step / per_epoch
        expected = (
            peak * epoch / warm
            if epoch < warm
            else peak * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))
        )
        assert cosine_schedule(step, base=peak, total=total, warmup=warmup) == pytest.approx(expected, abs=1e-9)


def test_views_equal_the_reference():
    paper, icarus = PRESETS["imagenet-vitb"][1], PRESETS["cifar10-vit-p2"][1]
    assert (paper.crop_scale, paper.flip, paper.interpolation, paper.norm_pix) == ((0.2, 1.0), 0.5, "bicubic", True)
    assert (icarus.norm_pix, icarus.learned_positions, icarus.patch_size) == (False, True, 2)
    recipe = one_view(replace(paper, image_size=32, normalize="none"))
    (view,) = recipe.views
    assert (view.color_jitter_prob, view.grayscale, view.blur, view.solarize, view.ratio) == (
        0,
        0,
        0,
        0,
        (3 / 4, 4 / 3),
    )
    whole = one_view(replace(icarus, normalize="none"))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    (made,) = whole(images, whole.sample(64, generator("whole")))
    torch.testing.assert_close(made, images / 255)  # no augmentation: the image itself


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    """On the meta device all of them; in earnest those below 0.6 GMAC an image and pass, batch of 4."""
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, spec = build(cfg)
        cost = multiply_adds(model.backbone, cfg.image_size)
        patches = model.backbone.patch_embed.num_patches
        keep = keep_count(patches, cfg.mask_ratio)
        images, noise = torch.empty(2, 3, cfg.image_size, cfg.image_size), torch.empty(2, patches)
        assert model(images, noise, keep)[0].shape == (2, patches, 3 * model.patch**2)
    if cost > 6e8:
        assert cfg.image_size == 224 or preset == "cifar10-vit-p2"
        return
    model = model_of(cfg)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=1e-3, betas=cfg.betas)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        images = torch.rand(4, 3, cfg.image_size, cfg.image_size)
        noise = mask_noise(cfg.masking, 4, *model.backbone.patch_embed.grid_size, generator(step), cfg.mask_window)
        predictions, mask, _ = model(images, noise, keep)
        loss = masked_error(predictions, make_targets(images, model.patch, cfg.norm_pix), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == (set() if cfg.learned_positions else {"backbone.pos_embed"})
