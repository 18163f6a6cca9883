"""Every stability trick of common/vit.py: what it changes, and what it must not."""

import json
import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.backbones import BackboneSpec, create_backbone, export_backbone, load_backbone
from common.distributed import rank, world_size
from common.ema import make_teacher
from common.errors import UserError
from common.optim import decay_groups, set_lr
from common.vit import (
    StochasticDepth,
    fix_sincos_positions,
    freeze_patch_projection,
    is_vit,
    last_attention,
    layer_groups,
    resample_positions,
    sincos_positions,
    vit_arguments,
)
from tests.processes import run_ranks

NAME, DEPTH = "vit_tiny_patch16_224", 3


def small(**tricks) -> VisionTransformer:
    """ViT-Ti of three blocks, patches of 4 px, global views of 16 px and local ones of 8 px."""
    arguments = vit_arguments(NAME, sizes=(16, 8), patch_size=4, **tricks)
    torch.manual_seed(0)
    return create_backbone(BackboneSpec(NAME, arguments={**arguments, "depth": DEPTH}, image_size=16))


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_off_means_timms_own_network():
    assert vit_arguments(NAME, sizes=(224, 96)) == {"img_size": 224, "dynamic_img_size": True}
    assert vit_arguments("resnet18", sizes=(32, 15)) == {}
    assert is_vit(NAME) and not is_vit("resnet18") and not is_vit("nothing")
    plain = timm.create_model(NAME, num_classes=0, img_size=16, patch_size=4, depth=DEPTH)
    assert small().state_dict().keys() == plain.state_dict().keys()


def test_options_of_vits_are_refused_for_resnets():
    resnet = create_backbone(BackboneSpec("resnet18", layers=(1, 1, 1, 1)))
    for options in ({"patch_size": 4}, {"layer_scale": 0.1}, {"qk_norm": True}):
        with pytest.raises(UserError, match="only to ViTs, but the backbone is resnet18"):
            vit_arguments("resnet18", sizes=(32,), **options)
    for call in (
        lambda: freeze_patch_projection(resnet),
        lambda: fix_sincos_positions(resnet),
        lambda: StochasticDepth(resnet, 0.1, seed=0, views=2, batch_size=4),
        lambda: layer_groups(decay_groups(resnet, 0.1), resnet, 0.9),
    ):
        with pytest.raises(UserError, match="applies only to ViTs, but the backbone is ResNet"):
            call()
    StochasticDepth(resnet, 0.0, seed=0, views=2, batch_size=4).draw(0)  # off: any network will do
    groups = decay_groups(resnet, 0.1)
    assert layer_groups(groups, resnet, 1.0) is groups


def test_views_must_divide_into_patches():
    with pytest.raises(UserError, match="views of 90 px do not divide into patches of 16 px"):
        vit_arguments(NAME, sizes=(224, 90))


# ---- frozen random patch projection ----------------------------------------------------------------------------------


def step(vit: nn.Module) -> dict[str, torch.Tensor]:
    """State before one AdamW step with weight decay on a random target."""
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    optimizer = torch.optim.AdamW(decay_groups(vit, 0.5), lr=0.01)
    (vit(images()) * torch.randn(4, vit.num_features, generator=torch.Generator().manual_seed(2))).sum().backward()
    optimizer.step()
    return before


def moved(vit: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}


def test_frozen_patch_projection_alone_stays_put():
    vit, other = small(), small()
    freeze_patch_projection(vit)
    changed = moved(vit, other.state_dict())
    assert changed == {"patch_embed.proj.weight", "patch_embed.proj.bias"}  # by the call: nothing else
    bound = math.sqrt(6 / (3 * 4 * 4 + 192))
    weight = vit.patch_embed.proj.weight
    assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.mean()) < 0.01 and weight.std() > 0.5 * bound
    assert not vit.patch_embed.proj.bias.any()
    everything = set(vit.state_dict())
    assert moved(vit, step(vit)) == everything - changed  # by training: everything else
    assert moved(other, step(other)) == everything


