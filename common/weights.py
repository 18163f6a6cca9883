"""Weights of others into a network: exports of this repository, timm, the Hugging Face hub, official SSL files.

A layout is recognized by its keys, not by its name. The tensors of a file, however deeply nested, are tried under every
prefix that ends before a key of the network, and the prefix that fills most of it wins:

    DINO         {"teacher": {"backbone.blocks..."}, "student": {"module.backbone..."}}   dino main_dino.py, utils.py
    MAE, I-JEPA  {"model": {"blocks...", "decoder_blocks..."}}, {"target_encoder": {"module.blocks..."}}
    MoCo         {"state_dict": {"module.encoder_q.layer1...", ".fc..."}}                 moco main_lincls.py
    MoCo v3      {"state_dict": {"module.base_encoder...", "module.momentum_encoder..."}} moco-v3 main_lincls.py
    SwAV         {"module.layer1...", "module.projection_head...", "module.prototypes..."}  swav eval_linear.py
    SimCLR       {"state_dict": {"backbone.layer1...", "backbone.fc..."}}                 sthalles/SimCLR
    BYOL         {"online_encoder.net...", "target_encoder.net..."}                       lucidrains/byol-pytorch

Heads have no place in the network and stay behind. Keys that are those of an `nn.Sequential` of the network's children
("backbone.0.weight", "backbone.4.0.conv1.weight") are understood too, and where names differ altogether timm's own
`checkpoint_filter_fn` of the architecture is asked. Positions are resampled, and nothing in a file is executed.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from common.backbones import DESCRIPTION, WEIGHTS, read_description
from common.checkpoint import non_finite, read_tensors, tensors_in
from common.errors import UserError
from common.files import one_line, sha256

HUB = "hf-hub:"
PART = "::"
FILES = (WEIGHTS, "model.safetensors", "pytorch_model.bin")
"""What a folder or a repository of the hub is searched for: an export of ours, or timm's layout."""
KINDS = "a run directory, a .safetensors or .pth file, a timm name, or hf-hub:org/name"

# Of several copies of one network in a file, the one its authors evaluate: DINO's teacher, MoCo's query encoder, BYOL's
# online network, I-JEPA's target encoder.
_FIRST = (r"teacher|online_\w+|encoder_q|base_encoder|\w+_ema", r"target_encoder")
_LAST = r"student|momentum_\w+|encoder_k"


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by dotted name, and where they are from."""

    name: str
    """Of the file or of the hub's repository; never a path."""
    sha256: str
    """Of the file."""
    tensors: Mapping[str, Tensor]
    part: str = ""
    """Which of several networks in the file was asked for, e.g. "student"."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """(mean, std) of the inputs they were trained on, where that is written down."""


@dataclass
class Filled:
    """What became of the tensors of a file and of those of a network."""

    weights: Weights
    prefix: str
    filled: int
    total: int
    share: float
    """Filled part of the network's numbers, 0 to 1."""
    resampled: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    """Tensors under the prefix that the network has no place for."""
    outside: int = 0
    """Tensors of the file that are not under the prefix."""
    missing: list[str] = field(default_factory=list)
    """Tensors of the network that keep their initial values."""
    others: list[str] = field(default_factory=list)
    """Tensors beside the network that were looked for."""
    with_others: bool = False

    def record(self) -> dict[str, Any]:
        """For config.json and the card; names are the first 20, "inputs" as they were normalized in training."""
        known = self.weights.statistics
        return {
            "name": self.weights.name,
            "sha256": self.weights.sha256,
            "prefix": self.prefix,
            "filled": self.filled,
            "total": self.total,
            "resampled": self.resampled[:20],
            "left_over": self.left_over[:20],
            "missing": self.missing[:20],
            **({"others_filled": self.with_others} if self.others else {}),
            **({"inputs": dict(zip(("mean", "std"), map(list, known), strict=True))} if known else {}),
        }

    def notice(self) -> str:
        """One line for people."""
        where = f" from {self.prefix}" if self.prefix else ""
        parts = [f"{self.filled} of the network's {self.total} tensors{where}"]
        if self.others:
            parts.append(f"beside it {'all' if self.with_others else 'none'} of {_first(self.others)}")
        if self.resampled:
            parts.append(f"resampled {_first(self.resampled)}")
        if self.missing:
            parts.append(f"NOT in the file, so random: {_first(self.missing)}")
        if self.left_over:
            parts.append(f"left over {_first(self.left_over)}")
        if self.outside:
            parts.append(f"{self.outside} tensors elsewhere in the file")
        warning = f"WARNING only {100 * self.share:.0f} % of the network is filled: " if self.share < 0.5 else ""
        return f"{warning}weights of {self.weights.name} (sha256 {self.weights.sha256[:12]}): {'; '.join(parts)}"


