"""Where images and recordings lie: folders, parquet files, the Hugging Face hub; columns, labels and splits in them.

Nothing is decoded here: a source gives the encoded bytes of a row.
"""

import bisect
import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "stl10": "jxie/stl10",  # unlike most copies it has the 100,000 images of the split "unlabeled"
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
GENERATED = ("shapes", "shapes-textured")
OFFLINE = "`--data shapes` (drawn, needs no file), an image folder, or a directory of parquet files"

_TEST_SPLITS = ("test", "validation", "val", "valid")
_IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "picture", "pixel_values")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y")
_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


# ---- specs -----------------------------------------------------------------------------------------------------------


def is_path(spec: str) -> bool:
    """Decided before the hub is asked: an unreachable hub takes 23 s to fail. Known names win over folders in sight."""
    if spec in HUB_NAMES:
        return False
    if spec.startswith(("/", ".", "~")) or spec.endswith("/") or Path(spec).exists():
        return True
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec):
        return False
    if "/" in spec:
        return True
    known = [*GENERATED, *HUB_NAMES]
    near = difflib.get_close_matches(spec, known, n=1)
    raise UserError(
        f"--data {spec}: no such data{f' (did you mean {near[0]}?)' if near else ''}; give one of {listed(known)}, "
        "org/name of a data set on the Hugging Face hub, or the path of a folder"
    )


# ---- Hugging Face datasets: the hub and parquet files ----------------------------------------------------------------


def load_hub(spec: str, log: Callable[[str], None], split: str | None = None, offline: str = OFFLINE) -> Any:
    """All splits of a data set of the hub, or one; `offline`: what works without a network, for the error."""
    import datasets  # takes 1.5 s, which shapes and folders need not pay

    hub_id, _, configuration = HUB_NAMES.get(spec, spec).partition(":")
    log(f"looking for {hub_id} on the Hugging Face hub (without a network this gives up after about 25 s) ...")
    try:
        return datasets.load_dataset(hub_id, configuration or None, split=split)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each raise their own kinds
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            hint = "check the name; a gated data set needs its terms accepted on the hub and `hf auth login`"
        elif isinstance(error, ValueError) and "onfig" in str(error):
            hint = f"choose a configuration as {hub_id}:NAME ({' '.join(str(error).split())})"
        else:
            hint = f"without a network these work: {offline}"
        wanted = f"split {split!r} of {hub_id}" if split else hub_id
        raise UserError(f"--data {spec}: cannot load {wanted} from the Hugging Face hub ({reason}); {hint}") from error


def parquet_files(path: Path) -> dict[str, list[str]]:
    """Split name -> sorted files: of the folder, or its data/, or its one subfolder, or one subfolder a split."""
    subfolders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("*.parquet")):
            return _by_split(files, [_split_of_file(file) for file in files])
    groups = {folder: files for folder in subfolders if (files := sorted(folder.glob("*.parquet")))}
    if not groups:
        return {}
    if all(folder.name == "train" or folder.name in _TEST_SPLITS for folder in groups):
        files = [file for group in groups.values() for file in group]
        return _by_split(files, [file.parent.name for file in files])
    if len(groups) > 1:
        raise UserError(f"{path} holds parquet files in {len(groups)} folders: give one of {listed(groups)}")
    files = next(iter(groups.values()))
    return _by_split(files, [_split_of_file(file) for file in files])


def _split_of_file(file: Path) -> str:
    """train-00000-of-00003.parquet -> train; a file whose name says nothing is taken for training data."""
    word = re.split(r"[-_.]", file.name)[0].lower()
    return word if word and not word.isdigit() and word != "part" else "train"


def _by_split(files: Sequence[Path], names: Sequence[str]) -> dict[str, list[str]]:
    return {name: [str(f) for f, n in zip(files, names, strict=True) if n == name] for name in dict.fromkeys(names)}


def load_parquet(path: Path, files: dict[str, list[str]]) -> Any:
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # an unreadable file, differing columns, a full disk: each its own kind
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"cannot read the parquet files in {path}: {reason}") from error


def open_table(
    data: Any, spec: str, split: str, image_column: str | None, label_column: str | None, log: Callable[[str], None]
) -> tuple["Rows", Tensor | None, list[str] | None, str | None, Tensor]:
    """Source, labels of all its rows, class names, label column and chosen rows, from a `datasets.DatasetDict`."""
    features = next(iter(data.values())).features
    image_column = _find_image_column(features, spec, image_column)
    label_column = _find_label_column(features, spec, label_column)

    def has_labels(name: str) -> bool:
        return label_column is None or bool((read_labels(data, name, label_column)[0] >= 0).any())

    chosen, part = choose_split({name: len(data[name]) for name in data}, spec, split, has_labels, log)
    labels = class_names = None
    if label_column is not None:
        labels, class_names = read_labels(data, chosen, label_column)
    source = Rows(arrow_column(data[chosen], image_column), chosen, spec)
    return source, labels, class_names, label_column, held_out(len(source), part)


