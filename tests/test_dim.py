"""Deep InfoMax: estimators against slow loops, the official code's faults absent, networks, prior, runs, report."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from common.backbones import create_backbone, custom_encoder_spec, export_backbone, load_backbone, multiply_adds
from common.data import open_data
from common.distributed import rank, sync_batchnorm, world_size
from common.errors import UserError
from common.log import read_metrics
from common.rng import generator
from eval.features import extract_features
from eval.linear import linear_probe
from eval.load import random_init
from methods.dim.augment import one_view
from methods.dim.config import PRESETS, PUBLISHED, Config
from methods.dim.health import check
from methods.dim.layers import LayerReport, held_out_retrieval, mlp_probe
from methods.dim.loss import (
    ESTIMATORS,
    chance_level,
    discriminator_loss,
    fooling_loss,
    information_loss,
    retrieval,
    scores,
)
from methods.dim.model import DIM, LAYOUTS, Discriminator, Encoder, ScoreBlock, map_size
from methods.dim.train import compute_loss
from tests.processes import run_command, run_ranks
from tests.test_compare import make_card

TINY = dict(width=0.0625, y_dim=5)  # 4-8-16 channels, 64


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n: int = 8, size: int = 32, seed: int = 1) -> torch.Tensor:
    return random(n, 3, size, size, seed=seed)


# ---- estimators ------------------------------------------------------------------------------------------------------


def slow_loss(summaries, parts, estimator):
    """The definitions, one score at a time."""
    n, locations = parts.shape[:2]
    u = lambda i, j, p: summaries[i] @ parts[j, p]  # noqa: E731
    own = [(i, p) for i in range(n) for p in range(locations)]
    others = [(i, j, p) for i in range(n) for j in range(n) for p in range(locations) if i != j]
    if estimator == "jsd":
        positive = sum(torch.log(1 + torch.exp(-u(i, i, p))) for i, p in own) / len(own)
        return positive + sum(torch.log(1 + torch.exp(u(*where))) for where in others) / len(others) - 2 * math.log(2)
    if estimator == "dv":
        mean = sum(torch.exp(u(*where)) for where in others) / len(others)
        return torch.log(mean) - sum(u(i, i, p) for i, p in own) / len(own)
    total = 0.0
    for i, p in own:
        negatives = sum(torch.exp(u(i, j, k)) for j in range(n) if j != i for k in range(locations))
        total = total - torch.log(torch.exp(u(i, i, p)) / (torch.exp(u(i, i, p)) + negatives))
    return total / len(own)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("n", "locations"), [(2, 1), (3, 4), (6, 5)])
def test_loss_and_gradient_equal_the_slow_version(estimator, n, locations):
    data = [random(n, 7, seed=2).requires_grad_(), random(n, locations, 7, seed=3).requires_grad_()]
    loss, told = information_loss(*data, estimator)
    expected = slow_loss(*data, estimator)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, data), torch.autograd.grad(expected, data), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    x, places = (value.detach() for value in data)
    u = [[[float(x[i] @ places[j, p]) for p in range(locations)] for j in range(n)] for i in range(n)]
    hits = [u[i][i][p] == max(u[i][j][p] for j in range(n)) for i in range(n) for p in range(locations)]
    assert float(told["retrieval"]) == pytest.approx(sum(hits) / len(hits))
    positive = [x for i in range(n) for x in u[i][i]]
    negative = [x for i in range(n) for j in range(n) if i != j for x in u[i][j]]
    assert float(told["positive"]) == pytest.approx(sum(positive) / len(positive))
    assert float(told["negative"]) == pytest.approx(sum(negative) / len(negative))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chance_level_is_the_loss_of_equal_scores(estimator):
    loss, _ = information_loss(torch.zeros(6, 3), torch.randn(6, 4, 3), estimator)
    assert float(loss) == pytest.approx(chance_level(estimator, 6, 4), abs=1e-6)
    assert chance_level("infonce", 6, 4) == pytest.approx(math.log(21))  # itself and 5 images x 4 places


def test_own_pairs_are_masked_by_infinity():
    """The code masks self-pairs by a score of -10, which competes as soon as true scores are lower, and
    with a mask of [N, N] on four dimensions for dv. Here pairs of the same image are excluded for any scores."""
    summaries = torch.full((4, 1), 1.0, dtype=torch.float64)
    parts = torch.full((4, 3, 1), -50.0, dtype=torch.float64)  # every score is -50, far below -10
    loss, _ = information_loss(summaries, parts, "infonce")
    assert float(loss) == pytest.approx(math.log(1 + 3 * 3), rel=1e-12)  # a mask of -10 would make it about 40
    loss, _ = information_loss(summaries, parts, "dv")
    assert float(loss) == pytest.approx(0.0, abs=1e-12)
    parts[0] = 900.0  # one image scores high with all: exp overflows unless the maximum is taken out
    for estimator in ESTIMATORS:
        assert torch.isfinite(information_loss(summaries, parts, estimator)[0])


def test_own_other_places_are_no_negatives():
    summaries, parts = random(3, 4, seed=4), random(3, 5, 4, seed=5)
    u = scores(summaries, parts)
    assert u.shape == (3, 3, 5) and float(u[1, 2, 3]) == pytest.approx(float(summaries[1] @ parts[2, 3]))
    # If they were, raising the score of one position would cost the other positions of its image: here it does not.
    # With one position far above all others, the image's term is 0 there and unaffected elsewhere.
    raised = parts.clone()
    raised[0, 0] += 100 * summaries[0]
    before, after = (information_loss(summaries, p, "infonce")[0] for p in (parts, raised))
    rest = [torch.logaddexp(u[0, 0, p], u[0, 1:].logsumexp((0, 1))) - u[0, 0, p] for p in range(5)]
    elsewhere = [(i, p) for i in (1, 2) for p in range(5)]
    v = scores(summaries, raised)
    expected = sum(rest[1:])  # the raised place itself: 0
    for i, p in elsewhere:
        others = torch.cat([v[i, j] for j in range(3) if j != i]).logsumexp(0)
        expected = expected + torch.logaddexp(v[i, i, p], others) - v[i, i, p]
    torch.testing.assert_close(after, expected / 15)
    assert before != after


def test_local_loss_is_a_mean_over_places():
    """Twice the same positions is the same loss (jsd, dv): a sum would weigh local against prior by 64."""
    summaries, parts = random(4, 3, seed=6), random(4, 5, 3, seed=7)
    for estimator in ("jsd", "dv"):
        once, twice = (information_loss(summaries, p, estimator)[0] for p in (parts, torch.cat([parts, parts], 1)))
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_is_float32_under_autocast(estimator):
    summaries, parts = torch.randn(4, 16).bfloat16(), torch.randn(4, 3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = information_loss(summaries, parts, estimator)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, information_loss(summaries.float(), parts.float(), estimator)[0])


def test_unknown_estimator():
    with pytest.raises(ValueError, match="unknown estimator 'nce': jsd, dv, infonce"):
        information_loss(torch.randn(2, 3), torch.randn(2, 1, 3), "nce")


def test_estimates_rank_by_information():
    """A critic that is right earns more the more two variables share, under every estimator."""
    noise, x = random(256, 8, seed=8, scale=0.5), random(256, 8, seed=9, scale=0.5)
    for estimator in ESTIMATORS:
        levels = [
            float(information_loss(x, (share * x + (1 - share) * noise).unsqueeze(1), estimator)[0])
            for share in (0.0, 0.5, 1.0)
        ]
        assert levels[0] > levels[1] > levels[2], estimator


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "size", "local", "conv", "fc"),
    [
        ("basic32", 32, (128, 8, 8), (256, 4, 4), 1024),
        ("alex64", 64, (384, 15, 15), (192, 7, 7), 4096),
    ],
)
def test_layers_have_the_papers_shapes(layout, size, local, conv, fc):
    with torch.device("meta"):
        encoder = Encoder(layout=layout, image_size=size)
        layers = encoder.layers(torch.empty(2, 3, size, size))
    assert [tuple(x.shape[1:]) for x in layers] == [local, conv, (fc,), (64,)]
    plan = LAYOUTS[layout]
    assert map_size(plan, size, plan.local) == local[1] and map_size(plan, size, len(plan.convs)) == conv[1]


@pytest.mark.parametrize("output", ["conv", "fc", "y"])
def test_encoder_exports_the_layer_it_is_asked_for(output, tmp_path):
    torch.manual_seed(0)
    spec = custom_encoder_spec(Encoder, arguments=dict(TINY, output=output, grayscale=True), image_size=32)
    encoder = create_backbone(spec).eval()
    with torch.no_grad():
        x = images(3).float()
        features, layers = encoder(x), encoder.layers(x)
        assert features.shape == (3, encoder.num_features) and torch.equal(features, getattr(layers, output).flatten(1))
        assert multiply_adds(encoder, 32) > 0
        export_backbone(tmp_path, encoder, spec)
        assert torch.equal(load_backbone(tmp_path)[0](x), features)
    assert layers.y.min() < 0  # before the sigmoid


def test_local_map_is_the_second_convolution_with_its_receptive_field():
    """10 px at stride 4: the third convolution would see 22. In eval mode: BatchNorm couples positions."""
    torch.manual_seed(0)
    encoder = Encoder(**TINY).double().eval()
    x = images(1).requires_grad_()
    local = encoder.layers(x).local
    assert local.shape[-2:] == (8, 8)
    seen = torch.zeros(32, 32, dtype=torch.bool)
    for channel in range(local.shape[1]):
        seen |= torch.autograd.grad(local[0, channel, 3, 4], x, retain_graph=True)[0][0].any(0)
    rows, columns = (dims.nonzero().flatten() for dims in (seen.any(1), seen.any(0)))
    assert (int(rows.min()), int(rows.max())) == (9, 18) and (int(columns.min()), int(columns.max())) == (13, 22)
    changed = x.detach().clone()
    changed[..., :9, :] += 1.0
    changed[..., 19:, :] -= 1.0
    after = encoder.layers(changed).local
    assert torch.equal(after[0, :, 3], local[0, :, 3]) and not torch.equal(after, local)


def test_gray_encoder_sees_luminance_alone():
    torch.manual_seed(0)
    encoder = Encoder(**TINY, grayscale=True).double().eval()
    x = images(2)
    shift = torch.tensor([1.0, -0.2989 / 0.587, 0.0]).view(1, 3, 1, 1)  # changes colors, not luminance
    torch.testing.assert_close(encoder(x + shift), encoder(x))
    plain = Encoder(**TINY).double().eval()
    assert (plain(x + shift) - plain(x)).abs().max() > 1e-3


def test_contrast_encoder_does_not_see_an_images_level_and_range():
    torch.manual_seed(0)
    encoder = Encoder(**TINY, contrast=True).double().eval()
    x = images(2)
    torch.testing.assert_close(encoder(100 * x + 7), encoder(100 * x))
    torch.testing.assert_close(encoder(1000 * x), encoder(100 * x), rtol=1e-3, atol=1e-3)
    two = torch.cat([100 * x[:1], 1000 * x[1:]])  # each image its own
    torch.testing.assert_close(encoder(two), encoder(100 * x), rtol=1e-3, atol=1e-3)
    assert (encoder(100 * x) - encoder(-100 * x)).abs().max() > 1e-3
    assert torch.isfinite(encoder(torch.ones_like(x))).all()


def test_score_block_is_the_code_with_1x1_convolutions():
    torch.manual_seed(0)
    block = ScoreBlock(6, 10).double().train()
    x = random(4, 6, 3, 3, seed=10)  # [N, d, M, M]
    first, norm, _, second = block.block
    conv = torch.nn.functional.conv2d
    hidden = torch.nn.functional.batch_norm(conv(x, first.weight[..., None, None]), None, None, training=True).relu()
    hidden = conv(hidden, second.weight[..., None, None], second.bias) + conv(x, block.shortcut.weight[..., None, None])
    expected = torch.nn.functional.layer_norm(hidden.permute(0, 2, 3, 1), (10,)).flatten(1, 2)  # [N, L, U]
    torch.testing.assert_close(block(x.flatten(2).transpose(1, 2)), expected)
    assert first.bias is None and block.shortcut.bias is None
    weight = block.shortcut.weight
    assert (weight.diagonal() == 1).all() and (weight - torch.eye(10, 6).double()).abs().max() <= 0.01


def dim_of(terms=("local", "global"), **changes) -> DIM:
    torch.manual_seed(0)
    return DIM(Encoder(**{**TINY, **changes}), 16, terms).double()


def test_terms_have_their_networks_and_no_others():
    y, pairs = dim_of()(images(4))
    assert y.shape == (4, 5) and list(pairs) == ["local", "global"]
    assert pairs["local"].parts.shape == (4, 64, 16) and pairs["global"].parts.shape == (4, 1, 16)
    for term in ("local", "global"):
        model = dim_of((term,))
        _, pairs = model(images(4))
        assert list(pairs) == [term]
        information_loss(*pairs[term], "jsd")[0].backward()
        assert all(p.grad is not None for p in model.parameters())  # none unused: DistributedDataParallel would stop
    tail = dim_of(("global",)).global_parts
    assert tail[0][0].in_channels == 8 and tail[-1].out_features == 16  # the encoder's layers after the local map


# ---- prior -----------------------------------------------------------------------------------------------------------


def test_discriminator_loss_penalizes_every_sample():
    """The code's penalty takes the gradient of the last sample's output alone, so it weighs 1 / B."""
    torch.manual_seed(0)
    discriminator = Discriminator(4, (8, 6)).double()
    prior, codes = random(5, 4, seed=13).sigmoid(), random(5, 4, seed=14).sigmoid()
    loss, told = discriminator_loss(discriminator, prior, codes, 0.7)
    expected, penalty = 0.0, 0.0
    for sample, real in [(x, True) for x in prior] + [(x, False) for x in codes]:
        x = sample.clone().requires_grad_()
        logit = discriminator(x.unsqueeze(0))[0]
        expected = expected + softplus(-logit if real else logit, threshold=100) / 5
        (gradient,) = torch.autograd.grad(logit, x, create_graph=True)
        assert gradient.square().sum() > 0
        penalty = penalty + 0.5 * gradient.square().sum() / 5
    torch.testing.assert_close(told["gradient_penalty"], penalty.detach())
    parameters = list(discriminator.parameters())
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected + 0.7 * penalty, parameters)
    torch.testing.assert_close(loss, expected + 0.7 * penalty)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    logits = discriminator(torch.cat([prior, codes]))
    right = (logits[:5] > 0).double().mean() / 2 + (logits[5:] < 0).double().mean() / 2
    assert float(told["discriminator_accuracy"]) == pytest.approx(float(right))


def test_discriminator_and_encoder_have_gradients_of_their_own():
    discriminator = Discriminator(4).double()
    assert [m.out_features for m in discriminator.layers if isinstance(m, torch.nn.Linear)] == [1000, 200, 1]
    codes = random(6, 4, seed=15).sigmoid().requires_grad_()
    discriminator_loss(discriminator, random(6, 4).sigmoid(), codes, 1.0)[0].backward()
    assert codes.grad is None and all(p.grad is not None for p in discriminator.parameters())
    logits = torch.tensor([-3.0, 0.5], dtype=torch.float64, requires_grad=True)
    loss = fooling_loss(torch.nn.Identity(), logits)
    assert float(loss.detach()) == pytest.approx((math.log1p(math.exp(3)) + math.log1p(math.exp(-0.5))) / 2)
    loss.backward()
    assert logits.grad[0] < -0.47  # non-saturating: strongest where the discriminator is sure
    assert float(fooling_loss(torch.nn.Identity(), torch.zeros(3))) == pytest.approx(math.log(2))


def test_prior_moves_codes_to_the_uniform():
    """Numbers that start near 1/2 are spread over [0, 1] by the two losses alone."""
    torch.manual_seed(0)
    y = (0.1 * torch.randn(256, 2)).requires_grad_()
    discriminator = Discriminator(2, (64, 32))
    optimizers = torch.optim.Adam([y], 0.02), torch.optim.Adam(discriminator.parameters(), 3e-3)
    for step in range(400):
        prior = torch.rand(256, 2, generator=generator("prior", step))
        loss, _ = discriminator_loss(discriminator, prior, y.sigmoid(), 1.0)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        fooling_loss(discriminator, y.sigmoid()).backward()
        optimizers[0].step()
    spread = y.sigmoid().std(0)
    assert (spread > 0.2).all()  # the uniform's is 0.289; it starts at 0.025


# ---- several processes -----------------------------------------------------------------------------------------------


def step_of_a_rank(estimator: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses, gradients and BatchNorm buffers of a step of train.py on this process's part of 8 images, with prior."""
    model = dim_of().to(dtype).train()
    discriminator = Discriminator(5, (12, 8)).to(dtype)
    n = 8 // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    prior = torch.rand(8, 5, generator=generator("prior"), dtype=torch.float64).to(dtype)[part]
    trained, judge = sync_batchnorm(model), discriminator
    if world_size() > 1:
        trained, judge = DistributedDataParallel(trained), DistributedDataParallel(discriminator)
    loss, parts, y = compute_loss(trained, images().to(dtype)[part], replace(Config(), alpha=1.0, estimator=estimator))
    found = {"loss": loss} | {name: value for name, value in parts.items() if name.endswith("_loss")}
    codes = y.sigmoid()
    found["loss d"], _ = discriminator_loss(judge, prior, codes, 1.0)
    found["loss d"].backward()
    grads = {f"d {n}": p.grad.clone() for n, p in discriminator.named_parameters()}
    found["loss prior"] = fooling_loss(discriminator, codes)
    (loss + 0.1 * found["loss prior"]).backward()
    found = {name: value.detach().clone() for name, value in found.items()}
    if world_size() > 1:
        for value in found.values():
            torch.distributed.all_reduce(value)
            value /= world_size()
    grads |= {n: p.grad for n, p in model.named_parameters()}
    return found | grads | {n: b.clone() for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(estimator, ranks):
    one = step_of_a_rank(estimator, torch.float64)
    for many in run_ranks(step_of_a_rank, ranks, estimator, torch.float64):
        assert_same(many, one, 1e-9)


def test_processes_equal_one_in_float32():
    one = step_of_a_rank("dv", torch.float32)
    assert_same(run_ranks(step_of_a_rank, 2, "dv", torch.float32)[1], one, 1e-3)


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) > 40
    largest = max(value.abs().max() for name, value in theirs.items() if "loss" not in name)
    for name, value in theirs.items():
        # A bias before a norm has no gradient but rounding: measured against the largest gradient, too.
        worst = (ours[name] - value).abs().max() / torch.maximum(value.abs().max(), 1e-3 * largest)
        assert worst < tolerance, (name, worst)


