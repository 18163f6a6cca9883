"""SwAV and LARC: Sinkhorn, loss, optimizer against slow versions, processes against one, queue, freeze, collapse."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.backbones import BackboneSpec, create_backbone, multiply_adds
from common.distributed import rank, sync_batchnorm, world_size
from common.log import read_metrics
from common.optim import LARC, LARS, set_lr
from common.schedules import cosine_schedule
from methods.swav.augment import multi_crop
from methods.swav.config import PRESETS
from methods.swav.loss import Queue, sinkhorn, swapped_prediction
from methods.swav.train import SwAV, compute_loss
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)


# ---- LARC ------------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).double()


def slow_larc(params, grads, buffers, lr, decay, clip, trust_coefficient=0.001, momentum=0.9):
    """One step, one tensor at a time, from the formulas alone."""
    for w, g, v in zip(params, grads, buffers, strict=True):
        q = 1.0
        if w.norm() > 0 and g.norm() > 0:
            q = trust_coefficient * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
            q = min(q / lr, 1.0) if clip else q
            g = g + decay * w
        v.copy_(momentum * v + q * g)
        w.sub_(lr * v)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_larc_equals_the_slow_loop_for_every_tensor(clip, decay):
    ours, theirs = network(), [p.detach().clone() for p in network().parameters()]
    assert any(p.ndim == 1 and not p.any() for p in theirs)  # BatchNorm's shift starts at zero
    optimizer = LARC(ours.parameters(), lr=0.0, weight_decay=decay, clip=clip)
    buffers = [torch.zeros_like(p) for p in theirs]
    for step in range(8):
        lr = cosine_schedule(step, base=3.0, total=8, warmup=4, start=1e-4, endpoint=True)
        set_lr(optimizer, lr)
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * (i != step) for i, p in enumerate(theirs)]
        for p, g in zip(ours.parameters(), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        slow_larc(theirs, grads, buffers, lr, decay, clip)
    for a, b in zip(ours.parameters(), theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)


def one_step(optimizer, w, g, **options):
    weight = nn.Parameter(torch.tensor(w))
    weight.grad = torch.tensor(g)
    optimizer([{"params": [weight], **options}], lr=1.0, weight_decay=0.5).step()
    return (torch.tensor(w) - weight.detach()).tolist()


def test_larc_takes_the_sum_of_norms_and_lars_the_norm_of_the_sum():
    """LARS has no step where decay cancels the gradient; LARC divides by the sum of norms. At zero: raw steps."""
    assert one_step(LARS, [3.0, 4.0], [-1.5, -2.0]) == [0, 0]
    assert one_step(LARC, [3.0, 4.0], [-1.5, -1.0]) == pytest.approx([0, 1.0 * 0.001 * 5 / (3.25**0.5 + 2.5)], abs=1e-7)
    assert one_step(LARC, [0.0, 0.0], [2.0, 1.0]) == [2, 1]  # a bias that starts at zero: neither decayed nor adapted
    assert one_step(LARC, [3.0, 4.0], [0.0, 0.0]) == [0, 0]
    assert one_step(LARC, [3.0, 4.0], [1.0, 1.0], adapt=False) == pytest.approx([2.5, 3.0])  # plain SGD with decay


def test_larc_skips_tensors_without_gradient_and_survives_a_checkpoint():
    model, other = network(), network()
    first, second = LARC(model.parameters(), lr=0.2), LARC(other.parameters(), lr=0.9)
    model(torch.ones(4, 3, 8, 8).double()).sum().backward()
    model[3].weight.grad = None
    before = model[3].weight.detach().clone()
    first.step()
    assert torch.equal(model[3].weight, before) and model[3].weight not in first.state
    second.load_state_dict(first.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a in first.state) == (b in second.state)
        assert a not in first.state or torch.equal(first.state[a]["momentum"], second.state[b]["momentum"])


# ---- codes -----------------------------------------------------------------------------------------------------------


def slow_sinkhorn(scores, epsilon, iterations=3):
    """The paper's iteration on the whole matrix, [N, K] -> [N, K]: prototypes first, samples last."""
    q = torch.exp(scores / epsilon).T  # [K, N]
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def unit(*shape, seed=0, dtype=torch.float64):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("n, k", [(3, 7), (40, 12), (12, 40)])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_slow_version(n, k, epsilon, iterations):
    scores = torch.stack([unit(n, 6, seed=s) @ unit(k, 6, seed=9).T for s in (1, 2)])
    codes = sinkhorn(scores, epsilon, iterations)
    for ours, s in zip(codes, scores, strict=True):  # two problems at once do not touch each other
        torch.testing.assert_close(ours, slow_sinkhorn(s, epsilon, iterations), rtol=1e-10, atol=1e-14)


