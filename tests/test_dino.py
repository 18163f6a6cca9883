"""DINO: loss, center and temperature against slow versions, N processes against one, head, groups, collapse, runs."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.backbones import export_backbone, load_backbone, multiply_adds
from common.checkpoint import load_newest
from common.data import open_data
from common.distributed import rank, sync_batchnorm, world_size
from common.ema import ema_update, make_teacher
from common.log import read_metrics
from common.memory import checkpoint_blocks
from common.optim import decay_groups
from common.schedules import cosine_schedule, scaled_lr
from common.vit import StochasticDepth, is_vit
from methods.dino.attention import attention_section, cls_attention
from methods.dino.augment import multi_crop
from methods.dino.config import PRESETS, Config
from methods.dino.loss import dino_loss, sinkhorn, teacher_temperature, update_center
from methods.dino.model import DINOHead, NormalizedLinear
from methods.dino.train import build, clip_each, compute_loss
from tests.processes import run_command, run_ranks


def outputs(rows: int, width: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- loss, center, temperature ---------------------------------------------------------------------------------------


def slow_loss(student, teacher, center, student_temperature, teacher_temperature):
    """Algorithm 1 of the paper: one pair of views and one image at a time."""
    n = len(teacher) // 2
    terms = []
    for i in range(2):
        for v in range(len(student) // n):
            if v == i:
                continue  # never a view against itself
            for b in range(n):
                target = torch.exp((teacher[i * n + b] - center) / teacher_temperature)
                answer = torch.exp(student[v * n + b] / student_temperature)
                terms.append(-(target / target.sum() * torch.log(answer / answer.sum())).sum())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3, 8])
@pytest.mark.parametrize("n", [1, 4])
def test_loss_and_gradient_equal_the_slow_version(views, n):
    student = outputs(views * n).requires_grad_()
    teacher, center = outputs(2 * n, seed=1), outputs(1, seed=2)[0]
    loss, parts = dino_loss(student, teacher, center, student_temperature=0.1, teacher_temperature=0.2)
    expected = slow_loss(student, teacher, center, 0.1, 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    target = ((teacher - center) / 0.2).softmax(1)
    torch.testing.assert_close(parts["teacher_entropy"], torch.special.entr(target).sum(1).mean())
    torch.testing.assert_close(parts["largest_share"], target.mean(0).max())
    pairs = [(i, v) for i in range(2) for v in range(views) if v != i]
    answers = student.detach().view(views, n, -1) / 0.1
    kl = [F.kl_div(answers[v].log_softmax(1), target.view(2, n, -1)[i], reduction="batchmean") for i, v in pairs]
    torch.testing.assert_close(parts["kl"], sum(kl) / len(kl))
    chosen, wanted = answers.argmax(2), target.view(2, n, -1).argmax(2)
    agreement = ((chosen[0] == wanted[1]).double().mean() + (chosen[1] == wanted[0]).double().mean()) / 2
    torch.testing.assert_close(parts["agreement"], agreement)


def test_sinkhorn_equals_the_slow_version():
    """Columns, then rows, three times; in the loss it takes the place of the center."""
    teacher = outputs(8, seed=1)
    q = torch.exp(teacher / 0.2)
    for _ in range(3):
        for column in range(q.shape[1]):
            q[:, column] = q[:, column] / q[:, column].sum()
        for row in range(len(q)):
            q[row] = q[row] / q[row].sum()
    torch.testing.assert_close(sinkhorn(teacher / 0.2), q)
    torch.testing.assert_close(q.sum(1), torch.ones(8, dtype=q.dtype))
    assert q.sum(0).std() < 0.7 * (teacher / 0.2).softmax(1).sum(0).std()  # shares of the prototypes
    student = outputs(8)
    loss, _ = dino_loss(student, teacher, None, student_temperature=0.1, teacher_temperature=0.2)
    answers = (student / 0.1).log_softmax(1)
    torch.testing.assert_close(loss, -(q.roll(4, 0) * answers).sum(1).mean())
    assert torch.isfinite(sinkhorn(torch.tensor([[0.0, 500.0], [0.0, 600.0]]))).all()


def test_no_gradient_to_teacher_and_center_and_no_view_against_itself():
    student, teacher = outputs(8).requires_grad_(), outputs(4, seed=1).requires_grad_()
    center = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    loss, _ = dino_loss(student, teacher, center, student_temperature=0.1, teacher_temperature=0.1)
    loss.backward()
    assert teacher.grad is None and center.grad is None
    other = teacher.detach().clone()
    other[:2] += 5 * outputs(2, seed=3)  # the teacher's first view does not reach the student's first view
    changed = outputs(8).requires_grad_()
    dino_loss(changed, other, center, student_temperature=0.1, teacher_temperature=0.1)[0].backward()
    torch.testing.assert_close(changed.grad[:2], student.grad[:2])
    assert not torch.allclose(changed.grad[2:4], student.grad[2:4])


@pytest.mark.parametrize("preset", ["imagenet-vits-100", "cifar10-r18", "shapes"])
def test_loss_at_initialization_is_near_ln_k(preset):
    cfg = PRESETS[preset][1]
    k = min(cfg.out_dim, 8192)
    torch.manual_seed(0)
    head = DINOHead(
        64, k, hidden=256, bottleneck=cfg.bottleneck_dim, layers=3, batch_norm=cfg.head_bn, norm_last_layer=True
    )
    features = torch.randn(4 * 32, 64)
    student, teacher = head(features), head(features)[: 2 * 32]
    loss_of = partial(
        dino_loss, student_temperature=cfg.student_temperature, teacher_temperature=cfg.teacher_temperature
    )
    loss, _ = loss_of(student, teacher, teacher.mean(0))
    assert abs(loss - math.log(k)) < 0.5
    uniform, _ = loss_of(torch.zeros_like(student), teacher, teacher[0])
    torch.testing.assert_close(uniform, torch.tensor(math.log(k)))  # the uniform collapse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    student, teacher, center = outputs(8).to(dtype), outputs(4, seed=1).to(dtype), torch.zeros(7)
    loss_of = partial(dino_loss, student_temperature=0.1, teacher_temperature=0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = loss_of(student, teacher, center)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(student.float(), teacher.float(), center)[0])


def test_center_is_the_moving_average_of_raw_outputs():
    center, expected = torch.zeros(7, dtype=torch.float64), np.zeros(7)
    for step in range(3):
        teacher = outputs(6, seed=step)
        update_center(center, teacher, 0.9)
        expected = 0.9 * expected + 0.1 * teacher.numpy().mean(0)  # raw: neither a temperature nor a softmax
    np.testing.assert_allclose(center.numpy(), expected, rtol=1e-12)


def test_temperature_is_linspace_over_epochs():
    for warmup in (0, 1, 30):
        expected = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(100 - warmup, 0.07)])
        ours = [teacher_temperature(e, start=0.04, final=0.07, warmup_epochs=warmup) for e in range(100)]
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


# ---- head, groups, clipping ------------------------------------------------------------------------------------------


def test_head_normalizes_the_bottleneck_and_the_rows():
    torch.manual_seed(0)
    head = DINOHead(8, 50, hidden=32, bottleneck=16, layers=3, batch_norm=False, norm_last_layer=True)
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert not any(m.bias.any() for m in head.mlp if hasattr(m, "bias"))
    assert float(head.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    features = torch.randn(5, 8)
    out = head(features)
    expected = F.normalize(head.mlp(features), dim=1) @ F.normalize(head.last_layer.weight_v, dim=1).T
    torch.testing.assert_close(out, expected)
    assert out.abs().max() <= 1  # cosines
    with torch.no_grad():
        head.last_layer.weight_v *= 3
        torch.testing.assert_close(head(features), out)
        head.last_layer.weight_g *= 2
        torch.testing.assert_close(head(features), 2 * out)
    weight = NormalizedLinear(256, 400, fixed=True).weight_v  # torch's default: uniform within 1 / sqrt(width)
    assert 0.99 / 16 < weight.abs().max() <= 1 / 16
    with_bn = DINOHead(8, 50, hidden=32, bottleneck=16, layers=3, batch_norm=True, norm_last_layer=True)
    names = [type(m).__name__ for m in with_bn.mlp]
    assert names == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]


def small_config(**changes) -> Config:
    sizes = dict(image_size=16, local_size=8, depth=2, hidden_dim=32, bottleneck_dim=16, out_dim=24, layer_scale=0.1)
    return replace(PRESETS["cifar10-vit"][1], **{**sizes, **changes})


def small_resnet(**changes) -> Config:
    sizes = dict(image_size=16, local_size=8, local_views=3, hidden_dim=32, bottleneck_dim=16, out_dim=24)
    return replace(PRESETS["smoke"][1], **{**sizes, "norm_last_layer": False, **changes})


def views_of(cfg: Config, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [cfg.image_size] * 2 + [cfg.local_size] * cfg.local_views
    return [torch.randn(batch, 3, s, s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def test_weight_decay_groups_are_dinos():
    """ndim >= 2 is decayed, positions, CLS token and last layer among them; timm's no_weight_decay() is not asked."""
    for fixed in (True, False):
        model, _ = build(small_config(norm_last_layer=fixed))
        decayed, free = (set(group["names"]) for group in decay_groups(model, 0.04))
        assert {"backbone.pos_embed", "backbone.cls_token", "head.last_layer.weight_v"} <= decayed
        assert ("head.last_layer.weight_g" in decayed) == (not fixed) and "head.last_layer.weight_g" not in free
        shapes = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
        assert decayed | free == shapes.keys() and all(shapes[n] == 1 for n in free) and "backbone.norm.bias" in free
        assert "backbone.blocks.0.ls1.gamma" in free
    assert float(model.backbone.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_clipping_is_per_tensor():
    parameters = [torch.nn.Parameter(outputs(3, seed=i)) for i in range(4)]
    for scale, p in zip((10.0, 0.001, 1.0), parameters, strict=False):
        p.grad = scale * outputs(3, seed=9)
    before = [p.grad.clone() for p in parameters[:3]]
    clip_each(parameters, 3.0)
    for p, old in zip(parameters, before, strict=False):
        torch.testing.assert_close(p.grad, old * min(1.0, 3.0 / (float(old.norm()) + 1e-6)))
    assert torch.equal(parameters[1].grad, before[1]) and parameters[3].grad is None
    assert [round(float(p.grad.norm()), 3) for p in parameters[:3:2]] == [3.0, 3.0]


def test_views_equal_the_code():
    cfg = PRESETS["imagenet-vits-100"][1]
    recipe = multi_crop(cfg)
    first, second, *local = recipe.views
    assert (first.size, first.scale, first.blur, first.solarize) == (224, (0.4, 1.0), 1.0, 0.0)
    assert (second.size, second.scale, second.blur, second.solarize) == (224, (0.4, 1.0), 0.1, 0.2)
    assert len(local) == 8 and len(set(local)) == 1
    assert (local[0].size, local[0].scale, local[0].blur, local[0].solarize) == (96, (0.05, 0.4), 0.5, 0.0)
    for view in recipe.views:
        assert (view.flip, view.color_jitter_prob, view.grayscale, view.interpolation) == (0.5, 0.8, 0.2, "bicubic")
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(kind: str, dtype: torch.dtype, global_batch: int) -> dict[str, torch.Tensor]:
    """One step on this process's part of a fixed batch: loss, signals, gradients after DDP, center, buffers of both.

    Two views of 16 px and three of 8 px; ResNet with SyncBatchNorm also in the head, or ViT with stochastic depth.
    """
    torch.manual_seed(0)
    centering = "sinkhorn" if kind == "sinkhorn" else "mean"
    cfg = small_config(local_views=3) if kind == "vit" else small_resnet()
    cfg = replace(cfg, student_temperature=0.2, centering=centering)
    model = build(cfg)[0].to(dtype).train().to(memory_format=torch.channels_last)
    model = sync_batchnorm(model)
    teacher = make_teacher(model)
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.3 * p.std(correction=0) * torch.randn(p.shape, dtype=torch.float64).to(dtype)
    teacher.register_buffer("center", torch.linspace(-1, 1, 24, dtype=dtype))
    rate = 0.3 if kind == "vit" else 0.0
    model.stochastic_depth = StochasticDepth(model.backbone, rate, seed=0, views=5, batch_size=global_batch)
    model.stochastic_depth.draw(3)
    student = DistributedDataParallel(model) if world_size() > 1 else model
    n = global_batch // world_size()
    views = [view[rank() * n : (rank() + 1) * n] for view in views_of(cfg, global_batch, dtype)]
    loss, parts, targets = compute_loss(student, teacher, views, 0.2, cfg)
    update_center(teacher.center, targets, 0.9)
    loss.backward()
    logged = torch.stack([loss.detach(), *parts.values()])
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
    buffers = {
        f"{who}.{n}": b.clone()
        for who, net in (("student", model), ("teacher", teacher))
        for n, b in net.named_buffers()
        if "running" in n
    }
    signals = dict(zip(("loss", *parts), logged / world_size(), strict=True))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return signals | {"center": teacher.center} | grads | buffers


ZERO = ("head.mlp.0.bias", "head.mlp.3.bias")  # no gradient but rounding where BatchNorm follows


@pytest.mark.parametrize("kind", ["resnet", "vit", "sinkhorn"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks, kind):
    """Float32 within 1e-5, or within twice what one process's own rounding does to an ill-conditioned tensor."""
    exact = gradients(kind, torch.float64, 16)

    def distance(ours: dict, theirs: dict, name: str) -> float:
        scale = exact["head.mlp.0.weight"] if name in ZERO else exact[name]
        return float((ours[name].double() - theirs[name].double()).abs().max() / scale.abs().max().clamp_min(1e-30))

    for dtype in (torch.float64, torch.float32):
        one = gradients(kind, dtype, 16)
        for many in run_ranks(gradients, ranks, kind, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 30
            for name in one:
                limit = max(1e-5, 2 * distance(one, exact, name))
                # timm resamples positions in float32, whatever the network's type
                if dtype == torch.float64 and name != "backbone.pos_embed":
                    limit = 1e-10
                assert limit < 1e-4 and distance(many, one, name) < limit, (name, dtype)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [small_resnet(), small_config(drop_path=0.0)], ids=["resnet", "vit"])
def test_activation_checkpointing_leaves_the_step_unchanged(cfg):
    """Gradients and running statistics are equal to the bit, with fewer saved tensors."""

    def step(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = build(cfg)[0].train()
        teacher = make_teacher(model)
        teacher.register_buffer("center", torch.zeros(cfg.out_dim))
        if checkpointing:
            checkpoint_blocks(model.backbone)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss, _, _ = compute_loss(model, teacher, views_of(cfg, 4, torch.float32), 0.2, cfg)
        loss.backward()
        buffers = {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss} | gradients | buffers, sum(saved)

    (plain, plain_size), (recomputed, size) = step(False), step(True)
    assert plain.keys() == recomputed.keys() and all(value.abs().sum() > 0 for value in plain.values())
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name
    assert size < 0.7 * plain_size


def test_activation_checkpointing_is_refused_with_drop_path(tmp_path):
    flags = ("--activation-checkpointing", "--out", tmp_path)
    code, text = run_command("methods.dino.train", "cifar10-vit", *flags, log=tmp_path / "log")
    assert code == 2 and "--activation-checkpointing or --drop-path" in text and "Traceback" not in text


# ---- runs ------------------------------------------------------------------------------------------------------------

SMOKE = ("smoke", "--no-eval", "--log-every", 1)


def state_of(run) -> dict:
    return load_newest(run / "checkpoints")[1]["stateful"]


def test_last_layer_is_frozen_center_is_saved_and_the_teacher_is_exported(tmp_path):
    """Four steps are the first epoch: with decay but without gradient the last layer must not move by a bit."""
    code, text = run_command(
        "methods.dino.train", *SMOKE, "--out", tmp_path, "--max-steps", 4, "--weight-decay", 1, log=tmp_path / "log"
    )
    assert code == 0, text
    state = state_of(tmp_path / "dino-smoke")
    student, teacher = state["model"], state["teacher"]
    assert torch.equal(student["head.last_layer.weight_v"], teacher["head.last_layer.weight_v"])
    assert not torch.equal(student["head.mlp.0.weight"], teacher["head.mlp.0.weight"])
    assert teacher["center"].abs().max() > 0 and "center" not in student
    weights = load_backbone(tmp_path / "dino-smoke")[0].state_dict()
    for name, value in weights.items():
        assert torch.equal(value, teacher[f"backbone.{name}"]), name
    moved = [n for n in weights if n.endswith("weight") and not torch.equal(weights[n], student[f"backbone.{n}"])]
    assert len(moved) > 10  # the student is another network
    code, text = run_command(
        "methods.dino.train", *SMOKE, "--out", tmp_path, "--max-steps", 5, "--weight-decay", 1, log=tmp_path / "log"
    )
    assert code == 0, text
    after = state_of(tmp_path / "dino-smoke")["model"]
    assert not torch.equal(after["head.last_layer.weight_v"], student["head.last_layer.weight_v"])


def collapsed(tmp_path, *flags) -> str:
    code, text = run_command(
        "methods.dino.train", *SMOKE, "--out", tmp_path, "--warmup-epochs", 0, *flags, log=tmp_path / "log"
    )
    assert code == 0, text
    return text


def test_sharpening_without_center_is_reported(tmp_path):
    text = collapsed(tmp_path, "--center-momentum", 1, "--teacher-temperature", 0.005, "--no-head-bn")
    assert "WARNING" in text and "One dimension" in text and "answers uniformly" not in text
    lines = [line for line in read_metrics(tmp_path / "dino-smoke" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["largest_share"] > 0.5


def test_center_without_sharpening_is_reported(tmp_path):
    text = collapsed(tmp_path, "--teacher-temperature", 1)
    assert "WARNING" in text and "answers uniformly" in text and "One dimension" not in text


def test_a_healthy_run_warns_of_nothing(tmp_path):
    assert "WARNING" not in collapsed(tmp_path)


def test_a_vit_runs_with_every_trick_and_keeps_what_is_frozen(tmp_path):
    flags = ("--data", "shapes", "--normalize", "shapes", "--limit", 32, "--batch-size", 8, "--max-steps", 3)
    tricks = ("--layer-scale", 0.1, "--qk-norm", "--frozen-patch-projection", "--sincos-positions")
    code, text = run_command(
        "methods.dino.train",
        "cifar10-vit",
        "--out",
        tmp_path,
        "--no-eval",
        *flags,
        *tricks,
        "--layer-decay",
        0.9,
        "--name",
        "vit",
        "--out-dim",
        64,
        log=tmp_path / "log",
    )
    assert code == 0, text
    state = state_of(tmp_path / "vit")
    for name in ("pos_embed", "patch_embed.proj.weight"):
        assert torch.equal(state["model"][f"backbone.{name}"], state["teacher"][f"backbone.{name}"])
    assert len({group["lr"] for group in state["optimizer"]["param_groups"]}) == 14  # 12 blocks, below and above
    load_backbone(tmp_path / "vit")


@pytest.mark.soak
def test_the_report_of_a_vit_shows_its_attention(tmp_path):
    flags = ("--data", "shapes", "--normalize", "shapes", "--limit", 64, "--batch-size", 16, "--max-steps", 2)
    code, text = run_command(
        "methods.dino.train",
        "cifar10-vit",
        "--out",
        tmp_path,
        *flags,
        "--patch-size",
        16,
        "--name",
        "vit",
        log=tmp_path / "log",
    )
    assert code == 0, text
    page = (tmp_path / "vit" / "report.html").read_text()
    assert "<h2>Attention</h2>" in page and "CLS token to the 2 x 2 patches" in page and "image 8, head 3" in page


def test_options_of_vits_are_refused_for_a_resnet(tmp_path):
    code, text = run_command("methods.dino.train", *SMOKE, "--out", tmp_path, "--drop-path", 0.1, log=tmp_path / "log")
    assert code == 2 and "--drop-path applies only to ViTs" in text and "Traceback" not in text


def test_attention_of_the_teacher_in_the_report(tmp_path):
    test = open_data("shapes", "test", limit=3, image_size=16)
    model, spec = build(small_config())
    export_backbone(tmp_path, model.backbone, spec)
    ((title, html),) = attention_section(tmp_path, test)
    assert title == "Attention" and html.count("<img") == 3 * (1 + 3) and "4 x 4 patches" in html
    maps = cls_attention(model.backbone, torch.randn(2, 3, 16, 16))
    assert maps.shape == (2, 3, 4, 4) and (maps > 0).all() and (maps.sum((2, 3)) < 1).all()  # CLS looks at itself too
    resnet, spec = build(small_resnet())
    export_backbone(tmp_path / "resnet", resnet.backbone, spec)
    assert attention_section(tmp_path / "resnet", test) == []


# ---- presets ---------------------------------------------------------------------------------------------------------

CIFAR, IMAGENET, IMAGENETTE = 50_000, 1_281_167, 9_469
# preset: images, batch, epochs, peak and last rate, decay first and last, K, EMA, teacher temperature, its epochs, clip
EXPECTED = {
    "cifar10-r18": (CIFAR, 256, 1000, 0.3, 0, 1e-6, 1e-6, 4096, 0.9995, 0.07, 50, 0),
    "imagenette-r18": (IMAGENETTE, 256, 800, 0.3, 0, 1e-6, 1e-6, 4096, 0.9995, 0.07, 50, 0),
    "imagenet-vits": (IMAGENET, 1024, 800, 2e-3, 1e-5, 0.04, 0.4, 65536, 0.996, 0.07, 30, 0),
    "imagenet-vits-300": (IMAGENET, 1024, 300, 2e-3, 1e-6, 0.04, 0.4, 65536, 0.996, 0.07, 30, 3),
    "imagenet-vits-100": (IMAGENET, 512, 100, 1e-3, 1e-6, 0.04, 0.4, 65536, 0.996, 0.04, 0, 3),
    "imagenet-r50": (IMAGENET, 4080, 800, 4.78125, 1e-6, 1e-6, 1e-6, 60000, 0.996, 0.07, 30, 0),
    "imagenet-r50-b512": (IMAGENET, 512, 100, 0.06, 1e-6, 1e-4, 1e-4, 65536, 0.996, 0.04, 0, 3),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_recipe_equals_the_reference(preset):
    images, batch, epochs, peak, last, decay, decay_end, k, ema, temperature, warmup_teacher, clip = EXPECTED[preset]
    cfg = PRESETS[preset][1]
    assert (cfg.batch_size, cfg.epochs, cfg.out_dim, cfg.ema_momentum) == (batch, epochs, k, ema)
    assert (cfg.teacher_temperature, cfg.warmup_teacher_epochs, cfg.clip) == (temperature, warmup_teacher, clip)
    assert (cfg.student_temperature, cfg.warmup_teacher_temperature, cfg.center_momentum) == (0.1, 0.04, 0.9)
    assert (cfg.freeze_last_layer, cfg.head_layers, cfg.hidden_dim, cfg.bottleneck_dim) == (1, 3, 2048, 256)
    assert scaled_lr(cfg.base_lr, cfg.batch_size, "linear") == pytest.approx(peak)
    per_epoch = images // batch
    total, warmup = epochs * per_epoch, int(cfg.warmup_epochs * per_epoch)
    assert warmup == 10 * per_epoch and cfg.min_lr == last
    i = np.arange(total - warmup)
    cosine = last + 0.5 * (peak - last) * (1 + np.cos(np.pi * i / len(i)))
    expected = np.concatenate([np.linspace(0, peak, warmup), cosine])
    for step in (0, 1, warmup - 1, warmup, total // 2, total - 1):
        rate = cosine_schedule(step, base=peak, final=cfg.min_lr, total=total, warmup=warmup, endpoint=True)
        assert rate == pytest.approx(expected[step], abs=1e-12)
    ends = dict(base=cfg.weight_decay, final=cfg.weight_decay_end, total=total)
    first, final = (cosine_schedule(step, **ends) for step in (0, total - 1))
    assert (first, final) == pytest.approx((decay, decay_end), rel=1e-4)
    assert cosine_schedule(total // 2, **ends) == pytest.approx((decay + decay_end) / 2, rel=1e-2)
    assert cosine_schedule(total // 2, base=0.996, final=1.0, total=total) == pytest.approx(0.998, abs=1e-5)
    vit = is_vit(cfg.backbone)
    assert cfg.drop_path == (0.1 if vit else 0) and cfg.optimizer in (("adamw",) if vit else ("sgd", "lars", "larc"))


def test_crops_of_the_presets_equal_the_reference():
    crops = {
        "imagenet-vits": ((0.25, 1), 10, 96, (0.05, 0.25)),
        "imagenet-vits-300": ((0.4, 1), 8, 96, (0.05, 0.4)),
        "imagenet-r50": ((0.14, 1), 6, 96, (0.05, 0.14)),
        "imagenet-r50-b512": ((0.14, 1), 8, 96, (0.05, 0.14)),
        "shapes": ((0.3, 1), 4, 16, (0.2, 0.5)),
    }
    for preset, expected in crops.items():
        cfg = PRESETS[preset][1]
        assert (cfg.global_crop_scale, cfg.local_views, cfg.local_size, cfg.local_crop_scale) == expected
    cpu = PRESETS["cifar10-cpu"][1]
    assert (cpu.global_crop_scale, cpu.local_views, cpu.image_size, cpu.epochs) == ((0.2, 1), 0, 32, 30)
    assert not PRESETS["imagenet-vits"][1].norm_last_layer and not PRESETS["imagenet-vits-300"][1].norm_last_layer


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_and_trains_two_steps(preset):
    """On the meta device all of them; in earnest those below 2.5 GMAC an image and pass, batch of 4."""
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, _ = build(cfg)
        cost = multiply_adds(model.backbone, cfg.image_size)
    if cost > 2.5e9:
        assert cfg.backbone in ("resnet50", "vit_small_patch16_224")
        assert model.backbone.num_features == (384 if is_vit(cfg.backbone) else 2048)
        return
    torch.manual_seed(0)
    cfg = replace(cfg, out_dim=min(cfg.out_dim, 256))
    model, _ = build(cfg)
    teacher, views = make_teacher(model), views_of(cfg, 4, torch.float32)
    teacher.register_buffer("center", torch.zeros(cfg.out_dim))
    model.stochastic_depth = StochasticDepth(model.backbone, cfg.drop_path, seed=0, views=len(views), batch_size=4)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        model.stochastic_depth.draw(step)
        loss, _, targets = compute_loss(model, teacher, views, 0.04, cfg)
        update_center(teacher.center, targets, cfg.center_momentum)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(teacher, model, cfg.ema_momentum)
        assert torch.isfinite(loss)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == ({"head.last_layer.weight_g"} if cfg.norm_last_layer else set())


def test_vits_is_dinos_not_moco_v3s():
    with torch.device("meta"):
        backbone = build(PRESETS["imagenet-vits"][1])[0].backbone
    assert (backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].attn.num_heads) == (384, 12, 6)
    assert backbone.norm.eps == 1e-6 and backbone.blocks[0].attn.qkv.bias is not None