def arrow_column(dataset: Any, name: str) -> Any:
    """An arrow ChunkedArray, not copied and not decoded."""
    return dataset.select_columns(name).with_format("arrow")[:].column(name)


def _find_image_column(features: Any, spec: str, named: str | None) -> str:
    import datasets

    arrow = features.arrow_schema
    if named is not None:
        if named not in features:
            raise UserError(f"--image-column {named}: {spec} has no such column; it has {listed(features)}")
        kind = arrow.field(named).type
        if not is_encoded(kind):
            raise UserError(f"--image-column {named}: this column of {spec} holds {kind}, not encoded images")
        return named
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        found = [field.name for field in arrow if field.name.lower() in _IMAGE_NAMES and is_encoded(field.type)]
    preferred = [name for name in _IMAGE_NAMES if name in found]
    if len(found) == 1 or preferred:
        return (preferred or found)[0]
    problem = f"several columns hold images ({listed(found)})" if found else "no column holds images"
    raise UserError(f"--data {spec}: {problem}; its columns are {listed(features)}; name one with --image-column")


def is_encoded(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or _has_bytes(kind)


def _has_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))


def _find_label_column(features: Any, spec: str, named: str | None) -> str | None:
    import datasets
    from pyarrow import types

    arrow = features.arrow_schema
    usable = [f.name for f in arrow if types.is_integer(f.type) or types.is_boolean(f.type) or types.is_string(f.type)]
    if named is not None:
        if named not in features:
            raise UserError(f"--label-column {named}: {spec} has no such column; it has {listed(features)}")
        if named not in usable:
            kind = arrow.field(named).type
            raise UserError(f"--label-column {named}: this column of {spec} holds {kind}, not integers or strings")
        return named
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    preferred = [name for name in _LABEL_NAMES if name in found] or [name for name in _LABEL_NAMES if name in usable]
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    if found:
        raise UserError(f"--data {spec}: several columns hold classes ({listed(found)}); name one with --label-column")
    return None


def read_labels(data: Any, split: str, column: str) -> tuple[Tensor, list[str] | None]:
    """Labels of a split. Strings are numbered in the order of all splits' sorted values, so that splits agree."""
    import datasets
    import pyarrow.compute as pc

    values = arrow_column(data[split], column)
    feature = data[split].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return torch.tensor(pc.fill_null(values, -1).to_numpy()), list(feature.names)
    if values.type in ("string", "large_string"):
        present = {value for name in data for value in pc.unique(arrow_column(data[name], column)).to_pylist()}
        names = sorted(present - {None})
        number = {name: i for i, name in enumerate(names)}
        return torch.tensor([number.get(value, -1) for value in values.to_pylist()]), names
    return torch.tensor(pc.fill_null(values.cast("int64"), -1).to_numpy()), None


# ---- image folders ---------------------------------------------------------------------------------------------------


@dataclass
class Folder:
    """Splits of an image folder: name -> (its directory, paths in it and their class or None)."""

    splits: dict[str, tuple[Path, list[tuple[str, str | None]]]]

    def open(
        self, spec: str, split: str, label_column: str | None, log: Callable[[str], None]
    ) -> tuple["Files", Tensor | None, list[str] | None, str | None, Tensor]:
        if label_column is not None:
            raise UserError(f"--label-column {label_column}: {spec} is an image folder; its labels are its subfolders")
        sizes = {name: len(images) for name, (_, images) in self.splits.items()}
        labelled = {name: any(c is not None for _, c in images) for name, (_, images) in self.splits.items()}
        chosen, part = choose_split(sizes, spec, split, lambda name: labelled[name], log)
        folder, images = self.splits[chosen]
        labels = names = None
        if labelled[chosen]:
            # Both splits' classes, so that a class keeps its number where a split lacks another.
            names = sorted({c for _, split_images in self.splits.values() for _, c in split_images if c is not None})
            number = {name: i for i, name in enumerate(names)}
            labels = torch.tensor([number[c] if c is not None else -1 for _, c in images])
        source = Files(folder, [path for path, _ in images])
        return source, labels, names, "folder" if labels is not None else None, held_out(len(images), part)


def scan_folder(path: Path) -> Folder:
    present = {p.name.lower(): p for p in path.iterdir() if p.is_dir()}
    names = [name for name in ("train", *_TEST_SPLITS) if name in present]
    directories = {name: present[name] for name in names} or {"train": path}
    splits = {name: (directory, _scan_images(directory)) for name, directory in directories.items()}
    splits = {name: (directory, images) for name, (directory, images) in splits.items() if images}
    if not splits:
        raise UserError(
            f"{path}: no images ({', '.join(sorted(_SUFFIXES))}) and no parquet files found; expected images, one "
            "subfolder a class, or train/ and test/ with either"
        )
    return Folder(splits)