def test_sinkhorn_without_iterations_is_a_softmax():
    scores = unit(5, 4) @ unit(6, 4, seed=1).T
    torch.testing.assert_close(sinkhorn(scores, 0.05, 0), (scores / 0.05).softmax(1))


@pytest.mark.parametrize("n, k, share", [(4096, 3000, 0.005), (256, 100, 0.15)])
def test_codes_sum_to_one_and_prototypes_share_equally(n, k, share):
    """After three rounds within about 0.2 % (7 % at B 256, K 100) of B / K."""
    codes = sinkhorn(unit(n, 128, dtype=torch.float32) @ unit(k, 128, seed=1, dtype=torch.float32).T, 0.05)
    torch.testing.assert_close(codes.sum(1), torch.ones(n), rtol=1e-5, atol=0)
    assert (codes.sum(0) * k / n - 1).abs().max() < share


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_are_float32_and_finite_at_the_extremes(dtype):
    scores = torch.full((8, 6), -1.0)
    scores[0, 0] = 1.0  # exp(1 / 0.05) is 4.9e8, above float16's range; exp(2 / 0.025) is near the end of float32's
    for epsilon in (0.05, 0.025):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes = sinkhorn(scores.to(dtype), epsilon)
        assert codes.dtype == torch.float32 and torch.isfinite(codes).all()
        torch.testing.assert_close(codes.sum(1), torch.ones(8))


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_loss(scores, codes, temperature):
    """Equations 1 and 2 of the paper, one pair of views and one image at a time."""
    total, views = 0.0, len(scores)
    for i in (0, 1):
        for v in range(views):
            if v == i:
                continue
            for b in range(scores.shape[1]):
                p = torch.exp(scores[v, b] / temperature)
                total = total - (codes[i, b] * torch.log(p / p.sum())).sum() / scores.shape[1] / (views - 1) / 2
    return total


