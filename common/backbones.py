"""timm backbones, the small-image stem, narrow networks, and the exported file that any program can load.

An export is `backbone.safetensors` (plain timm keys) with `backbone.json` beside it: timm name and arguments, image
size, mean/std, and `rebuild`, the few lines of plain Python that make the network without this repository. Those lines
are for people: nothing here runs them. A description is data, and every field that this file does not know is refused.

A method whose encoder timm does not have names its class instead, `custom_encoder_spec(Encoder, ...)`; its
export is then rebuilt with this repository.
"""

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import GroupNorm
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import vit
from common.errors import UserError
from common.files import (
    FINITE,
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    choice,
    integer,
    list_of,
    one_line,
    read_json,
    write_atomic,
)

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"

# Stem convolutions that timm's ResNets do not have, each without the max-pool: (kernel size, stride, padding).
STEMS = {"cifar": (3, 1, 1), "stride2": (3, 2, 1)}
NORMS = ("batch", "group")
RESNET_OPTIONS = {"stem": "timm", "layers": (), "channels": (), "stem_width": 64, "norm": "batch"}
"""Fields of a spec that only timm's ResNets have, and their values for other networks."""

# Arguments of `timm.create_model` that an export may have. Others are refused: some name files or addresses to load.
TIMM_ARGUMENTS = {
    "img_size": integer(1, 1 << 13),
    "dynamic_img_size": FLAG,
    "patch_size": integer(1, 1 << 10),
    "embed_dim": integer(1, 1 << 16),
    "depth": integer(1, 1000),
    "num_heads": integer(1, 1 << 10),
    "init_values": FINITE,
    "qk_norm": FLAG,
    "class_token": FLAG,
    "reg_tokens": integer(0, 1 << 10),
    "global_pool": choice("", "token", "avg", "avgmax", "max"),
    "fc_norm": FLAG,
}

# Fields of backbone.json: those of BackboneSpec, and two that are written for its readers.
FIELDS = {
    "name": TEXT,
    "stem": choice("timm", *STEMS),
    "layers": list_of(integer(1, 1000), 0, 4),
    "channels": list_of(integer(1, 1 << 16), 0, 4),
    "stem_width": integer(1, 1 << 16),
    "norm": choice(*NORMS),
    "zero_init_last": FLAG,
    "arguments": OBJECT,
    "image_size": integer(1, 1 << 13),
    "mean": list_of(FINITE, 3),
    "std": list_of(Kind("a positive number", lambda value: FINITE.fits(value) and value > 0), 3),
    "num_features": integer(1, 1 << 24),
    "rebuild": list_of(TEXT),
}


def _is_plain(value: Any) -> bool:
    """Whether an encoder of this repository may have it as an argument: a value that cannot name an object."""
    if isinstance(value, list | tuple):
        return len(value) <= 100 and all(_is_plain(part) and not isinstance(part, list | tuple) for part in value)
    if isinstance(value, str):
        return len(value) <= 100
    return value is None or isinstance(value, bool) or (FINITE.fits(value) and abs(value) <= 1 << 20)


PLAIN = Kind("a number, text, true, false, null, or a list of them", _is_plain)


@dataclass(frozen=True)
class BackboneSpec:
    """Everything needed to rebuild a backbone and to feed it: JSON-able, stored as `backbone.json`."""

    name: str
    """timm model name, or "methods.<name>.<module>:<Class>" for an encoder of this repository."""
    stem: str = "timm"
    """"timm": as timm builds it. "cifar": 3x3 convolution with stride 1 and no max-pool (SimCLR App. B.9).
    "stride2": the same with stride 2, a quarter of the cost."""
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
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments, of `timm.create_model` (those in `TIMM_ARGUMENTS`) or of the encoder's class."""
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
        if self.stem in STEMS:
            lines += ["from torch import nn"]
        lines += [f"model = timm.create_model({self.name!r}{written})"]
        if self.stem in STEMS:
            kernel, stride, padding = STEMS[self.stem]
            shape = f"{kernel}, padding={padding}" if stride == 1 else f"{kernel}, stride={stride}, padding={padding}"
            lines += [f"model.conv1 = nn.Conv2d(3, {self.stem_width}, {shape}, bias=False)"]
            lines += ["model.maxpool = nn.Identity()"]
            if self.stem_width != 64:
                block_norm = ", norm_layer=partial(GroupNorm, num_groups=8)" if self.norm == "group" else ""
                lines += [f"model.bn1 = {norm}"]
                block = f"timm.models.resnet.BasicBlock({self.stem_width}, {self.stem_width}{block_norm})"
                lines += [f"model.layer1[0] = {block}"]
        return lines


