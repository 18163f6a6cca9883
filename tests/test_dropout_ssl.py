"""Dropout as self-supervision: the exact identities, keyed masks, every arm's promise, metrics against slow loops."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.backbones import BackboneSpec, create_backbone
from common.errors import UserError
from common.log import TIME_FIELDS, read_metrics
from common.vit import vit_arguments
from eval.load import load
from methods.dropout_ssl import metrics
from methods.dropout_ssl.config import ARMS, PRESETS, Config
from methods.dropout_ssl.data import Inputs, Order, Records, labeled_rows, open_records, random_labels
from methods.dropout_ssl.loss import alignment, bhattacharyya, entropy_split, nt_xent, r_drop
from methods.dropout_ssl.measure import Measure, measured_steps, nt_xent_here
from methods.dropout_ssl.model import MLP, Network, copies_of, make_noise
from methods.dropout_ssl.noise import VAE, Additive, Channel, Element, Gaussian, Patch, mask_keys, normal, uniform
from methods.dropout_ssl.train import compute_loss
from tests.processes import run_command, run_ranks

ROOT = Path(__file__).parents[1]


def keys(n: int, seed=0, stream="train", epoch=0, copy=0) -> torch.Tensor:
    return mask_keys(seed, stream, epoch, torch.arange(n), copy)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the identities --------------------------------------------------------------------------------------------------


def noisy_predictions(masks: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(predictions [M, N, outputs], their input weights) of a real network under real masks, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, outputs)).double()
    x = doubles(30, 12)
    return torch.stack([net(Element(0.3)(x, keys(30, copy=m))) for m in range(masks)]), net[0].weight


@pytest.mark.parametrize("masks", [2, 3, 7])
def test_cross_entropy_splits_into_geometric_mean_and_consistency(masks):
    logits, weight = noisy_predictions(masks, 5)
    log_p, y = logits.log_softmax(-1), torch.arange(30) % 5
    geo, consistency = entropy_split(log_p, y)
    loss = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits]).mean(0)
    torch.testing.assert_close(geo + consistency, loss, rtol=0, atol=1e-10)
    p_geo = log_p.exp().prod(0) ** (1 / masks)  # spelled out
    p_geo = p_geo / p_geo.sum(-1, keepdim=True)
    torch.testing.assert_close(geo, -p_geo[torch.arange(30), y].log(), rtol=0, atol=1e-10)
    kl = torch.stack([(p_geo * (p_geo.log() - q)).sum(-1) for q in log_p]).mean(0)
    torch.testing.assert_close(consistency, kl, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(v.mean(), weight, retain_graph=True)[0] for v in (geo + consistency, loss)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert consistency.mean() > 1e-3


def test_two_masks_are_the_bhattacharyya_distance():
    logits, weight = noisy_predictions(2, 5)
    log_p, y = logits.log_softmax(-1), torch.arange(30) % 5
    geo, consistency = entropy_split(log_p, y)
    distance = bhattacharyya(*log_p)
    spelled = -(log_p[0].exp() * log_p[1].exp()).sqrt().sum(-1).log()
    torch.testing.assert_close(distance, spelled, rtol=0, atol=1e-10)
    torch.testing.assert_close(distance, consistency, rtol=0, atol=1e-10)
    both = 0.5 * (F.cross_entropy(logits[0], y, reduction="none") + F.cross_entropy(logits[1], y, reduction="none"))
    torch.testing.assert_close(both, geo + distance, rtol=0, atol=1e-10)
    zipped = F.cross_entropy(logits.flatten(0, 1), y.repeat(2))  # as A6 computes it, one batch of two copies
    gradients = [torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (zipped, (geo + distance).mean())]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_numbers_depend_on_the_key_alone():
    wide = uniform(keys(8), 100)
    assert torch.equal(wide[3:5], uniform(keys(8)[3:5], 100)) and torch.equal(wide[:, :10], uniform(keys(8), 10))
    others = [keys(8, seed=1), keys(8, stream="held-out"), keys(8, epoch=1), keys(8, copy=1), keys(9)[1:]]
    for other in others:
        assert not (uniform(other, 100) == wide).all(1).any()
    tensor_epoch = mask_keys(0, "train", torch.full((8,), 7), torch.arange(8), 2)
    assert torch.equal(tensor_epoch, keys(8, epoch=7, copy=2))
    assert len(torch.stack([keys(500, epoch=e, copy=c) for e in range(20) for c in range(4)]).unique()) == 40_000


def test_numbers_are_uniform_normal_and_independent():
    u = uniform(keys(400), 500)
    assert 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert ((counts - 3125).square() / 3125).sum() < 63 + 5 * math.sqrt(126)
    z = normal(keys(400), 500)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    for other in (
        uniform(keys(400, epoch=1), 500),
        uniform(keys(400, copy=1), 500),
        uniform(keys(401)[1:], 500),
        u.roll(1, 1),
    ):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.012  # 5 / sqrt(200,000)


def layers(p=0.2) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    vae = VAE(8, p)
    return {
        "element": (Element(p), (8, 8, 8)),
        "channel": (Channel(p), (8, 8, 8)),
        "patch": (Patch(p, 4), (3, 8, 8)),
        "token": (Patch(p, 4), (16, 8)),
        "gaussian": (Gaussian(p), (3, 8, 8)),
        "vae": (vae, (8, 4, 4)),
        "additive": (Additive(0.5), (3, 8, 8)),
    }


@pytest.mark.parametrize("name", layers())
def test_layer_keeps_the_mean_and_has_the_matched_variance(name):
    layer, shape = layers()[name]
    x = torch.full((3000, *shape), 1.0)
    y = layer(x, keys(3000)).detach()
    assert torch.equal(layer(x, None), x)
    assert abs(y.mean() - 1) < 0.03 and abs(y.var() - 0.25) < 0.03  # p / (1 - p) = 0.25, of all five at unit scale
    assert torch.equal(layer(x[:7], keys(3000)[5:12]), layer(x, keys(3000))[5:12])  # a process's slice
    assert not torch.equal(y, layer(x, keys(3000, epoch=1)))


def test_masks_have_their_shapes():
    x = torch.ones(64, 8, 8, 8)
    assert (Channel(0.5)(x, keys(64)).flatten(2).std(2) == 0).all()
    patches = Patch(0.5, 4)(x, keys(64))
    squares = patches.view(64, 8, 2, 4, 2, 4).transpose(3, 4).flatten(4)
    assert (patches.std(1) == 0).all() and (squares.std(4) == 0).all()
    assert len(patches[:, 0].flatten(1).unique(dim=0)) > 8
    assert (Patch(0.5, 4)(torch.ones(64, 9, 5), keys(64)).std(2) == 0).all()
    assert set(Element(0.2)(x, keys(64)).unique().tolist()) == {0.0, 1.25}


def test_vae_without_noise_is_the_identity_and_its_kl_is_the_formula():
    layer, mu = VAE(6, 0.3), torch.randn(5, 6)
    nn.init.normal_(layer.log_sigma.weight, std=0.1)
    layer(mu, keys(5))
    sigma = layer.log_sigma(mu).exp()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, sigma), torch.distributions.Normal(torch.zeros(6), torch.ones(6))
    )
    torch.testing.assert_close(layer.kl, expected.sum(1).mean())
    image = mu[:, :, None, None].expand(-1, -1, 3, 2)
    layer(image, keys(5))
    torch.testing.assert_close(layer.kl, expected.sum(1).mean())


# ---- networks --------------------------------------------------------------------------------------------------------


def resnet(norm="group") -> nn.Module:
    return create_backbone(
        BackboneSpec("resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8, norm=norm)
    )


def vit() -> nn.Module:
    arguments = {**vit_arguments("vit_tiny_patch16_224", sizes=(16,), patch_size=4), "depth": 2}
    return create_backbone(BackboneSpec("vit_tiny_patch16_224", arguments=arguments, image_size=16))


NETWORKS = {
    "mlp": (lambda: MLP(12, 16), (12,)),
    "resnet": (resnet, (3, 16, 16)),
    "vit": (vit, (3, 16, 16)),
    "resnet-bn": (lambda: resnet("batch"), (3, 16, 16)),
}
KINDS = {arm.noise for arm in ARMS.values()}
IMPOSSIBLE = {("mlp", "channel"), ("mlp", "patch"), ("vit", "channel")}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", NETWORKS)
def test_every_noise_in_every_network(name, kind):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = Network(build(), 5, 0.3)
    x = torch.randn(6, *shape)
    plain = network.eval()(x)
    network.set_noise(*make_noise(kind, network.backbone, p=0.3, sigma=0.5, patch=4))
    if (name, kind) in IMPOSSIBLE:
        with pytest.raises(UserError, match="A1s|A1p"):
            network(x, keys(6))
        return
    torch.testing.assert_close(network(x).logits, plain.logits, rtol=0, atol=0)  # without keys there is no noise
    noisy, again, other = network(x, keys(6)), network(x, keys(6)), network(x, keys(6, epoch=1))
    torch.testing.assert_close(noisy, again, rtol=0, atol=0)
    changed = not torch.allclose(noisy.logits, other.logits)
    assert changed == (kind != "none")
    assert (not torch.allclose(noisy.features, other.features)) == (kind not in ("none", "head"))
    assert (noisy.kl > 0) == (kind == "vae")
    # The common noise is the same for all arms and bypasses the arm's layer.
    common = network(x, keys(6), common=True)
    torch.testing.assert_close(common.features, network.backbone(Element(0.3)(x, keys(6))))
    part = network(x[2:5], keys(6)[2:5])  # eval mode: nothing couples the samples
    torch.testing.assert_close(part.logits, noisy.logits[2:5], rtol=1e-4, atol=1e-5)


def test_noise_does_not_change_the_initial_weights():
    """Arms of a seed are pairs: the same backbone and head, whatever is added."""
    weights = []
    for kind, projector in (("none", 0), ("element", 0), ("vae", 0), ("element", 32)):
        torch.manual_seed(3)
        network = Network(resnet(), 5, 0.2, projector)
        network.set_noise(*make_noise(kind, network.backbone, p=0.2, sigma=0.5, patch=4))
        weights.append({k: v for k, v in network.state_dict().items() if k.startswith(("backbone", "head"))})
    assert all(torch.equal(weights[0][k], w[k]) for w in weights for k in weights[0])


def test_noise_behind_an_unknown_stem_is_refused():
    with pytest.raises(UserError, match="an MLP, ViT or ResNet"):
        make_noise("vae", nn.Linear(3, 3), p=0.2, sigma=0.5, patch=4)


# ---- losses ----------------------------------------------------------------------------------------------------------


def slow_nt_xent(h1, h2, temperature):
    z = [v / v.norm() for v in (*h1, *h2)]
    total = 0
    for i in range(len(z)):
        partner = (i + len(h1)) % len(z)
        scores = [z[i] @ z[j] / temperature for j in range(len(z)) if j != i]
        total = total - z[i] @ z[partner] / temperature + torch.stack(scores).logsumexp(0)
    return total / len(z)


def slow_r_drop(a, b):
    total = 0
    for x, y in zip(a.softmax(1), b.softmax(1), strict=True):
        total = total + 0.5 * ((x * (x / y).log()).sum() + (y * (y / x).log()).sum())
    return total / len(a)


def slow_alignment(a, b):
    return sum((x / x.norm() - y / y.norm()).square().sum() for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize(
    "fast, slow",
    [
        (lambda a, b: nt_xent(a, b, 0.3), lambda a, b: slow_nt_xent(a, b, 0.3)),
        (r_drop, slow_r_drop),
        (alignment, slow_alignment),
    ],
    ids=["nt_xent", "r_drop", "alignment"],
)
def test_loss_and_gradient_against_a_loop(fast, slow):
    a, b = (doubles(7, 5, seed=s).requires_grad_() for s in (0, 1))
    values = [f(a, b) for f in (fast, slow)]
    gradients = [torch.autograd.grad(v, (a, b)) for v in values]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


def step_of_a_rank(arm_name: str, norm: str, rank: int, ranks: int) -> tuple[float, list]:
    """The update of train.py for a process's slice of a batch of 16 forward passes: (loss, gradients)."""
    from common.distributed import sync_batchnorm

    arm = ARMS[arm_name]
    k = arm.copies or 2
    torch.manual_seed(0)
    network = Network(MLP(12, 16, norm=norm).double(), 5, 0.3).double()
    network.set_noise(*make_noise(arm.noise, network.backbone, p=0.3, sigma=0.5, patch=4))
    network = sync_batchnorm(network.double())
    x, y = doubles(40, 12), torch.arange(40) % 5
    rows, epochs = Order(torch.arange(40), 16 // k, 0)(2)
    part = slice(rank * (len(rows) // ranks), (rank + 1) * (len(rows) // ranks))
    rows, epochs = rows[part], epochs[part]
    mask = torch.cat([mask_keys(0, "train", epochs * (not arm.frozen), rows, c) for c in range(k)])
    cfg = Config(lambd=1.0, alpha=1.0, beta=0.01)
    loss, _ = compute_loss(network, copies_of(x[rows], k), mask, y[rows], arm, cfg)
    loss.backward()
    return loss.item(), [p.grad for p in network.parameters() if p.grad is not None]


def averaged(arm_name: str, norm: str):
    import torch.distributed as dist

    loss, gradients = step_of_a_rank(arm_name, norm, dist.get_rank(), dist.get_world_size())
    for gradient in gradients:  # what DistributedDataParallel does
        dist.all_reduce(gradient)
    return loss, [g / dist.get_world_size() for g in gradients]


@pytest.mark.parametrize(
    "arm, norm, ranks",
    [
        ("A1", "group", 2),
        ("A2", "group", 4),
        ("A4", "group", 2),
        ("A5", "group", 4),
        ("A5", "batch", 2),
        ("A5r", "group", 4),
        ("A6", "batch", 4),
    ],
)
def test_processes_equal_one(arm, norm, ranks):
    loss, gradients = step_of_a_rank(arm, norm, 0, 1)
    found = run_ranks(averaged, ranks, arm, norm)
    assert sum(f[0] for f in found) / ranks == pytest.approx(loss, abs=1e-10)
    for theirs in found:
        torch.testing.assert_close(theirs[1], gradients, rtol=0, atol=1e-10)


# ---- arms and data ---------------------------------------------------------------------------------------------------


def test_frozen_masks_are_one_for_a_sample_and_others_are_fresh():
    order, x = Order(torch.arange(10), 5, 0), torch.ones(10, 50)
    seen: dict[tuple, set] = {}
    for step in range(8):
        rows, epochs = order(step)
        for name in ("A1", "A2"):
            mask = Element(0.5)(x[rows], mask_keys(0, "train", epochs * (not ARMS[name].frozen), rows, 0))
            for row, m in zip(rows.tolist(), mask, strict=True):
                seen.setdefault((name, row), set()).add(tuple(m.tolist()))
    assert {len(masks) for (name, _), masks in seen.items() if name == "A2"} == {1}
    assert {len(masks) for (name, _), masks in seen.items() if name == "A1"} == {4}
    assert len(set().union(*(m for (name, _), m in seen.items() if name == "A2"))) == 10  # not one mask for all


@pytest.mark.parametrize("n, per_step", [(10, 4), (7, 16), (12, 12)])
def test_order_visits_every_record_once_an_epoch(n, per_step):
    records = torch.arange(100, 100 + n)
    order, rows, epochs = Order(records, per_step, 0), [], []
    for step in range(3 * n):
        r, e = order(step)
        rows += r.tolist()
        epochs += e.tolist()
    for epoch in range(3):
        assert sorted(r for r, e in zip(rows, epochs, strict=True) if e == epoch) == records.tolist()
    later = Order(records, per_step, 0)(5)
    assert all(torch.equal(a, b) for a, b in zip(later, order(5), strict=True))


def test_budgets_are_nested_and_random_labels_stay():
    small, large = labeled_rows(1000, 50, 1), labeled_rows(1000, 200, 1)
    assert torch.equal(small, large[:50]) and len(labeled_rows(1000, 0, 1)) == 1000
    assert not torch.equal(small, labeled_rows(1000, 50, 2))
    assert torch.equal(random_labels(100, 5, 0), random_labels(100, 5, 0))
    with pytest.raises(UserError, match="has 1000 training records"):
        labeled_rows(1000, 1001, 0)


def test_zipped_batch_has_every_copy_of_every_record():
    assert copies_of(torch.arange(3), 2).tolist() == [0, 1, 2, 0, 1, 2]


def test_drawn_table_is_learnable_and_the_same_everywhere():
    train, test = (open_records("table", s, device=torch.device("cpu")) for s in ("train", "test"))
    assert (len(train), len(test), train.classes) == (10_000, 2_000, 5)
    assert abs(train.inputs.mean()) < 1e-5 and abs(train.inputs.std() - 1) < 1e-3
    assert torch.bincount(train.labels).min() > 500
    assert train.fingerprint == open_records("table", "train", device=torch.device("cpu")).fingerprint
    x = torch.cat([train.inputs, torch.ones(10_000, 1)], 1)
    weights = torch.linalg.lstsq(x, F.one_hot(train.labels).float()).solution
    right = (torch.cat([test.inputs, torch.ones(2000, 1)], 1) @ weights).argmax(1) == test.labels
    assert right.float().mean() > 0.35  # far above a fifth


def test_diamonds_is_read_without_importing_plotnine(tmp_path, monkeypatch):
    package = tmp_path / "plotnine"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="diamonds.csv"):
        open_records("diamonds", "train", device=torch.device("cpu"))
    grades = ["Ideal", "Premium", "Good", "Very Good", "Fair"]
    lines = ["carat,cut,color,clarity,depth,table,price,x,y,z"]
    lines += [
        f"{0.2 + i / 99},{grades[i % 5]},{'DEF'[i % 3]},{'SI'[i % 2]},{60 + i % 7},5{i % 9},{300 + i},{i},{-i},{i % 4}"
        for i in range(50)
    ]
    (package / "data" / "diamonds.csv").write_text("\n".join(lines) + "\n")
    train, test = (open_records("diamonds", s, device=torch.device("cpu")) for s in ("train", "test"))
    assert (len(train), len(test), train.classes, train.inputs.shape[1]) == (40, 10, 5, 12)
    assert "plotnine" not in sys.modules


def test_tables_and_images_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    if "plotnine" not in sys.modules:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install --no-deps plotnine"):
            open_records("diamonds", "train", device=torch.device("cpu"))
    import methods.dropout_ssl.data as data

    monkeypatch.setattr(data, "open_data", lambda *a, **k: object())
    with pytest.raises(UserError, match="fit in memory"):
        open_records("shapes", "train", device=torch.device("cpu"))
    from common.data import ImageStore

    unlabeled = ImageStore(name="x", fingerprint="", images=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(data, "open_data", lambda *a, **k: unlabeled)
    with pytest.raises(UserError, match="needs a label"):
        open_records("shapes", "train", device=torch.device("cpu"))


def test_images_reach_the_network_whole_unless_they_are_cropped():
    from methods.dropout_ssl.augment import one_view

    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    records = Records(
        inputs=images, labels=torch.zeros(6, dtype=torch.long), classes=1, name="", fingerprint="", label_name=""
    )
    cfg = Config(image_size=16, crop_scale=(0.3, 1.0), normalize="shapes")
    rows = torch.tensor([4, 1, 5, 0])
    whole = Inputs(records, one_view(cfg, crop_flip=False), 0)
    torch.testing.assert_close(whole(rows, 3), images[rows] / 127.5 - 1, rtol=0, atol=1e-5)
    cropped = Inputs(records, one_view(cfg, crop_flip=True), 0)
    assert not torch.allclose(cropped(rows, 3), whole(rows, 3))
    assert torch.equal(cropped(rows, 3, slice(2, 4)), cropped(rows, 3)[2:])
    assert not torch.equal(cropped(rows, 3), cropped(rows, 4))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def cos(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


def test_similarities_and_variance_against_loops():
    h, y = doubles(3, 9, 4) + 5, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    found = metrics.similarity_of_pairs(h, y)
    c = h - h.mean((0, 1))
    same = [cos(c[m, i], c[k, i]) for i in range(9) for m in range(3) for k in range(3) if m != k]
    pairs = [(i, j, m, k) for i in range(9) for j in range(9) if i != j for m in range(3) for k in range(3)]
    inside = [cos(c[m, i], c[k, j]) for i, j, m, k in pairs if y[i] == y[j]]
    across = [cos(c[m, i], c[k, j]) for i, j, m, k in pairs if y[i] != y[j]]
    expected = [sum(v) / len(v) for v in (same, inside, across)]
    assert [found[k] for k in ("s_same", "s_cls", "s_oth")] == pytest.approx(expected, abs=1e-10)
    assert found["g_inst"] == pytest.approx(expected[0] - expected[1], abs=1e-10)
    within = sum(float(h[:, i].var(0).sum()) for i in range(9)) / 9
    total = float((h.flatten(0, 1) - h.mean((0, 1))).square().sum(1).mean())
    assert found["V"] == pytest.approx(within / total, abs=1e-10)


def test_a_shared_mean_does_not_pass_for_agreement():
    """With a large common offset all raw cosines are 1."""
    h = doubles(8, 200, 30) + 100
    found = metrics.similarity_of_pairs(h, torch.arange(200) % 4)
    assert abs(found["s_same"]) < 0.05 and found["V"] > 0.9
    assert metrics.geometry(h)["alignment"] > 1.5


def test_contrast_by_kind_of_negative_against_loops():
    h, y, temperature = doubles(2, 8, 5), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), 0.5
    found = metrics.contrast(h, y, temperature)
    c = h - h.mean((0, 1))
    z, labels = [*c[0], *c[1]], [*y.tolist(), *y.tolist()]
    for name, fits in (
        ("all", lambda i, j: True),
        ("other", lambda i, j: labels[i] != labels[j]),
        ("same", lambda i, j: labels[i] == labels[j]),
    ):
        rows = []
        for i in range(16):
            partner = (i + 8) % 16
            negatives = [cos(z[i], z[j]) / temperature for j in range(16) if j not in (i, partner) and fits(i, j)]
            positive = cos(z[i], z[partner]) / temperature
            total = math.log(sum(math.exp(s) for s in (positive, *negatives)))
            rows.append((total - positive) / math.log(1 + len(negatives)))
        assert found[f"nt_xent_{name}_0.5"] == pytest.approx(sum(rows) / 16, abs=1e-5)
    alike = doubles(1, 300, 40).repeat(2, 1, 1)
    assert metrics.contrast(alike, torch.zeros(300, dtype=torch.long), 0.1)["nt_xent_all_0.1"] < 0.2
    apart = metrics.contrast(doubles(2, 300, 40), torch.arange(300) % 3, 1e6)
    assert [apart[f"nt_xent_{k}_1e+06"] for k in ("all", "other", "same")] == pytest.approx([1, 1, 1], abs=1e-4)


def test_nt_xent_of_a_measurement_is_the_loss():
    a, b = doubles(6, 5).float(), doubles(6, 5, seed=1).float()
    assert float(nt_xent_here(a, b, 0.5)) == pytest.approx(float(nt_xent(a, b, 0.5)), abs=1e-6)


def test_output_terms_add_up():
    log_p, y = doubles(4, 20, 5).log_softmax(-1), torch.arange(20) % 5
    found = metrics.output_terms(log_p, y)
    loss = sum(float(F.nll_loss(lp, y)) for lp in log_p) / 4
    assert found["ce"] == pytest.approx(loss, abs=1e-10)
    assert found["ce"] == pytest.approx(found["ce_geo"] + found["consistency"], abs=1e-10)
    assert found["symmetric_kl"] == pytest.approx(2 * float(slow_r_drop(log_p[0], log_p[1])), abs=1e-10)


def test_sinkhorn_cka_calibration_and_prototypes():
    scores = 0.05 * doubles(60, 4).float()
    q = metrics.sinkhorn(scores)
    torch.testing.assert_close(q.sum(1), torch.ones(60))
    assert abs(q.sum(0) - 15).max() < 2
    assert metrics.sinkhorn(3 * torch.eye(4)).argmax(1).tolist() == [0, 1, 2, 3]
    a = doubles(50, 6)
    rotation = torch.linalg.qr(doubles(6, 6, seed=2)).Q
    assert metrics.cka(a, 3 * a @ rotation + 1) == pytest.approx(1, abs=1e-9)
    assert metrics.cka(a, doubles(50, 6, seed=3)) < 0.5
    p = torch.tensor([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    y = torch.tensor([0] * 7 + [1] * 3 + [0] * 8 + [1] * 2)
    assert metrics.calibration_error(p.log(), y) == pytest.approx(0.5 * 0.2 + 0.5 * 0.2, abs=1e-6)
    h = doubles(2, 12, 6)
    h[1] = h[0]
    log_p = doubles(1, 12, 3).log_softmax(-1).repeat(2, 1, 1)
    found = metrics.prototypes(h, log_p, doubles(3, 6, seed=4), torch.arange(12) % 3)
    assert found["agreement"] == found["codes"] == 1
    assert found["soft_agreement"] == pytest.approx(float(log_p[0].exp().square().sum(1).mean()))
    assert metrics.cosine([a], [a]) == pytest.approx(1) and metrics.cosine([a], [0 * a]) == 0


def make_measure(network: Network, **changes) -> Measure:
    x, y = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 5
    sets = {"held-out": (x[:20], y[:20], torch.arange(20)), "train, measured": (x[20:], y[20:], torch.arange(20))}
    return Measure(network, sets, **{"seed": 0, "masks": 3, "own": False, "batch": 8, **changes})


def test_measuring_uses_noise_in_eval_mode_and_leaves_no_trace():
    """In plain eval mode all masks would agree."""
    torch.manual_seed(0)
    network = Network(MLP(12, 16, norm="batch"), 5, 0.3)
    network.set_noise(*make_noise("gaussian", network.backbone, p=0.3, sigma=0.5, patch=4))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    measure = make_measure(network, own=True)
    first = measure(0.0)
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert first.keys() == {"held-out", "train", "own"}
    assert 0.01 < first["held-out"]["V"] < 1 and first["held-out"]["s_same"] < 0.999
    assert first["own"]["V"] != first["held-out"]["V"]
    assert "cka" not in first["held-out"]
    second = measure(1.0)["held-out"]
    assert second["cka"] == pytest.approx(1) and second["drift_fixed"] == pytest.approx(1)
    assert second["drift_fresh"] < 0.999  # nothing but the mask has changed
    stable = {k: v for k, v in second.items() if k not in ("cka", "drift_fixed", "drift_fresh")}
    assert stable == {k: first["held-out"][k] for k in stable}
    restored = make_measure(network, own=True)
    restored.load_state_dict(measure.state_dict())
    assert restored(2.0) == measure(2.0)
    with pytest.raises(UserError, match="two masks"):
        make_measure(network, masks=1)


def test_gradient_cosines_are_of_the_named_losses():
    torch.manual_seed(0)
    network = Network(MLP(12, 16), 5, 0.3).eval()
    found = make_measure(network)._gradients()
    x, y = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))[20:28], (torch.arange(40) % 5)[20:28]
    weights = list(network.backbone.parameters())

    def gradient(loss):
        network.zero_grad()
        a, b = (network(x, mask_keys(0, "gradients", 0, torch.arange(8), c), common=True) for c in (0, 1))
        loss(a, b).backward()
        return torch.cat([w.grad.flatten() for w in weights]).double()

    labels = gradient(lambda a, b: 0.5 * (F.cross_entropy(a.logits, y) + F.cross_entropy(b.logits, y)))
    for name, loss in (
        ("alignment", lambda a, b: slow_alignment(a.features, b.features)),
        ("nt_xent", lambda a, b: slow_nt_xent(a.features, b.features, 0.5)),
    ):
        assert found[f"gradient_{name}"] == pytest.approx(cos(labels, gradient(loss)), abs=1e-4)


def test_measured_steps_are_those_of_full_epochs():
    assert measured_steps(250, 50_000, 128, 1500) == [0, 2, 4, 10, 20, 40, 98, 196, 390, 391, 977, 1500]
    assert measured_steps(4000, 43_152, 128, 100) == [0, 32, 63, 100]


# ---- presets and runs ------------------------------------------------------------------------------------------------


def test_presets_hold_the_design():
    r18, tabular = PRESETS["cifar10-r18"][1], PRESETS["tabular"][1]
    assert (r18.backbone, r18.stem, r18.norm, r18.optimizer) == ("resnet18", "cifar", "group", "sgd")
    assert (r18.lr, r18.momentum) == (0.1, 0.9)
    assert (r18.weight_decay, r18.batch_size, r18.steps, r18.masks, r18.measured) == (5e-4, 128, 10_000, 8, 512)
    assert (tabular.optimizer, tabular.lr, tabular.width, tabular.steps) == ("adam", 1e-3, 256, 1500)
    assert tabular.data == "diamonds"
    assert PRESETS["cifar10-r18-bn"][1].norm == "batch" and PRESETS["cifar10-cpu"][1].norm == "group"
    simcse = PRESETS["cifar10-contrastive"][1]
    assert (simcse.p, simcse.temperature, simcse.pretrain_share, simcse.protocol) == (0.1, 0.05, 1.0, "common")
    assert set(Config.__dataclass_fields__["arm"].type.__args__) == set(ARMS)
    assert [a for a, arm in ARMS.items() if arm.frozen] == ["A2"] and ARMS["A2"] == replace(
        ARMS["A1"], about=ARMS["A2"].about, frozen=True
    )


TABLE = (
    "table",
    "--no-eval",
    "--steps",
    6,
    "--labels",
    200,
    "--batch-size",
    32,
    "--measured",
    60,
    "--masks",
    2,
    "--log-every",
    2,
)
IMAGE_ARMS = ("A1s", "A1p", "A8")


def refused(tmp_path, *arguments) -> str:
    code, text = run_command("methods.dropout_ssl.train", *arguments, "--out", tmp_path, log=tmp_path / "log")
    assert code == 2 and "Traceback" not in text, text
    return text


def test_mistakes_are_said_in_a_sentence(tmp_path):
    assert "do not divide it" in refused(tmp_path, "table", "--arm", "A6", "--copies", 3)
    assert "cannot be cropped" in refused(tmp_path, "table", "--arm", "A8")
    assert "rows of a table have none" in refused(tmp_path, *TABLE, "--arm", "A1p")
    assert "convolutional network" in refused(tmp_path, *TABLE, "--arm", "A1s")
    assert "below 1" in refused(tmp_path, *TABLE, "--p", "1.0")
    assert "repeat among the negatives" in refused(tmp_path, *TABLE, "--arm", "A5", "--labels", 8)
    assert "--patch 5 does not divide" in refused(tmp_path, "smoke", "--no-eval", "--arm", "A1p", "--patch", 5)


def test_two_processes_train_as_one(tmp_path):
    """A7: without labels, where the head has no gradient, then with them, where the projector has none."""
    flags = [
        "table",
        "--no-eval",
        "--arm",
        "A7",
        "--steps",
        "24",
        "--labels",
        "300",
        "--measured",
        "60",
        "--masks",
        "2",
        "--log-every",
        "4",
        "--weight-decay",
        "0.1",
        "--projector-dim",
        "16",
        "--out",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    line = [*command, "-m", "methods.dropout_ssl.train", *flags, str(tmp_path / "two")]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    code, text = run_command("methods.dropout_ssl.train", *flags, tmp_path / "one", log=tmp_path / "log")
    assert code == 0, text
    lines = [read_metrics(tmp_path / name / "dropout_ssl-table" / "metrics.jsonl") for name in ("two", "one")]
    assert len(lines[0]) == len(lines[1]) > 12
    for two, one in zip(*lines, strict=True):
        assert two.get("kind") == one.get("kind")
        left_out = (*TIME_FIELDS, "kind", "feature_std")  # the spread over a process's own rows
        numbers = [{k: v for k, v in line.items() if k not in left_out} for line in (two, one)]
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=1e-4)
    torch.testing.assert_close(
        *(state_of(tmp_path / n / "dropout_ssl-table") for n in ("two", "one")), rtol=1e-3, atol=1e-4
    )
    rates = [line["lr"] for line in lines[1] if "loss" in line]
    assert rates[0] > rates[2] < rates[3]  # each phase has its own cosine


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    newest = max(directory.glob("checkpoints/step-*/state.pt"))
    return torch.load(newest, weights_only=False)["stateful"]["model"]


def test_weights_without_a_loss_stay_as_they_are(tmp_path):
    """Weight decay alone would shrink them, and arms would no longer start their supervised part as a pair."""
    torch.manual_seed(0)
    start = Network(MLP(16), 5, 0.2, 8).state_dict()
    shared = ("--weight-decay", 0.5, "--projector-dim", 8, "--out", tmp_path)
    for arm, idle in (("A7", "head"), ("A1", "projector")):
        arguments = (*TABLE, "--arm", arm, "--name", arm, "--pretrain-share", "1.0", *shared)
        code, text = run_command("methods.dropout_ssl.train", *arguments, log=tmp_path / "log")
        assert code == 0, text
        for name, value in state_of(tmp_path / arm).items():
            assert torch.equal(value, start[name]) == name.startswith(idle), (arm, name)


def events(directory, kind="held-out") -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == kind]


def test_every_arm_trains_from_the_same_start(tmp_path):
    start = {}
    for arm in ARMS:
        preset = ("smoke", "--no-eval", "--steps", 2, "--measured", 32) if arm in IMAGE_ARMS else TABLE
        arguments = (*preset, "--arm", arm, "--name", arm, "--out", tmp_path)
        code, text = run_command("methods.dropout_ssl.train", *arguments, log=tmp_path / "log")
        assert code == 0, f"{arm}: {text}"
        first, *_, last = events(tmp_path / arm)
        assert first["step"] == 0 and last["step"] == (2 if arm in IMAGE_ARMS else 6)
        assert bool(events(tmp_path / arm, "own")) == (arm in ("A1s", "A1p", "A3", "A3a", "A4", "A4x"))
        start.setdefault(preset[0], {})[arm] = {k: v for k, v in first.items() if "gradient" not in k}
    for arm in ("A1", "A4"):  # without the layer: a plain network, whatever it was trained with
        backbone, spec = load(tmp_path / arm)
        assert backbone(torch.zeros(2, 16)).shape == (2, 256) and spec.name == "methods.dropout_ssl.model:MLP"
    for arms in start.values():
        assert len({json.dumps(first) for first in arms.values()}) == 1
