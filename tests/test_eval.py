"""`eval` against slow, obvious versions: kNN, the linear bank, label-free metrics, probes, and what may not leak."""

import inspect
import json
import math
import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import timm
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.config import RunConfig
from common.data import ImageStore, open_data
from common.errors import UserError
from common.rng import generator
from common.shapes import FACTORS, render, sample_factors, sample_pair_factors
from eval import linear, metrics, mlp, probes
from eval.__main__ import Arguments, main
from eval.card import load_cards
from eval.features import RawPixels, extract_features, place, standardized, standardizer
from eval.knn import knn_accuracy, knn_predict, knn_rank
from eval.load import load, random_init
from eval.protocols import PROTOCOLS, cannot_run, check_protocols, evaluate, results_table
from tests.test_compare import make_card, make_row

STATISTICS = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def blobs(n, d, classes, seed, noise=1.0):
    """Gaussian classes around fixed centres: [n, d], [n]."""
    g = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + noise * torch.randn(n, d, generator=g), y


def tiny_spec():
    return BackboneSpec(
        "resnet18",
        stem="cifar",
        layers=(1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        stem_width=8,
        image_size=32,
        mean=STATISTICS["mean"],
        std=STATISTICS["std"],
    )


def tiny(seed=0):
    return random_init(tiny_spec(), seed)


class Store:
    """The part of an image store that features need, around uint8 images of the right size."""

    def __init__(self, images, labels=None, factors=None):
        self.images, self.labels, self.factors, self.name, self.class_names = images, labels, factors, "toy", None

    def __len__(self):
        return len(self.images)

    def eval_images(self, start, stop, size):
        assert self.images.shape[-1] == size
        return self.images[start:stop]


# ---- kNN -------------------------------------------------------------------------------------------------------------


def slow_knn(train_x, train_y, test_x, k, temperature, classes):
    predicted = []
    for query in test_x.double():
        cosines = [float(F.cosine_similarity(query, x, dim=0)) for x in train_x.double()]
        scores = [0.0] * classes
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            scores[int(train_y[i])] += math.exp(cosines[i] / temperature)
        predicted.append(max(range(classes), key=lambda c: scores[c]))
    return torch.tensor(predicted)


def test_knn_equals_the_double_loop():
    (train_x, train_y), (test_x, test_y) = blobs(90, 8, 5, 1, noise=2.0), blobs(25, 8, 5, 2, noise=2.0)
    settings = ((1, 0.07), (7, 0.07), (40, 0.5))
    predicted = knn_predict(train_x, train_y, test_x, settings, num_classes=5)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, settings)
    for setting in settings:
        expected = slow_knn(train_x, train_y, test_x, *setting, 5)
        assert torch.equal(predicted[setting], expected), setting
        assert accuracy[setting] == pytest.approx(100 * (expected == test_y).double().mean().item())
    assert len({tuple(p.tolist()) for p in predicted.values()}) == 3  # the settings do differ on these data


def test_knn_settings_share_one_pass_and_chunks_do_not_matter():
    (train_x, train_y), (test_x, _) = blobs(300, 16, 7, 1, noise=3.0), blobs(101, 16, 7, 2, noise=3.0)
    settings = ((5, 0.07), (200, 0.1))
    together = knn_predict(train_x, train_y, test_x, settings)
    for setting in settings:
        assert torch.equal(knn_predict(train_x, train_y, test_x, (setting,))[setting], together[setting])
        for chunk in (1, 10, 101):
            assert torch.equal(knn_predict(train_x, train_y, test_x, settings, chunk=chunk)[setting], together[setting])


def test_knn_with_a_part_of_the_training_images_at_once_is_knn_with_all():
    (train_x, train_y), (test_x, _) = blobs(300, 16, 7, 1, noise=3.0), blobs(101, 16, 7, 2, noise=3.0)
    settings = ((5, 0.07), (40, 0.1), (200, 0.1))
    expected = knn_predict(train_x, train_y, test_x, settings)
    for bank, chunk in ((299, None), (64, 10), (7, 101)):
        found = knn_predict(train_x, train_y, test_x, settings, chunk=chunk, bank=bank)
        assert all(torch.equal(found[setting], expected[setting]) for setting in settings), (bank, chunk)


def test_knn_ranks_the_classes_that_neighbors_have():
    (train_x, train_y), (test_x, _) = blobs(90, 8, 7, 1, noise=4.0), blobs(25, 8, 7, 2, noise=4.0)
    ranking = knn_rank(train_x, train_y, test_x, ((4, 0.5),), num_classes=9)[4, 0.5]
    assert ranking.shape == (25, 5)
    for query, found in zip(test_x, ranking.tolist(), strict=True):
        cosines = F.cosine_similarity(query[None], train_x)
        scores = [0.0] * 9
        for i in cosines.topk(4).indices.tolist():
            scores[int(train_y[i])] += math.exp(float(cosines[i]) / 0.5)
        order = sorted((c for c in range(9) if scores[c] > 0), key=lambda c: -scores[c])
        assert found == [*order, *[-1] * 5][:5]
    assert (ranking == -1).any() and (ranking[:, 1] >= 0).any()


