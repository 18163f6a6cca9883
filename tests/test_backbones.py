"""Backbones: cost, stems, export and reload with and without this repository, mistakes named."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.backbones import (
    BackboneSpec,
    create_backbone,
    custom_encoder_spec,
    export_backbone,
    fit_sizes,
    load_backbone,
    multiply_adds,
)
from common.errors import UserError
from common.memory import checkpoint_blocks

TINY = BackboneSpec(
    "resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, image_size=32
)
SPECS = {
    "narrow": TINY,
    "narrow-groupnorm": BackboneSpec(
        "resnet18",
        stem="cifar",
        layers=(1, 1, 1, 1),
        channels=(8, 16, 32, 64),
        stem_width=8,
        norm="group",
        image_size=32,
    ),
    "stride2": BackboneSpec(
        "resnet18",
        stem="stride2",
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_width=16,
        image_size=32,
    ),
    "cifar-r18": BackboneSpec("resnet18", stem="cifar", image_size=32),
    "cifar-r50": BackboneSpec("resnet50", stem="cifar", zero_init_last=False, image_size=32),
    "imagenet-r18": BackboneSpec("resnet18", image_size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1)),
    "vit": BackboneSpec(
        "vit_tiny_patch16_224",
        arguments={"img_size": 32, "patch_size": 4, "dynamic_img_size": True, "depth": 2},
        image_size=32,
    ),
}


def test_costs_are_those_of_the_design():
    assert multiply_adds(create_backbone(TINY), 32) == pytest.approx(4.2e6, rel=0.02)
    wider = BackboneSpec("resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), stem_width=16)
    assert multiply_adds(create_backbone(wider), 32) == pytest.approx(16e6, rel=0.02)
    assert multiply_adds(create_backbone(SPECS["stride2"]), 32) == pytest.approx(4e6, rel=0.02)
    assert multiply_adds(create_backbone(SPECS["cifar-r18"]), 32) == pytest.approx(556e6, rel=0.01)


def test_cifar_stem_keeps_the_resolution():
    model = create_backbone(SPECS["cifar-r18"])
    assert model.maxpool(model.bn1(model.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 64, 32, 32)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1) and model.conv1.padding == (1, 1)
    model = create_backbone(SPECS["stride2"])
    assert model.maxpool(model.bn1(model.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 16, 16, 16)


def test_zero_init_last_starts_blocks_as_identities():
    with_zero, without = (
        create_backbone(TINY),
        create_backbone(BackboneSpec(**{**TINY.__dict__, "zero_init_last": False})),
    )
    last = [block.bn2.weight for stage in range(1, 5) for block in getattr(with_zero, f"layer{stage}")]
    assert all(weight.abs().sum() == 0 for weight in last)
    assert all(block.bn2.weight.min() == 1 for stage in range(1, 5) for block in getattr(without, f"layer{stage}"))


@pytest.mark.parametrize("name", SPECS)
def test_export_loads_here_and_in_plain_timm(name, tmp_path):
    spec = SPECS[name]
    torch.manual_seed(3)
    model = create_backbone(spec)
    images = torch.randn(2, 3, spec.image_size, spec.image_size)
    model.train()(images)  # running statistics that a fresh network does not have
    expected = model.eval()(images)
    assert expected.shape == (2, model.num_features)
    export_backbone(tmp_path, model, spec)

    loaded, described = load_backbone(tmp_path)
    assert described == spec and not loaded.training
    assert torch.equal(loaded(images), expected)
    assert torch.equal(load_backbone(tmp_path / "backbone.safetensors")[0](images), expected)

    scope: dict = {}  # exactly the lines that backbone.json and the README give, and timm's own loader
    exec("\n".join(json.loads((tmp_path / "backbone.json").read_text())["rebuild"]), scope)
    assert repr(scope["model"]) == repr(model)
    timm.models.load_checkpoint(scope["model"], str(tmp_path / "backbone.safetensors"))
    assert torch.equal(scope["model"].eval()(images), expected)


def test_lines_in_the_readme_load_an_export(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = next(block.split("```")[0] for block in readme.split("```python\n") if block.startswith("import timm"))
    model = create_backbone(SPECS["cifar-r18"])
    export_backbone(tmp_path, model, SPECS["cifar-r18"])
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(lines, scope)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(scope["model"].eval()(images), model.eval()(images))


def test_unmodified_network_loads_by_its_timm_name_alone(tmp_path):
    model = create_backbone(SPECS["imagenet-r18"])
    export_backbone(tmp_path, model, SPECS["imagenet-r18"])
    plain = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "backbone.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_timm_name_is_a_backbone_with_its_own_statistics():
    model, spec = load_backbone("resnet18")
    assert model.num_features == 512 and spec.image_size == 224 and spec.mean == pytest.approx((0.485, 0.456, 0.406))


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no model 'resnet19'.*resnet18"):
        create_backbone(BackboneSpec("resnet19"))
    with pytest.raises(UserError, match="needs channels that begin with it"):
        create_backbone(BackboneSpec("resnet18", stem="cifar", stem_width=8))
    with pytest.raises(UserError, match="the field 'drop_rate' is unknown"):
        create_backbone(BackboneSpec("vit_tiny_patch16_224", arguments={"drop_rate": 0.1}))
    with pytest.raises(UserError, match="stem.*options of ResNets"):
        create_backbone(BackboneSpec("vit_tiny_patch16_224", stem="cifar"))
    with pytest.raises(UserError, match="not a run directory"):
        load_backbone(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="has not finished"):
        load_backbone(tmp_path)
    model = create_backbone(TINY)
    export_backbone(tmp_path, model, TINY)
    tensors = load_file(tmp_path / "backbone.safetensors")
    tensors["layer1.0.conv1.weight"] = torch.zeros(8, 8, 5, 5)
    del tensors["bn1.weight"]
    save_file(tensors, tmp_path / "backbone.safetensors")
    with pytest.raises(
        UserError, match=r"bn1.weight is missing.*layer1.0.conv1.weight is \(8, 8, 5, 5\).*\(8, 8, 3, 3\)"
    ):
        load_backbone(tmp_path)
    whole = (tmp_path / "backbone.safetensors").read_bytes()
    (tmp_path / "backbone.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").unlink()
    with pytest.raises(UserError, match="backbone.json is missing"):
        load_backbone(tmp_path)


def test_pretrained_weights_without_network_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no pretrained weights for 'resnet18'"):
        load_backbone("resnet18", pretrained=True)


# ---- any network of timm ---------------------------------------------------------------------------------------------

WIDER = (
    "mobilenetv3_small_050",
    "vgg11",
    "ghostnet_050",
    "hgnetv2_b0",
    "efficientvit_b0",
    "test_mambaout",
    "lcnet_050",
)
PLAIN = (
    "convnext_atto",
    "test_efficientnet",
    "test_nfnet",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
)


@pytest.mark.parametrize("name", [*WIDER, *PLAIN, "deit_tiny_distilled_patch16_224", "resnet18", "test_vit"])
def test_any_network_takes_32_pixels_and_says_how_wide_its_output_is(name):
    with torch.device("meta"):
        spec = fit_sizes(BackboneSpec(name, image_size=32), [32])
        model = create_backbone(spec).eval()
        plain = timm.create_model(name, num_classes=0)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)
    assert (plain.num_features != model.num_features) == (name in WIDER)


def test_sizes_that_a_network_cannot_have_are_one_sentence():
    for name, sizes, sentence in (
        ("inception_v3", (32,), "inception_v3 cannot take images of 32 px .*made for 299 px"),
        ("eva02_tiny_patch14_224", (32,), "32 px do not divide into patches of 14 px"),
        ("deit_tiny_patch16_224", (64, 33), "images of 64 and 33 px .*33 px do not divide into patches of 16 px"),
        ("mixer_s32_224", (224, 96), "cannot take images of 224 and 96 px"),
        ("vit_tiny_patch16_224", (33,), "33 px do not divide into patches of 16 px"),
    ):
        with pytest.raises(UserError, match=sentence):
            fit_sizes(BackboneSpec(name), sizes)
    assert fit_sizes(BackboneSpec("deit_tiny_patch16_224"), (64, 32)).arguments["dynamic_img_size"]
    state = torch.get_rng_state()
    assert not fit_sizes(BackboneSpec("convnext_atto"), (32, 64)).arguments
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "size", "other"), [("test_vit", 160, 96), ("deit_tiny_patch16_224", 64, 96), ("resnet18", 32, 48)]
)
def test_an_export_is_scored_at_another_size_as_timm_would(name, size, other, tmp_path):
    spec = BackboneSpec(name, arguments={} if name == "resnet18" else {"img_size": size}, image_size=size)
    model = create_backbone(spec).eval()
    export_backbone(tmp_path, model, spec)
    ours, read = load_backbone(tmp_path, image_size=other)
    assert read == spec
    arguments = {} if name == "resnet18" else {"img_size": other}
    file = {"file": str(tmp_path / "backbone.safetensors"), "num_classes": 0}
    plain = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, num_classes=0, **arguments).eval()
    images = torch.randn(2, 3, other, other)
    torch.testing.assert_close(ours(images), plain(images), rtol=0, atol=1e-5)
    assert load_backbone(name, image_size=other)[1].image_size == other
    if name != "resnet18":
        with pytest.raises(UserError, match="35 px do not divide into patches of 16 px"):
            load_backbone(tmp_path, image_size=35)


def test_options_of_resnets_are_for_those_that_have_them():
    for name in ("seresnet18", "resnext50_32x4d", "resnet50d"):
        with torch.device("meta"):
            model = create_backbone(BackboneSpec(name, stem="cifar", image_size=32))
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)
    narrow = {"stem": "cifar", "channels": (8, 16, 32, 64), "stem_width": 8}
    for name, options, sentence in (
        ("resnetv2_50", {"stem": "cifar"}, "stem are options of ResNets; resnetv2_50 has none"),
        ("test_resnet", {"stem": "cifar"}, "test_resnet has no stem of 64 channels"),
        ("resnet50", narrow, "--stem-width 8 is an option of ResNets of plain basic blocks"),
        ("seresnet18", narrow, "--stem-width 8 is an option of ResNets of plain basic blocks"),
    ):
        with pytest.raises(UserError, match=sentence), torch.device("meta"):
            create_backbone(BackboneSpec(name, **options))


def test_timms_own_checkpointing_changes_no_gradient_and_no_statistic():
    def step(checkpointed: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model, calls = create_backbone(BackboneSpec("test_byobnet")).train(), []
        model.stages[0].register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointed:
            checkpoint_blocks(model)
        images = torch.randn(4, 3, 32, 32)
        (model(images) * torch.randn(4, model.num_features)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()), len(calls)

    (without, once), (ours, twice) = step(False), step(True)
    assert (once, twice) == (1, 2)  # it was recomputed
    assert all(torch.equal(ours[name], value) for name, value in without.items())
    with pytest.raises(UserError, match="DLA cannot recompute its blocks: leave --activation-checkpointing out"):
        checkpoint_blocks(create_backbone(BackboneSpec("dla34")))


def test_groupnorm_network_has_no_batchnorm():
    model = create_backbone(SPECS["narrow-groupnorm"])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Patches(nn.Module):
    """A network that timm does not have: the mean over four quarters of an image, each through the same layer."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width
        self.conv = nn.Conv2d(3, width, 4)

    def forward(self, images):
        quarters = images.unflatten(2, (2, -1)).unflatten(4, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.conv(quarters).mean((2, 3)).unflatten(0, (-1, 4)).mean(1)


@pytest.fixture
def own(monkeypatch):
    """The spec of `Patches` as if it stood in methods/own/model.py."""
    module = ModuleType("methods.own.model")
    module.Patches = Patches
    monkeypatch.setitem(sys.modules, "methods.own", ModuleType("methods.own"))
    monkeypatch.setitem(sys.modules, "methods.own.model", module)
    monkeypatch.setattr(Patches, "__module__", "methods.own.model")
    return custom_encoder_spec(Patches, arguments={"width": 5}, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)


def test_an_encoder_of_a_method_is_exported_and_loaded_like_any_other(own, tmp_path):
    assert own.name == "methods.own.model:Patches"
    model = create_backbone(own).eval()
    export_backbone(tmp_path, model, own)
    loaded, spec = load_backbone(tmp_path)
    assert spec == own and loaded.num_features == 5 and not loaded.training
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    written = json.loads((tmp_path / "backbone.json").read_text())["rebuild"]
    assert written == ["from methods.own.model import Patches", "model = Patches(width=5)"]
    assert multiply_adds(model, 8) == 4 * 5 * 3 * 4 * 4  # all four quarters, one position each
    with pytest.raises(UserError, match="the field 'depth' is unknown; width is"):
        create_backbone(dataclasses.replace(own, arguments={"depth": 1, "width": {"a": 1}}))


def test_an_encoder_that_is_not_here_is_named(own, tmp_path, monkeypatch):
    export_backbone(tmp_path, create_backbone(own), own)
    monkeypatch.delattr(sys.modules["methods.own.model"], "Patches")
    with pytest.raises(UserError, match="class Patches in methods/own/model.py, which is not here"):
        load_backbone(tmp_path)
    monkeypatch.delitem(sys.modules, "methods.own.model")
    with pytest.raises(UserError, match="which is not here"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="has no pretrained weights"):
        create_backbone(BackboneSpec("methods.simclr.train:SimCLR"), pretrained=True)
    for name in ("os:system", "methods.own.model:Patches()", "methods:x"):
        with pytest.raises(UserError, match="no encoder of this repository"):
            create_backbone(BackboneSpec(name))
    for name in ("methods.simclr.train:nn", "methods.simclr.train:create_backbone", "methods.simclr.train:Config"):
        with pytest.raises(UserError, match="which is not here"):  # no network, or one that the module only imports
            create_backbone(BackboneSpec(name))
