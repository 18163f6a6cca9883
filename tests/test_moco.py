"""MoCo: loss, queue, shuffled BatchNorm, key encoder, N processes against one, whole runs, presets."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, rng
from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.ema import ema_update, make_teacher
from common.errors import UserError
from common.log import read_metrics
from common.schedules import cosine_schedule, scaled_lr
from methods.moco.augment import two_views
from methods.moco.config import PRESETS, Config
from methods.moco.health import chance_level, health_checks
from methods.moco.loss import Queue, info_nce
from methods.moco.shuffle import GroupedBatchNorm, encode_shuffled, group_batchnorm
from methods.moco.train import Encoder, compute_loss
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)


def unit(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(q, k, queue, temperature):
    """Equation 1 of the paper, one query at a time."""
    total = 0.0
    for own, positive in zip(q, k, strict=True):
        scores = [torch.exp((own * key).sum() / temperature) for key in (positive, *queue)]
        total = total - torch.log(scores[0] / sum(scores)) / len(q)
    return total


@pytest.mark.parametrize(("n", "length", "d"), [(1, 1, 3), (5, 7, 4), (8, 32, 6)])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradient_equal_the_slow_version(n, length, d, temperature):
    q, k, queue = (unit(rows, d, seed=i).requires_grad_() for i, rows in enumerate((n, n, length)))
    loss, parts = info_nce(q, k, queue.detach(), temperature)
    expected = slow_loss(q, k.detach(), queue.detach(), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(x, q, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert torch.autograd.grad(loss, k, allow_unused=True) == (None,)  # keys are constants, whoever calls it
    nearest = [all((own @ key) < (own @ positive) for key in queue) for own, positive in zip(q, k, strict=True)]
    assert parts["retrieval"].item() == pytest.approx(sum(nearest) / n)
    torch.testing.assert_close(parts["positive"], (q * k).sum(1).mean().detach())
    torch.testing.assert_close(parts["negative"], (q @ queue.T).mean().detach())


def test_known_values():
    q, queue = unit(64, 128, dtype=torch.float32), unit(4096, 128, seed=1, dtype=torch.float32)
    same = q[:1].expand(64, 128)
    loss, parts = info_nce(same, same, same[:1].expand(4096, 128), 0.2)  # all images in one point: chance, exactly
    torch.testing.assert_close(loss, torch.tensor(chance_level(4096)))
    assert parts["retrieval"] == 0  # a tie is a miss
    unrelated = info_nce(q, unit(64, 128, seed=2, dtype=torch.float32), queue, 0.2)[0]
    assert abs(unrelated - chance_level(4096)) < 0.2
    found, parts = info_nce(q, q, queue, 0.07)
    assert found < 0.02 and parts["retrieval"] == 1 and parts["positive"].item() == pytest.approx(1)
    assert chance_level(65536) == pytest.approx(11.09, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    q, k, queue = (unit(n, 16, seed=n).to(dtype) for n in (8, 9, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = info_nce(q, k[:8], queue, 0.2)
    assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    torch.testing.assert_close(loss, info_nce(q.float(), k[:8].float(), queue.float(), 0.2)[0])


def tripped(line: dict, step: int) -> set[str]:
    return {rule.metric for rule in health_checks(4096, 39, 39) if rule.trips({**line, "step": step})}


def test_forced_failures_trip_the_watch():
    healthy = {"retrieval": 0.3, "projection_std": 0.9, "queue_age": 0.4}
    assert tripped(healthy, 500) == set()
    assert tripped({**healthy, "retrieval": 0.0005}, 500) == {"retrieval"}
    assert tripped({**healthy, "projection_std": 0.05}, 500) == {"projection_std"}
    assert tripped({**healthy, "queue_age": 1.3}, 500) == {"queue_age"}
    assert tripped({"retrieval": 0.0, "projection_std": 0.0, "queue_age": 0.0}, 39) == set()


# ---- queue -----------------------------------------------------------------------------------------------------------


def test_queue_starts_random_and_the_oldest_batch_makes_place():
    queue = Queue(1, 6, 8, seed=3)
    torch.testing.assert_close(queue.keys.norm(dim=2), torch.ones(1, 6))
    assert torch.equal(queue.keys, Queue(1, 6, 8, seed=3).keys) and not torch.equal(
        queue.keys, Queue(1, 6, 8, seed=4).keys
    )
    start = queue.keys.clone()
    batches = [torch.full((1, 2, 8), float(i)) for i in range(5)]
    queue.push(batches[0], 0)
    assert torch.equal(queue.keys[:, :2], batches[0]) and torch.equal(queue.keys[:, 2:], start[:, 2:])
    for step in range(1, 5):
        queue.push(batches[step], step)
    assert queue.keys[0, :, 0].tolist() == [3, 3, 4, 4, 2, 2]  # 0 and 1 have left; the next place is that of 2
    assert list(queue.state_dict()) == ["keys"]


def test_queue_keeps_each_direction_apart():
    queue = Queue(2, 4, 1, seed=0)
    queue.push(torch.tensor([[[1.0], [2.0]], [[-1.0], [-2.0]]]), 1)
    assert queue.keys[:, 2:, 0].tolist() == [[1, 2], [-1, -2]]


# ---- networks and BatchNorm ------------------------------------------------------------------------------------------


def encoder_of(hidden_dim: int = 32) -> Encoder:
    torch.manual_seed(0)
    return Encoder(create_backbone(BackboneSpec("resnet18", **TINY)), hidden_dim, 16).train()


def test_projector_as_in_the_code():
    first, act, second = encoder_of().projector
    assert isinstance(act, nn.ReLU) and first.bias is not None and second.bias is not None  # and no norm
    assert (first.in_features, first.out_features, second.out_features) == (64, 32, 16)
    assert [layer.out_features for layer in encoder_of(0).projector] == [16]  # v1
    z = encoder_of()(*torch.randn(2, 4, 3, 16, 16))
    assert z.shape == (2, 4, 16)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_group_is_a_batch_of_its_own(norm):
    """Each group gives what torch's BatchNorm gives of it alone; running averages move by the mean of the groups'."""
    torch.manual_seed(0)
    shape = (12, 5) if norm is nn.BatchNorm1d else (12, 5, 3, 3)
    x = torch.randn(shape, dtype=torch.float64)
    plain = norm(5).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    grouped = GroupedBatchNorm(norm(5).double(), 3)
    grouped.load_state_dict(plain.state_dict())
    before, means, variances = plain.running_mean.clone(), [], []
    for part, out in zip(x.chunk(3), grouped(x).chunk(3), strict=True):
        plain.reset_running_stats()
        torch.testing.assert_close(out, plain(part), rtol=1e-12, atol=1e-12)
        means.append((plain.running_mean - before) / plain.momentum)
        variances.append((plain.running_var - 1) / plain.momentum + 1)
    torch.testing.assert_close(grouped.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(grouped.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert grouped.num_batches_tracked == 1
    plain.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x))


def test_shuffling_changes_the_neighbors_and_not_the_order():
    encoder = group_batchnorm(encoder_of(), 4)
    images = torch.randn(16, 3, 16, 16)
    keys = encode_shuffled(encoder, images, 0, "shuffle", 1)
    assert not torch.equal(keys, encoder(images)[0])  # normalized with others
    order = torch.randperm(16, generator=rng.generator(0, "shuffle", 1))
    torch.testing.assert_close(keys[order], encoder(images[order])[0])
    assert not torch.equal(keys, encode_shuffled(encoder, images, 0, "shuffle", 2))
    encoder.eval()  # every row is encoded alone: the order is that of the images
    torch.testing.assert_close(encode_shuffled(encoder, images, 0, "shuffle", 1), encoder(images)[0])


def test_a_key_does_not_know_the_neighbors_of_its_query():
    """What BatchNorm could tell: another image of a group changes the query of each; shuffled, not the same keys."""
    encoder = group_batchnorm(encoder_of().double(), 4)
    images = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    other = images.clone()
    other[1] += 1

    def changed(encode) -> set[int]:
        return set((encode(images) - encode(other)).abs().amax(1).gt(1e-9).nonzero().flatten().tolist())

    assert changed(lambda x: encoder(x)[0].detach()) == {0, 1, 2, 3}
    order = torch.randperm(16, generator=rng.generator(0, "shuffle", 1)).tolist()
    place = order.index(1) // 4 * 4
    keys = changed(lambda x: encode_shuffled(encoder, x, 0, "shuffle", 1))
    assert keys == set(order[place : place + 4]) != {0, 1, 2, 3}


# ---- N processes -----------------------------------------------------------------------------------------------------


def one_step(dtype: torch.dtype, bn_groups: int, symmetric: bool, batch: int = 16) -> dict[str, torch.Tensor]:
    """Loss, signals, gradients, key encoder, queue, BatchNorm buffers of this process after two steps under DDP."""
    cfg = Config(bn_groups=bn_groups, symmetric=symmetric, batch_size=batch, queue_length=2 * batch)
    encoder = encoder_of().to(dtype)
    if bn_groups:
        group_batchnorm(encoder, bn_groups // world_size())
    encoder = encoder if bn_groups else sync_batchnorm(encoder)
    key_encoder = make_teacher(encoder)
    queue = Queue(1 + symmetric, cfg.queue_length, 16, seed=0).to(dtype)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
    model = DistributedDataParallel(encoder) if world_size() > 1 else encoder
    generator = torch.Generator().manual_seed(1)
    n = batch // world_size()
    for step in range(2):
        views = torch.randn(2, batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        ema_update(key_encoder, encoder, 0.5)
        loss, parts, keys = compute_loss(model, key_encoder, queue, views[:, rank() * n : (rank() + 1) * n], cfg, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.push(keys, step)
    logged = torch.stack([loss.detach(), *parts.values()])
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
    found = dict(zip(("loss", *parts), logged / world_size(), strict=True)) | {"queue": queue.keys}
    found |= {name: p.grad for name, p in encoder.named_parameters()}
    found |= {f"key.{name}": p for name, p in key_encoder.named_parameters()}
    return found | {name: b.clone() for name, b in encoder.named_buffers() if "running" in name}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("bn_groups", "symmetric"), [(4, False), (8, True), (0, True)])
def test_processes_equal_one(ranks, bn_groups, symmetric):
    for dtype in (torch.float64, torch.float32):
        one, several = (f(dtype, bn_groups, symmetric) for f in (one_step, partial(run_ranks, one_step, ranks)))
        for many in several:
            assert many.keys() == one.keys() and len(one) > 60
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                exact = dtype == torch.float64 and name != "retrieval"
                assert worst < (1e-9 if exact else 1e-4), (name, dtype, worst)
                if name == "queue" or name.startswith("key."):
                    assert torch.equal(many[name], several[0][name]), name


# ---- whole runs ------------------------------------------------------------------------------------------------------


def states(directory) -> list[dict]:
    paths = [
        directory / "checkpoints" / f"step-{s:08d}" / "state.pt" for s in checkpoint.steps(directory / "checkpoints")
    ]
    return [torch.load(path, weights_only=False)["stateful"] for path in paths]


def test_key_encoder_and_queue_follow_the_queries(tmp_path):
    """Every step: key weights = m * key weights + (1 - m) * those of the queries; then a batch enters the queue."""
    flags = ("--no-eval", "--save-every", 1, "--keep", 20, "--log-every", 1, "--max-steps", 6)
    flags = (*flags, "--ema-momentum", 0.8, "--ema-momentum-end", 0.9)
    code, text = run_command("methods.moco.train", "smoke", "--out", tmp_path, *flags, log=tmp_path / "log")
    assert code == 0, text
    cfg, found = PRESETS["smoke"][1], states(tmp_path / "moco-smoke")
    lines = [line for line in read_metrics(tmp_path / "moco-smoke" / "metrics.jsonl") if "loss" in line]
    momenta = [cosine_schedule(step, base=0.8, final=0.9, total=16) for step in range(6)]
    assert [line["ema_momentum"] for line in lines] == pytest.approx(momenta) and len(found) == 6
    names = dict(encoder_of().named_parameters())
    for step, (before, after) in enumerate(pairwise(found), start=1):
        for name in names:
            old, query, new = before["key_encoder"][name], before["model"][name], after["key_encoder"][name]
            m = momenta[step]
            torch.testing.assert_close(new, m * old + (1 - m) * query, rtol=1e-5, atol=1e-7)
        place = step % 2 * 64  # two batches of 64 wrap around
        moved = (before["queue"]["keys"] != after["queue"]["keys"]).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == list(range(place, place + 64)), step
    age = [line["queue_age"] for line in lines]
    assert age == [0, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert cfg.queue_length == 2 * cfg.batch_size and found[-1]["queue"]["keys"].shape == (1, 128, 64)
    torch.testing.assert_close(found[-1]["queue"]["keys"].norm(dim=-1), torch.ones(1, 128))
    running = "backbone.layer4.0.bn1.running_mean"  # the keys' images have statistics of their own
    assert not torch.equal(found[-1]["key_encoder"][running], found[-1]["model"][running])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--queue-length", 100), "--queue-length 100 is no multiple of the batch of 64"),
        (("--bn-groups", 3), "--bn-groups 3 does not divide the batch of 64"),
        (("--bn-groups", 64), "--bn-groups 64 does not divide the batch of 64 into groups of 2"),
    ],
)
def test_what_does_not_fit_is_a_sentence(tmp_path, flags, words):
    code, text = run_command("methods.moco.train", "smoke", "--out", tmp_path, *flags, log=tmp_path / "log")
    assert code == 2 and words in text and "Traceback" not in text, text


def test_groups_divide_among_processes():
    with pytest.raises(UserError, match="--bn-groups 8 does not divide among 3 processes"):
        Config().check(3)
    Config().check(4)
    Config(bn_groups=0).check(3)


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: images, epochs, peak rate, warm-up, decay, queue, temperature, momenta of the key encoder, groups, symmetric
EXPECTED = {
    "cifar10-r18": (CIFAR, 1000, 0.3, 10, 1e-4, 32768, 0.2, (0.99, 0.999), 0, True),
    "imagenette-r18": (IMAGENETTE, 800, 0.06, 0, 5e-4, 4096, 0.1, (0.99, 0.99), 0, True),
    "imagenet-r50": (IMAGENET, 200, 0.03, 0, 1e-4, 65536, 0.2, (0.999, 0.999), 8, False),
    "imagenet-r50-e800": (IMAGENET, 800, 0.03, 0, 1e-4, 65536, 0.2, (0.999, 0.999), 8, False),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, epochs, peak, warmup_epochs, decay, length, temperature, momenta, groups, symmetric = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    cfg.check(1)
    assert (cfg.epochs, cfg.batch_size, cfg.warmup_epochs, cfg.weight_decay) == (epochs, 256, warmup_epochs, decay)
    assert (cfg.queue_length, cfg.temperature, cfg.bn_groups, cfg.symmetric) == (length, temperature, groups, symmetric)
    assert (cfg.optimizer, cfg.momentum, cfg.hidden_dim) == ("sgd", 0.9, 2048)
    assert cfg.projector_dim == (256 if preset == "cifar10-r18" else 128)
    assert scaled_lr(cfg.base_lr, cfg.batch_size, "linear") == pytest.approx(peak)
    assert cfg.queue_length < images
    total = epochs * (images // 256)
    warmup = warmup_epochs * (images // 256)
    rate = [cosine_schedule(s, base=peak, total=total, warmup=warmup) for s in (warmup, total - 1)]
    assert rate[0] == pytest.approx(peak) and rate[1] < 1e-6
    ema = [cosine_schedule(s, base=momenta[0], final=momenta[1], total=total) for s in (0, total // 2, total - 1)]
    assert (cfg.ema_momentum, cfg.ema_momentum_end) == momenta
    assert ema == pytest.approx([momenta[0], sum(momenta) / 2, momenta[1]], abs=1e-6)


def test_views_equal_the_reference():
    for view in two_views(PRESETS["imagenet-r50"][1]).views:
        assert (view.size, view.scale, view.interpolation) == (224, (0.2, 1.0), "bilinear")
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
        assert (view.color_jitter_prob, view.grayscale, view.flip, view.solarize) == (0.8, 0.2, 0.5, 0.0)
        assert (view.blur, view.blur_sigma) == (0.5, (0.1, 2.0))
    assert [view.blur for view in two_views(PRESETS["cifar10-r18"][1]).views] == [0.0, 0.0]
    assert PRESETS["cifar10-cpu"][1].crop_scale == (0.2, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    cfg.check(1)
    with torch.device("meta"):
        encoder = Encoder(create_backbone(cfg.resnet_spec(zero_init_last=False)), cfg.hidden_dim, cfg.projector_dim)
        encoder = group_batchnorm(encoder, 2) if cfg.bn_groups else encoder
        image = torch.empty(4, 3, cfg.image_size, cfg.image_size)
        assert encoder(image).shape == (1, 4, cfg.projector_dim)