# ---- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes that the tensors of operations inside held at once, those they were given included."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("probe", ["knn", "linear", "mlp"])
def test_a_probe_needs_little_memory_beyond_its_features(probe, monkeypatch):
    monkeypatch.setattr(linear, "MIN_STEPS", 1)
    (x, y), (test_x, test_y) = blobs(12_000, 512, 4, 1), blobs(100, 512, 4, 2)
    with LiveBytes() as live:
        if probe == "knn":
            knn_rank(x, y, test_x, bank=2048)
        elif probe == "linear":
            linear.linear_probe(x, y, test_x, test_y, epochs=1, batch_size=4096, rates=(0.1, 0.3))
        else:
            mlp.mlp_probe(x, y, test_x, test_y, epochs=1, rates=(0.001,))
    features = x.numel() * x.element_size()
    assert features < live.peak < 1.7 * features  # once the features themselves


def test_features_that_do_not_fit_the_device_stay_on_the_host_and_are_the_same_numbers():
    x, _ = blobs(900, 200, 4, 1)
    assert place(x, "meta", free=2.1 * 4 * x.numel()).device.type == "meta"
    assert place(x, "meta", free=1.9 * 4 * x.numel()).device.type == "cpu"
    assert place(x, "cpu") is x
    rows = torch.arange(0, 900, 3)
    part, expected = standardized(x, rows, device="cpu"), standardizer(x[rows])
    assert torch.equal(part.all(), expected(x[rows])) and torch.equal(part.of(x).all(), expected(x))
    assert torch.equal(part[torch.tensor([5, 1])], expected(x[[15, 3]]))
    assert [len(piece) for piece in part.split(128)] == [128, 128, 44]


def test_knn_takes_all_of_a_small_training_set_and_survives_a_tiny_temperature():
    (train_x, train_y), (test_x, _) = blobs(30, 8, 3, 1), blobs(20, 8, 3, 2)
    assert torch.equal(
        knn_predict(train_x, train_y, test_x, ((200, 0.1),))[200, 0.1],
        knn_predict(train_x, train_y, test_x, ((30, 0.1),))[30, 0.1],
    )
    nearest = knn_predict(train_x, train_y, test_x, ((1, 0.1), (30, 1e-4)))  # exp(1 / 1e-4) overflows
    assert torch.equal(nearest[1, 0.1], nearest[30, 1e-4])


def test_knn_counts_classes_of_train_and_test():
    (train_x, train_y), (test_x, test_y) = blobs(60, 8, 3, 1), blobs(20, 8, 3, 2)
    test_y[0] = 9  # a class that training has never seen is an error of the classifier, not of the program
    assert 0 < knn_accuracy(train_x, train_y, test_x, test_y)[20, 0.07] <= 95


# ---- linear probe ----------------------------------------------------------------------------------------------------


def test_bank_equals_each_head_trained_alone_by_torch():
    x, y = blobs(64, 6, 4, 3)
    rates, epochs = (0.01, 0.1, 1.0), 3
    bank = linear.HeadBank(6, 4, len(rates))
    heads = [nn.Linear(6, 4) for _ in rates]
    for head in heads:
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizers = [
        torch.optim.SGD(h.parameters(), lr=r, momentum=0.9, nesterov=True) for h, r in zip(heads, rates, strict=True)
    ]
    steps = epochs * 4
    for step in range(steps):
        part = slice(step % 4 * 16, step % 4 * 16 + 16)
        factor = linear.cosine(step, steps)
        bank.step(x[part], y[part], torch.tensor(rates) * factor)
        for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            F.cross_entropy(head(x[part]), y[part]).backward()
            optimizer.step()
    for r, head in enumerate(heads):
        torch.testing.assert_close(bank.logits(x)[:, r], head(x).detach(), rtol=1e-5, atol=1e-5)
        assert bank.accuracies(x, y)[r] == pytest.approx(100 * (head(x).argmax(1) == y).float().mean().item())


def test_bank_keeps_parts_of_a_batch_apart():
    x, y = blobs(32, 6, 4, 3)
    keep = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 2.0])
    masked, rates = linear.HeadBank(6, 4, 2), torch.tensor([0.1, 0.1])
    alone = linear.HeadBank(6, 4, 1), linear.HeadBank(6, 4, 1)
    for _ in range(3):
        masked.step(x, y, rates, keep)
        for r, bank in enumerate(alone):
            bank.step(x[keep[:, r]], y[keep[:, r]], rates[:1])
    for r, bank in enumerate(alone):
        torch.testing.assert_close(masked.logits(x)[:, r], bank.logits(x)[:, 0])


def test_a_diverged_head_does_not_touch_the_others():
    x, y = blobs(200, 6, 4, 3)
    x = x * 100
    both = linear.train_bank(x, y, (1e-5, 1e38), num_classes=4, epochs=2, batch_size=50, seed=0)
    alone = linear.train_bank(x, y, (1e-5,), num_classes=4, epochs=2, batch_size=50, seed=0)
    assert both.accuracies(x, y)[1] == 0
    torch.testing.assert_close(both.logits(x)[:, 0], alone.logits(x)[:, 0])


