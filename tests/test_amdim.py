"""AMDIM: the objective against loops, what features see, shared flips and translations, processes, probes, schedule."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common.backbones import create_backbone, export_backbone, load_backbone, multiply_adds
from common.data import open_data
from common.distributed import rank, sync_batchnorm, world_size
from common.errors import UserError
from common.log import read_metrics
from common.rng import generator
from common.views.crop import crop_boxes
from common.views.recipe import ViewRecipe
from common.views.sampling import Columns
from common.views.spec import View
from methods.amdim import loss as losses
from methods.amdim.augment import statistics, two_views
from methods.amdim.config import PRESETS, Config
from methods.amdim.loss import chance, draw_positions, effective_dimensions, multi_scale, nce, probe_loss
from methods.amdim.model import AMDIM, Embedding, Encoder, Probes, Unit
from methods.amdim.report import held_out, held_out_section
from methods.amdim.train import build, compute_loss, learning_rate
from tests.processes import run_command, run_ranks


def small(**changes) -> Config:
    return replace(PRESETS["quickstart"][1], **{**dict(ndf=4, n_rkhs=16, n_depth=2), **changes})


def normal(*shape: int, seed: str = "x", scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=generator("amdim", seed), dtype=torch.float64)


def assert_same_gradients(ours, theirs, inputs, tolerance=1e-10):
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# ---- objective -------------------------------------------------------------------------------------------------------


def slow_nce(sources, targets, first, clip, penalty):
    """One source, one position, one score at a time (arXiv:1906.00910, section 3)."""
    (n, width), (images, places) = sources.shape, targets.shape[:2]
    total, squares = 0.0, 0.0
    for i in range(n):
        raw = [[sources[i] @ targets[j, l] / math.sqrt(width) for l in range(places)] for j in range(images)]  # noqa: E741
        squares = squares + sum(s**2 for row in raw for s in row) / (n * images * places)
        s = [[clip * torch.tanh(value / clip) for value in row] for row in raw]
        others = sum(value.exp() for j, row in enumerate(s) if j != first + i for value in row)
        for own in s[first + i]:
            total = total - (own - torch.log(own.exp() + others)) / (n * places)
    return total + penalty * squares, total, squares


@pytest.mark.parametrize(("n", "images", "first"), [(1, 2, 1), (3, 3, 0), (2, 6, 4)])
@pytest.mark.parametrize(("clip", "scale"), [(20.0, 1.0), (3.0, 4.0)])
@pytest.mark.parametrize(("product", "sweep"), [(1 << 24, 1 << 17), (40, 20)])
def test_nce_and_its_gradient_equal_the_slow_version(n, images, first, clip, scale, product, sweep, monkeypatch):
    monkeypatch.setattr(losses, "_PRODUCT", product)
    monkeypatch.setattr(losses, "_SWEEP", sweep)
    sources, targets = (normal(*s, seed=str(s), scale=scale).requires_grad_() for s in ((n, 5), (images, 4, 5)))
    ours, parts = nce(sources, targets, first=first, clip=clip, penalty=0.05)
    expected, plain, squares = slow_nce(sources, targets, first, clip, 0.05)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["nce"], plain.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["score_rms"], squares.sqrt().detach(), rtol=1e-12, atol=0)
    assert_same_gradients(3 * ours, 3 * expected, (sources, targets))


def test_the_pairs_are_1_5_and_1_7_and_5_5_in_both_directions():
    f1, f5, f7 = (normal(2, 3, *s, 6, seed=str(s)).requires_grad_() for s in ((), (25,), (49,)))
    places = torch.tensor([[0, 24, 7], [3, 3, 11]])
    ours, parts = multi_scale(f1, f5, f7, places, clip=20.0, penalty=0.05)
    expected, named = 0.0, {"nce_1_5": 0.0, "nce_1_7": 0.0, "nce_5_5": 0.0}
    for view in (0, 1):
        single = torch.stack([f5[view, i, places[view, i]] for i in range(3)])
        for name, source, target in (("nce_1_5", f1[view], f5), ("nce_1_7", f1[view], f7), ("nce_5_5", single, f5)):
            whole, plain, _ = slow_nce(source, target[1 - view], 0, 20.0, 0.05)
            expected, named[name] = expected + whole / 2, named[name] + plain.detach() / 2
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for name, value in named.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=0)
    assert_same_gradients(ours, expected, (f1, f5, f7))
    torch.testing.assert_close(multi_scale(f1, f5, f7, places, clip=20.0, penalty=0.05, alone=True)[0], ours)


def test_chance_level_and_perfect_scores():
    zeros = torch.zeros(2, 8, 4), torch.zeros(2, 8, 25, 4), torch.zeros(2, 8, 49, 4)
    loss, parts = multi_scale(*zeros, torch.zeros(2, 8, dtype=torch.long), clip=20.0, penalty=0.05)
    levels = chance(8)
    assert float(loss) == pytest.approx(levels["loss"]) == pytest.approx(2 * math.log(176) + math.log(344))
    assert all(float(parts[k]) == pytest.approx(levels[k]) for k in ("nce_1_5", "nce_1_7", "nce_5_5"))
    assert parts["retrieval"] == 0  # a tie is no find
    eye = 40 * torch.eye(8)
    loss, parts = nce(eye, eye[:, None].expand(-1, 25, -1), first=0, clip=20.0, penalty=0.0)
    assert parts["hits"] == 1 and loss < 1e-5
    _, parts = nce(eye, eye.roll(1, 0)[:, None].expand(-1, 25, -1), first=0, clip=20.0, penalty=0.0)
    assert parts["hits"] == 0
    one = torch.zeros(8, 25, 8)
    one[:, 3] = eye  # one position is enough to find an image
    assert nce(eye, one, first=0, clip=20.0, penalty=0.0)[1]["hits"] == 1


def test_other_places_of_the_own_image_are_no_negatives():
    """With a single image there are no negatives, whatever its other positions score."""
    sources, targets = normal(1, 4).requires_grad_(), normal(1, 9, 4, scale=9.0)
    loss, _ = nce(sources, targets, first=0, clip=20.0, penalty=0.0)
    assert loss.detach().abs() < 1e-12 and torch.autograd.grad(loss, sources)[0].abs().max() < 1e-12
    rest = []
    for size in (0.1, 1.0, 50.0):  # only the term of position 0 may change with the feature of position 0
        targets = normal(2, 9, 4)
        targets[0, 0] = size
        score = 20 * torch.tanh(targets @ sources[0] / 2 / 20)
        term = torch.log1p(score[1].exp().sum() / score[0, 0].exp())
        rest.append(float((9 * nce(sources, targets, first=0, clip=20.0, penalty=0.0)[0] - term).detach()))
    assert rest == pytest.approx([rest[0]] * 3, rel=1e-12) and rest[0] > 1


def test_penalty_is_of_the_scores_before_clipping():
    """Where tanh is flat, the penalty still has a gradient, and it grows with the raw score."""
    sources, targets = torch.full((1, 4), 100.0, requires_grad=True), torch.full((3, 2, 4), 10.0)
    raw = 100 * 10 * 4 / math.sqrt(4)  # far beyond C = 20
    loss, parts = nce(sources, targets, first=0, clip=20.0, penalty=0.05)
    assert float(parts["score_rms"]) == pytest.approx(raw)
    assert float(loss.detach()) == pytest.approx(math.log(1 + 2 * 2) + 0.05 * raw**2, rel=1e-5)
    free = torch.autograd.grad(nce(sources, targets, first=0, clip=20.0, penalty=0.0)[0], sources)[0]
    held = torch.autograd.grad(loss, sources)[0]
    assert not free.any() and (held > 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_are_float32_and_do_not_overflow(scale):
    generator_ = torch.Generator().manual_seed(0)
    sources, targets = torch.randn(4, 8, generator=generator_), torch.randn(4, 25, 8, generator=generator_)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nce((scale * sources).bfloat16(), targets.bfloat16(), first=0, clip=20.0, penalty=0.05)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    exact = nce((scale * sources).bfloat16().double(), targets.bfloat16().double(), first=0, clip=20.0, penalty=0.05)
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=0)
    inputs = [x.requires_grad_() for x in (scale * sources, targets)]
    for clip in (20.0, 40.0):
        loss, _ = nce(*inputs, first=0, clip=clip, penalty=0.05)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("clip", [0.0, -1.0, 41.0])
def test_impossible_clips_are_refused(clip):
    with pytest.raises(UserError, match="--clip .* above 0 and up to 40"):
        nce(torch.zeros(2, 4), torch.zeros(2, 25, 4), first=0, clip=clip, penalty=0.0)


def test_effective_dimensions():
    line = normal(50, 1) * normal(1, 8, seed="d")
    assert float(effective_dimensions(line)) == pytest.approx(1, abs=1e-4)
    assert float(effective_dimensions(normal(4000, 8))) == pytest.approx(8, rel=0.05)
    assert torch.isfinite(effective_dimensions(torch.zeros(4, 3)))


def test_source_places_are_drawn_for_the_global_batch_and_both_views():
    places = draw_positions(0, 5, 4000)
    assert places.shape == (2, 4000) and torch.equal(places, draw_positions(0, 5, 4000))
    assert not torch.equal(places[0], places[1]) and not torch.equal(places, draw_positions(0, 6, 4000))
    assert places.min() == 0 and places.max() == 24 and places.flatten().bincount().min() > 250


# ---- network ---------------------------------------------------------------------------------------------------------

# size: what a 7x7, a 5x5 and the 1x1 feature see, the step between neighbors, the first feature's first pixel
SEEN = {32: (8, 16, 32, 4, 0), 64: (16, 32, 64, 8, 0), 128: (35, 67, 131, 16, -2)}


def alive(model: AMDIM, seed: int = 0) -> AMDIM:
    """Random numbers everywhere: at the start branches are zero and would hide what a convolution sees."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("size", SEEN)
