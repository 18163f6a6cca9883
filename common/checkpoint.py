"""Checkpoints that are complete or absent: written aside, synced, renamed; the last K kept; damaged ones skipped."""

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import TEXT, check_fields, integer, one_line, read_json

STATE, MANIFEST = "state.pt", "manifest.json"
MANIFEST_FIELDS = {"step": integer(0, 1 << 62), "bytes": integer(0, 1 << 62), "blake2b": TEXT}


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def save(directory: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, strings, nested dicts and lists) as checkpoint `step` and drop old ones.

    A kill at any moment leaves the older checkpoints and at most one hidden folder, which the next save removes.
    keep: checkpoints that remain, at least 1. Raises UserError, with the last good checkpoint named, when the disk is
    full or cannot be written.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the new checkpoint must remain")
    final, writing = path_of(directory, step), directory / f".writing-{step:08d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".writing-*"):
            shutil.rmtree(leftover)
        writing.mkdir()
        torch.save(state, writing / STATE)
        digest, size = _digest(writing / STATE)
        (writing / MANIFEST).write_text(json.dumps({"step": step, "bytes": size, "blake2b": digest}), encoding="utf-8")
        for path in (writing / STATE, writing / MANIFEST, writing):
            _sync(path)
        if final.exists():  # a rerun from an older checkpoint reaches this step again: its state is the same
            shutil.rmtree(final)
        writing.rename(final)
        _sync(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(writing, ignore_errors=True)
        raise UserError(
            f"could not save the checkpoint of step {step} to {directory} ({one_line(error)}); "
            f"the last good checkpoint: {last_good(directory)}. Is the disk full? Free some space and start the same "
            "command again: it continues from there."
        ) from error
    for old in steps(directory)[:-keep]:
        shutil.rmtree(path_of(directory, old), ignore_errors=True)
    return final


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, oldest first. Folders of other names, such as copies, are left alone."""
    names = [path.name for path in directory.glob("step-*") if path.is_dir()]
    found = [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{8,18}", name)]
    return sorted(step for step in found if path_of(directory, step).name in names)


def last_good(directory: Path) -> str:
    """The newest checkpoint for an error message, or "none yet"."""
    found = steps(directory)
    return str(path_of(directory, found[-1])) if found else "none yet"


def load_newest(directory: Path, log: Callable[[str], None] = print) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is complete and finite, or None where there is none.

    Each checkpoint that cannot be used is named through `log`. Raises UserError if there are some, all of this kind:
    starting from scratch must be the user's decision.
    """
    found = steps(directory)
    for step in reversed(found):
        path = path_of(directory, step)
        try:
            return step, _load(path, step)
        except (OSError, ValueError, UserError) as error:
            older = "falling back to the one before" if step != found[0] else "there is none before it"
            log(f"checkpoint {path} cannot be used ({error}): {older}")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {directory} can be used: remove this folder to train from the "
            "first step again, or start a new directory with --resume never"
        )
    return None


def load(directory: Path, step: int) -> dict[str, Any]:
    """The state of checkpoint `step`. Raises OSError, ValueError or UserError where it is not whole or not finite."""
    return _load(path_of(directory, step), step)


def digest_of(directory: Path, step: int) -> str:
    """The checksum of checkpoint `step`."""
    return _manifest(path_of(directory, step))["blake2b"]


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST, limit=1 << 16)
    check_fields(manifest, MANIFEST_FIELDS, MANIFEST, required=MANIFEST_FIELDS)
    return manifest


def _load(path: Path, step: int) -> dict[str, Any]:
    manifest = _manifest(path)
    if manifest["step"] != step:
        raise ValueError(f"its manifest is of step {manifest['step']}")
    digest, size = _digest(path / STATE)
    if size != manifest["bytes"]:
        raise ValueError(f"{STATE} has {size} bytes of {manifest['bytes']}")
    if digest != manifest["blake2b"]:
        raise ValueError(f"{STATE} does not match its checksum")
    state = read_tensors(path / STATE)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds a {type(state).__name__}, not a dict")
    if name := non_finite(state):
        raise ValueError(f"{name} is not finite")
    return state


def non_finite(state: Any) -> str | None:
    """Name of the first tensor in nested dicts and lists that holds NaN or an infinity, e.g. "model.fc.weight"."""
    named = [(name, tensor) for name, tensor in tensors_in(state) if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return None
    device = named[0][1].device
    finite = torch.stack([tensor.isfinite().all().to(device) for _, tensor in named]).tolist()  # one host sync for all
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


# ---- files of torch.save ---------------------------------------------------------------------------------------------


def read_tensors(path: Path, *, classes: Sequence[type] = ()) -> Any:
    """The content of a file that torch.save wrote, on the CPU: tensors, numbers, text, dicts and lists.

    Nothing in the file is called; instances of the given `classes` may occur in it. Raises ValueError with a short
    reason for anything else, and for a file that would unpack to more than its own size.
    """
    if _unpacked_size(path) > path.stat().st_size:
        raise ValueError("it unpacks to more than its own size")
    try:
        with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual files, which are refused or read
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if named := re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"it refers to {named[1]}, which is code and not data") from error
        if "weights_only" in str(error):  # torch's text would suggest to run the file
            raise ValueError("it holds other things than tensors, numbers, text, dicts and lists") from error
        raise ValueError(f"it is damaged, or torch.save did not write it ({one_line(error)})") from error
    for name, tensor in tensors_in(content, classes=classes):
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise ValueError(f"{name or 'it'} is not a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name or 'it'} is larger than its data")
    return content


def tensors_in(
    content: Any, name: str = "", *, classes: Sequence[type] = (), depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for all tensors in nested dicts and lists; a name joins keys and positions by dots.

    Raises ValueError for other objects than numbers, text and None, or instances of `classes`, and for nesting deeper
    than 32.
    """
    if depth > 32:
        raise ValueError("it is nested too deeply")
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key), classes=classes, depth=depth + 1)
    elif content is not None and not isinstance(content, (str, int, float, *classes)):
        raise ValueError(f"{name or 'it'} is a {type(content).__name__}")


def _unpacked_size(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return 0  # the format before torch 1.6, or damage that torch.load will name


def _digest(path: Path) -> tuple[str, int]:
    digest, size = blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs neither folders nor files that are open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
