"""SimCLR's variants: loss on a subvector, stochastic depth with N processes and with checkpointing, presets."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.backbones import BackboneSpec, create_backbone
from common.distributed import rank, sync_batchnorm, world_size
from common.errors import UserError
from common.log import read_metrics
from common.memory import checkpoint_blocks
from common.vit import StochasticDepth
from methods.simclr.config import PRESETS as SIMCLR_PRESETS
from methods.simclr.train import SimCLR as OriginalSimCLR
from methods.simclr.train import compute_loss as simclr_loss
from methods.simclr_variants.config import PRESETS
from methods.simclr_variants.train import SimCLR, build, compute_loss
from tests.processes import run_command, run_ranks

TINY = dict(stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, zero_init_last=False)


def test_loss_on_a_subvector_sees_no_other_feature():
    """DirectCLR: the first features are the projection; the others learn through the layers that they share."""
    model = SimCLR(create_backbone(BackboneSpec("resnet18", **TINY)), 24, "batch", 0, subvector=16).eval()
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model(images), model.backbone(images)[:, :16])
    with pytest.raises(UserError, match="--subvector takes 1 to 64 of the features"):
        SimCLR(model.backbone, 24, "batch", 0, subvector=65)
    with pytest.raises(UserError, match="needs --projector-layers 0"):
        SimCLR(model.backbone, 24, "batch", 2, subvector=16)


def step_gradients(preset: str, drop_path: float = 0.0, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step on this process's part of 16 images, after DDP."""
    torch.manual_seed(0)
    cfg = replace(PRESETS[preset][1], norm="group", drop_path=drop_path)
    model = build(cfg)[0].double().train()
    depth = StochasticDepth(model.backbone, cfg.drop_path, seed=0, views=2, batch_size=16)
    if checkpointing:
        checkpoint_blocks(model.backbone)
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = 16 // world_size()
    depth.draw(7)
    trained = sync_batchnorm(model)
    trained = DistributedDataParallel(trained) if world_size() > 1 else trained
    loss, _ = compute_loss(trained, depth, views[:, rank() * n : (rank() + 1) * n], cfg)
    loss.backward()
    loss = loss.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss / world_size()} | gradients


def assert_same(ours: dict, theirs: dict, tolerance: float):
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in theirs.items():
        worst = (ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert worst < tolerance, (name, worst)


def test_stochastic_depth_on_ranks_equals_one_rank():
    one, none = step_gradients("quickstart", 0.5), step_gradients("quickstart", 0.0)
    assert_same(step_gradients("quickstart", 0.5, checkpointing=True), one, 1e-12)
    for many in run_ranks(step_gradients, 2, "quickstart", 0.5):
        assert_same(many, one, 1e-10)
    name = "backbone.blocks.3.mlp.fc1.weight"
    assert not torch.allclose(one[name], none[name])


def test_loss_on_a_subvector_on_ranks_equals_one_rank():
    one = step_gradients("directclr")
    for many in run_ranks(step_gradients, 2, "directclr"):
        assert_same(many, one, 1e-10)


def test_a_run_with_stochastic_depth_drops_paths(tmp_path):
    losses = []
    for rate in (0.0, 0.5):
        flags = ("--limit", 128, "--max-steps", 2, "--log-every", 1, "--no-eval", "--drop-path", rate)
        target = ("--out", tmp_path, "--name", f"r{rate}")
        code, text = run_command("methods.simclr_variants.train", "smoke", *flags, *target, log=tmp_path / "log")
        assert code == 0, text
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"r{rate}" / "metrics.jsonl")])
    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses, strict=True)) and len(losses[0]) == 2


@pytest.mark.parametrize(
    ("preset", "flags", "sentence"),
    [
        ("directclr", ("--drop-path", "0.1"), "--drop-path"),
        ("directclr", ("--subvector", "65"), "--subvector takes 1 to 64 of the features"),
        ("smoke", ("--backbone", "resnet18", "--patch-size", "4"), "--patch-size"),
        ("smoke", ("--norm", "group", "--stem", "cifar"), "options of ResNets"),
    ],
)
def test_mistakes_are_one_sentence(preset, flags, sentence, tmp_path):
    arguments = (preset, "--limit", 128, "--batch-size", 64, "--out", tmp_path / "runs", *flags)
    code, text = run_command("methods.simclr_variants.train", *arguments, log=tmp_path / "log")
    assert code == 2 and "Traceback" not in text
    assert sentence in next(line for line in text.splitlines() if line.startswith("error: "))
    assert not (tmp_path / "runs").exists()  # found before anything was written


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset):
    cfg = PRESETS[preset][1]
    with torch.device("meta"):
        model, _ = build(cfg)
        width = cfg.subvector or cfg.projector_dim
        assert model(torch.empty(2, 3, cfg.image_size, cfg.image_size)).shape == (2, width)


def test_without_tricks_it_is_simclr():
    """The fork's step is `methods/simclr`'s where no variant is chosen: the same weights, loss and gradients."""
    theirs_cfg = SIMCLR_PRESETS["smoke"][1]
    cfg = replace(PRESETS["directclr"][1], projector_layers=2, subvector=0)
    assert {name: getattr(cfg, name) for name in ("temperature", "loss_weight", "norm", "channels")} == {
        name: getattr(theirs_cfg, name) for name in ("temperature", "loss_weight", "norm", "channels")
    }
    torch.manual_seed(0)
    model = build(cfg)[0].train()
    torch.manual_seed(0)
    original = OriginalSimCLR(create_backbone(theirs_cfg.resnet_spec()), theirs_cfg.projector_dim).train()
    assert model.state_dict().keys() == original.state_dict().keys()
    views = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    depth = StochasticDepth(model.backbone, 0.0, seed=0, views=2, batch_size=8)
    ours, theirs = compute_loss(model, depth, views, cfg)[0], simclr_loss(original, views, theirs_cfg)[0]
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    for (name, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