@pytest.mark.parametrize("hidden_bn", [False, True])
def test_features_see_their_pixels_and_no_more(size, hidden_bn):
    """Every row and column outside a feature's window may change without a trace; the window's own edges may not."""
    model = alive(build(small(image_size=size, ndf=2, hidden_bn=hidden_bn))[0])
    image = normal(1, 3, size, size)
    noise = normal(1, 3, size, size, seed="n")
    *windows, step, start = SEEN[size]
    with torch.no_grad():
        f1, f5, f7 = model.embed(image)
        for places, window, features in ((7, windows[0], f7), (5, windows[1], f5), (1, windows[2], f1)):
            assert features.shape[1:] == ((places**2, 16) if places > 1 else (16,))
            for row, column in {(0, 0), (places - 1, 0), (places // 2, places // 2), (places - 1, places - 1)}:
                top, left = (start + step * i for i in (row, column))
                inside = torch.zeros(size, size, dtype=torch.bool)
                inside[max(top, 0) : top + window, max(left, 0) : left + window] = True

                def read(changed, row=row, column=column, places=places):
                    f1, f5, f7 = model.embed(changed)
                    return {1: f1, 5: f5, 7: f7}[places].view(places, places, -1)[row, column]

                before = read(image)
                assert torch.equal(read(torch.where(inside, image, noise)), before)
                edges = {
                    "top": (max(top, 0), None),
                    "bottom": (min(top + window, size) - 1, None),
                    "left": (None, max(left, 0)),
                    "right": (None, min(left + window, size) - 1),
                }
                for y, x in edges.values():
                    changed = image.clone()
                    edge = (
                        slice(None),
                        slice(None),
                        slice(y, y + 1) if y is not None else slice(None),
                        slice(x, x + 1) if x is not None else slice(None),
                    )
                    changed[edge] = noise[edge]
                    assert not torch.equal(read(changed), before)


@pytest.mark.parametrize("size", [32, 64])
def test_features_do_not_know_where_they_are(size):
    """Without padding a moved image gives the moved features, bit for bit of the arithmetic."""
    model = alive(build(small(image_size=size, ndf=2))[0])
    step = SEEN[size][3]
    wide = normal(1, 3, size, size + step)
    with torch.no_grad():
        _, f5, f7 = model.embed(wide[..., :size])
        _, moved5, moved7 = model.embed(wide[..., step:])
    for places, still, moved in ((5, f5, moved5), (7, f7, moved7)):
        still, moved = (f.view(places, places, -1) for f in (still, moved))
        torch.testing.assert_close(still[:, 1:], moved[:, :-1])


@pytest.mark.parametrize("preset", PRESETS)
def test_encoders_of_all_presets_have_the_tabulated_form(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, spec = build(cfg)
        f1, map5, map7 = model.backbone.features(torch.empty(2, 3, cfg.image_size, cfg.image_size))
    times = 4 if cfg.image_size == 32 else 8
    assert f1.shape == (2, cfg.n_rkhs) and model.backbone.num_features == cfg.n_rkhs
    assert map5.shape == (2, times * cfg.ndf, 5, 5) and map7.shape == (2, times * cfg.ndf, 7, 7)
    units = [m for m in model.modules() if isinstance(m, Unit)]
    blocks = 4 if cfg.image_size == 32 else 5
    assert len(units) == blocks * cfg.n_depth + 1 + (cfg.image_size == 32)
    assert sum(u.kernel > 1 for u in units) == blocks + 1  # depth comes from 1x1 units
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3  # f1, f5 and f7 end in one, nothing else has any
    assert json.loads(json.dumps(spec.arguments)) == spec.arguments


def test_large_encoder_has_the_published_number_of_parameters():
    """626 million (SimCLR's table of methods): the ImageNet encoder without its embeddings."""
    with torch.device("meta"):
        model, _ = build(PRESETS["imagenet-128"][1])
    assert round(sum(p.numel() for p in model.backbone.parameters()) / 1e6) == 626


def test_units_and_embeddings_as_stated():
    torch.manual_seed(0)
    unit, x = Unit(3, 8, 4, 2), normal(2, 3, 14, 14).float()
    pooled = F.pad(F.avg_pool2d(x, 4, 2), (0, 0, 0, 0, 0, 5))
    assert torch.equal(unit(x), pooled)  # the branch starts at zero
    torch.nn.init.normal_(unit.conv2.weight)
    torch.testing.assert_close(unit(x), unit.conv2(F.relu(unit.conv1(x))) + pooled)
    assert (unit(x) < 0).any()  # no activation after the sum
    assert unit.conv1.bias is None and unit.conv2.bias is None and isinstance(unit.bn, torch.nn.Identity)
    bound = 1 / math.sqrt(3 * 16)  # kaiming_uniform, a = sqrt 5
    assert 0.9 * bound < unit.conv1.weight.abs().max() <= bound
    assert isinstance(Unit(3, 8, hidden_bn=True).bn, torch.nn.BatchNorm2d)
    embedding = Embedding(6, 10)
    weight = embedding.shortcut.weight[:, :, 0, 0].detach()
    assert torch.equal(weight[:6].diagonal(), torch.ones(6)) and embedding.shortcut.bias is not None
    off = weight[~torch.eye(10, 6, dtype=torch.bool)]
    assert off.abs().max() <= 0.01 and off.std() > 0.004 and not embedding.conv2.weight.any()
    x = normal(3, 6, 5, 5).float()
    embedding.eval()
    torch.testing.assert_close(embedding(x), embedding.shortcut(x) / math.sqrt(1 + 1e-5))
    embedding.train()
    out = embedding(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(10), rtol=0, atol=1e-5)


def test_evaluation_sees_f1_alone_and_can_rebuild_it(tmp_path):
    torch.manual_seed(0)
    model, spec = build(small())
    images = torch.rand(4, 3, 32, 32)
    model.train()(images, images)  # statistics move
    model.eval()
    export_backbone(tmp_path, model.backbone, spec)
    loaded, found = load_backbone(tmp_path)
    assert torch.equal(loaded(images), model.embed(images)[0]) and found.arguments == spec.arguments
    assert multiply_adds(create_backbone(spec), 32) < multiply_adds(model.backbone, 32) + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=96), "--image-size 96: .* forms for 32, 64, 128 pixels"),
        (dict(n_depth=0), "--n-depth 0: a block has at least one unit"),
        (dict(ndf=5), "--n-rkhs 16 is narrower than the 20 channels before it .4 times --ndf"),
    ],
)
def test_impossible_encoders_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        build(small(**changes))