def _first(names: Sequence[str], count: int = 3) -> str:
    more = ", ..." if len(names) > count else ""
    return f"{len(names)} ({', '.join(names[:count])}{more})"


# ---- reading ---------------------------------------------------------------------------------------------------------


def weights_name(source: str) -> str:
    """`source` as a config records it: the last part of a path, or the hub's name."""
    return source if source.startswith(HUB) else Path(source).name


def read_weights(source: str, option: str = "--init-from") -> Weights:
    """The tensors that `source` names: `KINDS`, with "::PART" behind it for one of several networks in a file.

    Raises UserError, beginning with `option`, where there is nothing of that name, or the file is damaged or holds
    other things than tensors, numbers and text (nothing is unpickled but those and an argparse.Namespace).
    """
    where, _, part = source.partition(PART)
    path, name, statistics = _locate(where, option)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
        tensors = dict(tensors_in(content, classes=[argparse.Namespace]))
        digest = sha256(path)
    except Exception as error:  # safetensors, torch and the file system each have their own
        raise UserError(f"{option} {source} cannot be read as weights: {one_line(error)}") from error
    if not tensors:
        raise UserError(f"{option} {source} holds no weights: expected tensors by name, maybe within dicts")
    return Weights(name, digest, tensors, part, statistics)


def _unpickled(path: Path) -> Any:
    return read_tensors(path, classes=[argparse.Namespace])  # the official files of MAE and DINO carry their arguments


