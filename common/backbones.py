"""timm backbones, the small-image stem, narrow networks, and the exported file that any program can load.

An export is `backbone.safetensors` (plain timm keys) with `backbone.json` beside it: timm name and arguments, image
size, mean/std, and `rebuild`, the few lines of plain Python that make the network without this repository.

A method whose encoder timm does not have names its class instead, `own_encoder(Encoder, ...)`; its
export is then rebuilt with this repository.
"""

import dataclasses
import importlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.errors import UserError
from common.files import write_whole

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"


@dataclass(frozen=True)
class BackboneSpec:
    """Everything needed to rebuild a backbone and to feed it: JSON-able, stored as `backbone.json`."""

    name: str
    """timm model name, or "methods.<name>.<module>:<Class>" for an encoder of this repository."""
    stem: str = "timm"
    """"timm": as timm builds it. "cifar": 3x3 convolution with stride 1 and no max-pool (SimCLR App. B.9)."""
    layers: tuple[int, ...] = ()
    """ResNet blocks per stage; empty: timm's."""
    channels: tuple[int, ...] = ()
    """ResNet width per stage; empty: timm's."""
    stem_width: int = 64
    """Stem channels of the CIFAR stem; timm's `channels` leaves it at 64, four times the cost of a narrow network."""
    norm: str = "batch"
    """"batch", or "group": GroupNorm with 8 groups, for which a batch may be split without changing the gradient."""
    zero_init_last: bool = True
    """Start each residual block as the identity: zero scale in its last norm (SimCLR and Barlow: yes, SwAV: no)."""
    arguments: dict = field(default_factory=dict)
    """Further keyword arguments of `timm.create_model` (ViT: img_size, dynamic_img_size, drop_path_rate ...)."""
    image_size: int = 224
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def rebuild(self) -> list[str]:
        """Lines of plain Python that build `model` with timm alone, ready for `timm.models.load_checkpoint`; for an
        encoder of this repository, lines that build it with this repository."""
        if ":" in self.name:
            module, name = self.name.split(":")
            written = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
            return [f"from {module} import {name}", f"model = {name}({written})"]
        arguments = {"num_classes": 0, **self.arguments}
        if self.layers:
            arguments["layers"] = self.layers
        if self.channels:
            arguments["channels"] = self.channels
        written = "".join(f", {k}={v!r}" for k, v in arguments.items())
        lines = ["import timm"]
        norm = f"nn.BatchNorm2d({self.stem_width})"
        if self.norm == "group":
            lines += ["from functools import partial", "from timm.layers import GroupNorm"]
            written += ", norm_layer=partial(GroupNorm, num_groups=8)"
            norm = f"GroupNorm({self.stem_width}, num_groups=8)"
        if self.stem == "cifar":
            lines += ["from torch import nn"]
        lines += [f"model = timm.create_model({self.name!r}{written})"]
        if self.stem == "cifar":
            lines += [f"model.conv1 = nn.Conv2d(3, {self.stem_width}, 3, padding=1, bias=False)"]
            lines += ["model.maxpool = nn.Identity()"]
            if self.stem_width != 64:
                block_norm = ", norm_layer=partial(GroupNorm, num_groups=8)" if self.norm == "group" else ""
                lines += [f"model.bn1 = {norm}"]
                block = f"timm.models.resnet.BasicBlock({self.stem_width}, {self.stem_width}{block_norm})"
                lines += [f"model.layer1[0] = {block}"]
        return lines


def own_encoder(encoder: type[nn.Module], **fields) -> BackboneSpec:
    """The spec of a network that timm has not: `encoder(**arguments)`, a class of a method's module.

    `fields` are those of BackboneSpec: arguments, image_size, mean, std. The instance maps [B, 3, H, W] to
    [B, num_features], takes its initial weights from torch's global generator, and stays loadable when its directory
    is copied under another name.
    """
    return BackboneSpec(f"{encoder.__module__}:{encoder.__name__}", **fields)


def create_backbone(spec: BackboneSpec, *, pretrained: bool = False) -> nn.Module:
    """The timm network of `spec`, without classifier: [B, 3, H, W] -> [B, model.num_features].

    Initialised from torch's global generator: seed it first. Raises UserError for an unknown name, a stem that does
    not fit the network, or pretrained weights that cannot be reached.
    """
    _check(spec)
    arguments = dict(spec.arguments)
    if spec.name.startswith(("resnet", "wide_resnet")) and not pretrained:
        arguments["zero_init_last"] = spec.zero_init_last
    written = dataclasses.replace(spec, arguments=arguments).rebuild()
    scope: dict = {}
    if pretrained:
        if ":" in spec.name:
            raise UserError(f"{spec.name} has no pretrained weights to download: pass a run directory")
        # The one thing `rebuild` does not do: it describes a network whose weights come from our file.
        try:
            return timm.create_model(spec.name, pretrained=True, num_classes=0, **arguments)
        except Exception as error:
            raise UserError(
                f"no pretrained weights for {spec.name!r} in reach ({_first_line(error)}). Without a network, pass a "
                "run directory or a .safetensors file, or leave --pretrained out to score random weights."
            ) from error
    # The lines a user runs are the lines we run: the exported description cannot drift from the code.
    exec("\n".join(written), scope)
    model = scope["model"]
    if spec.stem == "cifar":
        for module in [model.conv1, *(model.layer1[0].modules() if spec.stem_width != 64 else ())]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
        if spec.stem_width != 64 and spec.zero_init_last:
            model.layer1[0].zero_init_last()
    return model


