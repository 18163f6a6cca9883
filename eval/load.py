"""What an evaluation loads: any backbone this repository exported or any timm model, and the record of a run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.backbones import BackboneSpec, create_backbone, fit_sizes, load_backbone, resize_input, timm_spec
from common.data import mean_std
from common.errors import UserError
from common.files import TEXT, field_problems, integer, optional, read_json
from common.run import CONFIG, check_config
from common.weights import Filled, fill, read_weights

# Settings of a run that an evaluation reads; an export from elsewhere may lack them.
SETTINGS = {
    "data": optional(TEXT),
    "image_column": optional(TEXT),
    "label_column": optional(TEXT),
    "split": optional(TEXT),
    "eval_data": optional(TEXT),
    "eval_image_column": optional(TEXT),
    "eval_label_column": optional(TEXT),
    "limit": optional(integer(0, 1 << 62)),
    "seed": optional(integer(-(1 << 63), (1 << 64) - 1)),
}


def load(
    path: str | Path, *, pretrained: bool = False, image_size: int | None = None
) -> tuple[nn.Module, BackboneSpec]:
    """(backbone in eval mode on the CPU, its spec) from a run directory, a `.safetensors` file with its `.json` next to
    it, or a timm model name (random weights unless `pretrained`).

    The backbone maps [B, 3, H, W], normalized with `spec.mean` and `spec.std`, to [B, num_features]. `image_size`: what
    it must take, `spec.image_size` unless given; positions are resampled.
    Raises UserError for a missing or broken file, an unknown name, pretrained weights out of reach, or a size that the
    network cannot have.
    """
    return load_backbone(path, pretrained=pretrained, image_size=image_size)


def load_foreign(
    name: str, source: str, *, image_size: int | None = None, normalize: str | None = None
) -> tuple[nn.Module, BackboneSpec, Filled]:
    """(the timm network `name` in eval mode with the weights of `source`, its spec, what was filled).

    image_size: pixels, the network's own unless given; a ViT's positions are resampled to it. normalize: as of
    --normalize; by default what is written beside the weights, otherwise ImageNet's mean and std, which the official
    self-supervised files share. Raises UserError as `common.weights` does, and where the file lacks a part of the
    network: a score would be of partly random weights.
    """
    size = image_size or timm_spec(name).image_size
    weights = read_weights(source, "--weights")
    mean, std = mean_std(normalize) if normalize else weights.statistics or mean_std("imagenet-1k")
    spec = fit_sizes(BackboneSpec(name, image_size=size, mean=mean, std=std), [size])
    backbone = create_backbone(spec)
    filled = fill(backbone, weights, option="--weights")
    if filled.missing:
        more = ", ..." if len(filled.missing) > 3 else ""
        raise UserError(
            f"--weights {weights.name} lacks {len(filled.missing)} of the {filled.total} tensors of {name} "
            f"({', '.join(filled.missing[:3])}{more}), so a part of the network would be random: choose the network "
            "that they belong to"
        )
    return backbone.eval(), spec, filled


def load_asked(
    name: str, *, weights: str, normalize: str | None, pretrained: bool, image_size: int | None
) -> tuple[nn.Module, BackboneSpec, Filled | None]:
    """What a command line asks for: `load_foreign` where it gives `weights`, whose notice is printed, else `load`.

    Raises UserError as they do, and for a --normalize without --weights.
    """
    if weights:
        backbone, spec, filled = load_foreign(name, weights, image_size=image_size, normalize=normalize)
        print(f"{filled.notice()}; inputs of mean {spec.mean} and std {spec.std}")
        return backbone, spec, filled
    if normalize:
        raise UserError("--normalize goes with --weights: of all others it is known how their inputs were normalized")
    return *load(name, pretrained=pretrained, image_size=image_size), None


def random_init(spec: BackboneSpec, seed: int, image_size: int | None = None) -> nn.Module:
    """The same architecture with fresh weights from `seed`, in eval mode; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_backbone(spec).eval()
    if image_size and image_size != spec.image_size:
        resize_input(model, spec.name, image_size)
    return model


def run_record(directory: Path) -> dict[str, Any]:
    """{"config": the settings} of a run directory and, where it has recorded them, {"data": the images it used}.

    Empty where there is no config.json; that of an export from elsewhere may hold the settings alone. Raises UserError
    if it is damaged.
    """
    path = directory / CONFIG
    if not path.exists():
        return {}
    content = read_json(path, limit=1 << 24)
    if isinstance(content.get("config"), dict):
        check_config(content, path)
    else:
        content = {"config": content}
    if wrong := field_problems(content["config"], SETTINGS, others=True):
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return content


def device_of(name: str) -> torch.device:
    """The device of a command line; auto: the GPU if there is one. Raises UserError where it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from None
    return device