def _locate(source: str, option: str) -> tuple[Path, str, tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """(file, name, statistics of its inputs if known) of `source`, fetched from the hub where it is a name of it."""
    path = Path(source).expanduser()
    if not source.startswith(HUB) and path.exists():
        file = path
        if path.is_dir():
            file = next((path / name for name in FILES if (path / name).is_file()), path)
        if not file.is_file():
            raise UserError(
                f"{option} {source} has no {' or '.join(FILES)}: a run writes {WEIGHTS} when its training ends"
            )
        return file, path.resolve().name, _statistics(file)
    repository = source.removeprefix(HUB)
    if not source.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+", source) or not timm.is_model(source):
            raise UserError(f"{option} {source}: there is no such file; give {KINDS}")
        try:
            known = timm.get_pretrained_cfg(source)
        except RuntimeError:  # a network of timm, but no such tag
            known = None
        if known is None or not known.hf_hub_id:
            tags = timm.list_models(f"{source.split('.')[0]}.*", pretrained=True)
            tags = [tag for tag in tags if getattr(timm.get_pretrained_cfg(tag), "hf_hub_id", None)]
            have = f"it has {', '.join(tags)}" if tags else f"give {KINDS}"
            raise UserError(f"{option} {source}: timm has no such weights on the hub; {have}")
        repository = known.hf_hub_id
    file = _fetch(repository, source, option)
    return file, repository, _statistics(file)


def _fetch(repository: str, source: str, option: str) -> Path:
    from huggingface_hub import hf_hub_download

    reasons = []
    repository, _, revision = repository.partition("@")
    for name in FILES[1:]:
        try:
            file = Path(hf_hub_download(repository, name, revision=revision or None))
        except Exception as error:  # the hub's client and its HTTP library each have their own
            reasons.append(error)
            continue
        try:
            hf_hub_download(repository, "config.json", revision=revision or None)
        except Exception:  # it only says how inputs are normalized
            pass
        return file
    raise UserError(
        f"{option} {source}: no {' or '.join(FILES[1:])} of {repository} in reach of the Hugging Face hub or its cache "
        f"({one_line(reasons[0])}); without a network, download it elsewhere and pass the file"
    ) from reasons[0]


def _statistics(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of a description beside `file`: ours, or timm's config.json."""
    if file.name == WEIGHTS and (file.parent / DESCRIPTION).is_file():
        spec = read_description(file.parent / DESCRIPTION)
        return spec.mean, spec.std
    try:
        cfg = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
        mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else None


# ---- filling ---------------------------------------------------------------------------------------------------------


def fill(network: nn.Module, weights: Weights, others: Mapping[str, Tensor] | None = None, option: str = "") -> Filled:
    """Copy what fits of `weights` into `network`, in place.

    others: further tensors by the names that files have for them, such as a decoder's; filled where all of them are
    there in the right shapes, else left alone. Raises UserError where no weight fits, naming expected and found keys,
    where the part asked for is not there, or for numbers that are not finite; the network is then unchanged.
    """
    own, others = network.state_dict(), others or {}
    best: tuple[tuple[int, ...], str, dict[str, tuple[str, Tensor]]] | None = None
    for prefix, group in _groups(network, weights, option):
        for mapped in _readings(network, group):
            fits = sum(own[name].numel() for name, (_, tensor) in mapped.items() if _same(own.get(name), tensor))
            score = (fits, len(mapped.keys() & own.keys()), -_rank(prefix), -len(prefix))
            if best is None or score > best[0]:
                best = score, prefix, mapped
    if best is None or not any(
        _same(own.get(name), tensor) and tensor.ndim > 1 for name, (_, tensor) in best[2].items()
    ):
        raise UserError(_refusal(own, weights, best[2] if best else {}, option))
    _, prefix, mapped = best

    targets = {name: tensor for name, tensor in own.items() if _same(tensor, mapped.get(name, ("", None))[1])}
    group = _group(weights.tensors, prefix)
    grid = _grid(network)
    extra = {name: _positions(group[name], tensor, grid, name) for name, tensor in others.items() if name in group}
    complete = bool(others) and all(_same(tensor, extra.get(name)) for name, tensor in others.items())
    sources = {name: mapped[name] for name in targets}
    if complete:
        targets, sources = {**targets, **others}, {**sources, **{name: (name, extra[name]) for name in others}}
    if name := non_finite({name: tensor for name, (_, tensor) in sources.items()}):
        raise UserError(f"{option} {weights.name} cannot be used: {name} is not finite")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name][1])

    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    filled = [name for name in counted if name in targets]
    used = {original for original, _ in sources.values()}
    numbers = sum(own[name].numel() for name in counted)
    return Filled(
        weights,
        prefix,
        filled=len(filled),
        total=len(counted),
        share=sum(own[name].numel() for name in filled) / max(numbers, 1),
        resampled=[name for name, (key, t) in sources.items() if key in group and group[key].shape != t.shape],
        left_over=[key for key, _ in mapped.values() if key not in used and not key.endswith("num_batches_tracked")],
        outside=len(weights.tensors) - len(group),
        missing=[name for name in counted if name not in targets],
        others=list(others),
        with_others=complete,
    )