# ---- positions -------------------------------------------------------------------------------------------------------


def test_sincos_positions_equal_a_slow_loop():
    dim, rows, columns = 16, 3, 5
    ours = sincos_positions(dim, rows, columns)
    for r in range(rows):
        for c in range(columns):
            expected = []
            for index in (c, r):  # the column first
                angles = [index / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(ours[r * columns + c], torch.tensor(expected))
    with pytest.raises(UserError, match="divisible by 4"):
        sincos_positions(6, 2, 2)


def test_fixed_positions_are_neither_trained_nor_decayed():
    vit, other = small(), small()
    fix_sincos_positions(vit)
    assert moved(vit, other.state_dict()) == {"pos_embed"}
    assert not vit.pos_embed[0, 0].any()  # CLS
    assert torch.equal(vit.pos_embed[0, 1:], sincos_positions(192, 4, 4))
    assert moved(vit, step(vit)) == set(vit.state_dict()) - {"pos_embed"}
    assert vit(images(2, 8)).shape == (2, 192)  # a local view: the grid is resampled


@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [((14, 14), (6, 6), 1), ((4, 4), (2, 2), 0), ((7, 5), (9, 16), 5), ((14, 14), (37, 37), 1)],
)
def test_positions_are_resampled_as_timm_does(old, new, prefix):
    generator = torch.Generator().manual_seed(0)
    positions = 0.02 * torch.randn(1, prefix + old[0] * old[1], 32, generator=generator)  # as they are initialized
    weights = torch.randn(1, prefix + new[0] * new[1], 32, generator=generator)
    results = []
    for resample in (timm.layers.resample_abs_pos_embed, resample_positions):
        leaf = positions.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = resample(leaf, new, old, prefix)
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), leaf)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_smaller_view_needs_no_interpolation():
    """The backward pass of timm's own has no deterministic kernel on GPUs, where --deterministic would stop."""

    class Operators(TorchDispatchMode):
        seen: set[str] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(str(function))
            return function(*args, **(kwargs or {}))

    vit = small()
    vit(images(2, 8))  # makes the matrix
    with Operators() as mode:
        vit(images(2, 8)).sum().backward()
    assert vit.pos_embed.grad.abs().max() > 0 and any("mm" in name for name in mode.seen)
    assert not [name for name in mode.seen if "upsample" in name]


def test_resampled_positions_compile_into_one_graph():
    vit = small().eval()
    expected = [vit(images(2, size)) for size in (16, 8, 12)]
    vit.compile(backend="eager", fullgraph=True)
    for size, value in zip((16, 8, 12), expected, strict=True):
        torch.testing.assert_close(vit(images(2, size)), value)


# ---- LayerScale, QK-norm ---------------------------------------------------------------------------------------------


def test_layer_scale_scales_each_branch_and_is_not_decayed():
    vit, plain = small(layer_scale=1e-5), small()
    added = vit.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"blocks.{i}.ls{j}.gamma" for i in range(DEPTH) for j in (1, 2)}
    assert all(torch.equal(vit.state_dict()[n], torch.full((192,), 1e-5)) for n in added)
    assert added <= set(decay_groups(vit, 0.1)[1]["names"])
    vit.load_state_dict(plain.state_dict(), strict=False)
    x = images()
    embedded = vit.norm(vit._pos_embed(vit.patch_embed(x)))[:, 0]
    torch.testing.assert_close(vit(x), embedded, rtol=0, atol=1e-3)  # at 1e-5 blocks are nearly the identity
    assert (plain(x) - embedded).abs().max() > 0.01
    for name in added:
        nn.init.ones_(vit.get_parameter(name))
    torch.testing.assert_close(vit(x), plain(x))  # at 1 it is not there


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys():
    x = images()
    for normed in (True, False):
        vit = small(qk_norm=normed)
        before = last_attention(vit, x)
        qkv = vit.blocks[-1].attn.qkv
        with torch.no_grad():
            qkv.weight[: 2 * 192] *= 30  # queries and keys; values are untouched
            qkv.bias[: 2 * 192] *= 30
        change = (last_attention(vit, x) - before).abs().max()
        assert change < 1e-4 if normed else change > 1e-2
    added = small(qk_norm=True).state_dict().keys() - small().state_dict().keys()
    assert added == {
        f"blocks.{i}.attn.{which}_norm.{kind}" for i in range(DEPTH) for which in "qk" for kind in ("weight", "bias")
    }


