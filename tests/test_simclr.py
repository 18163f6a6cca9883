"""SimCLR: the loss against slow versions and the reference, ranks against one rank, gradient caching, the projector."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.errors import UserError
from common.log import read_metrics
from common.memory import cached_backward, checkpoint_blocks, couples_samples
from common.vit import StochasticDepth
from methods.simclr.config import PRESETS
from methods.simclr.loss import nt_xent
from methods.simclr.train import SimCLR, build
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)


def slow_nt_xent(z1, z2, temperature, decoupled=False):
    """Equation 1 of the paper, one pair at a time."""
    z = normalize(torch.cat([z1, z2]), dim=1)
    total = 0.0
    for i in range(len(z)):
        partner = (i + len(z1)) % len(z)
        others = [k for k in range(len(z)) if k != i and not (decoupled and k == partner)]
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in others)
        total = total - torch.log(torch.exp(z[i] @ z[partner] / temperature) / denominator)
    return total / len(z)


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_loss_and_gradient_equal_the_slow_version(n, temperature, decoupled, chunk):
    generator = torch.Generator().manual_seed(n)
    z1, z2 = (torch.randn(n, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, parts = nt_xent(z1, z2, temperature, decoupled=decoupled, chunk=chunk)
    expected = slow_nt_xent(z1, z2, temperature, decoupled)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["log_sum_exp"] - parts["alignment"], loss.detach())
    for ours, theirs in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_is_the_official_cross_entropy():
    """objective.py of the code: two softmax problems with the own column at -1e9; its sum is twice our mean."""
    z1, z2 = normalize(torch.randn(6, 8), dim=1), normalize(torch.randn(6, 8), dim=1)
    own, labels = torch.eye(6) * 1e9, torch.arange(6)
    first = cross_entropy(torch.cat([z1 @ z2.T, z1 @ z1.T - own], 1) / 0.5, labels)
    second = cross_entropy(torch.cat([z2 @ z1.T, z2 @ z2.T - own], 1) / 0.5, labels)
    torch.testing.assert_close(2 * nt_xent(z1, z2, 0.5)[0], first + second)


def test_known_values():
    identical = torch.ones(8, 4)  # every similarity 1: each of the 2B - 1 candidates is equally likely
    torch.testing.assert_close(nt_xent(identical, identical, 0.5)[0], torch.tensor(math.log(15)))
    z = torch.eye(64)  # orthogonal images, equal views: -1/t + ln(e^(1/t) + 2B - 2)
    loss, parts = nt_xent(z, z, 0.5)
    torch.testing.assert_close(loss, torch.tensor(-2 + math.log(math.exp(2) + 126)))
    assert parts["retrieval"] == 1
    random = nt_xent(torch.randn(512, 4096), torch.randn(512, 4096), 0.5)[0]  # reference section 9: near ln(2B - 1)
    assert abs(random - math.log(1023)) < 0.01


def test_scale_of_projections_is_irrelevant_and_self_similarity_is_out():
    z1, z2 = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(nt_xent(z1, z2, 0.1)[0], nt_xent(3 * z1, 0.2 * z2, 0.1)[0])
    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # own similarity 1 would dominate the softmax if it were counted
    assert nt_xent(far, far, 0.01)[0] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nt_xent(z1.to(dtype), z2.to(dtype), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z1.to(dtype).float(), z2.to(dtype).float(), 0.1)[0])


def test_projector_as_in_the_code():
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 128, "batch")
    first, norm1, _, second, norm2 = model.projector
    assert (first.in_features, first.out_features, second.out_features) == (64, 64, 128)
    assert first.bias is None and second.bias is None
    assert norm1.bias.requires_grad and norm2.weight.requires_grad and not norm2.bias.requires_grad
    assert abs(first.weight.std() - 0.01) < 1e-3


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_projectors_of_other_depths(layers):
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 24, "batch", layers)
    linear = [part for part in model.projector if isinstance(part, torch.nn.Linear)]
    assert [part.out_features for part in linear] == [64] * (layers - 1) + [24] * (layers > 0)
    assert sum(isinstance(part, torch.nn.ReLU) for part in model.projector) == max(layers - 1, 0)
    images = torch.randn(4, 3, 16, 16)
    assert model.eval()(images).shape == (4, 24 if layers else 64)


def test_loss_on_a_subvector_sees_no_other_feature():
    """DirectCLR: the first features are the projection; the others learn through the layers that they share."""
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 24, "batch", 0, subvector=16).eval()
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model(images), model.backbone(images)[:, :16])
    with pytest.raises(UserError, match="--subvector takes 1 to 64 of the features"):
        SimCLR(model.backbone, 24, "batch", 0, subvector=65)
    with pytest.raises(UserError, match="needs --projector-layers 0"):
        SimCLR(model.backbone, 24, "batch", 2, subvector=16)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def gradients(norm: str, dtype: torch.dtype, global_batch: int, sync: bool = True) -> dict[str, torch.Tensor]:
    """Loss, gradients and BatchNorm buffers of one step on this rank's part of a fixed global batch, after DDP."""
    torch.manual_seed(0)
    model = SimCLR(create_backbone(BackboneSpec("resnet18", norm=norm, **TINY)), 16, norm).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, global_batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    n = global_batch // world_size()
    views = views[:, rank() * n : (rank() + 1) * n]
    trained = sync_batchnorm(model, "cpu") if sync else model
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    z1, z2 = trained(torch.cat(list(views))).chunk(2)
    loss, _ = nt_xent(z1, z2, 0.2)
    loss.backward()
    if world_size() > 1:
        torch.distributed.all_reduce(loss := loss.detach())
        loss = loss / world_size()
    return (
        {"loss": loss.detach()}
        | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        | {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_rank(ranks, norm):
    for dtype in (torch.float64, torch.float32):
        one = gradients(norm, dtype, 16)
        for many in run_ranks(gradients, ranks, norm, dtype, 16):
            assert many.keys() == one.keys() and len(one) > 20
            for name, value in one.items():
                worst = (many[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
                assert worst < (1e-10 if dtype == torch.float64 else 1e-5), (name, dtype, worst)


def stochastic_gradients(rate: float, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of one step of a ViT with stochastic depth on this rank's part of 16 images, after DDP."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(PRESETS["shapes-vit"][1], norm="group")
    model = build(cfg, (0.5,) * 3, (0.5,) * 3)[0].double().train()
    depth = StochasticDepth(model.backbone, rate, seed=0, views=2, batch_size=16)
    if checkpointing:
        checkpoint_blocks(model.backbone)
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = 16 // world_size()
    depth.draw(7)
    depth.select(first=0, count=2)
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    views = views[:, rank() * n : (rank() + 1) * n]
    nt_xent(*trained(torch.cat(list(views))).chunk(2), 0.2)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_stochastic_depth_on_ranks_equals_one_rank():
    one = stochastic_gradients(0.5)
    assert_same(stochastic_gradients(0.5, checkpointing=True), one, 1e-12)
    for many in run_ranks(stochastic_gradients, 2, 0.5):
        assert_same(many, one, 1e-10)
    assert not torch.allclose(one["backbone.blocks.3.mlp.fc1.weight"],
                              stochastic_gradients(0.0)["backbone.blocks.3.mlp.fc1.weight"])  # fmt: skip


def test_a_run_with_stochastic_depth_drops_paths(tmp_path):
    losses = []
    for rate in (0.0, 0.5):
        small = ("--limit", 128, "--batch-size", 64, "--max-steps", 2, "--log-every", 1, "--no-eval", "--knn-every", 0)
        place = ("--out", tmp_path, "--name", f"r{rate}")
        code, text = run_command("methods.simclr.train", "shapes-vit", "--drop-path", rate, *small, *place,
                                 log=tmp_path / "log")  # fmt: skip
        assert code == 0, text
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"r{rate}" / "metrics.jsonl")])
    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses, strict=True)) and len(losses[0]) == 2