def _scan_images(directory: Path) -> list[tuple[str, str | None]]:
    """Sorted (path relative to the directory, class). Images beside the subfolders mean that these are no classes."""
    found: list[tuple[str, str | None]] = []
    for where, folders, files in os.walk(directory, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(where).relative_to(directory)
        top = relative.parts[0] if relative.parts else None
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in _SUFFIXES and not file.startswith("."):
                found.append((os.path.join(*relative.parts, file), top))
    if any(top is None for _, top in found):
        return [(path, None) for path, _ in found]
    return found


# ---- splits ----------------------------------------------------------------------------------------------------------


def choose_split(
    sizes: dict[str, int], spec: str, split: str, has_labels: Callable[[str], bool], log: Callable[[str], None]
) -> tuple[str, str | None]:
    """The split to read, and which part of it: None (all), "train" or "test" where a test set is held out."""
    if split not in ("train", "test"):
        if split not in sizes:
            raise UserError(f"--data {spec}: no split {split!r}; it has {listed(sizes)}")
        return split, None
    tests = [name for name in _TEST_SPLITS if name in sizes]
    test = next((name for name in tests if has_labels(name)), tests[0] if tests else None)
    if split == "test" and test is not None:
        if test != "test":
            log(f"{spec}: the split {test!r} serves as test")
        return test, None
    train = "train" if "train" in sizes else next(iter(sizes)) if len(sizes) == 1 and not tests else None
    if train is None:
        raise UserError(f"--data {spec}: no split 'train'; it has {listed(sizes)}")
    if test is not None:
        return train, None
    if sizes[train] < 2:
        raise UserError(f"--data {spec}: one image cannot be parted into train and test")
    log(f"{spec}: no test split; a tenth of {train!r}, chosen by a fixed seed, is held out as test")
    return train, split


def held_out(n: int, part: str | None) -> Tensor:
    """Rows of a part, ascending; the two parts are disjoint and together everything."""
    if part is None:
        return torch.arange(n)
    order = torch.randperm(n, generator=generator("held out", n))
    tenth = max(1, n // 10)
    return (order[:tenth] if part == "test" else order[tenth:]).sort().values


# ---- encoded bytes ---------------------------------------------------------------------------------------------------


class Files:
    """Image files under one directory."""

    def __init__(self, directory: Path, paths: list[str]) -> None:
        self.directory, self.paths = directory, paths

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, row: int) -> bytearray:
        return bytearray((self.directory / self.paths[row]).read_bytes())

    def where(self, row: int) -> str:
        return str(self.directory / self.paths[row])

    def sizes(self, rows: Tensor) -> np.ndarray:
        return np.array([os.path.getsize(os.path.join(self.directory, self.paths[i])) for i in rows.tolist()], "<i8")


class Rows:
    """A column of encoded images: binary, or structs of bytes and path, memory-mapped and never copied as a whole."""

    def __init__(self, column: Any, split: str, spec: str) -> None:
        self.split, self.spec, self.count = split, spec, len(column)
        self.chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.starts = np.cumsum([0, *map(len, self.chunks)])[:-1].tolist()
        self.bytes = [chunk.field("bytes") if _has_bytes(column.type) else chunk for chunk in self.chunks]

    def __len__(self) -> int:
        return self.count

    def encoded(self, row: int) -> bytearray:
        chunk = bisect.bisect_right(self.starts, row) - 1
        place = row - self.starts[chunk]
        value = self.bytes[chunk][place]
        if value.is_valid:
            return bytearray(value.as_buffer())
        whole = self.chunks[chunk][place].as_py()
        path = whole.get("path") if isinstance(whole, dict) else None
        if not path:
            raise ValueError(f"{self.where(row)} is empty")
        return bytearray(Path(path).read_bytes())  # data sets saved without embedding their files

    def where(self, row: int) -> str:
        return f"row {row} of split {self.split!r} of {self.spec}"

    def sizes(self, rows: Tensor) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        lengths = pa.chunked_array([pc.fill_null(pc.binary_length(chunk), 0).cast("int64") for chunk in self.bytes])
        return lengths.to_numpy()[rows.numpy()].astype("<i8")


# ---- small parts -----------------------------------------------------------------------------------------------------


def content_hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)  # lengths keep neighbours from running into each other
    return digest.hexdigest()


def spread(n: int, count: int) -> list[int]:
    """At most `count` evenly spaced numbers below n."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


def listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)