# ---- stochastic depth ------------------------------------------------------------------------------------------------


def test_rates_of_stochastic_depth():
    linear, uniform, off = small(), small(), small()
    StochasticDepth(linear, 0.3, seed=0, views=2, batch_size=4)
    StochasticDepth(uniform, 0.3, seed=0, views=2, batch_size=4, uniform=True)
    StochasticDepth(off, 0.0, seed=0, views=2, batch_size=4)
    for vit, expected in ((linear, [0, 0.15, 0.3]), (uniform, [0.3] * 3), (off, [0] * 3)):
        rates = [getattr(getattr(block, which), "rate", 0) for block in vit.blocks for which in ("drop_path1",)]
        assert rates == pytest.approx(expected)
        assert [getattr(block.drop_path2, "rate", 0) for block in vit.blocks] == rates
        assert vit.state_dict().keys() == off.state_dict().keys()


def test_stochastic_depth_drops_whole_branches_of_single_samples_and_only_in_training():
    vit, plain = small(), small()
    depth = StochasticDepth(vit, 0.5, seed=3, views=2, batch_size=4)
    x = images()
    torch.testing.assert_close(vit.eval()(x), plain.eval()(x), rtol=0, atol=0)
    vit.train()
    depth.draw(0)
    depth.select(0, 1)
    masks = [layer.mask for layer in depth.layers]
    assert len(masks) == 2 * (DEPTH - 1)
    for rate, mask in zip((0.25, 0.25, 0.5, 0.5), masks, strict=True):
        torch.testing.assert_close(mask, (mask > 0) / (1 - rate))
    assert not all(mask.all() for mask in masks)
    tokens = vit._pos_embed(vit.patch_embed(x))
    for i, block in enumerate(plain.blocks):  # a slow version with the same masks
        a, b = (torch.ones(4), torch.ones(4)) if i == 0 else masks[2 * i - 2 : 2 * i]
        tokens = tokens + a.view(-1, 1, 1) * block.attn(block.norm1(tokens))
        tokens = tokens + b.view(-1, 1, 1) * block.mlp(block.norm2(tokens))
    torch.testing.assert_close(vit(x), plain.norm(tokens)[:, 0])


def test_masks_are_a_function_of_step_layer_view_and_sample():
    depth = StochasticDepth(small(), 0.4, seed=0, views=10, batch_size=512)
    depth.draw(7)
    first = depth.masks
    assert first.shape == (4, 10, 512)
    assert (first > 0).float().mean((1, 2)).tolist() == pytest.approx([0.8, 0.8, 0.6, 0.6], abs=0.03)
    torch.testing.assert_close(first.mean((1, 2)), torch.ones(4), rtol=0, atol=0.05)  # the branch's mean stays
    depth.draw(8)
    assert not torch.equal(depth.masks, first)
    again = StochasticDepth(small(), 0.4, seed=0, views=10, batch_size=512)
    again.draw(7)
    assert torch.equal(again.masks, first)
    again.select(2, 3)
    assert torch.equal(again.layers[1].mask, first[1, 2:5].flatten())
    flat = (first[2:] > 0).flatten(0, 1).float()  # two layers of one rate, 20 rows: all different
    assert (torch.corrcoef(flat) - torch.eye(20)).abs().max() < 0.25


def masks_of_rank() -> torch.Tensor:
    depth = StochasticDepth(small(), 0.4, seed=0, views=3, batch_size=8)
    depth.draw(5)
    assert depth.masks.shape[2] == 8 // world_size()
    return rank(), depth.masks