@pytest.mark.parametrize("views", [2, 3, 8])
def test_loss_and_gradient_equal_the_slow_version(views):
    scores = (unit(views, 5, 4) @ unit(7, 4, seed=1).T).requires_grad_()
    codes = sinkhorn(scores[:2], 0.05)
    assert not codes.requires_grad  # codes are constants
    loss, parts = swapped_prediction(scores, codes, 0.1)
    expected = slow_loss(scores, codes, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    entropy = -(codes * codes.log()).sum(-1).mean()
    torch.testing.assert_close(parts["code_entropy"], entropy)


def test_a_view_never_predicts_its_own_code():
    scores = torch.zeros(2, 1, 3, dtype=torch.float64)
    codes = torch.eye(3, dtype=torch.float64)[[0, 1]].unsqueeze(1)  # view 1 is cluster 0, view 2 is cluster 1
    scores[0, 0, 1] = scores[1, 0, 0] = 9.0  # each view predicts the other's
    assert swapped_prediction(scores, codes, 0.1)[0] < 1e-8


def test_known_values():
    k = 3000
    same = torch.zeros(4, 8, k)  # all images in one point: chance, exactly
    loss, parts = swapped_prediction(same, sinkhorn(same[:2], 0.05), 0.1)
    torch.testing.assert_close(loss, torch.tensor(math.log(k)))
    torch.testing.assert_close(parts["code_entropy"], torch.tensor(math.log(k)))
    torch.testing.assert_close(parts["prototypes_used"], torch.tensor(float(k)), rtol=1e-3, atol=0)
    scores = unit(8, 64, 128, dtype=torch.float32) @ unit(k, 128, seed=1, dtype=torch.float32).T
    loss, _ = swapped_prediction(scores, sinkhorn(scores[:2], 0.05), 0.1)  # random directions: near ln K
    assert abs(loss - math.log(k)) < 0.5
    one = torch.zeros(2, 8, 16)
    one[..., 3] = 20.0
    assert swapped_prediction(one, sinkhorn(one, 0.05, 0), 0.1)[1]["prototypes_used"] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    scores, codes = (unit(3, 4, 8) @ unit(5, 8, seed=1).T).to(dtype), sinkhorn(torch.randn(2, 4, 5), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = swapped_prediction(scores, codes, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, swapped_prediction(scores.float(), codes, 0.1)[0])


# ---- model -----------------------------------------------------------------------------------------------------------


def model_of(**spec):
    torch.manual_seed(0)
    return SwAV(create_backbone(BackboneSpec("resnet18", **{**TINY, **spec})), 32, 16, 12).train()


def test_views_of_one_size_share_a_pass_and_the_projector_sees_all():
    model, rows = model_of(), []
    model.backbone.register_forward_hook(lambda _m, inputs, _o: rows.append(tuple(inputs[0].shape)))
    model.projector.register_forward_hook(lambda _m, inputs, _o: rows.append(tuple(inputs[0].shape)))
    z, scores = model(*torch.randn(2, 4, 3, 16, 16), *torch.randn(3, 4, 3, 8, 8))
    assert rows == [(8, 3, 16, 16), (12, 3, 8, 8), (20, 64)]
    assert z.shape == (20, 16) and scores.shape == (20, 12)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(20))
    assert scores.abs().max() <= 1 + 1e-6  # both sides have unit length, so Sinkhorn's exponentials are bounded


def test_scores_are_float32_under_autocast():
    model, images = model_of(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, scores = model(images, images)
    assert z.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, z @ model.prototypes.weight.T)


def test_normalizing_prototypes_leaves_gradient_and_momentum_alone():
    model = model_of()
    optimizer = LARC(model.parameters(), lr=1.0)
    model(*torch.randn(2, 8, 3, 16, 16))[1].square().sum().backward()
    optimizer.step()
    weight = model.prototypes.weight
    gradient, momentum = weight.grad.clone(), optimizer.state[weight]["momentum"].clone()
    assert (weight.norm(dim=1) - 1).abs().max() > 1e-6
    model.normalize_prototypes()
    torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(12))
    assert torch.equal(weight.grad, gradient) and torch.equal(optimizer.state[weight]["momentum"], momentum)


