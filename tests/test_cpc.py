"""CPC for images: losses against slow loops, causality by perturbed pixels, patches, processes, presets, errors."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.backbones import create_backbone, export_backbone, load_backbone
from common.data import open_data
from common.distributed import rank, world_size
from common.errors import UserError
from common.rng import generator
from methods.cpc.augment import PatchJitter, grid_side, one_view, statistics
from methods.cpc.config import PRESETS, Config
from methods.cpc.loss import cpc_loss, draw_negatives, info_nce_all, info_nce_sampled, positives, turned
from methods.cpc.model import CONTEXTS, CPC, GatedLayer, RowGRU
from methods.cpc.retrieval import held_out, section, sentence
from methods.cpc.train import build, compute_loss
from tests.processes import run_command, run_ranks


def tiny(**changes) -> Config:
    """24 px, patches of 8 px at stride 4: a 5 x 5 grid, rows 2 and 3 below predicted."""
    sizes = dict(image_size=24, crop_size=24, patch=8, stride=4, stem_width=4, stem_kernel=3, stem_stride=2)
    stages = dict(layers=(1, 1), channels=(6, 10), hidden=(3, 4))
    rest = dict(context="pixelcnn", context_width=8, context_depth=2, directions=1, skip_step=1, prediction_steps=2)
    compared = dict(embedding=0, num_negatives=3)
    return replace(PRESETS["quickstart"][1], **{**sizes, **stages, **rest, **compared, **changes})


def model_of(cfg: Config, dtype=torch.float64, seed: int = 0) -> CPC:
    torch.manual_seed(seed)
    model = build(cfg)[0]
    for name, parameter in model.named_parameters():  # biases too, so that a lost one shows
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def pixels(n: int = 3, size: int = 24, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- losses ----------------------------------------------------------------------------------------------------------


def leaves(anchors=7, candidates=9, width=5, seed=0):
    made = torch.Generator().manual_seed(seed)
    p, z = (torch.randn(n, width, generator=made, dtype=torch.float64) for n in (anchors, candidates))
    weight = torch.rand(anchors, generator=made, dtype=torch.float64)
    own = torch.randint(candidates, (anchors,), generator=made)
    return p.requires_grad_(), z.requires_grad_(), own, weight, made


def assert_equal_with_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 1 << 8, 1 << 21])
@pytest.mark.parametrize("count", [1, 4, 30])
def test_sampled_loss_and_gradient_equal_the_slow_loop(count, chunk, monkeypatch):
    monkeypatch.setattr("methods.cpc.loss.CHUNK_BYTES", chunk)
    p, z, own, weight, made = leaves()
    drawn = torch.randint(len(z) - 1, (len(p), count), generator=made)  # the last candidate is never a negative
    loss, parts = info_nce_sampled(p, z, own, drawn, weight)
    slow, hits, score = 0.0, 0.0, 0.0
    for a in range(len(p)):
        right = torch.exp(p[a] @ z[own[a]])
        wrong = [torch.exp(p[a] @ z[i]) for i in drawn[a]]
        slow = slow - weight[a] * torch.log(right / (right + sum(wrong)))
        hits += weight[a] * float(all(right > w for w in wrong))
        score += weight[a] * (p[a] @ z[own[a]]).detach()
    torch.testing.assert_close(parts["retrieval"], torch.as_tensor(hits, dtype=torch.float64))
    torch.testing.assert_close(parts["positive_score"], score)
    assert_equal_with_gradients(loss, slow, (p, z))


@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_all_loss_and_gradient_equal_the_slow_loop(chunk, monkeypatch):
    monkeypatch.setattr("methods.cpc.loss.CHUNK_BYTES", chunk)
    p, z, own, weight, _ = leaves(anchors=150)  # more than one block of 64
    loss, parts = info_nce_all(p, z, own, weight)
    slow, hits, score = 0.0, 0.0, 0.0
    for a in range(len(p)):
        scores = [p[a] @ z[i] for i in range(len(z))]
        slow = slow - weight[a] * torch.log(torch.exp(scores[own[a]]) / sum(torch.exp(s) for s in scores))
        hits += weight[a] * float(all(s < scores[own[a]] for i, s in enumerate(scores) if i != own[a]))
        score += weight[a] * scores[own[a]].detach()
    torch.testing.assert_close(parts["retrieval"], torch.as_tensor(hits, dtype=torch.float64))
    torch.testing.assert_close(parts["positive_score"], score)
    assert_equal_with_gradients(loss, slow, (p, z))


def test_chance_levels_and_ties():
    own, weight = torch.arange(20), torch.full((20,), 0.05)
    drawn = torch.randint(30, (20, 16))
    nothing = torch.zeros(20, 4)
    for loss, parts, chance in (
        (*info_nce_sampled(nothing, torch.randn(30, 4), own, drawn, weight), 17),
        (*info_nce_all(nothing, torch.randn(30, 4), own, weight), 30),
    ):
        torch.testing.assert_close(loss, torch.tensor(math.log(chance)))
        assert parts["retrieval"] == 0  # a collapsed network finds nothing, it does not find everything
    sure = 50 * torch.eye(30)
    assert info_nce_all(sure[:20], torch.eye(30), own, weight)[1]["retrieval"] == pytest.approx(1)
    assert info_nce_all(sure[:20], torch.eye(30), own, weight)[0] < 1e-6


def test_scores_are_bilinear_without_norm_or_temperature():
    p, z, own, weight, _ = leaves()
    doubled = info_nce_all(2 * p, z, own, weight)[0]
    torch.testing.assert_close(doubled, info_nce_all(p, 2 * z, own, weight)[0])
    assert not torch.isclose(doubled, info_nce_all(p, z, own, weight)[0])


def test_large_scores_stay_finite():
    """log_softmax, not log(softmax + 1e-11): a certain mistake costs its whole score difference."""
    p, z = torch.tensor([[200.0]]), torch.tensor([[-1.0], [1.0]])
    own, weight = torch.tensor([0]), torch.ones(1)
    assert info_nce_sampled(p, z, own, torch.tensor([[1]]), weight)[0] == pytest.approx(400)
    assert info_nce_all(p, z, own, weight)[0] == pytest.approx(400)


def test_loss_is_float32_under_autocast():
    p, z, own, weight, made = leaves()
    half, other = p.detach().bfloat16(), z.detach().bfloat16()
    drawn = torch.randint(len(z), (len(p), 3), generator=made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled, every = info_nce_sampled(half, other, own, drawn, weight)[0], info_nce_all(half, other, own, weight)[0]
    assert sampled.dtype == every.dtype == torch.float32
    torch.testing.assert_close(every, info_nce_all(half.float(), other.float(), own, weight)[0])


# ---- anchors, offsets, negatives -------------------------------------------------------------------------------------

STEP = {0: (1, 0), 1: (-1, 0), 2: (0, 1), 3: (0, -1)}  # down, up, right, left: (rows, columns) to the target


def slow_loss(model: CPC, images: torch.Tensor, negatives=None) -> torch.Tensor:
    """Every direction, offset, image, row and column one by one, from the network's z, contexts and matrices."""
    z = model.backbone.grid(images)
    total, terms = 0.0, 0
    compared = model.embed(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    n, rows, columns, _ = z.shape
    for d, (context, ws) in enumerate(zip(model.contexts, model.predictors, strict=True)):
        if d == 0:
            c = context(z.permute(0, 3, 1, 2))  # [n, width, R, Q]
        elif d == 1:
            c = context(z.permute(0, 3, 1, 2).flip(2)).flip(2)
        elif d == 2:
            c = context(z.permute(0, 3, 2, 1)).transpose(2, 3)
        else:
            c = context(z.permute(0, 3, 2, 1).flip(2)).flip(2).transpose(2, 3)
        taken = 0
        for offset, w in zip(model.offsets, ws, strict=True):
            sums, count = 0.0, 0
            down, right = (offset * step for step in STEP[d])
            for b in range(n):
                for i in range(rows):
                    for j in range(columns):
                        if not (0 <= i + down < rows and 0 <= j + right < columns):
                            continue
                        prediction = model.scale * (w.weight @ c[b, :, i, j])
                        score = prediction @ compared[b, i + down, j + right]
                        if negatives is None:
                            others = (compared.flatten(0, 2) @ prediction).logsumexp(0)
                        else:
                            drawn = turned(compared, d).flatten(0, 2)[negatives[d][taken]]
                            others = torch.cat([score[None], drawn @ prediction]).logsumexp(0)
                        sums, count, taken = sums + others - score, count + 1, taken + 1
            total, terms = total + sums / count, terms + 1
    return total / terms


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("embedding", [0, 7])
def test_whole_objective_equals_the_slow_loop(directions, embedding):
    """Which patch is whose positive, for every direction and offset; a silent transpose would fail here."""
    cfg = tiny(directions=directions, embedding=embedding, embedding_scale=0.5 if embedding else 1.0)
    model, images = model_of(cfg), pixels(2)
    compared, predictions, _ = model(images)
    loss, _ = cpc_loss(compared, predictions, model.offsets, None, everywhere=True)
    assert_equal_with_gradients(loss, slow_loss(model, images), list(model.parameters()))


def test_sampled_objective_equals_the_slow_loop():
    """With one direction: the order of the sampled negatives is that of the loop over offset, image, row and column."""
    model, images = model_of(tiny()), pixels(2)
    drawn = [draw_negatives(2, 2, 5, 5, model.offsets, 3, generator(0))]
    compared, predictions, _ = model(images)
    loss, _ = cpc_loss(compared, predictions, model.offsets, drawn, everywhere=True)
    assert_equal_with_gradients(loss, slow_loss(model, images, drawn), list(model.parameters()))


def test_each_offset_has_its_own_matrix_and_no_bias():
    model = model_of(tiny(directions=4))
    assert model.offsets == (2, 3)  # row i + 1, which shares half of its pixels, is skipped
    assert len(model.predictors) == len(model.contexts) == 4
    assert all(len(ws) == 2 and all(w.bias is None for w in ws) for ws in model.predictors)
    assert len({id(w.weight) for ws in model.predictors for w in ws}) == 8


def test_positives_are_the_rows_below_and_offsets_weigh_alike():
    own, weight = positives(2, 4, 3, (1, 3), first=5)
    expected = [
        (5 + b) * 12 + (i + o) * 3 + j for o in (1, 3) for b in range(2) for i in range(4 - o) for j in range(3)
    ]
    assert own.tolist() == expected
    assert weight.sum() == pytest.approx(1) and weight[:18].sum() == pytest.approx(0.5)


def test_negatives_are_uniform_over_the_rows_an_offset_can_reach():
    drawn = draw_negatives(40, 3, 4, 2, (1, 3), 50, generator(0))
    assert drawn.shape == (40 * (3 + 1) * 2, 50)
    first, second = drawn[: 40 * 6], drawn[40 * 6 :]
    for part, rows in ((first, (1, 2, 3)), (second, (3,))):
        counts = part.flatten().bincount(minlength=24).view(3, 4, 2).double()
        assert (counts[:, [r for r in range(4) if r not in rows]] == 0).all()
        inside = counts[:, list(rows)]
        assert (inside / inside.mean() - 1).abs().max() < 0.15  # every image, its own too, every column
    part = draw_negatives(40, 3, 4, 2, (1, 3), 50, generator(0), slice(10, 20))
    assert torch.equal(part, torch.cat([first[60:120], second[20:40]]))


# ---- encoder and patches ---------------------------------------------------------------------------------------------


def test_patches_are_rows_then_columns():
    images = torch.arange(2 * 3 * 16 * 12).view(2, 3, 16, 12).float()
    patches = PatchJitter(8, 4)(images)
    rows, columns = grid_side(16, 8, 4), grid_side(12, 8, 4)
    assert (rows, columns, len(patches)) == (3, 2, 12)
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                expected = images[b, :, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8]
                assert torch.equal(patches[(b * rows + i) * columns + j], expected)


@pytest.mark.parametrize("crop", [5, 6, 7])
def test_subcrop_is_each_patchs_own_and_padded_back(crop):
    jitter, images = PatchJitter(8, 4, crop), pixels(2, 16)
    numbers = jitter.sample(2, 9, generator(0))
    patches, plain = jitter(images, numbers), PatchJitter(8, 4)(images)
    seen, border = set(), (8 - crop) // 2
    for i, (patch, whole) in enumerate(zip(patches, plain, strict=True)):
        top, left = (min(int(u * (9 - crop)), 8 - crop) for u in numbers.view(-1, 6)[i, :2].tolist())
        expected = torch.zeros_like(whole)
        expected[:, border : border + crop, border : border + crop] = whole[:, top : top + crop, left : left + crop]
        assert torch.equal(patch, expected)  # the same pixels: nothing was resized
        seen.add((top, left))
    assert len(seen) > 2
    middle = jitter(images)  # evaluation
    inner = (8 - crop) // 2
    cut = slice(inner, inner + crop)
    assert torch.equal(middle[:, :, cut, cut], plain[:, :, cut, cut])
    torch.testing.assert_close(middle.abs().sum(), plain[:, :, cut, cut].abs().sum())  # zeros around it


def test_light_and_dropped_colors_are_each_patchs_own():
    images = pixels(2, 16)
    jitter = PatchJitter(8, 4, brightness=0.7, contrast=0.4, color_drop=0.5)
    numbers = jitter.sample(2, 9, generator(3))
    patches, plain = jitter(images, numbers), PatchJitter(8, 4)(images)
    dropped = 0
    for patch, whole, (*_, gain, shift, drop, channel) in zip(
        patches, plain, numbers.view(-1, 6).tolist(), strict=True
    ):
        expected = whole.mean() + (whole - whole.mean()) * (1 + 0.4 * (2 * gain - 1)) + 0.7 * (2 * shift - 1)
        if drop < 0.5:
            dropped += 1
            expected = torch.stack([x if k == int(channel * 3) else 0 * x for k, x in enumerate(expected)])
        torch.testing.assert_close(patch, expected)
    assert 0 < dropped < 18
    assert torch.equal(jitter(images), plain)  # nothing random without numbers


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_every_patch_is_encoded_alone(norm):
    """A changed pixel changes z of the patches that hold it, and of no other, bitwise; in train mode."""
    encoder = model_of(tiny(norm=norm)).backbone.train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    images = pixels(2)
    before = encoder.grid(images)
    for y, x in ((0, 0), (9, 14), (23, 23), (11, 4)):
        other = images.clone()
        other[1, :, y, x] += 3
        changed = (encoder.grid(other) != before).any(-1)
        expected = torch.zeros(2, 5, 5, dtype=torch.bool)
        for i in range(5):
            for j in range(5):
                expected[1, i, j] = 4 * i <= y < 4 * i + 8 and 4 * j <= x < 4 * j + 8
        assert torch.equal(changed, expected)


def test_forward_is_the_mean_over_the_grid_at_any_size():
    encoder = model_of(tiny()).backbone
    for size in (24, 8, 30):
        images = pixels(2, size)
        z = encoder.grid(images)
        assert z.shape[1:] == (grid_side(size, 8, 4), grid_side(size, 8, 4), 10)
        torch.testing.assert_close(encoder(images), z.flatten(1, 2).mean(1))
    with pytest.raises(UserError, match="smaller than a patch of 8"):
        encoder(pixels(1, 7))


def test_gray_views_and_colored_images_are_the_same_input():
    mean, std = statistics("shapes", True)
    recipe = one_view(replace(PRESETS["quickstart"][1], flip=0.0, grayscale=True))
    color = replace(recipe.views[0], grayscale=0.0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    params = recipe.sample(4, generator(0))
    (gray,) = recipe(images, params)
    assert (gray[:, 0] == gray[:, 2]).all()
    encoder = model_of(tiny(), torch.float32).backbone
    plain = type(recipe)([color])
    (colored,) = plain(images, plain.sample(4, generator(0)))
    read = [(x * encoder.luma_weights).sum(1) for x in (gray, colored)]
    torch.testing.assert_close(*read, atol=6e-4, rtol=0)  # torchvision's weights sum to 0.9999
    torch.testing.assert_close(encoder(gray), encoder(colored), atol=2e-3, rtol=0)
    assert encoder.stem.in_channels == 1 and model_of(tiny(grayscale=False)).backbone.stem.in_channels == 3
    assert statistics("stl10", True) == ((0.4120,) * 3, (0.2570,) * 3)  # GIM's
    assert statistics("cifar10", False)[0] == (0.4914, 0.4822, 0.4465)
    assert 0.4465 < statistics("cifar10", True)[0][0] < 0.4914


def test_stl_crops_keep_their_resolution():
    """64 of 96 pixels as 4/9 of the area: pixels are copied, not resampled."""
    cfg = PRESETS["stl10"][1]
    recipe = one_view(replace(cfg, flip=0.0, grayscale=False, normalize="none"))
    images = torch.randint(256, (3, 3, 96, 96), dtype=torch.uint8)
    (views,) = recipe(images, recipe.sample(3, generator(0)))
    for view, image in zip((255 * views).round().to(torch.uint8), images, strict=True):
        windows = image.unfold(1, 64, 1).unfold(2, 64, 1)[0]  # [33, 33, 64, 64]
        assert (windows == view[0]).flatten(2).all(-1).sum() == 1


def test_export_is_loaded_as_any_other(tmp_path):
    torch.manual_seed(0)
    model, spec = build(tiny(patch_crop=7))
    export_backbone(tmp_path, model.backbone, spec)
    assert json.loads((tmp_path / "backbone.json").read_text())["name"] == "methods.cpc.model:Encoder"
    loaded, read = load_backbone(tmp_path)
    images = pixels(2, dtype=torch.float32)
    assert torch.equal(loaded(images), model.backbone.eval()(images))
    assert loaded.cut == model.backbone.cut and loaded.num_features == 10
    assert create_backbone(read).num_features == 10


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("row", [0, 2, 3])
def test_context_sees_its_row_and_those_above_and_never_the_next(context, row):
    """Bitwise: a patch of row i + 1 leaves c of rows 0 to i unchanged, and changes that of row i + 1."""
    cfg = tiny(context=context, context_depth=1 if context == "gru" else 2)
    model = model_of(cfg, torch.float32)
    z = torch.randn(2, 5, 5, 10, generator=torch.Generator().manual_seed(0))
    before = model.contexts[0](z.permute(0, 3, 1, 2))
    other = z.clone()
    other[:, row + 1, 2] += 1
    after = model.contexts[0](other.permute(0, 3, 1, 2))
    assert torch.equal(after[:, :, : row + 1], before[:, :, : row + 1])
    changed = (after != before).any(1)[:, row + 1]
    assert changed[:, 2].all()
    if context != "residual":
        assert changed.sum() >= 6  # to both sides along its row
    assert (after != before).any(1)[:, row + 2 :].any() or row == 3  # and what is below remembers it


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize("context", CONTEXTS)
def test_predictions_do_not_see_the_pixels_they_predict(context, direction):
    """From pixels: what only rows beyond an anchor hold cannot move its prediction, in any direction."""
    cfg = tiny(context=context, context_depth=1 if context == "gru" else 2, directions=4)
    model, images = model_of(cfg, torch.float32), pixels(2, dtype=torch.float32)
    before = model(images)[1][direction]
    other = images.clone()
    place = [other[:, :, 16:], other[:, :, :8], other[..., 16:], other[..., :8]][direction]
    place += 1  # rows 3 and 4 of the grid hold these pixels, seen along the direction
    after = model(other)[1][direction]
    moved = (after != before).any(1)
    rows = [torch.arange(5 - o).view(1, -1, 1).expand(2, -1, 5).flatten() for o in model.offsets]
    rows = torch.cat(rows)
    assert not moved[rows < 3].any()
    assert len(moved) == len(rows) and (rows < 3).all() == (moved == 0).all()
    shifted = images.clone()
    place = [shifted[:, :, :8], shifted[:, :, 16:], shifted[..., :8], shifted[..., 16:]][direction]
    place += 1
    assert (model(shifted)[1][direction] != before).any(1).all()  # row 0 is seen by rows 0 to 2


def test_gated_layer_is_a_masked_3x3_convolution():
    layer, x = GatedLayer(4).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    kernel = torch.zeros(8, 4, 3, 3, dtype=torch.float64)
    kernel[:, :, :2] = layer.conv.weight.detach()
    a, b = F.conv2d(x, kernel, layer.conv.bias, padding=1).chunk(2, 1)
    torch.testing.assert_close(layer(x), x + torch.tanh(a) * torch.sigmoid(b))


def test_row_gru_is_a_gru_down_the_columns():
    """With the side taps at zero every column is torch's GRU."""
    context, reference = RowGRU(4, 6).double(), nn.GRU(4, 6, batch_first=True).double()
    with torch.no_grad():
        for layer, kind in ((context.input, "ih"), (context.state, "hh")):
            layer.weight.zero_()
            weight = getattr(reference, f"weight_{kind}_l0")
            layer.weight.flatten(2)[:, :, 1] = weight
            layer.bias.copy_(getattr(reference, f"bias_{kind}_l0"))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    expected = reference(x.permute(0, 3, 2, 1).flatten(0, 1))[0].view(2, 3, 5, 6).permute(0, 3, 2, 1)
    torch.testing.assert_close(context(x), expected)


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(dtype: torch.dtype, negatives: str, pool: str, directions: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step on this process's part of a fixed global batch of 8 images, after DDP."""
    cfg = tiny(directions=directions, patch_crop=7, pool=pool)
    model = model_of(cfg, dtype)
    n = 8 // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    images = pixels(8).to(dtype)[part]
    numbers = model.jitter.sample(8, 25, generator(0, "patches", 3))[part]
    pooled = 8 if pool == "global" else n
    drawn = None
    if negatives == "sampled":
        stream = generator(0, "negatives", 3)
        drawn = [draw_negatives(8, pooled, 5, 5, model.offsets, 4, stream, part) for _ in range(directions)]
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    loss, parts = compute_loss(trained, images, numbers, drawn, cfg)
    loss.backward()
    means = torch.stack([loss.detach(), parts["retrieval"].to(dtype)])
    if world_size() > 1:
        torch.distributed.all_reduce(means)
        means = means / world_size()
    return {"loss and retrieval": means} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("negatives", "directions"), [("sampled", 1), ("sampled", 4), ("all", 4)])
def test_processes_equal_one(ranks, negatives, directions):
    for dtype in (torch.float64, torch.float32):
        one = gradients(dtype, negatives, "global", directions)
        assert len(one) > 20 and one["loss and retrieval"][0] > 0.1
        for many in run_ranks(gradients, ranks, dtype, negatives, "global", directions):
            assert many.keys() == one.keys()
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                assert worst < (1e-10 if dtype == torch.float64 else 2e-5), (name, dtype, worst)


def test_local_pool_is_another_objective():
    """The mean of what each half of the batch would get alone, as on the paper's GPUs."""
    model = model_of(tiny(patch_crop=7))
    numbers = model.jitter.sample(8, 25, generator(0, "patches", 3))
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        compared, predictions, _ = model(pixels(8)[part], numbers[part])
        halves.append(cpc_loss(compared, predictions, model.offsets, None, everywhere=True)[0])
    expected = (sum(halves) / 2).detach()
    for many in run_ranks(gradients, 2, torch.float64, "all", "local", 1):
        torch.testing.assert_close(many["loss and retrieval"][0], expected)
    whole = gradients(torch.float64, "all", "global", 1)["loss and retrieval"][0]
    assert whole - expected > 0.3  # about ln 2: half the candidates


# ---- held-out retrieval ----------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Knows every patch: each image has its own code, and so has each position."""

    def __init__(self, offsets, sure: bool):
        super().__init__()
        self.offsets, self.contexts, self.sure = offsets, [None], sure
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        made = torch.Generator().manual_seed(0)
        compared = torch.randn(len(images), 4, 4, 64, generator=made)
        made = [compared[:, o:].flatten(0, 2) for o in self.offsets]
        predictions = torch.cat(made) if self.sure else torch.randn(sum(map(len, made)), 64)
        return compared, [predictions], compared


def test_held_out_retrieval_and_its_chance():
    store = open_data("shapes", "test", limit=128)
    spec = build(tiny())[1]
    arguments = dict(crop=24, batch=64, count=16, seed=0)
    found = held_out(Oracle((1, 2), True), store, spec, **arguments)
    assert found.keys() == {1, 2}
    for values in found.values():
        assert values["sampled"] > 0.9 and values["all"] == pytest.approx(1)  # a draw may be the positive: a tie
        assert values["sampled chance"] == 1 / 17 and values["all chance"] == pytest.approx(1 / (64 * 16))
    blind = held_out(Oracle((1, 2), False), store, spec, **arguments)
    assert all(abs(values["sampled"] - 1 / 17) < 0.03 and values["all"] < 0.01 for values in blind.values())
    assert "times chance" in sentence(found)
    title, html = section(found, stride=4, patch=8)
    assert "held-out" in title and "4 px" in html and "none" in html


def test_held_out_retrieval_changes_nothing_and_repeats_itself():
    store = open_data("shapes", "test", limit=70)
    cfg = tiny(image_size=32, patch_crop=7)
    model, (_, spec) = model_of(cfg, torch.float32).train(), build(cfg)
    before = [p.clone() for p in model.parameters()]
    first = held_out(model, store, spec, crop=24, batch=32, count=4, seed=0)
    assert held_out(model, store, spec, crop=24, batch=32, count=4, seed=0) == first
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- presets, errors -------------------------------------------------------------------------------------------------


def test_recipes_equal_the_reference():
    stl, cifar, imagenet = (PRESETS[name][1] for name in ("stl10", "cifar10", "imagenet"))
    assert (stl.crop_size, stl.patch, stl.stride, stl.batch_size, stl.epochs, stl.lr) == (64, 16, 8, 32, 300, 2e-4)
    assert (stl.layers, stl.channels, stl.hidden) == ((3, 4, 6), (256, 512, 1024), (64, 128, 256))
    assert (stl.stem_kernel, stl.stem_stride, stl.split, stl.patch_crop) == (5, 1, "unlabeled", 0)
    assert (cifar.patch, cifar.stride, cifar.batch_size, cifar.epochs, cifar.lr) == (8, 4, 64, 1000, 4e-5)
    assert (imagenet.patch, imagenet.stride, imagenet.patch_crop, imagenet.lr) == (64, 32, 60, 2e-4)
    assert (imagenet.layers, imagenet.batch_size, imagenet.pool) == ((3, 4, 23), 32 * 16, "local")
    for cfg in (stl, cifar, imagenet):
        assert (cfg.skip_step, cfg.prediction_steps, cfg.num_negatives, cfg.negatives) == (1, 5, 16, "sampled")
        assert (cfg.context, cfg.context_width, cfg.context_depth, cfg.norm) == ("pixelcnn", 1024, 4, "none")
        assert (cfg.grayscale, cfg.flip, cfg.schedule, cfg.weight_decay) == (True, 0.5, "constant", 0.0)
        assert grid_side(cfg.crop_size, cfg.patch, cfg.stride) == 7


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, spec = build(cfg)
        side = grid_side(cfg.crop_size, cfg.patch, cfg.stride)
        compared, predictions, z = model(torch.empty(2, 3, cfg.crop_size, cfg.crop_size))
        assert z.shape == (2, side, side, cfg.channels[-1])
        anchors = sum(2 * (side - o) * side for o in model.offsets)
        assert predictions[0].shape == (anchors, cfg.embedding or cfg.channels[-1])
        assert model.backbone(torch.empty(1, 3, cfg.image_size, cfg.image_size)).shape == (1, cfg.channels[-1])


def test_v2_is_a_set_of_options():
    """CPC v2 (arXiv:1905.09272): 80 px patches, stride 36, 6 x 6; row + 3; 64-d, 0.1."""
    cfg = replace(
        PRESETS["imagenet"][1],
        crop_size=260,
        patch=80,
        stride=36,
        patch_crop=0,
        layers=(3, 4, 46),
        channels=(256, 512, 4096),
        hidden=(64, 128, 512),
        norm="layer",
        directions=4,
        context="residual",
        context_width=256,
        context_depth=5,
        skip_step=2,
        prediction_steps=1,
        embedding=64,
        embedding_scale=0.1,
        negatives="all",
    )
    with torch.device("meta"):
        model, _ = build(cfg)
        compared, predictions, z = model(torch.empty(2, 3, 260, 260))
    assert z.shape == (2, 6, 6, 4096) and compared.shape == (2, 6, 6, 64) and model.offsets == (3,)
    assert [p.shape for p in predictions] == [(2 * 3 * 6, 64)] * 4
    encoder = sum(p.numel() for p in model.backbone.parameters())
    assert 250e6 < encoder < 320e6  # the "ResNet-161" has 305 million


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prediction_steps=5), "has 5 rows of patches"),
        (dict(stride=9, prediction_steps=1, skip_step=0), "patches touch or overlap"),
        (dict(patch_crop=9), "--patch-crop 9"),
        (dict(layers=(1,)), "one number for each stage"),
        (dict(hidden=(3,)), "one number for each stage"),
        (dict(context="gru"), "a row GRU has one layer"),
        (dict(color_drop=0.5), "--no-grayscale"),
        (dict(patch=32), "has 0 rows of patches"),
        (dict(norm="batch"), "none or layer"),
    ],
)
def test_errors_say_what_to_do(changes, message):
    with pytest.raises(UserError, match=message):
        build(tiny(**changes))


def test_shared_pixels_are_told_and_a_wrong_size_is_one_sentence(tmp_path):
    arguments = ("smoke", "--out", tmp_path, "--no-eval", "--max-steps", 2)
    code, text = run_command("methods.cpc.train", *arguments, "--skip-step", 0, log=tmp_path / "log")
    assert code == 0 and "pixels with its anchor" in text and "--skip-step" in text
    code, text = run_command("methods.cpc.train", "smoke", "--prediction-steps", 9, log=tmp_path / "log")
    assert code == 2 and "rows of patches" in text and "Traceback" not in text