def test_ranks_take_their_part_of_one_draw():
    _, one = masks_of_rank()
    parts = run_ranks(masks_of_rank, 2)
    assert [r for r, _ in parts] == [0, 1]
    assert torch.equal(torch.cat([masks for _, masks in parts], dim=2), one)


def test_a_teacher_copied_before_has_no_stochastic_depth():
    student = small()
    teacher = make_teacher(student)
    depth = StochasticDepth(student, 0.9, seed=0, views=1, batch_size=4, uniform=True)
    depth.draw(0)
    depth.select(0, 1)
    x = images()
    assert torch.equal(teacher(x), teacher(x)) and teacher.training
    assert not torch.equal(student(x), teacher(x))


# ---- layer-wise learning rates ---------------------------------------------------------------------------------------


def test_layer_groups_follow_the_rule_and_keep_the_decay():
    model = nn.ModuleDict({"backbone": small(layer_scale=0.1), "head": nn.Linear(192, 8)})
    plain = decay_groups(model, 0.1)
    groups = layer_groups(plain, model["backbone"], 0.5)
    decayed = {name: group["weight_decay"] for group in plain for name in group["names"]}
    named = dict(model.named_parameters())
    found = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is named[name] and group["weight_decay"] == decayed[name]
            found[name] = group["lr_scale"]
    assert len(found) == sum(len(group["names"]) for group in groups) and found.keys() == named.keys()
    for name, scale in found.items():  # L = 3: l = 0, i + 1, L + 1
        if name.startswith(("backbone.patch_embed", "backbone.pos_embed", "backbone.cls_token")):
            assert scale == 0.5**4, name
        elif name.startswith("backbone.blocks."):
            assert scale == 0.5 ** (3 - int(name.split(".")[2])), name
        else:
            assert scale == 1 and name.startswith(("backbone.norm", "head")), name
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_lr(optimizer, 0.8)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])


# ---- attention, export -----------------------------------------------------------------------------------------------


def test_last_attention_is_the_softmax_and_leaves_no_trace():
    vit, x = small(), images()
    vit.train()
    expected = vit(x)
    fused = vit.blocks[-1].attn.fused_attn
    ours = last_attention(vit, x)
    assert ours.shape == (4, 3, 17, 17)
    tokens = vit.blocks[:-1](vit._pos_embed(vit.patch_embed(x)))
    attention = vit.blocks[-1].attn
    qkv = attention.qkv(vit.blocks[-1].norm1(tokens)).reshape(4, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
    slow = (qkv[0] @ qkv[1].transpose(-1, -2) / 8).softmax(-1)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(ours.sum(-1), torch.ones(4, 3, 17))
    assert attention.fused_attn == fused and not attention.attn_drop._forward_hooks and vit.training
    assert torch.equal(vit(x), expected)


def test_exported_backbone_rebuilds_with_every_trick(tmp_path):
    arguments = vit_arguments(NAME, sizes=(16, 8), patch_size=4, layer_scale=0.1, qk_norm=True)
    spec = BackboneSpec(NAME, arguments={**arguments, "depth": DEPTH}, image_size=16)
    vit = create_backbone(spec)
    freeze_patch_projection(vit)
    fix_sincos_positions(vit)
    StochasticDepth(vit, 0.3, seed=0, views=2, batch_size=4)
    export_backbone(tmp_path, vit, spec)
    loaded, read = load_backbone(tmp_path)
    assert read == spec
    scope: dict = {}
    exec("\n".join(json.loads((tmp_path / "backbone.json").read_text())["rebuild"]), scope)
    timm.models.load_checkpoint(scope["model"], str(tmp_path / "backbone.safetensors"))
    for x in (images(), images(size=8)):
        assert torch.equal(loaded(x), vit.eval()(x)) and torch.equal(scope["model"].eval()(x), vit(x))