def timm_spec(name: str) -> BackboneSpec:
    """The spec of timm's network `name` with the image size and statistics of its published weights, where it has any.

    Raises UserError for an unknown name or tag.
    """
    _check(BackboneSpec(name))
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the network has not
        tags = timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
        raise UserError(f"timm has no weights {name!r}, but {', '.join(tags) or 'none of this network'}") from None
    if config is None:
        return BackboneSpec(name)
    return BackboneSpec(name, image_size=config.input_size[-1], mean=tuple(config.mean), std=tuple(config.std))


def custom_encoder_spec(encoder: type[nn.Module], **fields: Any) -> BackboneSpec:
    """The spec of a network that timm does not have: `encoder(**arguments)`, a class of a method's module.

    `fields` are those of BackboneSpec: arguments, image_size, mean, std. The instance maps [B, 3, H, W] to
    [B, num_features], takes its initial weights from torch's global generator, and stays loadable when its directory
    is copied under another name.
    """
    return BackboneSpec(f"{encoder.__module__}:{encoder.__name__}", **fields)


def create_backbone(spec: BackboneSpec, *, pretrained: bool = False) -> nn.Module:
    """The network of `spec`, without classifier: [B, 3, H, W] -> [B, model.num_features].

    Initialized from torch's global generator: seed it first. Raises UserError for an unknown name or argument, a stem
    that does not fit the network, or pretrained weights that cannot be reached.
    """
    encoder = _check(spec)
    if pretrained:
        if encoder is not None:
            raise UserError(f"{spec.name} has no pretrained weights to download: pass a run directory")
        try:
            return _with_width(timm.create_model(spec.name, pretrained=True, num_classes=0, **spec.arguments))
        except Exception as error:
            raise UserError(
                f"no pretrained weights for {spec.name!r} in reach ({one_line(error)}). Without a network, pass a "
                "run directory or a .safetensors file, or leave --pretrained out to score random weights."
            ) from error
    if encoder is not None:
        return encoder(**spec.arguments)
    arguments = dict(spec.arguments)
    if is_resnet(spec.name):
        arguments["zero_init_last"] = spec.zero_init_last
    if spec.layers:
        arguments["layers"] = spec.layers
    if spec.channels:
        arguments["channels"] = spec.channels
    norm = partial(GroupNorm, num_groups=8) if spec.norm == "group" else nn.BatchNorm2d
    if spec.norm == "group":
        arguments["norm_layer"] = norm
    model = timm.create_model(spec.name, num_classes=0, **arguments)
    if spec.stem in STEMS:
        _replace_stem(model, spec, norm)
    return _with_width(model)


def _with_width(model: Any) -> nn.Module:
    """A network of timm whose `num_features` is the width of its output. timm's is that of the last feature map, before
    layers that it counts to the head and keeps without a classifier (VGG: 512 and 4096)."""
    model.num_features = model.head_hidden_size
    return model


def _replace_stem(model: Any, spec: BackboneSpec, norm: Any) -> None:
    """Give a ResNet the stem of `spec`, and a first block of that width, initialized as timm initializes a ResNet."""
    width, block = spec.stem_width, model.layer1[0]
    if width == 64 and model.bn1.weight.numel() != 64:
        raise UserError(f"{spec.name} has no stem of 64 channels to replace: leave its own, --stem timm")
    if width != 64 and (not isinstance(block, BasicBlock) or block.se is not None):
        raise UserError(f"--stem-width {width} is an option of ResNets of plain basic blocks, such as resnet18")
    kernel, stride, padding = STEMS[spec.stem]
    model.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=padding, bias=False)
    model.maxpool = nn.Identity()
    replaced = [model.conv1]
    if width != 64:  # timm's first stage expects the 64 channels of its own stem
        model.bn1 = norm(width)
        model.layer1[0] = BasicBlock(width, width, norm_layer=norm)
        replaced += model.layer1[0].modules()
    for module in replaced:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if width != 64 and spec.zero_init_last:
        model.layer1[0].zero_init_last()