def local_dv(scale: float) -> torch.Tensor:
    """Gradient of the global dv of this process's slice of fixed summaries and parts."""
    n = 8 // world_size()
    part = slice(rank() * n, (rank() + 1) * n)
    summaries = random(8, 3, seed=30, scale=scale)[part].requires_grad_()
    loss, _ = information_loss(summaries, random(8, 4, 3, seed=31, scale=scale)[part], "dv")
    return torch.cat([loss.detach().view(1), torch.autograd.grad(loss, summaries)[0].flatten()])


def test_dv_takes_one_logarithm_over_all_ranks():
    """The mean of the processes' own logarithms is another number (Jensen): by a lot when scores vary."""
    whole = local_dv(3.0)
    ranks = run_ranks(local_dv, 4, 3.0)
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), whole[0])
    torch.testing.assert_close(torch.cat([r[1:] for r in ranks]) / 4, whole[1:])
    summaries, parts = random(8, 3, seed=30, scale=3.0), random(8, 4, 3, seed=31, scale=3.0)
    u = scores(summaries, parts).masked_fill(torch.eye(8, dtype=torch.bool).unsqueeze(2), -torch.inf)
    apart = torch.stack([x.logsumexp((0, 1, 2)) - math.log(2 * 7 * 4) for x in u.chunk(4)]).mean()
    together = u.logsumexp((0, 1, 2)) - math.log(8 * 7 * 4)
    assert together - apart > 0.5