def test_queue_keeps_the_newest_rows_first():
    queue = Queue(6, 1)
    for i in range(5):
        queue.push(torch.tensor([[[10.0 * i], [10 * i + 1]], [[-10.0 * i], [-10 * i - 1]]]))
    assert queue.rows[..., 0].tolist() == [[40, 41, 30, 31, 20, 21], [-40, -41, -30, -31, -20, -21]]
    assert torch.equal(queue.part(), queue.rows) and "rows" in queue.state_dict()


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(dtype: torch.dtype, global_batch: int = 16) -> dict[str, torch.Tensor]:
    """Loss, signals, gradients, BatchNorm buffers and queue of one step on this process's part, after DDP."""
    cfg = PRESETS["smoke"][1]
    unwrapped = sync_batchnorm(model_of().to(dtype))
    generator = torch.Generator().manual_seed(1)
    n = global_batch // world_size()
    own = slice(rank() * n, (rank() + 1) * n)
    draw = [
        torch.randn(v, global_batch, 3, s, s, generator=generator, dtype=torch.float64) for v, s in ((2, 16), (2, 8))
    ]
    views = [view[own].to(dtype) for group in draw for view in group]
    queue = Queue(2 * global_batch, 16).to(dtype)
    for _ in range(2):
        queue.push(normalize(torch.randn(2, global_batch, 16, generator=generator, dtype=torch.float64), dim=2)[:, own])
    model = DistributedDataParallel(unwrapped) if world_size() > 1 else unwrapped
    loss, parts, z = compute_loss(model, views, unwrapped.scores(queue.part()).detach(), cfg)
    queue.push(z)
    loss.backward()
    logged = torch.stack([loss.detach(), *parts.values()])
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
    return (
        dict(zip(("loss", *parts), logged / world_size(), strict=True))
        | {name: p.grad for name, p in unwrapped.named_parameters()}
        | {name: b.clone() for name, b in unwrapped.named_buffers() if "running" in name}
        | {"queue": queue.rows[:, :global_batch]}
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    for dtype in (torch.float64, torch.float32):
        one = gradients(dtype)
        for many in run_ranks(gradients, ranks, dtype):
            assert many.keys() == one.keys() and "prototypes.weight" in one and len(one) > 30
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                exact = dtype == torch.float64 and name != "projection_std"  # a signal, always float32
                # A bias before a norm has no gradient but rounding.
                small = name == "projector.0.bias"
                assert worst < (1e-10 if exact else 3e-5) or small, (name, dtype, worst)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def states(directory) -> dict[int, dict]:
    found = {}
    for step in checkpoint.steps(directory / "checkpoints"):
        path = directory / "checkpoints" / f"step-{step:08d}" / "state.pt"
        found[step] = torch.load(path, weights_only=False)["stateful"]
    return found


def test_freeze_and_queue_follow_their_schedules(tmp_path):
    """smoke: 4 frozen steps; a queue of 2 batches filled from step 4 on, so used from step 6 on."""
    flags = ("--out", tmp_path, "--no-eval", "--log-every", 1, "--max-steps", 8)
    for name, more in (("with", ("--save-every", 1, "--keep", 20)), ("without", ("--queue-length", 0))):
        code, text = run_command(
            "methods.swav.train", "smoke", *flags, "--name", name, *more, log=tmp_path / f"{name}.log"
        )
        assert code == 0, text
    found = states(tmp_path / "with")
    prototypes = {step: normalize(state["model"]["prototypes.weight"], dim=1) for step, state in found.items()}
    index = list(found[1]["model"]).index("prototypes.weight")
    assert index > 0
    for step in range(2, 9):
        moved = (prototypes[step] - prototypes[step - 1]).abs().max()
        assert (moved < 1e-6) == (step <= 4), step
    momenta = {step: len(state["optimizer"]["state"]) for step, state in found.items()}
    assert momenta[4] == momenta[5] - 1  # not even a momentum while frozen
    filled = {step: state["queue"]["rows"].any(-1).float().mean().item() for step, state in found.items()}
    assert filled == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0.5, 6: 1, 7: 1, 8: 1}
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in line]
        for n in ("with", "without")
    ]
    assert losses[0][:6] == losses[1][:6] and losses[0][6] != losses[1][6]


def test_without_sinkhorn_the_prototypes_collapse_and_the_run_says_so(tmp_path):
    flags = ("--out", tmp_path, "--no-eval", "--sinkhorn-iterations", 0, "--freeze-prototypes", 0, "--epochs", 16)
    code, text = run_command("methods.swav.train", "smoke", *flags, log=tmp_path / "log")
    assert code == 0 and "WARNING" in text and "prototypes get all images: collapse" in text, text