# ---- large batches in little memory ----------------------------------------------------------------------------------


def cached_gradients(norm: str, micro: int, frozen: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = SimCLR(create_backbone(BackboneSpec("resnet18", norm=norm, **TINY)), 16, norm).double().train()
    if frozen:
        model.eval()
    views = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss_of(projections):
        halves = [z.chunk(2) for z in projections]
        return nt_xent(*(torch.cat([pair[i] for pair in halves]) for i in (0, 1)), 0.2)

    inputs = [torch.cat(list(part)) for part in views.split(micro, dim=1)]
    loss, _ = cached_backward(model, inputs, loss_of, backward=torch.Tensor.backward)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss} | grads | {n: b.clone() for n, b in model.named_buffers() if "running" in n}


def assert_same(ours: dict, theirs: dict, tolerance: float, skip: str = "-"):
    for name, value in theirs.items():
        if skip not in name:
            worst = (ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
            assert worst < tolerance, (name, worst)


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_gradient_caching_equals_the_whole_batch_with_groupnorm(micro):
    assert_same(cached_gradients("group", micro), gradients("group", torch.float64, 16), 1e-10)


def test_gradient_caching_equals_the_whole_batch_with_frozen_batchnorm():
    assert_same(cached_gradients("batch", 4, frozen=True), cached_gradients("batch", 16, frozen=True), 1e-10)


def cached_gradients_of_a_rank(micro: int) -> dict[str, torch.Tensor]:
    """Gradient caching inside DistributedDataParallel, as train.py runs it: reduced in the last micro-batch only."""
    torch.manual_seed(0)
    model = SimCLR(create_backbone(BackboneSpec("resnet18", norm="group", **TINY)), 16, "group").double().train()
    views = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = 16 // world_size()
    views = views[:, rank() * n : (rank() + 1) * n]

    def loss_of(projections):
        halves = [z.chunk(2) for z in projections]
        return nt_xent(*(torch.cat([pair[i] for pair in halves]) for i in (0, 1)), 0.2)

    inputs = [torch.cat(list(part)) for part in views.split(micro, dim=1)]
    trained = DistributedDataParallel(model)
    cached_backward(trained, inputs, loss_of, backward=torch.Tensor.backward, no_sync=lambda m: m.no_sync())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_caching_on_ranks_equals_one_rank_with_the_whole_batch():
    whole = gradients("group", torch.float64, 16)
    for many in run_ranks(cached_gradients_of_a_rank, 2, 4):
        assert_same(many, {name: value for name, value in whole.items() if name in many}, 1e-10)
        assert len(many) > 20


def test_gradient_caching_with_batchnorm_equals_ranks_with_local_batchnorm():
    ranks = run_ranks(partial(gradients, sync=False), 4, "batch", torch.float64, 16)
    cached = cached_gradients("batch", 4)
    assert_same(cached, ranks[0], 1e-10, skip="running")
    whole = gradients("batch", torch.float64, 16)
    apart = torch.cat([(cached[n] - g).flatten() for n, g in whole.items() if "running" not in n]).norm()
    total = torch.cat([g.flatten() for n, g in whole.items() if "running" not in n]).norm()
    assert apart / total > 0.01  # it is not the whole batch's gradient, and the run says so


def test_running_statistics_move_once_per_micro_batch():
    """In the second pass only: momentum 0.1 over four micro-batches, as four plain forward passes move them."""
    torch.manual_seed(0)
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 16, "batch").double().train()
    views = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert couples_samples(model)
    with torch.no_grad():
        for part in views.split(4, dim=1):
            model(torch.cat(list(part)))
    expected = {n: b for n, b in model.named_buffers() if "running" in n}
    assert_same(cached_gradients("batch", 4), expected, 1e-12)


def test_activation_checkpointing_changes_nothing_with_batchnorm():
    def step(checkpointed: bool):
        torch.manual_seed(0)
        model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 16, "batch").train()
        if checkpointed:
            checkpoint_blocks(model.backbone)
        loss, _ = nt_xent(*model(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))).chunk(2), 0.2)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())

    plain, ours = step(False), step(True)
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