# ---- inputs, presets, errors -----------------------------------------------------------------------------------------


def test_cifar_input_is_the_image_and_stl_a_crop_at_full_resolution():
    generator_ = torch.Generator().manual_seed(0)
    for preset, size in (("cifar10", 32), ("stl10", 96)):
        cfg = PRESETS[preset][1]
        pixels = torch.randint(0, 256, (6, 3, size, size), generator=generator_, dtype=torch.uint8)
        recipe = one_view(replace(cfg, normalize="none"))
        (made,) = recipe(pixels, recipe.sample(6, generator_))
        if preset == "cifar10":
            torch.testing.assert_close(made, pixels / 255)
        else:
            for image, view in zip(pixels / 255, made, strict=True):
                windows = torch.stack(
                    [image.unfold(1, 64, 1).unfold(2, 64, 1)[:, i, j] for i in range(33) for j in range(33)]
                )
                nearest = min(float((w - view).abs().amax((1, 2, 3)).min()) for w in (windows, windows.flip(3)))
                assert nearest < 1e-5


EXPECTED = {  # alpha, beta, gamma, estimator, epochs, batch; arXiv:1808.06670, section 4
    "cifar10": (0.0, 1.0, 0.1, "jsd", 1000, 64),
    "cifar10-infonce": (0.0, 1.0, 0.1, "infonce", 1000, 64),
    "cifar10-global": (1.0, 0.0, 1.0, "jsd", 1000, 64),
    "stl10": (0.0, 1.0, 0.1, "infonce", 200, 64),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    cfg = PRESETS[preset][1]
    assert (cfg.alpha, cfg.beta, cfg.gamma, cfg.estimator, cfg.epochs, cfg.batch_size) == EXPECTED[preset]
    assert (cfg.lr, cfg.discriminator_lr, cfg.decay, cfg.penalty) == (1e-4, 1e-4, "none", 1.0)
    assert (cfg.mi_units, cfg.width, cfg.y_dim, cfg.output) == (2048, 1.0, 64, "conv")
    assert not cfg.grayscale and not cfg.contrast
    assert {row["protocol"] for row in PUBLISHED[preset]} == {"conv-mlp", "fc-mlp", "y-mlp"}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    check(cfg)
    terms = tuple(name for name, weight in (("local", cfg.beta), ("global", cfg.alpha)) if weight)
    with torch.device("meta"):
        encoder = Encoder(layout=cfg.layout, image_size=cfg.image_size, width=cfg.width)
        y, pairs = DIM(encoder, cfg.mi_units, terms)(torch.empty(4, 3, cfg.image_size, cfg.image_size))
    assert y.shape == (4, 64) and tuple(pairs) == terms


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(alpha=0.0, beta=0.0), "--alpha or --beta must be above 0"),
        (dict(image_size=4), "--image-size 4 is too small for --layout basic32"),
        (dict(width=0.001), "leaves a layer without channels"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        check(replace(Config(), **changes))


# ---- report ----------------------------------------------------------------------------------------------------------


def test_held_out_retrieval_is_that_of_training_in_eval_mode():
    torch.manual_seed(0)
    model = DIM(Encoder(**TINY), 16, ("local", "global")).train()
    store = open_data("shapes", "test", limit=70)
    spec = custom_encoder_spec(Encoder, arguments=TINY, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, batch = held_out_retrieval(model, store, spec, 32, torch.device("cpu"))
    assert batch == 32 and found.keys() == {"local", "global"} and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    hits = []
    for start in (0, 32):  # the last 6 images make no whole batch
        x = (store.images[start : start + 32] / 255 - 0.5) / 0.5
        with torch.no_grad():
            summaries, parts = model(x)[1]["local"]
        hits.append(float(retrieval(scores(summaries, parts), torch.arange(32))))
    assert found["local"] == pytest.approx(50 * sum(hits))


def test_mlp_probe_learns_what_a_line_cannot():
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    device = torch.device("cpu")
    accuracy = mlp_probe(x[:1500], y[:1500], x[1500:], y[1500:], classes=2, epochs=30, seed=0, device=device)
    assert accuracy > 80


def test_layers_are_probed_and_written_into_the_card(tmp_path):
    torch.manual_seed(0)
    arguments = dict(**TINY, output="fc")
    spec = custom_encoder_spec(Encoder, arguments=arguments, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = DIM(create_backbone(spec), 16, ("local",))
    export_backbone(tmp_path, model.backbone, spec)
    accelerator, said = SimpleNamespace(device=torch.device("cpu")), []
    run = SimpleNamespace(directory=tmp_path, seed=3, accelerator=accelerator, print=said.append)
    stores = open_data("shapes", "train", limit=150), open_data("shapes", "test", limit=100)
    report = LayerReport(run, spec, *stores, mlp_epochs=1)
    report.measure(model, batch=50)
    rows = {row["protocol"]: row for row in report.rows}
    assert rows.keys() == {"held-out-retrieval", "conv-linear", "y-linear", "conv-mlp", "fc-mlp", "y-mlp"}
    assert rows["held-out-retrieval"]["settings"]["chance"] == 2.0
    for layer, width in (("conv", 256), ("fc", 64), ("y", 5)):
        assert (
            rows[f"{layer}-mlp"]["settings"]["features"] == width and rows[f"{layer}-mlp"]["settings"]["layer"] == layer
        )
        assert rows[f"{layer}-mlp"]["baselines"].keys() == {"random init"}
    about = dict(image_size=32, mean=spec.mean, std=spec.std)
    for encoder, value in (
        (load_backbone(tmp_path)[0], rows["y-linear"]["value"]),
        (random_init(spec, 3), rows["y-linear"]["baselines"]["random init"]),
    ):
        encoder.output = "y"
        x, test_x = (extract_features(encoder, store, **about) for store in stores)
        assert linear_probe(x, stores[0].labels, test_x, stores[1].labels, num_classes=10, seed=3).accuracy == value
    title, html = report.sections()[0]
    assert "held-out" in title and "y-mlp" in html and "The layer fc is the exported one" in html
    linear = dict(rows["y-linear"], protocol="linear", value=12.5, baselines={"raw pixels": 11.0, "random init": 10.0})
    (tmp_path / "result.json").write_text(json.dumps(make_card("dim", rows=[linear])))
    report.add_to_card()
    card = json.loads((tmp_path / "result.json").read_text())["evaluations"]
    written = {row["protocol"]: row for row in card}
    assert written["fc-linear"]["value"] == 12.5 and len(card) == len(rows) + 2 == len(said) + 1
    assert written["y-linear"]["baselines"]["raw pixels"] == 11.0


def test_unlabeled_images_leave_the_retrieval_alone(tmp_path):
    torch.manual_seed(0)
    spec = custom_encoder_spec(Encoder, arguments=dict(**TINY, output="conv"), image_size=32)
    store = replace(open_data("shapes", "test", limit=40), labels=None)
    run = SimpleNamespace(directory=tmp_path, seed=0, accelerator=SimpleNamespace(device=torch.device("cpu")))
    report = LayerReport(run, spec, store, store)
    report.measure(DIM(create_backbone(spec), 8, ("local",)), batch=64)
    assert [row["protocol"] for row in report.rows] == ["held-out-retrieval"]
    assert report.rows[0]["settings"]["batch"] == 40  # fewer images than a batch


def test_command_with_the_global_term_alone(tmp_path):
    arguments = ("smoke", "--out", tmp_path, "--max-steps", 4, "--beta", 0, "--estimator", "dv", "--no-eval")
    code, text = run_command("methods.dim.train", *arguments, log=tmp_path / "log")
    assert code == 0, text
    line = read_metrics(tmp_path / "dim-smoke" / "metrics.jsonl")[-1]
    assert {"global_loss", "prior_loss", "discriminator_accuracy", "retrieval", "y_std"} <= line.keys()
    assert "local_loss" not in line
    code, text = run_command("methods.dim.train", "smoke", "--alpha", 0, "--beta", 0, log=tmp_path / "log")
    assert code == 2 and "must be above 0" in text and "Traceback" not in text