def test_images_of_another_size_are_refused():
    """A 96-px image in the 64-px encoder would not end in one feature."""
    with pytest.raises(UserError, match="for 64 x 64 pixels, not 96 x 96"):
        Encoder(64, 2, 16, 1)(torch.zeros(1, 3, 96, 96))


def test_batchnorm_takes_each_view_by_itself():
    model = build(small())[0].train()
    views = torch.rand(2, 6, 3, 32, 32)
    f1, f5, f7, _ = model(views[0], 3 * views[1] - 1)
    torch.testing.assert_close(f1.mean(1), torch.zeros(2, 16), rtol=0, atol=1e-4)
    for view, image in enumerate((views[0], 3 * views[1] - 1)):
        for ours, theirs in zip((f1, f5, f7), model.embed(image), strict=True):
            torch.testing.assert_close(ours[view], theirs)


# ---- views -----------------------------------------------------------------------------------------------------------


def colorful(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=generator("views"), dtype=torch.uint8)


def plain_views(size: int, translate: int, **changes) -> ViewRecipe:
    """Views that only move or crop, but for `changes`; inputs in [0, 1]."""
    plain = {"color_jitter": (0.0,) * 4, "color_jitter_prob": 0.0, "grayscale": 0.0, "normalize": "none"}
    return two_views(small(image_size=size, translate=translate, **{**plain, **changes}))