def test_linear_probe_never_chooses_on_test():
    (train_x, train_y), (test_x, test_y) = blobs(400, 16, 5, 1, noise=2.0), blobs(100, 16, 5, 2, noise=2.0)
    one = linear.linear_probe(train_x, train_y, test_x, test_y, seed=3)
    two = linear.linear_probe(train_x, train_y, test_x, test_y.roll(1), seed=3)
    assert one.learning_rate == two.learning_rate and one.validation == two.validation
    assert torch.equal(one.predictions, two.predictions)
    assert two.accuracy == pytest.approx(100 * (one.predictions == test_y.roll(1)).double().mean().item())
    assert two.accuracy != one.accuracy
    assert one.learning_rate == max(one.validation, key=lambda rate: (one.validation[rate], -rate))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_linear_probe_reaches_the_logistic_optimum_at_any_scale(scale):
    (train_x, train_y), (test_x, test_y) = blobs(2000, 20, 5, 1, noise=2.5), blobs(1000, 20, 5, 2, noise=2.5)
    head = nn.Linear(20, 5)  # the optimum on the unscaled features, by L-BFGS
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train_x), train_y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = 100 * (head(test_x).argmax(1) == test_y).double().mean().item()
    dead = torch.zeros(len(train_x), 2)  # dead units and an offset must not matter
    result = linear.linear_probe(
        torch.cat([train_x * scale + 3 * scale, dead], 1),
        train_y,
        torch.cat([test_x * scale + 3 * scale, dead[:1000]], 1),
        test_y,
    )
    assert optimum > 60
    assert result.accuracy == pytest.approx(optimum, abs=1.5)


def test_validation_split_is_stratified_and_deterministic():
    labels = torch.tensor([0] * 50 + [1] * 200 + [2] * 30 + [3])
    fit, held_out = linear.validation_split(labels, seed=1)
    assert torch.equal(torch.cat([fit, held_out]).sort().values, torch.arange(len(labels)))
    counts = labels[held_out].bincount(minlength=4).tolist()
    assert [abs(c - n / 10) <= 1 for c, n in zip(counts, (50, 200, 30, 1), strict=True)] == [True] * 4
    assert torch.equal(held_out, linear.validation_split(labels, seed=1)[1])
    assert not torch.equal(held_out, linear.validation_split(labels, seed=2)[1])
    with pytest.raises(UserError, match="at least 20"):
        linear.validation_split(labels[:19], seed=0)


# ---- label-free metrics ----------------------------------------------------------------------------------------------