def _check(spec: BackboneSpec) -> None:
    if ":" in spec.name:
        if not re.fullmatch(r"methods(\.\w+)+:\w+", spec.name):
            raise UserError(f"{spec.name!r} is no encoder of this repository: methods.<name>.<module>:<Class>")
        module, name = spec.name.split(":")
        try:
            found = hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            found = False
        if not found:
            raise UserError(
                f"the network of these weights is the class {name} in {module.replace('.', '/')}.py, which is not "
                "here: evaluate them in the copy of this repository that trained them"
            )
        return
    if not timm.is_model(spec.name):
        near = timm.list_models(f"{spec.name[:6]}*")[:5] or timm.list_models("resnet*")[:5]
        raise UserError(f"timm has no model {spec.name!r}. Near: {', '.join(near)}. All: timm.list_models().")
    if spec.stem not in ("timm", "cifar"):
        raise UserError(f"unknown stem {spec.stem!r}: choose timm or cifar")
    if spec.norm not in ("batch", "group"):
        raise UserError(f"unknown norm {spec.norm!r}: choose batch or group")
    if not spec.name.startswith(("resnet", "wide_resnet")):
        changed = [n for n in ("stem", "layers", "channels", "stem_width", "norm") if getattr(spec, n) != _default(n)]
        if changed:
            raise UserError(f"{', '.join(changed)} are options of ResNets; {spec.name} has none of them")
    elif spec.stem == "cifar" and spec.stem_width != 64 and (not spec.channels or spec.channels[0] != spec.stem_width):
        raise UserError(
            f"a stem of width {spec.stem_width} needs channels that begin with it, not {spec.channels or 'timm widths'}"
        )
    elif spec.stem == "timm" and spec.stem_width != 64:
        raise UserError("stem_width is an option of --stem cifar; timm's own stem is 64 wide")


def _default(name: str):
    return BackboneSpec.__dataclass_fields__[name].default


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def export_backbone(directory: Path, model: nn.Module, spec: BackboneSpec) -> None:
    """Write `backbone.safetensors` and `backbone.json` into `directory`, each through a temporary file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    description = {**dataclasses.asdict(spec), "num_features": model.num_features, "rebuild": spec.rebuild()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / f"{WEIGHTS}.tmp")
    (directory / f"{WEIGHTS}.tmp").replace(directory / WEIGHTS)
    write_whole(directory / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_backbone(path: str | Path, *, pretrained: bool = False) -> tuple[nn.Module, BackboneSpec]:
    """A backbone in eval mode from a run directory, a `.safetensors` file with its `.json` beside it, or a timm name.

    A timm name gives random weights unless `pretrained`. Raises UserError for a missing or broken file, and for
    weights that belong to another architecture (naming keys and shapes).
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    if weights.suffix != ".safetensors":
        if path.exists() or len(path.parts) > 1:
            raise UserError(f"{path} is not a run directory, a .safetensors file or a timm model name")
        _check(BackboneSpec(str(path)))
        config = timm.get_pretrained_cfg(str(path))
        size = config.input_size[-1] if config else 224
        mean, std = (tuple(config.mean), tuple(config.std)) if config else ((0.0,) * 3, (1.0,) * 3)
        spec = BackboneSpec(str(path), image_size=size, mean=mean, std=std)
        return create_backbone(spec, pretrained=pretrained).eval(), spec
    if not weights.exists():
        hint = "the run has not finished training yet" if path.is_dir() else "check the path"
        raise UserError(f"{weights} does not exist: {hint}")
    description = weights.with_suffix(".json")
    if not description.exists():
        raise UserError(f"{description} is missing: it says which network the weights in {weights.name} belong to")
    fields = json.loads(description.read_text())
    known = {f.name for f in dataclasses.fields(BackboneSpec)}
    spec = BackboneSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known})
    model = create_backbone(spec)
    try:
        tensors = load_file(weights)
    except Exception as error:
        raise UserError(
            f"{weights} cannot be read ({_first_line(error)}): it is truncated or not safetensors"
        ) from error
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in tensors] + [
        f"{k} is not in the network" for k in tensors if k not in own
    ]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, the network has {tuple(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{weights} does not fit {spec.name}: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(tensors)
    return model.eval(), spec


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one image's forward pass in convolutions and linear layers (what papers call MACs or FLOPs)."""
    total = 0

    def count(module: nn.Module, _inputs, output: torch.Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += output.numel() * per_output  # of one image, which may be many patches

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    was_training = model.training
    parameter = next(model.parameters())
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return total