def test_unsafe_epsilon_is_a_sentence(tmp_path):
    code, text = run_command("methods.swav.train", "smoke", "--out", tmp_path, "--epsilon", 0.01, log=tmp_path / "log")
    assert code == 2 and "leaves the range of float32" in text and "Traceback" not in text


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: images, batch, epochs, (start, peak, end) rates, warm-up epochs, frozen steps, queue, its epoch, trust, clip
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, (0.003, 0.6, 0.0006), 10, 390, 3840, 50, 0.02, True),
    "imagenette-r18": (IMAGENETTE, 256, 800, (0.6, 0.6, 0.0006), 0, 36, 3840, 15, 0.001, False),
    "imagenet-r50": (IMAGENET, 4096, 800, (0.3, 4.8, 0.0048), 10, 313, 0, None, 0.001, False),
    "imagenet-r50-2x224": (IMAGENET, 4096, 400, (0.3, 4.8, 0.0048), 10, 313, 0, None, 0.001, False),
    "imagenet-r50-b256": (IMAGENET, 256, 200, (0.6, 0.6, 0.0006), 0, 5005, 3840, 15, 0.001, False),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, rates, warmup_epochs, frozen, queue, queue_epoch, trust, clip = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.freeze_prototypes, cfg.queue_length) == (batch, epochs, frozen, queue)
    assert (cfg.trust_coefficient, cfg.larc_clip, cfg.weight_decay, cfg.momentum) == (trust, clip, 1e-6, 0.9)
    assert (cfg.prototypes, cfg.temperature, cfg.epsilon, cfg.sinkhorn_iterations) == (3000, 0.1, 0.05, 3)
    assert (cfg.hidden_dim, cfg.projector_dim, cfg.optimizer) == (2048, 128, "larc")
    assert not queue or (cfg.queue_start, queue % batch) == (queue_epoch, 0)
    per_epoch = images // batch
    warmup = cfg.warmup_epochs * per_epoch
    assert cfg.warmup_epochs == warmup_epochs
    schedule = dict(total=epochs * per_epoch, warmup=warmup, start=cfg.lr_start, final=cfg.lr_end, endpoint=True)
    at = [cosine_schedule(s, base=cfg.lr, **schedule) for s in (0, max(warmup - 1, 0), warmup, epochs * per_epoch - 1)]
    assert at[:3] == pytest.approx([rates[0], rates[1], rates[1]]) and at[3] == pytest.approx(rates[2], rel=1e-3)


def test_views_equal_the_reference():
    def views(preset):
        return multi_crop(PRESETS[preset][1]).views

    paper = views("imagenet-r50")
    assert [(v.size, v.scale) for v in paper] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    for v in paper:
        assert (v.color_jitter_prob, v.brightness, v.contrast, v.saturation, v.hue) == (0.8, 0.8, 0.8, 0.8, 0.2)
        assert (v.flip, v.grayscale, v.blur, v.solarize, v.interpolation) == (0.5, 0.2, 0.5, 0.0, "bilinear")
    assert [(v.size, v.scale) for v in views("imagenet-r50-2x224")] == [(224, (0.08, 1.0))] * 2
    assert [(v.size, v.scale) for v in views("cifar10-r18")] == [(32, (0.08, 1.0))] * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    """On the meta device all of them; in earnest those below 2.5 GMAC an image and pass, batch of 4."""
    cfg = PRESETS[preset][1]

    def build():
        backbone = create_backbone(cfg.resnet_spec(zero_init_last=False))
        return SwAV(backbone, cfg.hidden_dim, cfg.projector_dim, cfg.prototypes)

    sizes = [cfg.image_size] * 2 + [cfg.local_size] * cfg.local_views
    with torch.device("meta"):
        model = build()
        for size in set(sizes):  # not the scores: autocast does not know the meta device
            assert model.projector(model.backbone(torch.empty(2, 3, size, size))).shape == (2, cfg.projector_dim)
        assert model.prototypes.weight.shape == (cfg.prototypes, cfg.projector_dim)
        cost = multiply_adds(model.backbone, cfg.image_size)
    if cost > 2.5e9:
        assert "imagenet-r50" in preset
        return
    torch.manual_seed(0)
    model = build()
    optimizer = LARC(model.parameters(), lr=0.1, trust_coefficient=cfg.trust_coefficient, clip=cfg.larc_clip)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model.normalize_prototypes()
        loss, _, z = compute_loss(model, [torch.rand(4, 3, s, s) for s in sizes], None, cfg)
        assert z.shape == (2, 4, cfg.projector_dim)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