def with_spectrum(sigma, n, d):
    """A [n, d] float64 matrix with exactly these singular values."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(n, len(sigma), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(d, len(sigma), generator=g, dtype=torch.float64))[0]
    return u @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_rankme_and_rank_on_known_spectra(shape):
    for k in (1, 3, 10):
        x = with_spectrum([2.5] * k, *shape)
        assert metrics.rankme(x) == pytest.approx(k, rel=1e-4)
        assert metrics.rank_of_spectrum(metrics.singular_values(x.float()), max(x.shape)) == k
    x = with_spectrum([1.0, 0.5, 0.25], *shape)
    p = torch.tensor([4 / 7, 2 / 7, 1 / 7], dtype=torch.float64) + 1e-7
    assert metrics.rankme(x) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)
    torch.testing.assert_close(metrics.singular_values(x)[:3], torch.linalg.svdvals(x)[:3])
    assert metrics.rankme(torch.zeros(10, 4)) == 0


def test_alpha_req_on_exact_power_laws():
    for alpha in (0.5, 1.0, 2.3):
        eigenvalues = torch.arange(1, 151, dtype=torch.float64) ** -alpha
        assert metrics.alpha_of_spectrum(eigenvalues) == pytest.approx(alpha, abs=1e-9)
        # Features whose covariance has this spectrum: centred orthonormal columns, scaled, around a large mean.
        g = torch.Generator().manual_seed(0)
        base = torch.randn(400, 150, generator=g, dtype=torch.float64)
        base = torch.linalg.qr(base - base.mean(0))[0] * eigenvalues.sqrt() + 5
        assert metrics.alpha_req(base) == pytest.approx(alpha, abs=1e-6)
    assert math.isnan(metrics.alpha_req(torch.ones(50, 8)))


def test_alignment_and_uniformity_equal_loops():
    x, _ = blobs(40, 5, 3, 1)
    y, _ = blobs(40, 5, 3, 2)
    u, v = F.normalize(x, dim=1).double(), F.normalize(y, dim=1).double()
    expected = sum(float(((a - b) ** 2).sum()) for a, b in zip(u, v, strict=True)) / 40
    assert metrics.alignment(x, y) == pytest.approx(expected, rel=1e-5)
    assert metrics.alignment(x, 3 * x) == pytest.approx(0, abs=1e-10)
    pairs = [math.exp(-2 * float(((u[i] - u[j]) ** 2).sum())) for i in range(40) for j in range(40) if i != j]
    for chunk in (7, 40, 2048):
        assert metrics.uniformity(x, chunk=chunk) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert metrics.uniformity(torch.ones(10, 4)) == pytest.approx(0, abs=1e-5)


def test_feature_std_is_one_on_the_sphere_and_zero_collapsed():
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.feature_std(x) == pytest.approx(1, abs=0.01)
    assert metrics.feature_std(7 * x) == pytest.approx(metrics.feature_std(x))
    assert metrics.feature_std(torch.ones(100, 64)) == pytest.approx(0, abs=1e-6)


# ---- factors ---------------------------------------------------------------------------------------------------------


def test_ridge_probes_read_linear_targets_and_nothing_from_noise():
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(600, 12, generator=g), torch.randn(600, generator=g)
    y = x @ torch.randn(12, generator=g) + 4
    targets = {"exact": y, "noise": z, "both": torch.stack([y, z], 1), "noisy": y + 3 * z}

    def parts(a, b):
        return x[:400], {k: v[:400] for k, v in a.items()}, x[400:], {k: v[400:] for k, v in b.items()}

    results = probes.ridge_probes(*parts(targets, targets))
    assert list(results) == list(targets)
    assert results["exact"][0] > 0.9999 and results["exact"][1] == min(probes.PENALTIES)
    assert abs(results["noise"][0]) < 0.05 and results["noise"][1] >= 1
    design = torch.cat([x, torch.ones(600, 1)], 1)
    solution = torch.linalg.lstsq(design[:400], targets["noisy"][:400, None]).solution[:, 0]
    least_squares = probes.r_squared(design[400:] @ solution, targets["noisy"][400:])
    assert results["noisy"][0] == pytest.approx(least_squares, abs=0.02)
    alone = probes.ridge_probes(*parts({"noisy": targets["noisy"]}, {"noisy": targets["noisy"]}))
    assert alone["noisy"] == pytest.approx(results["noisy"])
    # The penalties come from the training set: other test targets change only the score.
    rolled = probes.ridge_probes(*parts(targets, {name: value.roll(1, 0) for name, value in targets.items()}))
    assert all(rolled[name][1] == results[name][1] and rolled[name][0] != results[name][0] for name in targets)


def test_ridge_solution_is_the_optimum():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, columns, generator=g, dtype=torch.float64) for columns in (6, 2))
    w, b = (value.requires_grad_() for value in probes._ridge(x.T @ x, x, y, 0.3))
    ((x @ w + b - y).pow(2).sum() / 50 + 0.3 * w.pow(2).sum()).backward()
    assert w.grad.abs().max() < 1e-12 and b.grad.abs().max() < 1e-12


def test_few_images_of_many_dimensions_give_the_same_numbers(monkeypatch):
    (x, y), (test_x, test_y) = blobs(60, 200, 4, 1, noise=6.0), blobs(80, 200, 4, 2, noise=6.0)
    compact = linear.linear_probe(x, y, test_x, test_y)
    targets = {"a": x @ torch.ones(200)}, {"a": test_x @ torch.ones(200)}
    ridge = probes.ridge_probes(x, targets[0], test_x, targets[1])
    assert linear.project_to_row_space(x, test_x)[1].shape == (80, 60)
    for module in (linear, probes):
        monkeypatch.setattr(module, "project_to_row_space", lambda *tensors: tensors)
    assert linear.linear_probe(x, y, test_x, test_y).validation == compact.validation
    assert torch.equal(linear.linear_probe(x, y, test_x, test_y).predictions, compact.predictions)
    assert probes.ridge_probes(x, targets[0], test_x, targets[1])["a"] == pytest.approx(ridge["a"])


def test_circular_targets_have_no_seam():
    values = torch.tensor([0.0, 0.25, 0.999999])
    target = probes.circular_target(values, 1.0)
    torch.testing.assert_close(target, torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.float64), atol=1e-5, rtol=0)


def test_r_squared_bounds():
    y = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert probes.r_squared(y, y) == 1
    assert probes.r_squared(y.mean().expand(100), y) == pytest.approx(0, abs=1e-6)
    assert math.isnan(probes.r_squared(y, torch.ones(100)))


def test_invariance_profile_of_hand_made_features():
    factors = sample_factors(128, seed=5)

    def draw(values):
        return render(values, 32)

    def corner(images):  # background colour only
        return images[:, :, 0, 0].float()

    profile = probes.invariance_profile(corner, factors, draw, probes.drawable)
    assert set(profile) == set(factors)
    assert all(abs(profile[name]) < 1e-9 for name in factors if name != "background_hue")
    assert 0.5 < profile["background_hue"] < 1.5

    def everything(images):
        return images.flatten(1).float()

    profile = probes.invariance_profile(everything, factors, draw, probes.drawable)
    assert all(value > 0.01 for value in profile.values())

    constant = probes.invariance_profile(lambda images: torch.ones(len(images), 3), factors, draw)
    assert all(math.isnan(value) for value in constant.values())
    fixed = {**factors, "rotation": torch.zeros(128)}
    assert "rotation" not in probes.invariance_profile(corner, fixed, draw)


def test_drawable_is_the_law_of_shapes():
    factors = sample_factors(500, seed=1)
    assert probes.drawable(factors).all()
    assert not probes.drawable({**factors, "background_hue": factors["hue"]}).any()
    assert not probes.drawable({**factors, "x": torch.full((500,), 0.05)}).any()


def test_drawable_is_the_law_of_pairs():
    factors = sample_pair_factors(500, seed=1)
    assert probes.drawable(factors).all()
    assert not probes.drawable({**factors, "hue2": factors["background_hue"]}).any()
    assert not probes.drawable({**factors, "x2": torch.full((500,), 0.05)}).any()
    assert not probes.drawable({**factors, "x2": factors["x1"], "y2": factors["y1"]}).any()
    assert not probes.drawable({**factors, "y1": factors["y2"], "y2": factors["y1"]}).any()


# ---- features --------------------------------------------------------------------------------------------------------


def test_extract_features_restores_flags_and_moves_no_statistics():
    model = timm.create_model("resnet10t", num_classes=0, pretrained=False)
    model.train()
    model.bn1.eval()
    flags = [m.training for m in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = extract_features(model, Store(images), batch_size=4, **STATISTICS)
    assert features.shape == (10, model.num_features) and features.dtype == torch.float32 and not features.requires_grad
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.eval()
    with torch.no_grad():
        expected = model((images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_features_that_make_no_sense_are_errors():
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"\[batch, features\].*\(4, 3, 32, 32\)"):
        extract_features(nn.Identity(), Store(images), **STATISTICS)

    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) / 0

    with pytest.raises(UserError, match="not finite"):
        extract_features(Broken(), Store(images), **STATISTICS)
    with pytest.raises(UserError, match="no images"):
        extract_features(RawPixels(), Store(images[:0]), **STATISTICS)


def test_raw_pixels_are_the_image_or_a_shrunken_one():
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(RawPixels()(image), image.flatten(1))
    assert RawPixels()(torch.rand(2, 3, 48, 64)).shape == (2, 3 * 32 * 32)


def drawn(split, limit):
    return open_data("shapes", split=split, limit=limit, image_size=32)


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return [drawn("train", 240), drawn("test", 100)]


@pytest.fixture(scope="module")
def evaluation(shapes):
    lines = []
    return evaluate(tiny(1), *shapes, random_init=tiny(2), seed=0, log=lines.append, **STATISTICS), lines


def test_evaluate_rows(evaluation, shapes):
    result, lines = evaluation
    rows = {(row["protocol"], row["target"], row["metric"]): row for row in result.rows}
    assert len(rows) == len(result.rows) and not result.skipped
    factors = shapes[0].factors
    expected = {("knn-20-0.07", "label", "top-1"), ("knn-200-0.1", "label", "top-1"), ("linear", "label", "top-1")}
    expected |= {
        ("label-free", "features", m) for m in ("RankMe", "rank", "alpha-ReQ", "feature std", "uniformity", "alignment")
    }
    expected |= {("factor-linear", name, "top-1" if FACTORS[name].kind == "categorical" else "R2") for name in factors}
    expected |= {("invariance", name, "relative distance") for name in factors}
    assert set(rows) == expected
    for row in result.rows:
        assert math.isfinite(row["value"]) and set(row["baselines"]) == {"raw pixels", "random init"}, row
        assert row["settings"]["train_images"] == 240 and row["text"].endswith(".")
        assert row["baselines"]["random init"] != row["value"]
    json.dumps(result.rows, allow_nan=False)
    # Each number is that of the function alone, on the returned features.
    x, y = (result.train_features, result.test_features), [store.labels for store in shapes]
    knn = knn_accuracy(x[0], y[0], x[1], y[1])
    assert rows["knn-20-0.07", "label", "top-1"]["value"] == knn[20, 0.07]
    assert rows["label-free", "features", "RankMe"]["value"] == pytest.approx(metrics.rankme(x[1]))
    assert rows["linear", "label", "top-1"]["chosen"]["learning_rate"] in linear.LEARNING_RATES
    probe = linear.linear_probe(x[0], y[0], x[1], y[1], num_classes=10)
    assert rows["linear", "label", "top-1"]["value"] == probe.accuracy
    assert rows["factor-linear", "shape", "top-1"]["value"] == probe.accuracy
    pixels = [extract_features(RawPixels(), store, **STATISTICS) for store in shapes]
    raw = knn_accuracy(pixels[0], y[0], pixels[1], y[1])
    assert rows["knn-200-0.1", "label", "top-1"]["baselines"]["raw pixels"] == raw[200, 0.1]
    assert rows["factor-linear", "background_hue", "R2"]["baselines"]["raw pixels"] > 0.5
    assert any("raw pixels" in line for line in lines)
    assert results_table(result.rows).row_count == len(rows)


def test_augmented_probe(shapes):
    def run(test):
        return evaluate(
            tiny(1),
            shapes[0],
            test,
            protocols=["linear-augmented"],
            augmented_epochs=2,
            log=lambda _: None,
            **STATISTICS,
        ).rows[0]

    row = run(shapes[1])
    assert row["protocol"] == "linear-augmented" and 0 < row["value"] <= 100 and set(row["baselines"]) == {"raw pixels"}
    assert row["settings"]["epochs"] == 2 and row["chosen"]["base_learning_rate"] in linear.BASE_LEARNING_RATES
    assert run(shapes[1]) == row
    other = drawn("test", 100)
    other.labels = other.labels.roll(1)
    assert run(other)["chosen"] == row["chosen"]


def test_augmented_probe_learns_what_crops_keep():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    shades = torch.tensor([[230, 20, 20], [20, 230, 20], [20, 20, 230]])[labels]
    images = (shades.view(60, 3, 1, 1) + torch.randint(-20, 20, (60, 3, 32, 32), generator=g)).clamp(0, 255)
    store = drawn("train", 60)
    store.images, store.labels = images.to(torch.uint8), labels
    x = extract_features(RawPixels(8), store, **STATISTICS)
    result = linear.linear_probe_augmented(RawPixels(8), store, x, labels, x, labels, epochs=10, **STATISTICS)
    assert result.accuracy == 100 and max(result.validation.values()) == 100


def test_small_training_sets_name_the_k_they_use():
    train, test = drawn("train", 60), drawn("test", 60)
    lines = []
    result = evaluate(RawPixels(), train, test, protocols=["knn"], log=lines.append, **STATISTICS)
    assert [row["protocol"] for row in result.rows] == ["knn-20-0.07", "knn-60-0.1"]
    assert result.rows[1]["settings"]["k"] == 60 and "k = 200" in lines[0] and "60" in lines[0]


def test_images_without_labels():
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    store = drawn("train", 64)
    store.images, store.labels, store.factors = images, None, None
    lines = []
    result = evaluate(RawPixels(), store, store, log=lines.append, **STATISTICS)
    assert {row["protocol"] for row in result.rows} == {"label-free"} and result.rows
    assert set(result.skipped) == {"knn", "linear", "factors"} and "have no labels" in " ".join(lines)
    for name in ("knn", "linear", "linear-augmented"):
        with pytest.raises(UserError, match="no labels, which " + name):
            check_protocols([name], store, store)
    with pytest.raises(UserError, match="only those of drawn images"):
        check_protocols(["factors"], store, store)
    check_protocols(["metrics"], store, store)


def test_some_images_without_labels_are_left_out():
    train, test = drawn("train", 80), drawn("test", 80)
    full = evaluate(RawPixels(), train, test, protocols=["knn"], log=lambda _: None, **STATISTICS)
    part = train.labels.clone()
    part[::2] = -1
    train.labels = part
    half = evaluate(RawPixels(), train, test, protocols=["knn"], log=lambda _: None, **STATISTICS)
    expected = knn_accuracy(full.train_features[1::2], part[1::2], full.test_features, test.labels, ((20, 0.07),))
    assert half.rows[0]["value"] == expected[20, 0.07] and half.rows[0]["settings"]["labelled_train_images"] == 40


def test_images_smaller_than_the_network_are_enlarged_but_not_cropped():
    train, test = drawn("train", 40), drawn("test", 40)
    lines = []
    result = evaluate(
        RawPixels(), train, test, protocols=["knn", "metrics"], log=lines.append, **(STATISTICS | {"image_size": 48})
    )
    found = {row["metric"] for row in result.rows}
    assert "alignment" not in found and "RankMe" in found and "alignment" in " ".join(lines)


def test_a_run_chooses_among_all_protocols_and_may_leave_baselines_out(shapes):
    choice = get_type_hints(RunConfig)["eval_protocols"]  # tuple[Literal[...], ...]
    assert sorted(get_args(get_args(choice)[0])) == sorted(PROTOCOLS)
    train, test = shapes
    alone, beside = (
        evaluate(
            tiny(), train, test, **STATISTICS, protocols=("knn",), random_init=tiny(1), baselines=b, log=lambda _: None
        ).rows
        for b in (False, True)
    )
    assert [row["value"] for row in alone] == [row["value"] for row in beside]
    assert all(row["baselines"] == {} for row in alone) and all(len(row["baselines"]) == 2 for row in beside)


def test_unknown_protocol_lists_the_valid_ones(shapes):
    with pytest.raises(UserError, match="did you mean linear.*knn, linear, linear-augmented, mlp, metrics, factors"):
        evaluate(RawPixels(), *shapes, protocols=["lineer"], **STATISTICS)


# ---- mlp -------------------------------------------------------------------------------------------------------------


def exclusive_or(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane whose class is the product of two signs: no line tells it."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 50.0]) + 3
    return x, ((x[:, 0] > 3) ^ (x[:, 1] > 3)).long()


def test_mlp_probe_reads_what_no_line_can():
    (x, y), (test_x, test_y) = exclusive_or(2000, 0), exclusive_or(500, 1)
    assert linear.linear_probe(x, y, test_x, test_y).accuracy < 65
    result = mlp.mlp_probe(x, y, test_x, test_y, rates=(0.0001, 0.01))
    assert result.accuracy > 97 and result.learning_rate in result.validation
    assert result.accuracy == pytest.approx(100 * (result.predictions == test_y).double().mean().item())
    torch.manual_seed(5)  # its randomness is its own
    again = mlp.mlp_probe(x, y, test_x, 1 - test_y, rates=(result.learning_rate,))
    assert torch.equal(again.predictions, result.predictions)  # nothing is chosen on test


def test_mlp_is_no_score_of_raw_pixels(shapes, monkeypatch):
    monkeypatch.setattr(mlp, "LEARNING_RATES", (0.003,))
    rows = evaluate(tiny(1), *shapes, protocols=["mlp"], random_init=tiny(2), log=lambda _: None, **STATISTICS).rows
    assert [row["protocol"] for row in rows] == ["mlp"] and rows[0]["baselines"].keys() == {"random init"}
    assert rows[0]["settings"]["hidden"] == 512 and rows[0]["chosen"]["learning_rate"] == 0.003


# ---- command line ----------------------------------------------------------------------------------------------------


def test_command_line_scores_a_run_and_merges(tmp_path, capsys):
    run = tmp_path / "run"
    backbone = tiny(4)
    export_backbone(run, backbone, tiny_spec())
    (run / "config.json").write_text(json.dumps({"data": "shapes", "limit": 100, "seed": 3, "image_column": None}))
    rows = [make_row("knn-20-0.07", -1.0), make_row("other", 5.0)]
    (run / "result.json").write_text(json.dumps(make_card(seed=3, rows=rows)))
    main([str(run), "--protocols", "knn", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "knn-20-0.07" in printed and "raw pixels" in printed and "random init" in printed
    card = json.loads((run / "result.json").read_text())
    assert [row["protocol"] for row in card["evaluations"]] == ["knn-20-0.07", "other", "knn-100-0.1"]
    stores = [drawn("train", 100), drawn("test", 2000)]  # --limit was for the training images
    expected = evaluate(backbone, *stores, protocols=["knn"], log=lambda _: None, **STATISTICS)
    assert card["evaluations"][0]["value"] == expected.rows[0]["value"] and card["format"] == 1

    # The same file by its own path, on other data: written where asked, the card is left alone.
    main(
        [
            str(run / "backbone.safetensors"),
            "--data",
            "shapes",
            "--limit",
            "60",
            "--protocols",
            "metrics",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "scores.json"),
        ]
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["data"]["name"] == "shapes" and scores["data"]["train_images"] == 60
    assert len(scores["evaluations"]) == 6
    assert load_cards([tmp_path / "scores.json"])[0][1]["method"] == "backbone.safetensors"
    assert json.loads((run / "result.json").read_text()) == card


def test_command_line_mistakes(tmp_path, capsys):
    for arguments, message in (
        (["resnet10t", "--data", "shapes", "--protocols", "knn,metrik"], "did you mean metrics"),
        (["resnet10t"], "--data"),
        (["resnet10t", "--data", "shapes", "--protocols", ","], "--protocols is empty"),
        (["resnet10t", "--data", "shapes", "--device", "gpu"], "--device gpu"),
        (["test_vit", "--data", "shapes", "--image-size", "33"], "33 px do not divide into patches of 16 px"),
        ([str(tmp_path), "--data", "shapes"], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    with pytest.raises(SystemExit) as stopped:
        main(["resnet10t", "--protocol", "knn"])
    assert stopped.value.code == 2 and "--protocols" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "levit_128s", "mobilenetv3_small_050"])
def test_any_network_is_scored_and_fine_tuned_at_another_size(name, tmp_path):
    words = [
        "--data",
        "shapes",
        "--limit",
        "40",
        "--image-size",
        "32",
        "--device",
        "cpu",
        "--out",
        tmp_path / "card.json",
    ]
    tuning = ["--finetune.epochs", "1", "--finetune.scratch", "1"]
    main([str(word) for word in (name, *words, "--protocols", "knn,finetune", *tuning)])
    rows = json.loads((tmp_path / "card.json").read_text())["evaluations"]
    assert {row["protocol"] for row in rows} > {"finetune"}
    assert all(0 < row["value"] <= 100 and row["baselines"]["random init"] > 0 for row in rows)


def test_load_and_random_init(tmp_path):
    export_backbone(tmp_path, tiny(4), tiny_spec())
    backbone, spec = load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    state = torch.random.get_rng_state()
    same, other = random_init(spec, 4), random_init(spec, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(backbone(images), same(images)) and not torch.equal(backbone(images), other(images))
    assert not backbone.training and not same.training
    torch.manual_seed(4)
    assert torch.equal(create_backbone(spec).conv1.weight, same.conv1.weight)


def test_the_help_names_all_protocols():
    assert all(name in inspect.getsource(Arguments) for name in PROTOCOLS)


# ---- what cannot be judged -------------------------------------------------------------------------------------------


def labeled_store(labels, names=("a", "b", "c")):
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=generator(len(labels), "x"))
    labels, names = torch.tensor(labels), None if names is None else list(names)
    return ImageStore(name="mine", fingerprint="", images=images, labels=labels, class_names=names)


@pytest.mark.parametrize(
    ("train", "test", "protocols", "reason"),
    [
        ([0, 1] * 20, [1] * 9, ("knn", "linear", "mlp"), "labeled test images of 'mine' are all of one class, 'b'"),
        ([2] * 40, [0, 1], ("knn", "linear"), "labeled training images of 'mine' are all of one class, 'c'"),
        ([0, 1] * 20, [2, 2, -1], ("knn",), "labeled test images of 'mine' are all of one class, 'c'"),
        ([0, 1] * 7 + [-1] * 99, [0, 1], ("linear", "mlp"), "needs at least 20 labeled training images .* are 14"),
        ([-1] * 40, [0, 1], ("knn", "linear"), "the training images of 'mine' have no labels"),
        ([0, 1] * 4, [0, 1], ("rotation",), "rotation needs at least 10 training images .* there are 8"),
    ],
)
def test_impossible_evaluations_are_named(train, test, protocols, reason):
    stores = labeled_store(train), labeled_store(test)
    found = cannot_run((*protocols, "metrics"), *stores)
    assert set(found) == set(protocols) and all(re.search(reason, text) for text in found.values()), found


def test_labels_that_name_images_are_no_classes():
    names = [str(i) for i in range(2400)]
    many, test = labeled_store(range(2400), names), labeled_store([0, 1, 2], names)
    assert "2,400 values for 2,400 training images" in cannot_run(["linear"], many, test)["linear"]
    assert not cannot_run(["linear"], labeled_store([*range(1200)] * 2, names), test)


def test_unseen_classes_are_counted_and_one_failure_costs_only_its_own_rows():
    train, test = labeled_store([0, 1] * 10), labeled_store([0, 1, 2, 2])
    broken = replace(PROTOCOLS["metrics"], run=lambda setup, candidate: (_ for _ in ()).throw(UserError("no room.")))
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "metrics", broken)
        result = evaluate(tiny(1), train, test, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, log=lines.append)
    assert {row["protocol"].split("-")[0] for row in result.rows} == {"knn", "linear"}
    assert result.skipped["metrics"] == "no room" and "evaluation: metrics of backbone is skipped: no room." in lines
    assert any("2 of the 4 test images of 'mine' are of classes without a training image (c)" in line for line in lines)


# ---- what is measured beside top-1 -----------------------------------------------------------------------------------


def many_classes(classes: int, n: int, seed: int) -> Store:
    """Images whose brightness tells their class a little."""
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 1, 1, 1), generator=torch.Generator().manual_seed(seed))
    return Store((labels.view(-1, 1, 1, 1) * (195 // classes) + noise).expand(-1, 3, 32, 32).to(torch.uint8), labels)


@pytest.mark.parametrize(("classes", "asked", "found"), [(10, False, False), (10, True, True), (5, True, False)])
def test_top5_of_few_classes_is_measured_only_when_asked(classes, asked, found):
    stores = many_classes(classes, 120, 0), many_classes(classes, 60, 1)
    options = dict(protocols=["knn", "linear"], top5=asked, baselines=False, log=lambda _: None, **STATISTICS)
    rows = evaluate(nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), *stores, **options).rows
    assert [row["metric"] for row in rows] == (["top-1", "top-5"] if found else ["top-1"]) * (len(rows) // (1 + found))


def test_top5_and_confusion_are_those_of_the_ranking():
    stores, network = (
        (many_classes(60, 360, 0), many_classes(60, 120, 1)),
        nn.Sequential(nn.AvgPool2d(16), nn.Flatten()),
    )
    options = dict(baselines=False, log=lambda _: None, **STATISTICS)
    result = evaluate(network, *stores, protocols=["knn", "linear"], **options)
    rows = {(row["protocol"], row["metric"]): row for row in result.rows}
    assert ("linear", "top-5") in rows and not any("details" in row for row in result.rows)  # 60 classes: no matrix
    x, labels = (result.train_features, result.test_features), [store.labels for store in stores]
    ranking = linear.linear_probe(x[0], labels[0], x[1], labels[1], num_classes=60).ranking.tolist()
    hits = [label in row for label, row in zip(labels[1].tolist(), ranking, strict=True)]
    assert rows["linear", "top-5"]["value"] == pytest.approx(100 * sum(hits) / len(hits))
    assert rows["linear", "top-1"]["value"] < rows["linear", "top-5"]["value"] < 100
    first, fifth = (rows["linear", metric] for metric in ("top-1", "top-5"))
    assert first["settings"] == fifth["settings"] and first["text"] == fifth["text"]
    texts = [cell for column in results_table(result.rows).columns for cell in column.cells]
    assert f"{fifth['value']:.1f} %" in texts and "top-5" in texts

    few = many_classes(8, 160, 0), many_classes(8, 64, 1)
    result = evaluate(network, *few, protocols=["linear"], **options)
    matrix = torch.tensor(result.rows[0]["details"]["confusion"])
    x = result.train_features, result.test_features
    found = linear.linear_probe(x[0], few[0].labels, x[1], few[1].labels, num_classes=8).predictions.tolist()
    expected = torch.zeros(8, 8, dtype=torch.long)
    for label, prediction in zip(few[1].labels.tolist(), found, strict=True):
        expected[label, prediction] += 1
    assert torch.equal(matrix, expected) and not torch.equal(matrix, matrix.T)
    assert result.rows[0]["value"] == pytest.approx(100 * matrix.trace().item() / matrix.sum().item())


# ---- an evaluation that was broken off -------------------------------------------------------------------------------


def test_an_evaluation_goes_on_from_any_protocol_to_the_same_rows(shapes):
    options = dict(protocols=["knn", "metrics"], random_init=tiny(2), log=lambda _: None, **STATISTICS)
    saved: list[tuple] = []

    def save(so_far):
        saved.append((json.loads(json.dumps(so_far.rows)), json.loads(json.dumps(so_far.done))))

    whole = json.loads(json.dumps(evaluate(tiny(1), *shapes, save=save, **options).rows))
    names = ["backbone", "raw pixels", "random init"]
    assert [sum(map(len, done.values())) for _, done in saved] == [1, 2, 3, 4, 5, 6]
    assert saved[-1] == (whole, {name: ["knn", "metrics"] for name in names})
    for number, (rows, done) in enumerate(saved):
        more: list[dict] = []
        resumed = evaluate(tiny(1), *shapes, rows=rows, done=done, save=lambda s, m=more: m.append(s.done), **options)
        assert json.loads(json.dumps(resumed.rows)) == whole and len(more) == len(saved) - number - 1
        assert len(resumed.test_features) == len(shapes[1])  # which the report shows
