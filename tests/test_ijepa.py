"""I-JEPA: masks and loss against slow versions; what each network sees; processes; EMA; schedules; runs."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.backbones import export_backbone, load_backbone, multiply_adds
from common.data import open_data
from common.distributed import rank, world_size
from common.ema import ema_update, make_teacher
from common.errors import UserError
from common.log import read_metrics
from common.optim import decay_groups
from common.rng import generator
from common.vit import sincos_positions, take
from methods.ijepa.augment import one_view
from methods.ijepa.config import PRESETS, Config
from methods.ijepa.figure import mask_section, shown
from methods.ijepa.loss import blocks_of, moments, normalize, prediction_error, signals
from methods.ijepa.masking import COUNTED, BlockMasks, block_size, place_blocks
from methods.ijepa.train import build, compute_loss, masks_of
from tests.processes import run_command, run_ranks

TRAIN = "methods.ijepa.train"


def small(**changes) -> Config:
    sizes = dict(image_size=24, width=24, depth=2, heads=3, predictor_dim=12, predictor_depth=2, min_keep=3)
    return replace(PRESETS["quickstart"][1], **{**sizes, **changes})


def model_of(cfg: Config, seed: int = 0):
    torch.manual_seed(seed)
    return build(cfg)[0]


def pixels(n: int = 4, size: int = 24, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def paper_masks(grid: int, **changes) -> BlockMasks:
    return masks_of(replace(PRESETS["imagenet-vitb"][1], **changes), (grid, grid))


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "count"), [(8, 64), (14, 300), (16, 40)])
def test_masks_are_what_they_should_be(grid, count):
    """One image after another: rectangles of the step's size, context without targets, equal counts, enough left."""
    masks = paper_masks(grid)
    for step in range(12):
        (height, width), (side, other) = masks.sizes(3, step)
        context, targets = masks.draw(count, 3, step)
        assert side == other and context.shape[0] == count and targets.shape == (count, 4, height * width)
        assert context.shape[1] >= masks.min_keep and context.dtype == targets.dtype == torch.long
        for seen, blocks in zip(context.tolist(), targets.tolist(), strict=True):
            assert seen == sorted(set(seen)) and not set(seen) & {p for block in blocks for p in block}
            rows, columns = [p // grid for p in seen], [p % grid for p in seen]
            assert max(rows) - min(rows) < side and max(columns) - min(columns) < side
            for block in blocks:
                top, left = divmod(block[0], grid)
                assert block == [(top + i) * grid + left + j for i in range(height) for j in range(width)]
                assert top + height <= grid and left + width <= grid


def test_block_sizes_stay_in_their_ranges():
    masks = paper_masks(16)
    drawn = [masks.sizes(0, step) for step in range(400)]
    areas = {h * w / 256 for (h, w), _ in drawn}
    ratios = {h / w for (h, w), _ in drawn}
    contexts = {side / 16 for _, (side, _) in drawn}
    assert 0.13 < min(areas) and max(areas) < 0.22  # rounded to whole patches
    assert 0.65 < min(ratios) < 0.8 and 1.4 < max(ratios) < 1.7
    assert contexts == {15 / 16, 1.0}  # 0.85 to 1 of the area is 14.75 to 16 of 16
    for scale, aspect in ((0.15, 0.75), (0.2, 1.5), (0.17, 1.0)):
        height, width = block_size(14, 14, scale, aspect)
        assert abs(height - math.sqrt(scale * 196 * aspect)) <= 0.5
        assert abs(width - math.sqrt(scale * 196 / aspect)) <= 0.5
    assert block_size(4, 4, 1.0, 1.5) == (4, 3) and block_size(20, 20, 0.001, 0.5) == (1, 1)
    # sizes belong to the step, not to the batch; two in a row differ now and then, as do those of another seed
    assert len(set(drawn)) > 15 and drawn != [masks.sizes(1, step) for step in range(400)]


def test_every_place_is_equally_likely_and_the_codes_are_not():
    """The code's randint(0, 14 - h) never samples the last corner; its context is as large as possible, 13 of 14, so it
    never moves, and the last row and column of an image are neither seen nor predicted."""
    placed = place_blocks(40_000, 14, 14, (5, 6), generator("places"))
    counts = torch.bincount(placed[:, 0] // 14, minlength=10).double() / 40_000
    assert (counts - 0.1).abs().max() < 0.01 and len(counts) == 10
    offsets = (placed - placed[:, :1]).unique(dim=0)
    assert torch.equal(offsets[0], (14 * torch.arange(5)[:, None] + torch.arange(6)).flatten()) and len(offsets) == 1
    assert (placed % 14 >= placed[:, :1] % 14).all()  # no block goes around the edge
    whole = place_blocks(5, 14, 14, (14, 14), generator("whole"))
    assert torch.equal(whole, torch.arange(196).expand(5, -1))
    for grid in (14, 16):  # the code: h = round(sqrt(int(L s))), lowered while h >= grid; corner < grid - h
        sides = {min(round(math.sqrt(int(grid**2 * s))), grid - 1) for s in np.linspace(0.85, 1, 200)}
        corners = {corner for side in sides for corner in range(grid - side)}
        assert sides == {grid - 1} and corners == {0}
    context, targets = paper_masks(14).draw(300, 0, 0)
    for ids in (context, targets):  # ours reach every patch
        assert len(ids.unique()) == 196


def test_masks_equal_those_made_image_by_image():
    """From the same numbers, blocks painted one at a time and contexts cut by a stable sort of the noise."""
    masks = paper_masks(8, min_keep=4)
    for step in range(5):
        (height, width), (side, _) = masks.sizes(0, step)
        stream = generator(0, "mask-place", step)
        places, corners = torch.rand(50 * 4, 2, generator=stream), torch.rand(50, 2, generator=stream)
        context, targets = masks.draw(50, 0, step)
        numbers = []
        for image in range(50):
            left = torch.zeros(8, 8, dtype=torch.bool)
            top, first = (int(u * (8 - side + 1)) for u in corners[image])
            left[top : top + side, first : first + side] = True
            for block in range(4):
                top, first = (
                    int(places[4 * image + block, 0] * (9 - height)),
                    int(places[4 * image + block, 1] * (9 - width)),
                )
                asked = torch.zeros(8, 8, dtype=torch.bool)
                asked[top : top + height, first : first + width] = True
                assert torch.equal(asked.flatten().nonzero()[:, 0], targets[image, block])
                left &= ~asked
            numbers.append(left.flatten())
        left = torch.stack(numbers)
        if int(left.sum(1).min()) < 4:
            continue  # new positions were drawn
        assert context.shape[1] == left.sum(1).min()
        noise = torch.rand(50, 64, generator=stream).masked_fill(~left, 2.0)
        assert torch.equal(context, noise.argsort(dim=1, stable=True)[:, : context.shape[1]].sort(1).values)


def test_longer_contexts_lose_patches_at_random():
    """The code keeps the first in reading order, so the lowest rows are lost: half of all masks at the bottom."""
    masks = paper_masks(14)
    ours, theirs, all_of_them = (torch.zeros(14) for _ in range(3))
    for step in range(6):
        stream = generator(0, "mask-place", step)
        target, size = masks.sizes(0, step)
        left = masks._places(2000, target, size, stream)[1]
        length = int(left[:COUNTED].sum(1).min())
        context = masks.draw(2000, 0, step)[0]
        rows = left.view(-1, 14, 14).sum((0, 2))
        all_of_them += rows
        ours += torch.bincount((context // 14).flatten(), minlength=14)
        first = left & (left.cumsum(1) <= length)
        theirs += first.view(-1, 14, 14).sum((0, 2))
    ours, theirs = ours / all_of_them, theirs / all_of_them
    assert ours.max() / ours.min() < 1.3
    assert theirs[0] > 0.9 and theirs[-1] < 0.3


def test_context_length_is_the_smallest_of_the_first_128():
    masks = paper_masks(14)
    for step in range(4):
        target, size = masks.sizes(0, step)
        left = masks._places(2048, target, size, generator(0, "mask-place", step))[1].sum(1)
        context, _ = masks.draw(2048, 0, step)
        assert context.shape[1] == left[:128].min() > left.min()  # not the smallest of all
        small = masks._places(100, target, size, generator(0, "mask-place", step))[1].sum(1)
        assert masks.draw(100, 0, step)[0].shape[1] == small.min()


def test_draws_are_keyed_and_min_keep_is_kept_or_told():
    masks = paper_masks(8, min_keep=24)
    first, again = masks.draw(64, 0, 5), masks.draw(64, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and first[0].shape[1] >= 24
    for other in (masks.draw(64, 0, 6), masks.draw(64, 1, 5)):
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for impossible in (lambda m: m.draw(64, 0, 5), lambda m: m.check()):
        with pytest.raises(UserError, match="rarely leave an image of 8 x 8 its --min-keep 60 patches of context"):
            impossible(paper_masks(8, min_keep=60))
    with pytest.raises(UserError, match="--min-keep 26"):  # enough at some sizes, too much at the largest
        paper_masks(8, min_keep=26).check()
    for grid in (8, 14, 16):
        paper_masks(grid).check()
    for changes, words in (
        (dict(target_scale=(0.5, 0.2)), "--target-scale 0.5 0.2"),
        (dict(context_scale=(0.5, 1.2)), "--context-scale 0.5 1.2"),
        (dict(target_aspect=(0.0, 1.2)), "--target-aspect 0 1.2"),
    ):
        with pytest.raises(UserError, match=words):
            paper_masks(8, **changes)


# ---- loss ------------------------------------------------------------------------------------------------------------


def example(n: int = 3, patches: int = 9, width: int = 5):
    stream = generator("example")
    tokens = torch.randn(n, patches, width, generator=stream, dtype=torch.float64)
    targets = torch.stack([torch.randperm(patches, generator=stream)[:4] for _ in range(2 * n)]).view(n, 2, 4)
    return tokens, targets, 2 * torch.randn(n, 2, 4, width, generator=stream, dtype=torch.float64)


def test_targets_are_the_normalized_features_of_their_patches():
    tokens, targets, _ = example()
    goals = blocks_of(normalize(tokens), targets)
    for n in range(3):
        for m in range(2):
            for t in range(4):
                feature = tokens[n, targets[n, m, t]].numpy()
                expected = (feature - feature.mean()) / math.sqrt(feature.var() + 1e-5)
                np.testing.assert_allclose(goals[n, m, t].numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(normalize(7 * tokens + 3), normalize(tokens), rtol=1e-4, atol=1e-4)  # scale is no way
    assert normalize(tokens.bfloat16()).dtype == torch.float32
    assert torch.equal(take(tokens, targets[:, 0]), tokens.gather(1, targets[:, 0, :, None].expand(-1, -1, 5)))


@pytest.mark.parametrize("kind", ["smooth-l1", "l2"])
def test_loss_and_gradient_equal_the_slow_version(kind):
    tokens, targets, predictions = example()
    predictions.requires_grad_()
    goals = blocks_of(normalize(tokens), targets).requires_grad_()
    loss = prediction_error(predictions, goals, kind)
    total = 0.0
    for p, g in zip(predictions.flatten(), goals.detach().flatten(), strict=True):
        e = (p - g).abs()
        total = total + (e**2 if kind == "l2" else e - 0.5 if e >= 1 else e**2 / 2)
    total = total / predictions.numel()
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    ours, theirs = torch.autograd.grad(loss, predictions)[0], torch.autograd.grad(total, predictions)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    if kind == "l2":  # the paper: mean over blocks of the sum over patches of squared distances
        paper = sum(
            ((predictions[n, m, t] - goals[n, m, t]) ** 2).sum() for n in range(3) for m in range(2) for t in range(4)
        ) / (3 * 2)
        torch.testing.assert_close(loss, paper / (4 * 5), rtol=1e-12, atol=0)
    loss = prediction_error(predictions, goals, kind)
    assert torch.autograd.grad(loss, goals, allow_unused=True) == (None,)  # the target gets none, whoever calls it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prediction_error(predictions.bfloat16(), goals.float(), kind).dtype == torch.float32


def signals_of(predictions, goals, targets, micro=3):
    chunks = zip(*(x.split(micro) for x in (predictions, goals, targets)), strict=True)
    return {name: float(value) for name, value in signals([moments(*chunk) for chunk in chunks], targets).items()}


def test_signals_equal_the_slow_version():
    tokens, targets, predictions = example()
    goals = normalize(tokens)
    signals = signals_of(predictions, goals, targets)
    assert signals_of(predictions, goals, targets, micro=1) == pytest.approx(signals, rel=1e-12)  # of the whole batch
    error = reference = 0.0
    for n in range(3):
        for m in range(2):
            for t in range(4):
                place = targets[n, m, t]
                mean = goals[:, place].mean(0)
                error += float(((predictions[n, m, t] - goals[n, place]) ** 2).mean())
                reference += float(((goals[:, place] - mean) ** 2).mean())
    assert signals["relative_error"] == pytest.approx(error / reference, rel=1e-12)
    assert signals["target_std"] == pytest.approx(math.sqrt(float(goals.numpy().var(0).mean())), rel=1e-12)
    mean = goals.mean(0).expand_as(goals)
    same = goals[:1].expand_as(goals)
    assert signals_of(blocks_of(goals, targets), goals, targets)["relative_error"] == 0
    assert signals_of(blocks_of(same, targets), same, targets)["target_std"] < 1e-7  # collapse
    one = torch.arange(9).view(1, 1, 9).expand(3, 1, 9)  # over all positions exactly 1 for the mean
    assert signals_of(blocks_of(mean, one), goals, one)["relative_error"] == pytest.approx(1)


# ---- the networks ----------------------------------------------------------------------------------------------------


def test_encoder_with_every_patch_is_timms_forward():
    model, images = model_of(small()).double(), pixels(dtype=torch.float64)
    encoder, vit = model.encoder, model.encoder.backbone
    whole, ids = encoder(images), torch.arange(36).expand(4, -1)
    assert whole.shape == (4, 36, 24) and vit.num_prefix_tokens == 0
    torch.testing.assert_close(encoder(images, ids), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole, vit.forward_features(images), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.mean(1), vit(images), rtol=1e-6, atol=1e-6)  # normalized, then averaged
    some = torch.tensor([[3, 7, 30]]).expand(4, -1)  # positions travel with their patches, order is no matter
    torch.testing.assert_close(encoder(images, some).flip(1), encoder(images, some.flip(1)))
    assert not torch.allclose(encoder(images, some), whole[:, [3, 7, 30]])  # context tokens know of the context alone
    torch.testing.assert_close(vit.pos_embed[0], sincos_positions(24, 6, 6).double())
    assert not vit.pos_embed.requires_grad


def test_context_encoder_sees_no_target_pixel_and_the_target_encoder_all():
    cfg = small()
    model = model_of(cfg).double()
    target = make_teacher(model.encoder)
    context, targets = masks_of(cfg, (6, 6)).draw(4, 0, 0)
    images = pixels(dtype=torch.float64).requires_grad_()
    predictions = model(images, context, targets)
    weights = torch.randn(predictions.shape, generator=generator("w"), dtype=torch.float64)
    gradient = torch.autograd.grad((predictions * weights).sum(), images)[0]
    by_patch = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # [n, L]
    seen = torch.zeros(4, 36, dtype=torch.bool).scatter(1, context, True)
    assert torch.equal(by_patch > 0, seen)
    goals = blocks_of(target(images), targets)
    gradient = torch.autograd.grad((goals * weights).sum(), images)[0]
    assert (gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)) > 0).all()  # targets are cut from the output
    alone = target(images, targets[:, 0])  # the other way, cutting the input, is another feature
    assert not torch.allclose(alone, goals[:, 0], rtol=0.1)


def test_target_gets_no_gradient_and_all_else_does():
    cfg = small()
    model = model_of(cfg)
    target = make_teacher(model.encoder)
    context, targets = masks_of(cfg, (6, 6)).draw(4, 0, 0)
    goals = normalize(target(pixels()))
    assert not goals.requires_grad and not any(p.requires_grad for p in target.parameters())
    prediction_error(model(pixels(), context, targets), blocks_of(goals, targets), "smooth-l1").backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"encoder.backbone.pos_embed"}
    assert not any("predictor" in name for name, _ in target.named_parameters())


def test_target_blocks_do_not_see_each_other():
    cfg = small()
    model = model_of(cfg).double()
    context, targets = masks_of(cfg, (6, 6)).draw(4, 0, 0)
    images = pixels(dtype=torch.float64)
    predictions = model(images, context, targets)
    moved = targets.clone()
    moved[:, 1] = (moved[:, 1] + 7) % 36
    other = model(images, context, moved)
    assert torch.equal(other[:, [0, 2, 3]], predictions[:, [0, 2, 3]])
    assert not torch.allclose(other[:, 1], predictions[:, 1])
    for m in range(4):  # and each is what it would be alone
        alone = model(images, context, targets[:, m : m + 1])
        torch.testing.assert_close(alone[:, 0], predictions[:, m])
    # a position names its prediction: the order of the patches is no matter
    torch.testing.assert_close(model(images, context, targets.flip(2)), predictions.flip(2))


def test_predictor_equals_the_slow_version():
    """One image and one block at a time, positions looked up one by one."""
    cfg = small()
    model = model_of(cfg).double()
    predictor, (context, targets) = model.predictor, masks_of(cfg, (6, 6)).draw(3, 0, 1)
    tokens = torch.randn(3, context.shape[1], 24, generator=generator("t"), dtype=torch.float64)
    made, table = predictor(tokens, context, targets), sincos_positions(12, 6, 6).double()
    for n in range(3):
        for m in range(4):
            rows = [predictor.embed(x) + table[p] for x, p in zip(tokens[n], context[n], strict=True)]
            rows += [predictor.mask_token[0, 0] + table[p] for p in targets[n, m]]
            x = predictor.norm(predictor.blocks(torch.stack(rows)[None]))[0, context.shape[1] :]
            torch.testing.assert_close(made[n, m], predictor.project(x))


@pytest.mark.parametrize("rescale", [False, True])
def test_initialization_is_the_codes(rescale):
    model = model_of(replace(PRESETS["cifar10-vit"][1], depth=3, rescale_init=rescale))
    for blocks in (model.encoder.backbone.blocks, model.predictor.blocks):
        for layer, block in enumerate(blocks, start=1):
            for name, module in block.named_modules():
                if isinstance(module, torch.nn.Linear):
                    shrunk = rescale and name in ("attn.proj", "mlp.fc2")
                    expected = 0.02 / math.sqrt(2 * layer) if shrunk else 0.02
                    assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.05)
                    assert not module.bias.any()
                elif isinstance(module, torch.nn.LayerNorm):
                    assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6
    assert float(model.encoder.backbone.patch_embed.proj.weight.detach().std()) == pytest.approx(0.08, rel=0.05)
    assert float(model.predictor.mask_token.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_weight_decay_is_the_codes():
    model = model_of(small())
    decayed, free = (set(group["names"]) for group in decay_groups(model, 0.04))
    shapes = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | free == shapes.keys() and all(shapes[name] == 1 for name in free)
    assert {"predictor.mask_token", "encoder.backbone.patch_embed.proj.weight"} <= decayed
    assert not any("pos_embed" in name for name in shapes)


def test_encoder_is_a_plain_timm_vit(tmp_path):
    model, spec = build(small())
    export_backbone(tmp_path, model.encoder.backbone, spec)
    scope: dict = {}
    exec("\n".join(json.loads((tmp_path / "backbone.json").read_text())["rebuild"]), scope)
    plain = scope["model"]
    assert "common" not in str(spec.rebuild())
    timm.models.load_checkpoint(plain, str(tmp_path / "backbone.safetensors"))
    with torch.no_grad():
        expected = model.encoder.backbone.eval()(pixels())
        torch.testing.assert_close(plain.eval()(pixels()), expected, rtol=0, atol=0)
        torch.testing.assert_close(load_backbone(tmp_path)[0](pixels()), expected, rtol=0, atol=0)
        torch.testing.assert_close(model.encoder(pixels()).mean(1), expected, rtol=1e-5, atol=1e-6)


# ---- several processes -----------------------------------------------------------------------------------------------


def one_step(dtype: torch.dtype, global_batch: int, chunks: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and the target after a step and its EMA update, on this process's part of a batch, after DDP."""
    cfg = small()
    model = model_of(cfg).to(dtype)
    target = make_teacher(model.encoder)
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    n = global_batch // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    images = pixels(global_batch, dtype=dtype)[part]
    context, targets = (ids[part] for ids in masks_of(cfg, (6, 6)).draw(global_batch, 0, 5))
    total = torch.zeros((), dtype=torch.float64)
    for i, (x, c, t) in enumerate(zip(*(v.chunk(chunks) for v in (images, context, targets)), strict=True)):
        if world_size() > 1:
            trained.require_backward_grad_sync = i == chunks - 1
        loss, _, _ = compute_loss(trained, target, x, c, t, "smooth-l1")
        (loss / chunks).backward()
        total += loss.detach() / chunks
    if world_size() > 1:
        torch.distributed.all_reduce(total)
        total /= world_size()
    optimizer.step()
    ema_update(target, model.encoder, 0.9)
    found = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": total, **found, **{f"target.{name}": p.detach() for name, p in target.named_parameters()}}


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_and_micro_batches_equal_one(ranks):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        one = one_step(dtype, 16, 1)
        many = run_ranks(one_step, ranks, dtype, 16, 2)
        for other in [*many, one_step(dtype, 16, 8)]:
            assert other.keys() == one.keys() and len(one) > 60
            for name in one:
                scale = one[name].abs().max().clamp_min(1e-3)
                assert float((other[name] - one[name]).abs().max() / scale) < limit, (name, dtype)
        for name in many[0]:  # targets agree to the bit, whatever the loss each process saw
            assert not name.startswith("target.") or torch.equal(many[0][name], many[-1][name])


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_shows_context_and_targets():
    masks = masks_of(small(), (6, 6))
    image = torch.randint(0, 100, (3, 24, 24), dtype=torch.uint8)
    picture = shown(image, torch.tensor([0, 7]), masks)
    gray = picture == 128
    assert torch.equal(picture[:, :4, :4], image[:, :4, :4]) and torch.equal(picture[:, 4:8, 4:8], image[:, 4:8, 4:8])
    assert int((~gray).sum()) == 2 * 3 * 16
    ((title, html),) = mask_section(open_data("shapes", "test", limit=5, image_size=24), 24, masks, seed=0, count=3)
    assert title == "Context and targets" and html.count("data:image/png") == 3 * 6
    assert "image 3, target block 4" in html


# ---- whole runs ------------------------------------------------------------------------------------------------------

SMOKE = ("smoke", "--no-eval")


def metrics_of(directory) -> list[dict]:
    return [line for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]


def test_target_follows_and_schedules_end_where_the_config_says(tmp_path):
    """Every step: target = m * target + (1 - m) * new encoder, with the code's m, rate and decay written out."""
    flags = ("--out", tmp_path, "--save-every", 1, "--keep", 30, "--log-every", 1, "--weight-decay-end", 0.4)
    code, text = run_command(TRAIN, *SMOKE, *flags, log=tmp_path / "log")
    assert code == 0, text
    directory = tmp_path / "ijepa-smoke"
    lines, found = metrics_of(directory), []
    for step in checkpoint.steps(directory / "checkpoints"):
        path = directory / "checkpoints" / f"step-{step:08d}" / "state.pt"
        found.append(torch.load(path, weights_only=False)["stateful"])
    cfg = PRESETS["smoke"][1]
    per_epoch = cfg.limit // cfg.batch_size
    total, warmup = cfg.epochs * per_epoch, int(cfg.warmup_epochs * per_epoch)
    assert len(lines) == len(found) == total
    for i, line in enumerate(lines):
        k = i + 1  # the code's schedulers count before they are asked
        if k < warmup:
            rate = cfg.start_lr + k / warmup * (cfg.lr - cfg.start_lr)
        else:
            progress = (k - warmup) / (total - warmup)
            rate = cfg.end_lr + (cfg.lr - cfg.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        assert line["lr"] == pytest.approx(rate)
        assert line["weight_decay"] == pytest.approx(0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * k / total)))
        assert line["ema_momentum"] == pytest.approx(cfg.ema_momentum + i * (1 - cfg.ema_momentum) / total)
    assert lines[-1]["lr"] == pytest.approx(cfg.end_lr) and lines[-1]["weight_decay"] == pytest.approx(0.4)
    assert lines[0]["lr"] > cfg.start_lr and lines[-1]["ema_momentum"] < 1
    names = [name for name in found[0]["target"] if name != "backbone.pos_embed"]
    for (before, after), line in zip(pairwise(found), lines[1:], strict=True):
        m = line["ema_momentum"]
        for name in names:
            old, new, encoder = before["target"][name], after["target"][name], after["model"][f"encoder.{name}"]
            torch.testing.assert_close(new, m * old + (1 - m) * encoder, rtol=1e-5, atol=1e-7)
    for state in found:
        assert torch.equal(state["target"]["backbone.pos_embed"], found[0]["target"]["backbone.pos_embed"])
    exported = load_backbone(directory)[0].state_dict()  # the target encoder is what is evaluated
    assert all(torch.equal(exported[n.removeprefix("backbone.")], v) for n, v in found[-1]["target"].items())
    assert not torch.equal(exported["norm.bias"], found[-1]["model"]["encoder.backbone.norm.bias"])


def test_a_cut_schedule_and_micro_batches_and_the_papers_loss(tmp_path):
    flags, losses, signals = ("--out", tmp_path, "--log-every", 1), {}, {}
    for name, extra in {"whole": (), "parts": ("--micro-batch", 16)}.items():
        code, text = run_command(TRAIN, *SMOKE, *flags, "--max-steps", 3, "--name", name, *extra, log=tmp_path / "log")
        assert code == 0, text
        losses[name] = [line["loss"] for line in metrics_of(tmp_path / name)]
        signals[name] = [
            line[key] for line in metrics_of(tmp_path / name) for key in ("relative_error", "target_std", "feature_std")
        ]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4) and len(set(losses["whole"])) == 3
    assert signals["parts"] == pytest.approx(signals["whole"], rel=1e-3)  # of all images, not of 16
    extra = ("--name", "cut", "--schedule-scale", 1.25, "--loss", "l2", "--rescale-init", "--knn-every", 6)
    code, text = run_command(TRAIN, *SMOKE, *flags, *extra, log=tmp_path / "log")
    assert code == 0 and "step 24: accuracy" in text, text
    last, cfg = metrics_of(tmp_path / "cut")[-1], PRESETS["smoke"][1]
    progress = (24 - 4) / (30 - 4)
    rate = cfg.end_lr + (cfg.lr - cfg.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    assert last["lr"] == pytest.approx(rate) and last["ema_momentum"] == pytest.approx(0.99 + 23 * 0.01 / 30)
    assert losses["whole"][0] < metrics_of(tmp_path / "cut")[0]["loss"]  # squares: about twice


LITTLE = ("--batch-size", 32, "--limit", 32, "--log-every", 102, "--save-every", 2000)  # a step an epoch


def test_a_short_run_learns_and_warns_of_nothing(tmp_path):
    flags = ("--epochs", 510, "--warmup-epochs", 20, "--crop-scale", 1, 1, *LITTLE)
    code, text = run_command(TRAIN, *SMOKE, *flags, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0 and "WARNING" not in text, text
    lines = metrics_of(tmp_path / "ijepa-smoke")
    for line in lines:
        assert line.keys() >= {"loss", "relative_error", "target_std", "feature_std", "context_patches", "lr"}
    assert lines[-1]["relative_error"] < 0.9


def test_a_run_that_does_not_learn_is_reported(tmp_path):
    flags = ("--epochs", 510, "--lr", 0, "--start-lr", 0, "--end-lr", 0, *LITTLE)
    code, text = run_command(TRAIN, *SMOKE, *flags, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0 and "WARNING" in text and "predicted no better than by the mean of the same patch" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--schedule-scale", 0.5), "--schedule-scale 0.5: schedules that end before the run"),
        (("--image-size", 30), "views of 30 px do not divide into patches of 8 px"),
        (("--backbone", "resnet18"), "needs a ViT of timm"),
        (("--backbone", "vit_small_patch16_dinov3"), "needs a ViT of timm"),
        (("--predictor-dim", 20, "--predictor-heads", 8), "--predictor-dim 20 does not divide among 8 heads"),
        (("--predictor-dim", 18), "a width divisible by 4, not 18"),
        (("--width", 50), "--width 50 does not divide among --heads 3"),
        (("--micro-batch", 5), "--micro-batch 5 does not divide the 64 images"),
        (("--min-keep", 12), "its --min-keep 12 patches"),
        (("--target-scale", 0.2, 0.1), "--target-scale 0.2 0.1"),
        (("--loss", "l1"), "smooth-l1"),
    ],
)
def test_every_mistake_is_one_sentence(tmp_path, flags, words):
    code, text = run_command(TRAIN, *SMOKE, *flags, "--out", tmp_path / "run", log=tmp_path / "log")
    assert code == 2 and words in text and "Traceback" not in text, text
    assert not (tmp_path / "run").exists()


# ---- presets ---------------------------------------------------------------------------------------------------------

# preset: batch, epochs, warm-up epochs, rates (start, peak), grid, encoder (width, depth, heads), predictor depth
EXPECTED = {
    "imagenet-vitb": (2048, 600, 15, (1e-4, 1e-3), 14, (768, 12, 12), (384, 6)),
    "imagenet-vitl": (2048, 600, 15, (1e-4, 1e-3), 14, (1024, 24, 16), (384, 12)),
    "imagenet-vith": (2048, 300, 40, (2e-4, 1e-3), 16, (1280, 32, 16), (384, 12)),
    "imagenette-vits": (256, 200, 15, (3.5e-5, 3.5e-4), 14, (384, 12, 6), (384, 6)),
    "cifar10-vit": (1024, 400, 40, (7e-5, 7e-4), 8, (192, 12, 3), (96, 6)),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    batch, epochs, warm, rates, grid, encoder, predictor = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs, (cfg.start_lr, cfg.lr)) == (batch, epochs, warm, rates)
    assert (cfg.end_lr, cfg.weight_decay, cfg.weight_decay_end, cfg.betas) == (1e-6, 0.04, 0.4, (0.9, 0.999))
    assert (cfg.ema_momentum, cfg.ema_momentum_end, cfg.schedule_scale, cfg.loss) == (0.996, 1.0, 1.0, "smooth-l1")
    assert (cfg.blocks, cfg.target_scale, cfg.target_aspect) == (4, (0.15, 0.2), (0.75, 1.5))
    assert (cfg.context_scale, cfg.min_keep, cfg.rescale_init) == ((0.85, 1.0), 10, False)
    with torch.device("meta"):
        model = build(cfg)[0]
    vit = model.encoder.backbone
    assert vit.patch_embed.grid_size == (grid, grid) and not vit.has_class_token
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == encoder
    assert (model.predictor.mask_token.shape[2], len(model.predictor.blocks)) == predictor
    assert model.predictor.blocks[0].attn.num_heads == encoder[2]


def test_views_equal_the_reference():
    cfg = PRESETS["imagenet-vith"][1]
    (view,) = one_view(cfg).views
    assert (view.scale, view.ratio, view.flip, view.interpolation) == ((0.3, 1.0), (3 / 4, 4 / 3), 0.0, "bilinear")
    assert (view.color_jitter_prob, view.grayscale, view.blur, view.solarize) == (0, 0, 0, 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    """On the meta device all of them; in earnest those below 0.6 GMAC an image and pass, batch of 4."""
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, _ = build(cfg)
        vit = model.encoder.backbone
        cost, grid = multiply_adds(vit, cfg.image_size), vit.patch_embed.grid_size
    masks = masks_of(cfg, grid)
    if cost > 6e8:
        assert cfg.image_size == 224
        return
    model = model_of(cfg)
    target = make_teacher(model.encoder)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=1e-3, betas=cfg.betas)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        images = torch.rand(4, 3, cfg.image_size, cfg.image_size)
        context, targets = masks.draw(4, 0, step)
        goals = blocks_of(normalize(target(images)), targets)
        loss = prediction_error(model(images, context, targets), goals, cfg.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(target, model.encoder, cfg.ema_momentum)
        assert torch.isfinite(loss)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"encoder.backbone.pos_embed"}