def _same(own: Tensor | None, found: Tensor | None) -> bool:
    """Whether `found` can be copied into `own`: equal shapes, both with or both without a fraction."""
    return (
        own is not None
        and found is not None
        and own.shape == found.shape
        and own.is_floating_point() == found.is_floating_point()
    )


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}." if prefix else ""
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _groups(network: nn.Module, weights: Weights, option: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(prefix, tensors under it) that may be the network's, the most promising ones.

    Those that end before most keys of the network, and those that most tensors of the file share.
    """
    wanted = {*network.state_dict(), *_sequential_names(network)}
    exact: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for name in weights.tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            prefix, rest = ".".join(parts[:i]), ".".join(parts[i:])
            exact[prefix] += rest in wanted
            if i <= 4:
                shared[prefix] += 1
    prefixes = [prefix for prefix, count in exact.most_common(12) if count]
    prefixes += [prefix for prefix, _ in shared.most_common(12) if prefix not in prefixes]
    if weights.part:
        prefixes = [prefix for prefix in exact if weights.part in prefix.split(".") and exact[prefix]]
        if not prefixes:
            tops = sorted({name.split(".")[0] for name in weights.tensors})
            raise UserError(
                f"{option} {weights.name}{PART}{weights.part}: the file has no such part with this network's keys; "
                f"its parts are {', '.join(tops[:12])}{' ...' if len(tops) > 12 else ''}"
            )
    for prefix in prefixes:
        yield prefix, _group(weights.tensors, prefix)


def _rank(prefix: str) -> int:
    """Which of equal copies of a network comes first; see `_FIRST`."""
    for rank, pattern in enumerate(_FIRST):
        if re.search(rf"(^|\.)({pattern})(\.|$)", prefix):
            return rank
    return len(_FIRST) + bool(re.search(rf"(^|\.)({_LAST})(\.|$)", prefix))


def _sequential_names(network: nn.Module) -> dict[str, str]:
    """Keys of the network's children in an `nn.Sequential`, as "4.0.conv1.weight": the network's own keys."""
    number = {name: str(i) for i, (name, _) in enumerate(network.named_children())}
    own = {name: name.split(".", 1) for name in network.state_dict() if "." in name}
    return {f"{number[child]}.{rest}": name for name, (child, rest) in own.items() if child in number}


def _readings(network: nn.Module, group: Mapping[str, Tensor]) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """What `group` may mean: name in the network -> (name in the group, tensor with positions resampled)."""
    own, grid, sequential = network.state_dict(), _grid(network), _sequential_names(network)

    def fitted(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, tuple[str, Tensor]]:
        found = {names.get(key, key): (key, tensor) for key, tensor in tensors.items()}
        return {
            name: (key, _positions(tensor, own[name], grid, name) if name in own else tensor)
            for name, (key, tensor) in found.items()
        }

    plain = fitted(group, {})
    yield plain
    if sequential.keys() & group.keys():
        yield fitted(group, sequential)
    if all(_same(tensor, plain.get(name, ("", None))[1]) for name, tensor in own.items()):
        return
    module = sys.modules.get(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if convert is None or not type(network).__module__.startswith("timm."):
        return
    for tensors in (group, {name: tensor for name, (_, tensor) in plain.items()}):
        try:
            converted = convert(dict(tensors), network)
        except Exception:  # written for its own layouts, it may raise anything for others
            continue
        yield fitted({k: v for k, v in converted.items() if isinstance(v, Tensor)}, {})
        return


def _grid(network: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    return tuple(size) if size is not None else None


def _positions(found: Tensor, own: Tensor, grid: tuple[int, int] | None, name: str) -> Tensor:
    """`found` for the place of `own`: positions [1, tokens, D] of another grid or with other class tokens are adapted.

    Tokens before the patches (class, registers) keep theirs as far as both have them.
    """
    if not name.endswith("pos_embed") or grid is None or found.ndim != 3 or found.shape == own.shape:
        return found
    side = math.isqrt(found.shape[1])
    before, prefix = found.shape[1] - side**2, own.shape[1] - grid[0] * grid[1]
    if before > 16 or prefix < 0 or found.shape[2] != own.shape[2]:
        return found
    patches = resample_abs_pos_embed(found[:, before:], list(grid), [side, side], num_prefix_tokens=0)
    tokens = own[:, :prefix].clone()
    kept = min(prefix, before)
    tokens[:, :kept] = found[:, :kept]
    return torch.cat([tokens.to(patches.dtype), patches], 1)


def _refusal(own: Mapping[str, Tensor], weights: Weights, mapped: Mapping[str, tuple[str, Tensor]], option: str) -> str:
    def shown(tensors: Mapping[str, Tensor]) -> str:
        chosen = [(name, tuple(t.shape)) for name, t in tensors.items() if t.ndim > 1][:3]
        return ", ".join(f"{name} {shape}" for name, shape in chosen) or "no matrix at all"

    common = {key: tensor for name, (key, tensor) in mapped.items() if name in own}
    return (
        f"{option} {weights.name}: nothing in it fits this network. Expected {shown(own)} ...; found "
        f"{shown(common) if any(t.ndim > 1 for t in common.values()) else shown(weights.tensors)} ...: choose the "
        "--backbone, and its sizes, that these weights belong to"
    )