def slowly_moved(image, down, right):
    """One pixel at a time; what lies outside is mirrored in the border pixel."""
    out = torch.empty_like(image)
    last = image.shape[-1] - 1
    for y in range(last + 1):
        for x in range(last + 1):
            a, b = y + down, x + right
            out[:, y, x] = image[:, last - abs(last - abs(a)), last - abs(last - abs(b))]
    return out


@pytest.mark.parametrize("form", [dict(), dict(_form="accelerator"), dict(_crop="native"), "worker"])
def test_translations_are_whole_pixels_with_reflected_borders(form):
    recipe = plain_views(32, 4)
    worker = form == "worker"
    recipe = ViewRecipe(recipe.views, shared=recipe.shared, **({} if worker else form))
    images = colorful(24)
    params = recipe.sample(24, generator("moves"))
    if worker:
        crops = [recipe.crop_one(image, params, i) for i, image in enumerate(images)]
        views = recipe.finish([torch.stack(view) for view in zip(*crops, strict=True)], params)
    else:
        views = recipe(images, params)
    moves = crop_boxes(params, recipe.views, 32, 32)
    assert (moves[..., 2:] == 32).all() and moves[..., :2].abs().max() <= 4
    assert not torch.equal(moves[:, 0], moves[:, 1])
    for v, view in enumerate(views):
        for i, image in enumerate(images):
            expected = slowly_moved(image, *moves[i, v, :2].long().tolist())
            expected = expected.flip(-1) if params.columns.flip[i, v] else expected
            torch.testing.assert_close(view[i], expected / 255, rtol=0, atol=2e-6)