def is_resnet(name: str) -> bool:
    """Whether timm builds `name` as a ResNet or ResNeXt, whose stem, stages and norms a spec can change."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.resnet"


def fit_sizes(spec: BackboneSpec, sizes: Sequence[int]) -> BackboneSpec:
    """`spec` with the arguments that its network needs to take square images of all `sizes` pixels.

    Nothing is added for ResNets, for encoders of this repository and where `img_size` is among the arguments already.
    Other networks of timm are tried on the meta device, as they are and with `img_size` (positions and windows for
    the first size). Raises UserError for a size that the network cannot have.
    """
    if ":" in spec.name or is_resnet(spec.name) or "img_size" in spec.arguments:
        _check(spec)
        return spec
    if vit.is_vit(spec.name):
        return dataclasses.replace(spec, arguments={**vit.vit_arguments(spec.name, sizes=sizes), **spec.arguments})
    reason = ""
    for more in ({}, {"img_size": sizes[0], "dynamic_img_size": True}, {"img_size": sizes[0]}):
        tried = dataclasses.replace(spec, arguments={**more, **spec.arguments})
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = create_backbone(tried)
                for size in sizes:
                    _try_size(model, size)
        except UserError:
            raise
        except TypeError as error:  # a network without that argument
            reason = reason or one_line(error)
        except Exception as error:
            reason = one_line(error)
        else:
            return tried
    raise UserError(_refusal(spec.name, sizes, reason))


def resize_input(model: Any, name: str, size: int) -> None:
    """Let `model`, a network of this module, take square images of `size` pixels if it does not yet.

    Where positions or windows are for one size, timm resamples them. Raises UserError for a size that the network
    cannot have.
    """
    try:
        _try_size(model, size)
        return
    except Exception as error:
        reason = one_line(error)
    if hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=size)
            _try_size(model, size)
            return
        except Exception as error:
            reason = one_line(error)
    raise UserError(_refusal(name, [size], reason))


def _try_size(model: nn.Module, size: int) -> None:
    """Pass an empty image of `size` pixels through `model`, whose training flags and statistics stay as they are.

    Raises ValueError for a size that its patches do not divide, and what the network raises.
    """
    patches = getattr(getattr(model, "patch_embed", None), "proj", None)
    if isinstance(patches, nn.Conv2d) and patches.kernel_size == patches.stride and size % patches.stride[0]:
        raise ValueError(f"{size} px do not divide into patches of {patches.stride[0]} px")
    parameter, flags = next(model.parameters()), [(part, part.training) for part in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device))
    finally:
        for part, training in flags:
            part.training = training


def _refusal(name: str, sizes: Sequence[int], reason: str) -> str:
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    made = f"; it was made for {config.input_size[-1]} px" if config else ""
    asked = " and ".join(map(str, dict.fromkeys(sizes)))
    return f"{name} cannot take images of {asked} px ({reason}): choose another size or network{made}"


def _check(spec: BackboneSpec) -> type[nn.Module] | None:
    """Raise UserError unless `spec` can be built; the encoder's class, or None for a network of timm."""
    if ":" in spec.name:
        encoder = _encoder_class(spec.name)
        kinds = {name: PLAIN for name in inspect.signature(encoder).parameters}
        check_fields(spec.arguments, kinds, f"the arguments of {spec.name}")
        return encoder
    if not re.fullmatch(r"[\w.-]+", spec.name) or not timm.is_model(spec.name):
        near = timm.list_models(f"{spec.name[:6]}*")[:5] or timm.list_models("resnet*")[:5]
        raise UserError(f"timm has no model {spec.name!r}. Near: {', '.join(near)}. All: timm.list_models().")
    check_fields(spec.arguments, TIMM_ARGUMENTS, f"the arguments of {spec.name}")
    if spec.stem not in ("timm", *STEMS):
        raise UserError(f"unknown stem {spec.stem!r}: choose {' or '.join(('timm', *STEMS))}")
    if spec.norm not in NORMS:
        raise UserError(f"unknown norm {spec.norm!r}: choose batch or group")
    if not is_resnet(spec.name):
        changed = [n for n, value in RESNET_OPTIONS.items() if getattr(spec, n) != value]
        if changed:
            raise UserError(f"{', '.join(changed)} are options of ResNets; {spec.name} has none of them")
    elif spec.stem in STEMS and spec.stem_width != 64 and (not spec.channels or spec.channels[0] != spec.stem_width):
        raise UserError(
            f"a stem of width {spec.stem_width} needs channels that begin with it, not {spec.channels or 'timm widths'}"
        )
    elif spec.stem == "timm" and spec.stem_width != 64:
        raise UserError(f"stem_width is an option of --stem {' or '.join(STEMS)}; timm's own stem is 64 wide")
    return None


def _encoder_class(name: str) -> type[nn.Module]:
    """The class "methods.<name>.<module>:<Class>": a network that this module defines, nothing that it imports."""
    if not re.fullmatch(r"methods(\.\w+)+:\w+", name):
        raise UserError(f"{name!r} is no encoder of this repository: methods.<name>.<module>:<Class>")
    path, class_name = name.split(":")
    try:
        found = getattr(importlib.import_module(path), class_name, None)
    except ModuleNotFoundError:
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == path):
        raise UserError(
            f"the network of these weights is the class {class_name} in {path.replace('.', '/')}.py, which is not "
            "here: evaluate them in the copy of this repository that trained them"
        )
    return found


# ---- the exported file -----------------------------------------------------------------------------------------------


