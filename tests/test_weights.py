"""--init-from and eval --weights: official layouts, positions, what is left over or missing; timm and the hub."""

import argparse
import ast
import json
import pkgutil
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import methods
from common import checkpoint
from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.errors import UserError
from common.weights import Filled, fill, read_weights, sha256, weights_name
from eval.load import load_foreign
from tests.processes import run_command

METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg)
VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=0)


def vit(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **changes}).eval()


def resnet(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet18", **{**RESNET, **changes}).eval()


def under(prefix: str, network: nn.Module, **others: int) -> dict[str, torch.Tensor]:
    """The network's state under a prefix, and further tensors beside it."""
    return {prefix + name: value for name, value in network.state_dict().items()} | {
        prefix + name.replace("__", "."): torch.ones(size, size) for name, size in others.items()
    }


def filled_from(tmp_path: Path, content: object, network: nn.Module, part: str = "") -> Filled:
    torch.save(content, tmp_path / "weights.pth")
    return fill(network, read_weights(f"{tmp_path / 'weights.pth'}{part}"))


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


# ---- layouts of others -----------------------------------------------------------------------------------------------

# Keys as the official code writes or strips them: the file where each was read is beside it.
LAYOUTS = {
    # dino main_dino.py (save_dict), utils.py (load_pretrained_weights); eval_linear.py: --checkpoint_key teacher
    "dino": (
        vit,
        lambda a, b: {
            "student": under("module.backbone.", b) | {"module.head.mlp.0.weight": torch.ones(3, 3)},
            "teacher": under("backbone.", a) | {"head.mlp.0.weight": torch.ones(3, 3)},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        "teacher.backbone",
        [],
    ),
    # mae main_finetune.py: checkpoint["model"]; models_mae.py: the decoder's names
    "mae": (
        vit,
        lambda a, b: {"model": under("", a, mask_token=2, decoder_embed__weight=4, decoder_pred__weight=4)},
        "model",
        ["mask_token", "decoder_embed.weight", "decoder_pred.weight"],
    ),
    # ijepa src/helper.py (load_checkpoint); what is evaluated is the target encoder (arXiv:2301.08243, App. A)
    "ijepa": (
        lambda seed: vit(seed, class_token=False, global_pool="avg", fc_norm=False),
        lambda a, b: {"encoder": under("module.", b), "predictor": {}, "target_encoder": under("module.", a)},
        "target_encoder.module",
        [],
    ),
    # moco main_lincls.py: module.encoder_q without module.encoder_q.fc; the same in v2, whose fc is an MLP
    "moco v1": (
        resnet,
        lambda a, b: {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": under("module.encoder_q.", a, fc__weight=4)
            | under("module.encoder_k.", b, fc__weight=4)
            | {"module.queue": torch.ones(4, 4)},
        },
        "state_dict.module.encoder_q",
        ["fc.weight"],
    ),
    "moco v2": (
        resnet,
        lambda a, b: {"state_dict": under("module.encoder_q.", a, fc__0__weight=4, fc__2__weight=4)},
        "state_dict.module.encoder_q",
        ["fc.0.weight", "fc.2.weight"],
    ),
    # moco-v3 main_lincls.py: module.base_encoder without .head (ViT) or .fc (ResNet)
    "moco v3": (
        vit,
        lambda a, b: {
            "state_dict": under("module.momentum_encoder.", b, head__0__weight=4)
            | under("module.base_encoder.", a, head__0__weight=4)
            | {"module.predictor.0.weight": torch.ones(4, 4)},
        },
        "state_dict.module.base_encoder",
        ["head.0.weight"],
    ),
    # swav eval_linear.py: "module." removed; src/resnet50.py: projection_head and prototypes
    "swav": (
        resnet,
        lambda a, b: under("module.", a, projection_head__0__weight=4, prototypes__weight=4),
        "module",
        ["projection_head.0.weight", "prototypes.weight"],
    ),
    # sthalles/SimCLR models/resnet_simclr.py: self.backbone with the projector as its fc
    "simclr": (
        resnet,
        lambda a, b: {"epoch": 100, "state_dict": under("backbone.", a, fc__0__weight=4, fc__2__weight=4)},
        "state_dict.backbone",
        ["fc.0.weight", "fc.2.weight"],
    ),
    # lucidrains/byol-pytorch byol_pytorch.py: NetWrapper.net in online_encoder and target_encoder
    "byol": (
        resnet,
        lambda a, b: (
            under("target_encoder.net.", b)
            | under("online_encoder.net.", a)
            | {"online_predictor.0.weight": torch.ones(4, 4)}
        ),
        "online_encoder.net",
        [],
    ),
    # timm utils/model_ema.py and checkpoint_saver.py: averaged weights beside the others; torch.compile's prefix
    "timm, ema": (
        resnet,
        lambda a, b: {"state_dict": under("_orig_mod.", b), "state_dict_ema": under("_orig_mod.", a)},
        "state_dict_ema._orig_mod",
        [],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts(layout, tmp_path):
    """The network that its authors evaluate is found, and gives the same features to the bit."""
    make, content, prefix, left = LAYOUTS[layout]
    one, other, network = make(1), make(2), make(3)
    filled = filled_from(tmp_path, content(one, other), network)
    assert filled.prefix == prefix and not filled.missing and not filled.resampled and filled.share == 1
    assert filled.left_over == left
    assert same(network, one) and not same(network, other)


def test_a_part_can_be_asked_for(tmp_path):
    content = LAYOUTS["dino"][1](vit(1), vit(2))
    network = vit(3)
    assert filled_from(tmp_path, content, network, "::student").prefix == "student.module.backbone"
    assert same(network, vit(2))
    with pytest.raises(UserError, match="::encoder: the file has no such part.*its parts are .*student, teacher"):
        filled_from(tmp_path, content, network, "::encoder")


def test_a_sequential_of_children_is_understood(tmp_path):
    """torchvision's ResNet without its classifier, as lightly's documentation wraps it, into timm's."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18().eval()
    network = timm.create_model("resnet18", num_classes=0)
    filled = filled_from(
        tmp_path, {"state_dict": under("backbone.", nn.Sequential(*list(theirs.children())[:-1]))}, network
    )
    assert not filled.missing and not filled.left_over
    theirs.fc = nn.Identity()
    assert same(network, theirs)


def test_an_earlier_run_and_its_checkpoint(tmp_path):
    network = resnet(1)
    export_backbone(tmp_path / "run", network, BackboneSpec("resnet18"))
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, {"stateful": {"model": under("backbone.", network)}})
    for source in ("run", "run/backbone.safetensors", "run/checkpoints/step-00000007/state.pt"):
        other = resnet(2)
        filled = fill(other, read_weights(str(tmp_path / source)))
        assert same(other, network) and not filled.missing
        assert filled.record()["name"] == Path(source).name == weights_name(str(tmp_path / source))
    with pytest.raises(UserError, match="has no backbone.safetensors or .*: a run writes"):
        read_weights(str(tmp_path / "run" / "checkpoints"))


def test_timms_own_filter_is_asked_where_names_differ(tmp_path):
    """ConvNeXt in the names of its authors: stages as downsample_layers and stages (timm convnext.py)."""
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0)
    torch.manual_seed(1)
    source = timm.create_model("convnext_atto", **sizes, conv_mlp=False).eval()
    theirs = {}
    for name, value in source.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
        parts = name.split(".")
        if parts[0] == "stages" and parts[2] == "downsample":
            name = ".".join(["downsample_layers", parts[1], *parts[3:]])
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv")
        theirs[name.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")] = value
    assert len(theirs.keys() & source.state_dict().keys()) < len(theirs) / 2
    network = timm.create_model("convnext_atto", **sizes, conv_mlp=False)
    filled = filled_from(tmp_path, {"model": theirs}, network)
    assert not filled.missing and filled.prefix == "model" and same(network, source)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_positions_and_patches_are_resampled_as_timm_does(tmp_path):
    """Other image and patch sizes equal timm's own loading of the same file."""
    source = vit(1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    for changes in ({"img_size": 64}, {"patch_size": 4}, {"patch_size": 4, "img_size": 64}):
        ours, theirs = vit(2, **changes), vit(3, **changes)
        filled = fill(ours, read_weights(str(tmp_path / "w.safetensors")))
        timm.models.load_checkpoint(
            theirs, str(tmp_path / "w.safetensors"), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
        )
        assert not filled.missing
        changed = {"patch_embed.proj.weight"} if "patch_size" in changes else set()
        if theirs.pos_embed.shape != source.pos_embed.shape:
            changed |= {"pos_embed"}
        assert set(filled.resampled) == changed
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [32, 64])
def test_positions_with_and_without_class_token(tmp_path, size):
    """A file with a class token into a network without, and the reverse: patches keep their positions."""
    bare = dict(class_token=False, global_pool="avg", fc_norm=False)
    source, network = vit(1), vit(2, **bare, img_size=size)
    filled = filled_from(tmp_path, source.state_dict(), network)
    assert filled.left_over == ["cls_token"] and not filled.missing
    if size == 32:
        assert torch.equal(network.pos_embed, source.pos_embed[:, 1:])
    with_token = vit(3)
    own = with_token.pos_embed[:, :1].clone()
    filled = filled_from(tmp_path, network.state_dict(), with_token)
    assert filled.missing == ["cls_token"] and torch.equal(with_token.pos_embed[:, :1], own)
    torch.testing.assert_close(with_token.pos_embed[:, 1:].mean(), network.pos_embed.mean(), rtol=0.1, atol=1e-3)


def test_what_was_not_used_is_told(tmp_path):
    """A CIFAR stem from an ImageNet ResNet: all but the first convolution."""
    network = create_backbone(
        BackboneSpec("resnet18", stem="cifar", layers=RESNET["layers"], channels=(64, 16, 32, 64))
    )
    before = network.conv1.weight.clone()
    source = timm.create_model("resnet18", layers=RESNET["layers"], channels=(64, 16, 32, 64), num_classes=10)
    filled = filled_from(tmp_path, source.state_dict(), network)
    assert torch.equal(network.conv1.weight, before) and filled.missing == ["conv1.weight"]
    assert filled.left_over == ["conv1.weight", "fc.weight", "fc.bias"]
    notice = filled.notice()
    assert "NOT in the file, so random: 1 (conv1.weight)" in notice and "left over 3 (conv1.weight, fc" in notice
    assert notice.startswith("weights of weights.pth (sha256 ") and "WARNING" not in notice
    assert filled.record()["sha256"] == sha256(tmp_path / "weights.pth")
    deeper = timm.create_model("resnet34", layers=(3, 4, 6, 3), channels=(64, 16, 32, 64), num_classes=0)
    assert filled_from(tmp_path, source.state_dict(), deeper).notice().startswith("WARNING only")


def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path):
    network = vit(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for content, found in (
        (vit(2, embed_dim=48).state_dict(), r"blocks|cls_token \(1, 1, 48\)"),
        (resnet(1).state_dict(), r"conv1\.weight \(64, 3, 7, 7\)"),
        ({"model": {"bias": torch.ones(3)}}, "no matrix at all"),
    ):
        with pytest.raises(UserError, match=rf"nothing in it fits.*Expected cls_token \(1, 1, 24\).*found .*({found})"):
            filled_from(tmp_path, content, network)
    bad = vit(2).state_dict()
    bad["norm.weight"] = bad["norm.weight"] * torch.nan
    with pytest.raises(UserError, match="norm.weight is not finite"):
        filled_from(tmp_path, bad, network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing.pth", "there is no such file; give a run directory"),
        ("runs/nothing", "there is no such file"),
        ("resnet18.nothing", "timm has no such weights on the hub; it has resnet18.a1_in1k"),
        ("empty.pth", "holds no weights"),
        ("broken.pth", "cannot be read as weights"),
        ("broken.safetensors", "cannot be read as weights"),
    ],
)
def test_sources_that_are_no_weights(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"epoch": 3}}, "empty.pth")
    Path("broken.pth").write_bytes(b"not a checkpoint")
    Path("broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=rf"--init-from {source}:? .*{words}"):
        read_weights(source)


# ---- timm and the hub, from its cache --------------------------------------------------------------------------------


def cached(folder: Path, repository: str, network: nn.Module, mean: float) -> None:
    """A repository in the layout of the hub's cache, as timm writes one."""
    root = folder / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (mean,) * 3, "std": (0.5,) * 3}
    timm.models.save_for_hf(network, str(root / "snapshots" / ("0" * 40)), safe_serialization=True)


def test_timm_names_and_the_hub_offline(tmp_path, monkeypatch):
    """From the hub's cache, without a network: the same features as timm's own loading."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(1)
    network = timm.create_model("test_vit")
    cached(tmp_path, "timm/test_vit.r160_in1k", network, 0.25)
    cached(tmp_path, "mine/vit", network, 0.125)
    x = torch.randn(2, 3, 160, 160)
    for source, name, mean in (
        ("test_vit.r160_in1k", "timm/test_vit.r160_in1k", 0.25),
        ("hf-hub:mine/vit", "mine/vit", 0.125),
    ):
        theirs = timm.create_model(f"hf-hub:{name}", pretrained=True, num_classes=0).eval()
        ours, spec, filled = load_foreign("test_vit", source)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
        assert filled.record()["name"] == name and sorted(filled.left_over) == ["head.bias", "head.weight"]
        assert spec.mean == (mean,) * 3  # of the config.json beside the weights
    with pytest.raises(UserError, match="no model.safetensors or pytorch_model.bin of mine/nothing in reach"):
        read_weights("hf-hub:mine/nothing")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_takes_only_whole_networks(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("test_vit", num_classes=0).eval()
    torch.save({"teacher": under("backbone.", source)}, tmp_path / "dino.pth")
    backbone, spec, filled = load_foreign("test_vit", str(tmp_path / "dino.pth"))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), source(x), rtol=0, atol=0)
    assert spec.mean == (0.485, 0.456, 0.406) and spec.image_size == 160  # ImageNet's, as the official files
    smaller, spec, filled = load_foreign("test_vit", str(tmp_path / "dino.pth"), image_size=96, normalize="none")
    assert filled.resampled == ["pos_embed"] and spec.mean == (0, 0, 0) and smaller(x[..., :96, :96]).shape == (2, 64)
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("norm.")}, tmp_path / "part.pth")
    with pytest.raises(
        UserError, match=r"lacks 2 of the \d+ tensors of test_vit \(norm.weight, norm.bias\), so a part"
    ):
        load_foreign("test_vit", str(tmp_path / "part.pth"))


def test_the_command_scores_a_file_and_says_what_it_took(tmp_path):
    torch.save(
        {"state_dict": under("module.encoder_q.", resnet(1, layers=(2, 2, 2, 2), channels=(64, 128, 256, 512)))},
        tmp_path / "moco.pth.tar",
    )
    flags = ("--data", "pairs", "--limit", 60, "--image-size", 32, "--protocols", "knn")
    code, text = run_command(
        "eval",
        "--model",
        "resnet18",
        "--weights",
        tmp_path / "moco.pth.tar",
        *flags,
        "--out",
        tmp_path / "card.json",
        log=tmp_path / "log",
    )
    assert code == 0 and "100 of the network's 100 tensors from state_dict.module.encoder_q" in text, text
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["initial_weights"]["name"] == "moco.pth.tar" and card["backbone"].startswith("resnet18, ")
    assert card["initial_weights"]["sha256"] == sha256(tmp_path / "moco.pth.tar")
    for wrong, words in (
        (("--model", "resnet18"), "give what to score"),
        (("resnet18", "--weights", "x"), "give what to score"),
        (("resnet18", "--normalize", "none"), "--normalize goes with --weights"),
        (("--model", "resnet18", "--weights", tmp_path / "none.pth"), "--weights .*: there is no such file"),
    ):
        code, text = run_command("eval", *wrong, *flags, log=tmp_path / "log")
        assert code == 2 and "Traceback" not in text, text
        assert re.search(words, text), text


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_before_anything_is_made_of_the_backbone(method):
    """One line of train.py, before a teacher is copied and before processes are wrapped around the model."""
    tree = ast.parse((Path(methods.__path__[0]) / method / "train.py").read_text())
    calls: dict[str, list[int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.setdefault(ast.unparse(node.func), []).append(node.lineno)
    (line,) = calls["session.init_from"]
    later = [n for name in ("make_teacher", "session.place", "session.prepare") for n in calls.get(name, [])]
    assert later and line < min(later)


TEACHERS = {
    "byol": "target",
    "dino": "teacher",
    "ijepa": "target",
    "moco": "key_encoder",
    "moco_v3": "momentum_encoder",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_an_earlier_one(method, tmp_path):
    """The backbone that a run trains, and its teacher, are the file's; recorded by name and content, never by path."""
    train, flags = f"methods.{method}.train", ("smoke", "--no-eval", "--max-steps", 1, "--out", tmp_path)
    code, text = run_command(train, *flags, "--name", "first", "--seed", 1, log=tmp_path / "log")
    assert code == 0, text
    first = tmp_path / "first" / "backbone.safetensors"
    code, text = run_command(
        train, *flags, "--name", "second", "--init-from", tmp_path / "first", "--save-every", 1, log=tmp_path / "log"
    )
    assert code == 0 and "weights of first (sha256" in text and "NOTE first was trained" not in text, text
    record = json.loads((tmp_path / "second" / "config.json").read_text())
    assert record["config"]["init_from"] == "first" and str(tmp_path) not in json.dumps(record["initial_weights"])
    weights = record["initial_weights"]
    assert weights["sha256"] == sha256(first) and weights["filled"] == weights["total"] and not weights["missing"]
    before, after = load_file(first), load_file(tmp_path / "second" / "backbone.safetensors")
    # A step, at most, away from the file; random weights are sqrt(2) times its norm away.
    matrices = [name for name, value in before.items() if value.ndim > 1 and value.std() > 0]
    size = sum(float(before[name].norm()) for name in matrices)
    assert sum(float((after[name] - before[name]).norm()) for name in matrices) < 0.5 * size
    if method in TEACHERS:
        state = checkpoint.load_newest(tmp_path / "second" / "checkpoints")[1]["stateful"]
        teacher = {name: state[TEACHERS[method]][f"backbone.{name}"] for name in matrices}
        assert sum(float((teacher[name] - before[name]).norm()) for name in matrices) < 0.5 * size


def test_other_inputs_than_the_weights_had_are_told(tmp_path):
    torch.manual_seed(1)
    described = BackboneSpec("vit_tiny_patch16_224", mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    export_backbone(tmp_path / "first", vit(1, embed_dim=48), described)
    flags = ("smoke", "--no-eval", "--max-steps", 1, "--out", tmp_path, "--init-from", tmp_path / "first")
    code, text = run_command("methods.mae.train", *flags, log=tmp_path / "log")
    assert code == 0 and "NOTE first was trained on inputs of mean [0.5, 0.5, 0.5] and std [0.25, 0.5, 0.5]" in text, (
        text
    )
    record = json.loads((tmp_path / "mae-smoke" / "config.json").read_text())
    assert record["initial_weights"]["inputs"]["std"] == [0.25, 0.5, 0.5]


def test_a_resumed_run_does_not_read_the_weights_again(tmp_path):
    """The checkpoint wins: the file may be gone. Another file's name is another run."""
    save_file(resnet(1).state_dict(), tmp_path / "w.safetensors")
    flags = ("smoke", "--no-eval", "--out", tmp_path, "--name", "run", "--init-from", tmp_path / "w.safetensors")
    size = ("--stem", "timm", "--stem-width", 64, "--layers", 1, 1, 1, 1, "--channels", 8, 16, 32, 64)
    train = "methods.simclr.train"
    code, text = run_command(train, *flags, *size, "--max-steps", 2, log=tmp_path / "log")
    assert code == 0 and "weights of w.safetensors" in text, text
    before = json.loads((tmp_path / "run" / "config.json").read_text())["initial_weights"]
    (tmp_path / "w.safetensors").unlink()
    code, text = run_command(train, *flags, *size, "--max-steps", 3, log=tmp_path / "log")
    assert code == 0 and "resumed" in text and "weights of" not in text, text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["initial_weights"] == before
    code, text = run_command(train, *flags[:-1], tmp_path / "other.pth", *size, "--max-steps", 3, log=tmp_path / "log")
    assert code == 2 and "init_from w.safetensors -> other.pth" in text, text