def test_translations_are_uniform_and_happen_with_their_probability():
    recipe = plain_views(32, 4)
    params = recipe.sample(20_000, generator("frequencies"))
    moves = crop_boxes(params, recipe.views, 32, 32)[..., :2]
    moved = params.columns.translated > 0
    assert float(moved.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert not moves[~moved].any()
    for axis in (0, 1):
        counts = (moves[moved][:, axis] + 4).long().bincount(minlength=9) / moved.sum()
        assert (counts - 1 / 9).abs().max() < 0.01
    assert float(torch.corrcoef(moves[moved].T)[0, 1]) == pytest.approx(0, abs=0.02)  # axes are independent


def test_one_flip_an_image_and_all_else_apart():
    """The flip is the first view's; every other random number is per view."""
    recipe = plain_views(32, 0, color_jitter=(0.4,) * 4, color_jitter_prob=0.8, grayscale=0.25)
    params = recipe.sample(4000, generator("flips"))
    assert torch.equal(params.columns.flip[:, 0], params.columns.flip[:, 1])
    assert float(params.columns.flip.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(params.columns.grayscale.mean()) == pytest.approx(0.25, abs=0.02)
    for name in ("top", "left", "brightness", "hue", "color_jitter_prob", "grayscale", "area", "order"):
        column = getattr(params.columns, name)
        pair = column if column.ndim > 2 else column[..., None]
        assert abs(float(torch.corrcoef(torch.stack((pair[:, 0, 0], pair[:, 1, 0])))[0, 1])) < 0.06, name
    free = ViewRecipe(recipe.views).sample(4000, generator("flips"))
    for name in set(Columns._fields) - {"flip"}:  # sharing changes nothing else
        assert torch.equal(getattr(free.columns, name), getattr(params.columns, name)), name
    assert not torch.equal(free.columns.flip[:, 0], free.columns.flip[:, 1])
    assert "the same for all views of an image: flip" in recipe.describe()


def test_numbers_of_earlier_recipes_are_what_they_were():
    """The 33 columns that every method's results were made with come first from the stream."""
    view = View(32, flip=0.0)
    columns = ViewRecipe([view, view]).sample(6, generator("old")).columns
    drawn = torch.rand(6, 2, 33, generator=generator("old"))
    assert torch.equal(columns.top, drawn[..., 20]) and torch.equal(columns.left, drawn[..., 21])


def test_a_ranks_slice_gives_its_views():
    recipe = plain_views(32, 4, color_jitter=(0.4, 0.4, 0.4, 0.2), color_jitter_prob=0.8, grayscale=0.25)
    images = colorful(8)
    params = recipe.sample(8, generator("ranks"))
    whole = recipe(images, params)
    for part in (slice(0, 4), slice(4, 8)):
        for ours, view in zip(recipe(images[part], params[part]), whole, strict=True):
            torch.testing.assert_close(ours, view[part])


def test_impossible_translations_and_shared_names_are_refused():
    with pytest.raises(UserError, match="translations by 4 px are too much for an image of 4 px"):
        recipe = ViewRecipe([View(4, translate=4)])
        recipe(colorful(2, 4), recipe.sample(2, generator("x")))
    with pytest.raises(UserError, match="translate must be 0 or a positive number of pixels, not -1"):
        View(32, translate=-1)
    with pytest.raises(UserError, match="translated must be a probability"):
        View(32, translated=2.0)
    with pytest.raises(UserError, match="turn cannot be shared: choose from area,.* flip,"):
        ViewRecipe([View(32)], shared=("turn",))


def test_views_of_the_presets_equal_the_reference():
    cifar, stl, imagenet = (PRESETS[name][1] for name in ("cifar10", "stl10", "imagenet-128"))
    assert (cifar.translate, stl.translate, imagenet.translate) == (4, 0, 0)
    assert cifar.color_jitter == stl.color_jitter == (0.4, 0.4, 0.4, 0.2) and imagenet.color_jitter == (
        0.4,
        0.4,
        0.4,
        0.1,
    )
    assert {(c.color_jitter_prob, c.grayscale, c.crop_scale) for c in (cifar, stl, imagenet)} == {
        (0.8, 0.25, (0.3, 1.0))
    }
    assert statistics(cifar.normalize)[0] == (125.3 / 255, 123.0 / 255, 113.9 / 255)
    assert statistics(cifar.normalize)[1] == (63.0 / 255, 62.1 / 255, 66.7 / 255)
    assert statistics(stl.normalize) == ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27))
    with pytest.raises(UserError, match="--normalize nobody"):
        statistics("nobody")
    crop = plain_views(64, 0).views[0]
    assert (crop.ratio, crop.interpolation, crop.flip) == ((0.7, 1.4), "bicubic", 0.5)
    assert plain_views(32, 4).views[0].translated == 0.8


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(dtype: torch.dtype, batch: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and BatchNorm buffers of one step on this process's part of a fixed global batch, as train.py."""
    torch.manual_seed(0)
    cfg = small(hidden_bn=True)
    model = build(cfg, classes=3)[0]
    for parameter in model.parameters():  # zero branches would have zero gradients behind them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(dtype).train()
    n = batch // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    views = normal(2, batch, 3, 32, 32, seed="ranks").to(dtype)[:, part]
    noise = torch.rand(2, batch, cfg.n_rkhs + Probes.hidden, generator=generator("probes"))[:, part].flatten(0, 1)
    labels = (torch.arange(batch) % 4 - 1)[part]  # some without a label, unequally many per process
    trained = sync_batchnorm(model)
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    loss, _ = compute_loss(trained, views, draw_positions(0, 3, batch)[:, part], cfg, noise, labels)
    loss.backward()
    loss = loss.detach()
    if world_size() > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / world_size()
    found = {"loss": loss} | {n: p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    """Global negatives through a gather with gradient, shared source positions and dropout, synchronized BatchNorm."""
    one = gradients(torch.float64, 8)
    assert all(value is not None and value.abs().max() > 0 for value in one.values()) and len(one) > 40
    # Constants added before a BatchNorm have no gradient but rounding: nothing is smaller than a millionth of the rest.
    floor = 1e-6 * max(float(value.abs().max()) for name, value in one.items() if "running" not in name)
    for many in run_ranks(gradients, ranks, torch.float64, 8):
        assert many.keys() == one.keys()
        for name, value in one.items():
            worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(floor)
            assert worst < 1e-9, (name, worst)


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_probe_loss_equals_the_formula():
    logits = tuple(normal(6, 4, seed=name, scale=8.0).requires_grad_() for name in ("linear", "mlp"))
    labels = torch.tensor([2, -1, 0])
    loss, parts = probe_loss(logits, labels)
    expected = 0.0
    for raw in logits:
        rows = [(i, y) for i, y in enumerate([2, -1, 0] * 2) if y >= 0]
        for i, y in rows:
            clipped = 10 * torch.tanh(raw[i] / 10)
            expected = expected + (torch.log(clipped.exp().sum()) - clipped[y]) / len(rows)
        expected = expected + 1e-3 * (raw**2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(loss, expected, logits)
    right = sum(int(logits[0][i].argmax()) == y for i, y in [(0, 2), (2, 0), (3, 2), (5, 0)])
    assert float(parts["online_linear"]) == pytest.approx(100 * right / 4)
    assert torch.isfinite(probe_loss(logits, torch.full((3,), -1))[0])


def test_probes_do_not_touch_the_encoder_and_drop_what_they_are_told():
    torch.manual_seed(0)
    model = build(small(), classes=3)[0].train()
    images, noise = torch.rand(2, 4, 3, 32, 32), torch.rand(8, 16 + Probes.hidden)
    _, _, _, logits = model(*images, noise)
    probe_loss(logits, torch.tensor([0, 1, 2, -1]))[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("probes"), name
    probes, f1 = model.probes, torch.rand(8, 16)
    linear, mlp = probes(f1, noise)
    kept = (noise >= 0.2).float() / 0.8
    hidden = F.relu(probes.bn(probes.first(f1 * kept[:, :16]))) * kept[:, 16:]
    torch.testing.assert_close(mlp, probes.second(hidden))
    torch.testing.assert_close(linear, probes.linear(f1))  # the linear probe has no dropout
    probes.eval()
    assert torch.equal(probes(f1, noise)[1], probes(f1)[1])


def test_online_probes_leave_the_encoders_training_as_it_is(tmp_path):
    """The same losses with and without: labels teach the probes alone, and their numbers are called online."""
    lines = []
    for name, flags in (("without", ()), ("with", ("--online-probes",))):
        arguments = ("smoke", "--out", tmp_path, "--name", name, "--no-eval", "--max-steps", 6, *flags)
        code, text = run_command("methods.amdim.train", *arguments, log=tmp_path / "log")
        assert code == 0, text
        lines.append([line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line])
    for before, after in zip(*lines, strict=True):
        assert before["loss"] == after["loss"] and after["online_linear"] > 0 and "online_mlp" not in before


def test_unlabeled_images_are_trained_on_and_probes_see_the_labeled_ones(tmp_path):
    from tests.test_data import make_parquet

    data = make_parquet(tmp_path / "stl", {"train": 30, "unlabeled": 50, "test": 20}, size=32)
    arguments = ("smoke", "--data", data, "--split", "train+unlabeled", "--epochs", 1, "--eval-protocols", "knn")
    code, text = run_command("methods.amdim.train", *arguments, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0, text
    record = json.loads((tmp_path / "amdim-smoke" / "config.json").read_text())["data"]
    assert {use: part["images"] for use, part in record.items()} == {
        "training images": 80,
        "probed images": 30,
        "test images": 20,
    }


def test_online_probes_without_labels_are_refused(tmp_path):
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    flags = ("--data", tmp_path, "--no-eval", "--online-probes", "--batch-size", 4, "--limit", 0)
    code, text = run_command("methods.amdim.train", "smoke", "--out", tmp_path / "out", *flags, log=tmp_path / "log")
    assert code == 2 and "--online-probes needs labels" in text and "Traceback" not in text


# ---- schedule, held-out images, presets ------------------------------------------------------------------------------


def test_rate_warms_up_over_500_updates_and_falls_at_the_milestones():
    cfg = PRESETS["cifar10"][1]
    assert (cfg.lr, cfg.betas, cfg.weight_decay, cfg.warmup_steps) == (2e-4, (0.8, 0.999), 1e-5, 500)
    assert (cfg.epochs, cfg.batch_size, cfg.milestones) == (300, 200, (250, 280))
    rates = {step: learning_rate(step, cfg, 250) for step in (0, 249, 499, 500, 250 * 250 - 1, 250 * 250, 280 * 250)}
    expected = (2e-4 / 500, 1e-4, 2e-4, 2e-4, 2e-4, 4e-5, 8e-6)
    assert list(rates.values()) == pytest.approx(expected)
    assert learning_rate(0, replace(cfg, warmup_steps=0), 250) == 2e-4


def test_presets_equal_the_reference():
    sizes = {name: (c.image_size, c.ndf, c.n_rkhs, c.n_depth, c.batch_size) for name, (_, c) in PRESETS.items()}
    assert sizes["cifar10"] == (32, 128, 1024, 3, 200) and sizes["cifar10-large"] == (32, 320, 1280, 10, 200)
    assert sizes["stl10"] == (64, 192, 1536, 8, 200) and sizes["imagenet-128"][:4] == (128, 320, 2560, 10)
    # code datasets.py: STL-10's 5,000 labeled and 100,000 unlabeled images, the only data with a split of such images
    assert {name: c.split for name, (_, c) in PRESETS.items() if c.split != "train"} == {"stl10": "train+unlabeled"}
    imagenet = PRESETS["imagenet-128"][1]
    assert (imagenet.epochs, imagenet.milestones) == (50, (30, 45))
    for cfg in (c for name, (_, c) in PRESETS.items() if name in ("cifar10", "cifar10-large", "stl10", "imagenet-128")):
        assert (cfg.clip, cfg.penalty, cfg.hidden_bn, cfg.lr) == (20.0, 0.05, False, 2e-4)


def test_quickstart_is_small_enough():
    model, _ = build(PRESETS["quickstart"][1])
    embeddings = sum(
        p.numel() * places
        for e, places in ((model.embed5, 25), (model.embed7, 49))
        for p in e.parameters()
        if p.ndim == 4
    )
    assert multiply_adds(model.backbone, 32) + embeddings < 6e6


def test_held_out_images_are_read_in_eval_mode_and_cost_no_draw(tmp_path):
    cfg = small(batch_size=32)
    torch.manual_seed(0)
    model = build(cfg)[0].train()
    test = open_data("shapes", "test", limit=100, image_size=32, device="cpu")
    recipe = plain_views(32, 0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    found, again = (held_out(model, test, recipe, cfg, torch.device("cpu")) for _ in range(2))
    assert found == again and (found["images"], found["batch"]) == (96, 32) and model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    title, html = held_out_section(found)
    assert "held-out" in title and f"{found['retrieval']:.4g}" in html and "96 test images" in html