def export_backbone(directory: Path, model: nn.Module, spec: BackboneSpec) -> None:
    """Write `backbone.safetensors` and `backbone.json` into `directory`, each through a temporary file.

    Raises UserError where the weights cannot be written, e.g. on a full disk.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    description = {**dataclasses.asdict(spec), "num_features": model.num_features, "rebuild": spec.rebuild()}
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{WEIGHTS}.tmp"
    try:
        save_file(tensors, aside)
        aside.replace(directory / WEIGHTS)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        aside.unlink(missing_ok=True)
        raise UserError(
            f"could not write {directory / WEIGHTS} ({one_line(error)}); free some space and start the same command "
            "again: it continues from the last checkpoint"
        ) from error
    write_atomic(directory / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_backbone(
    path: str | Path, *, pretrained: bool = False, image_size: int | None = None
) -> tuple[nn.Module, BackboneSpec]:
    """A backbone in eval mode from a run directory, a `.safetensors` file with its `.json` beside it, or a timm name.

    A timm name gives random weights unless `pretrained`. `image_size`: pixels that the backbone must take, where they
    are not those of the description; positions are resampled. Raises UserError for a missing or damaged file, for a
    description with fields that are unknown or of the wrong type, for weights that belong to another architecture
    (naming keys and shapes), and for a size that the network cannot have.
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    if weights.suffix != ".safetensors":
        if path.exists() or len(path.parts) > 1:
            raise UserError(f"{path} is not a run directory, a .safetensors file or a timm model name")
        spec = timm_spec(str(path))
        if image_size and image_size != spec.image_size:
            spec = fit_sizes(dataclasses.replace(spec, image_size=image_size), [image_size])
        return create_backbone(spec, pretrained=pretrained).eval(), spec
    if not weights.is_file():
        hint = "the run has not finished training yet" if path.is_dir() else "check the path"
        raise UserError(f"{weights} does not exist: {hint}")
    description = weights.with_suffix(".json")
    if not description.exists():
        raise UserError(f"{description} is missing: it says which network the weights in {weights.name} belong to")
    spec = read_description(description)
    try:
        with safe_open(weights, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except Exception as error:
        raise UserError(f"{weights} cannot be read ({one_line(error)}): it is truncated or not safetensors") from error
    try:
        model = _build_to_fit(spec, weights, shapes)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{description} describes a {spec.name} that cannot be built: {one_line(error)}") from error
    model.load_state_dict(load_file(weights))
    if image_size and image_size != spec.image_size:
        resize_input(model, spec.name, image_size)
    return model.eval(), spec


def read_description(path: Path) -> BackboneSpec:
    """The spec in a `backbone.json`. Raises UserError for unknown or missing fields and wrong types, naming them."""
    content = read_json(path, limit=1 << 20)
    check_fields(content, FIELDS, path, required=("name",))
    fields: dict[str, Any] = {f.name: content[f.name] for f in dataclasses.fields(BackboneSpec) if f.name in content}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    spec = BackboneSpec(**fields)
    _check(spec)
    return spec


def _build_to_fit(spec: BackboneSpec, weights: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> nn.Module:
    """The network of `spec`, built only if its tensors have the names and shapes that the file `weights` has.

    They are compared on the meta device, which holds no values: a description may name a network of any size.
    """
    try:
        with torch.device("meta"):
            expected = create_backbone(spec).state_dict()
    except (NotImplementedError, RuntimeError):  # an encoder that reads values while it is built
        model = create_backbone(spec)
        _check_shapes(weights, spec, shapes, model.state_dict())
        return model
    _check_shapes(weights, spec, shapes, expected)
    return create_backbone(spec)


def _check_shapes(
    weights: Path, spec: BackboneSpec, shapes: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, Tensor]
) -> None:
    wrong = [f"{k} is missing" for k in expected if k not in shapes]
    wrong += [f"{k} is not in the network" for k in shapes if k not in expected]
    for name, tensor in expected.items():
        if name not in shapes:
            continue
        shape, dtype = shapes[name]
        if shape != tuple(tensor.shape):
            wrong.append(f"{name} is {shape}, the network has {tuple(tensor.shape)}")
        elif dtype.startswith(("F", "BF")) != tensor.is_floating_point():
            wrong.append(f"{name} holds {dtype}, the network has {tensor.dtype}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{weights} does not fit {spec.name}: {'; '.join(wrong[:4])}{more}")


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one image's forward pass in convolutions and linear layers (what papers call MACs or FLOPs)."""
    aten = torch.ops.aten
    was_training, parameter = model.training, next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))
    model.train(was_training)
    counts = counter.get_flop_counts()["Global"]  # attention's own products are not counted, as usual
    return sum(counts.get(operator, 0) for operator in (aten.convolution, aten.addmm, aten.mm)) // 2
