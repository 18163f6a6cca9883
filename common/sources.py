"""Where images and recordings lie: folders, parquet files, the Hugging Face hub; columns, labels and splits in them.

Nothing is decoded here: a source gives the encoded bytes of a row.
"""

import bisect
import difflib
import hashlib
import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import shown
from common.rng import generator

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "stl10": "jxie/stl10",  # unlike most copies it has the 100,000 images of the split "unlabeled"
    "imagenet-1k": "ILSVRC/imagenet-1k",
}


@dataclass(frozen=True)
class Known:
    """A data set of known size: images by split, all labeled but those of "unlabeled", and their shorter side in
    pixels."""

    images: Mapping[str, int]
    side: int
    classes: int


_IMAGENETTE = {"train": 9_469, "test": 3_925}  # github.com/fastai/imagenette; "test": its validation images
KNOWN = {
    "cifar10": Known({"train": 50_000, "test": 10_000}, 32, 10),  # Krizhevsky 2009
    "cifar100": Known({"train": 50_000, "test": 10_000}, 32, 100),
    "stl10": Known({"train": 5_000, "test": 8_000, "unlabeled": 100_000}, 96, 10),  # Coates et al. 2011
    "frgfm/imagenette:160px": Known(_IMAGENETTE, 160, 10),
    "frgfm/imagenette:320px": Known(_IMAGENETTE, 320, 10),
    # Russakovsky et al. 2015, Table 2; "test": its validation images, whose most frequent size is 500 x 375
    "imagenet-1k": Known({"train": 1_281_167, "test": 50_000}, 375, 1000),
}
"""What a plan knows of data that it does not open."""
GENERATED = ("pairs", "shapes", "shapes-textured")
OFFLINE = "`--data pairs` (rendered, needs no file), an image folder, or a directory of parquet files"

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words that name it, as in `datasets.data_files.SPLIT_KEYWORDS`."""
_SPLIT_WORD = re.compile(
    rf"(?:^|[-._ 0-9])({'|'.join(w for words in SPLIT_WORDS.values() for w in words)})(?=$|[-._ 0-9])"
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5,}.*\.parquet")  # how the hub names files: any word is a split there
_UNLABELED = ("unlabeled", "unlabelled", "unsupervised", "extra")  # folders that are no class beside train/
_IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "picture", "pixel_values")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y")
_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST_FILE = 1 << 30  # bytes of one encoded image or recording


# ---- splits by name --------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that the name of a file, folder or split says, by the rule of the `datasets` library: one of
    `SPLIT_WORDS` between the name's ends, dots, dashes, spaces, underscores and digits; case does not matter here."""
    found = _SPLIT_WORD.search(name.lower())
    return None if found is None else next(split for split, words in SPLIT_WORDS.items() if found[1] in words)


# ---- specs -----------------------------------------------------------------------------------------------------------


def is_path(spec: str) -> bool:
    """Decided before the hub is contacted, which takes 23 s to fail if unreachable. Known names win over folders."""
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
    """Split name -> sorted files: of the folder, or its data/, or of one subfolder, or of one subfolder a split.

    A file's split is the word before -00000-of-00001, otherwise what its folder's or its own name says (`split_of`). Of
    the others, all are training data if no name says a split; else each first word is a split of its own. Raises
    UserError for files in several folders that are no splits, and for what is no regular file.
    """
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("*.parquet")):
            return _by_split(files, path)
    subfolders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    groups = {folder: files for folder in subfolders if (files := sorted(folder.glob("*.parquet")))}
    if not groups:
        return {}
    if len(groups) > 1 and not all(split_of(folder.name) for folder in groups):
        raise UserError(f"{path} holds parquet files in {len(groups)} folders: give one of {listed(groups)}")
    return _by_split([file for group in groups.values() for file in group], path)


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[str]]:
    named: dict[Path, str | None] = {}
    for file in files:
        check_regular(file)
        shard = _SHARD.fullmatch(file.name)
        said = split_of(file.parent.name) if file.parent != root else None
        named[file] = said or (shard[1].lower() if shard else split_of(file.name))
    if any(named.values()):  # the others stand beside them: unlabeled.parquet
        named = {file: name or re.split(r"[-_.]", file.name)[0].lower() for file, name in named.items()}
    splits = [name or "train" for name in named.values()]
    return {
        split: [str(f) for f, s in zip(named, splits, strict=True) if s == split] for split in dict.fromkeys(splits)
    }


def load_parquet(path: Path, files: dict[str, list[str]]) -> dict[str, Any]:
    """Split -> `datasets.Dataset`, each read by itself, so that each keeps the names of its classes.

    Raises UserError for files that cannot be read, and for two of a split that number their classes differently.
    """
    import datasets

    try:
        for parts in files.values():
            _same_classes(parts)
        return {
            split: datasets.load_dataset("parquet", data_files={split: parts}, split=split)
            for split, parts in files.items()
        }
    except UserError:
        raise
    except Exception as error:  # an unreadable file, differing columns, a full disk: each its own kind
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        place = cause.filename if isinstance(cause, OSError) else None
        if place and not Path(str(place)).is_relative_to(path):
            reason += ". The datasets library writes a copy to its cache: set HF_HOME to a folder that can be written"
        raise UserError(f"cannot read the parquet files in {path}: {reason}") from error


def _same_classes(files: Sequence[str]) -> None:
    import datasets
    import pyarrow.parquet as pq

    seen: dict[str, tuple[list[str], str]] = {}
    for file in files if len(files) > 1 else ():
        for column, feature in datasets.Features.from_arrow_schema(pq.read_schema(file)).items():
            if isinstance(feature, datasets.ClassLabel):
                names, first = seen.setdefault(column, (feature.names, file))
                if names != feature.names:
                    raise UserError(
                        f"{file} numbers the classes of its column {column!r} otherwise than {first}, and both are of "
                        "one split: write them with the same names, or store the labels as text"
                    )


def open_table(
    data: Mapping[str, Any],
    spec: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    hold_out: "HoldOut",
    log: Callable[[str], None],
    beside: Collection[str] = (),
) -> tuple["Rows", Tensor | None, list[str] | None, str | None, Tensor]:
    """Source, labels of all its rows, class names, label column and chosen rows, from splits of `datasets.Dataset`."""
    named = label_column is not None
    label_column = _find_label_column(data, spec, label_column, log)
    labels: dict[str, Tensor] = {}
    class_names: list[str] | None = None
    if label_column is not None:
        try:
            labels, class_names = number_labels(data, label_column, spec)
        except UserError as error:
            if named:
                raise
            log(f"{spec}: the column {label_column!r} is not read as labels: {error}")
    labeled = {name for name, found in labels.items() if bool((found >= 0).any())}
    chosen, part = choose_split({name: len(data[name]) for name in data}, labeled, spec, split, hold_out, log, beside)
    column = _find_image_column(data[chosen].features, spec, image_column)
    folder = Path(spec).expanduser().resolve() if is_path(spec) else None
    source = Rows(arrow_column(data[chosen], column), chosen, spec, folder)
    if chosen not in labels:
        class_names = label_column = None
    return source, labels.get(chosen), class_names, label_column, held_out(len(source), part)


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
    preferred = _preferred(found, _IMAGE_NAMES)
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


def _preferred(found: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns with one of `names`, in the order of these; case does not matter."""
    return [column for name in names for column in found if column.lower() == name]


def _find_label_column(data: Mapping[str, Any], spec: str, named: str | None, log: Callable[[str], None]) -> str | None:
    import datasets

    features: dict[str, Any] = {}
    for name in sorted(data, key=lambda name: name != "train"):
        features = {**data[name].features, **features}
    types = {field.name: field.type for name in data for field in data[name].features.arrow_schema}
    if named is not None:
        if named not in features:
            raise UserError(f"--label-column {named}: {spec} has no such column; it has {listed(features)}")
        if not _holds_classes(types[named]):
            raise UserError(
                f"--label-column {named}: this column of {spec} holds {types[named]}, not integers or strings"
            )
        return named
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usable = [name for name, kind in types.items() if _holds_classes(kind)]
    preferred = _preferred(found, _LABEL_NAMES) or _preferred(usable, _LABEL_NAMES)
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    if found:
        raise UserError(f"--data {spec}: several columns hold classes ({listed(found)}); name one with --label-column")
    for name in _preferred(features, _LABEL_NAMES):
        log(f"{spec}: the column {name!r} holds {types[name]}, which are no classes: it is not read")
    return None


def _holds_classes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    numbers = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return numbers or texts or types.is_binary(kind) or types.is_large_binary(kind)


def number_labels(data: Mapping[str, Any], column: str, spec: str) -> tuple[dict[str, Tensor], list[str]]:
    """(split -> labels, long [N] each, -1 where a row has none; class names): classes are compared by name.

    A ClassLabel's classes have its names, numbers and texts are their own. All splits share one list: of ClassLabels,
    the first split's (train's, if there is one) and what others add; else in the order of numbers or texts. A label
    that is empty, null, NaN or negative is none. Splits without the column are left out. Raises UserError for a
    ClassLabel beyond its names, and for numbers that are not whole.
    """
    import datasets

    read, lists = {}, []
    for name in sorted(data, key=lambda name: name != "train"):
        if column in data[name].features:
            read[name] = codes, names = _local_labels(data[name], column, f"the split {name!r} of {spec}")
            if isinstance(data[name].features[column], datasets.ClassLabel):
                lists += names
    present = {name for _, names in read.values() for name in names}
    numeric = all(re.fullmatch(r"\d+", name) for name in present)
    classes = list(dict.fromkeys(lists))
    if classes and not numeric:  # of a split that was written without the names, numbers are their places
        for split, (codes, names) in read.items():
            if names and all(re.fullmatch(r"\d+", n) and int(n) < len(classes) and n not in classes for n in names):
                read[split] = codes, [classes[int(n)] for n in names]
        present = {name for _, names in read.values() for name in names}
    classes += sorted(present - set(classes), key=(lambda name: (int(name), name)) if numeric else None)
    number = {name: i for i, name in enumerate(classes)}
    labels = {}
    for split, (codes, names) in read.items():
        labels[split] = torch.tensor([*(number[name] for name in names), -1])[codes]  # the code -1 is the last one
    return labels, classes


def _local_labels(dataset: Any, column: str, where: str) -> tuple[Tensor, list[str]]:
    """(codes, long [N], -1 for none; the class names of the codes) of one split."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    values, feature = arrow_column(dataset, column), dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        codes = torch.tensor(pc.fill_null(values, -1).to_numpy()).clamp_(min=-1)
        if len(codes) and int(codes.max()) >= len(feature.names):
            row = int(codes.argmax())
            raise UserError(
                f"row {row} of {where} has the class {int(codes[row])} in its column {column!r}, which has names for "
                f"{len(feature.names)} classes"
            )
        return codes, list(feature.names)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())
    unique = pc.unique(values).drop_null()
    names, keep = [], []
    for i, value in enumerate(unique.to_pylist()):
        if (name := _class_name(value, column, where)) is not None:
            names.append(name)
            keep.append(i)
    places = pc.index_in(values, value_set=unique.take(pa.array(keep, pa.int64())))
    return torch.tensor(pc.fill_null(places, -1).to_numpy(), dtype=torch.long), names


def _class_name(value: Any, column: str, where: str) -> str | None:
    """What a class is called by its value, None for a value that says there is no class."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(f"the column {column!r} of {where} holds bytes that are no text: {shown(value)}") from None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise UserError(
                f"the column {column!r} of {where} holds numbers such as {value:g}, which are no classes: name another "
                "with --label-column"
            )
        value = int(value)
    if isinstance(value, str):
        return value or None
    return None if value < 0 else str(value)


def read_labels(data: Mapping[str, Any], split: str, column: str) -> Tensor:
    """Labels of one split, long [N], for splits that are not opened together: numbers are themselves, classes and
    texts are numbered (`number_labels`)."""
    labels, names = number_labels(data, column, column)
    if all(re.fullmatch(r"\d+", name) for name in names):
        return torch.tensor([*map(int, names), -1])[labels[split]]
    return labels[split]


# ---- image folders ---------------------------------------------------------------------------------------------------


@dataclass
class Folder:
    """Splits of an image folder: name -> paths below `root` and their class or None; what was decided, in `notes`."""

    root: Path
    splits: dict[str, list[tuple[str, str | None]]]
    notes: list[str]

    def open(
        self,
        spec: str,
        split: str,
        label_column: str | None,
        hold_out: "HoldOut",
        log: Callable[[str], None],
        beside: Collection[str] = (),
    ) -> tuple["Files", Tensor | None, list[str] | None, str | None, Tensor]:
        if label_column not in (None, "folder"):
            raise UserError(f"--label-column {label_column}: {spec} is an image folder; its labels are its subfolders")
        for note in self.notes:
            log(f"{spec}: {note}")
        sizes = {name: len(images) for name, images in self.splits.items()}
        labeled = {name for name, images in self.splits.items() if any(c is not None for _, c in images)}
        chosen, part = choose_split(sizes, labeled, spec, split, hold_out, log, beside)
        images = self.splits[chosen]
        labels = names = None
        if chosen in labeled:
            # All splits' classes, so that a class keeps its number where a split lacks another.
            names = sorted({c for split_images in self.splits.values() for _, c in split_images if c is not None})
            number = {name: i for i, name in enumerate(names)}
            labels = torch.tensor([number[c] if c is not None else -1 for _, c in images])
        source = Files(self.root, [path for path, _ in images], chosen)
        return source, labels, names, "folder" if labels is not None else None, held_out(len(images), part)


Parts = tuple[str, ...]  # of a path below the data's folder: subfolders, then the file
Placed = tuple[Parts, int]  # with the number of its first subfolders that are no classes


def scan_folder(path: Path) -> Folder:
    """The images below `path`, in splits and classes. Raises UserError if there are none, or one cannot be read."""
    notes: list[str] = []
    images = list(_walk(path, notes))
    if not images:
        raise UserError(
            f"{path}: no images ({', '.join(sorted(_SUFFIXES))}) and no parquet files found; expected images, one "
            "subfolder a class, or train/ and test/ with either"
        )
    splits = _in_splits(images, _wrapping(images, notes), notes)
    return Folder(path, {split: _in_classes(split, splits, notes) for split in splits}, notes)


def _walk(root: Path, notes: list[str]) -> Iterator[Parts]:
    """The images below `root`, sorted.

    Links are followed, but not to a folder above them, and below the second level, where classes may be links to
    others, each folder is read once in its class.
    """
    waiting: list[tuple[Parts, tuple[tuple[int, int], ...]]] = [((), ())]  # folders, and the identities of those above
    read: set[tuple[int, int]] = set()
    real, outside = os.path.join(os.path.realpath(root), ""), 0
    while waiting:
        where, above = waiting.pop()
        folder = os.path.join(root, *where)
        try:
            about = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
        identity = about.st_dev, about.st_ino
        if len(where) <= 2:
            read = set()
        if identity in above or identity in read:
            notes.append(f"{'/'.join(where)} is a link to a folder that is read already: it is not read again")
            continue
        read.add(identity)
        deeper = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                deeper.append(((*where, entry.name), (*above, identity)))
            elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES:
                if link or not entry.is_file(follow_symlinks=False):
                    check_regular(Path(entry.path))
                yield (*where, entry.name)
            else:
                continue
            outside += link and not os.path.realpath(entry.path).startswith(real)
        waiting += reversed(deeper)
    if outside:
        notes.append(f"{outside} links lead out of the folder, and what they lead to is read")


def _wrapping(images: Sequence[Parts], notes: list[str]) -> int:
    """The number of folders in one another that do nothing but hold all others, such as an archive's own."""
    depth = 0
    while (
        all(len(parts) > depth + 2 for parts in images)
        and len({parts[depth] for parts in images}) == 1
        and not split_of(images[0][depth])
    ):
        depth += 1
    if depth:
        notes.append(f"all images are in {'/'.join(images[0][:depth])}/, which is read as the data's folder")
    return depth


def _in_splits(images: Sequence[Parts], depth: int, notes: list[str]) -> dict[str, list[Placed]]:
    """Split -> its images.

    Subfolders are splits if all their names say so, or two different ones do, or one does beside unlabeled/ or beside
    folders that have no subfolders where it has some. A class may be called "train".
    """
    folders: dict[str, list[Placed]] = {}
    for parts in images:
        if len(parts) > depth + 1:
            folders.setdefault(parts[depth], []).append((parts, depth + 1))
    roles = {name: split for name in folders if (split := split_of(name))}
    others = [name for name in folders if name not in roles]
    deep = {name: any(len(parts) > below + 1 for parts, below in found) for name, found in folders.items()}
    marked = (
        not others
        or len(set(roles.values())) > 1
        or all(name.lower() in _UNLABELED for name in others)
        or (all(deep[name] for name in roles) and not any(deep[name] for name in others))
    )
    if not (roles and marked):
        second = {split_of(parts[depth + 1]) if len(parts) > depth + 2 else None for parts in images}
        if len(second) > 1 and None not in second:  # cat/train, cat/test, dog/train ...
            notes.append("splits by the names of the folders below those of the classes")
            return {
                str(split): [(parts, depth) for parts in images if split_of(parts[depth + 1]) == split]
                for split in sorted(map(str, second))
            }
        if roles:
            notes.append(f"{some(roles)} is read as a class, not as a split, as it is beside {some(others)}")
        return {"train": [(parts, depth) for parts in images]}
    splits: dict[str, list[Placed]] = {}
    for name, found in folders.items():
        splits.setdefault(roles.get(name, name), []).extend(found)
    if renamed := [f"{name} is {split}" for name, split in roles.items() if name not in SPLIT_WORDS[split]]:
        notes.append(f"splits by the names of the folders: {listed(renamed)}")
    if beside := [parts[-1] for parts in images if len(parts) == depth + 1]:
        notes.append(f"images beside the folders of the splits are not read ({len(beside):,}): {some(beside)}")
    return splits


def _in_classes(split: str, splits: Mapping[str, Sequence[Placed]], notes: list[str]) -> list[tuple[str, str | None]]:
    """(path, class or None) of a split's images: the first level of folders is the classes, if there are two."""

    def folders(name: str) -> dict[str, int]:
        """Folder -> images in it, "" for those in none."""
        found: dict[str, int] = {}
        for parts, depth in splits[name]:
            top = parts[depth] if len(parts) > depth + 1 else ""
            found[top] = found.get(top, 0) + 1
        return found

    def doubled(name: str) -> bool:  # train/train/1.png, as some archives have it
        return len(found := folders(name)) == 1 and split_of(next(iter(found))) == name

    if doubled(split):
        splits = {**splits, split: [(parts, depth + 1) for parts, depth in splits[split]]}
    named = [name for name in splits if name in SPLIT_WORDS]
    classes = {top for name in named if not doubled(name) for top in folders(name) if top}
    here = folders(split)
    loose = here.get("", 0)
    inside = len(splits[split]) - loose
    labeled = len(classes) > 1 and loose <= inside and bool(classes & here.keys())
    found = [
        (os.path.join(*parts), parts[depth] if labeled and len(parts) > depth + 1 and parts[depth] in classes else None)
        for parts, depth in splits[split]
    ]
    if len(classes) == 1 and inside and split in named:
        notes.append(f"all folders of {split!r} are one, {some(classes)}: it is no class, and there are no labels")
    elif inside and loose > inside:
        notes.append(
            f"{loose:,} images of {split!r} are in no folder and {inside:,} in {some(here.keys() - {''})}: there are "
            "no labels"
        )
    elif labeled and loose:
        beside = [parts[-1] for parts, depth in splits[split] if len(parts) == depth + 1]
        notes.append(f"images of {split!r} beside the folders of its classes have no label ({loose:,}): {some(beside)}")
    deeper = {
        parts[:-1] for parts, depth in splits[split] if len(parts) > depth + 2 and split_of(parts[depth + 1]) != split
    }
    if labeled and deeper:
        notes.append(
            f"classes of {split!r} are the {len(classes)} folders of the first level; the {len(deeper)} folders below "
            "them are not told apart"
        )
    return found


# ---- splits ----------------------------------------------------------------------------------------------------------

HoldOut = Literal["always", "labeled", "never"]
"""Of data without a test split: whether a tenth of the training images becomes one."""


def choose_split(
    sizes: Mapping[str, int],
    labeled: Collection[str],
    spec: str,
    split: str,
    hold_out: HoldOut,
    log: Callable[[str], None],
    beside: Collection[str] = (),
) -> tuple[str, str | None]:
    """The split to read, and which part of it: None (all), "train" or "test" where a test set is held out.

    sizes: images of each split; labeled: the splits with labels; beside: the splits that are read, too.
    """
    if split not in ("train", "test"):
        same = [split] if split in sizes else _of_role(sizes, split_of(split) or "")
        if len(same) != 1:
            raise UserError(f"--data {spec}: no split {split!r}; it has {listed(sizes)}")
        return same[0], None
    tests = [*_of_role(sizes, "test"), *_of_role(sizes, "validation")]
    test = next((name for name in tests if name in labeled), tests[0] if tests else None)
    if split == "test" and test is not None:
        if test != "test":
            log(f"{spec}: the split {test!r} serves as test")
        return test, None
    trains = _of_role(sizes, "train") or (list(sizes) if len(sizes) == 1 and not tests else [])
    if len(trains) != 1:
        raise UserError(f"--data {spec}: no split 'train'; it has {listed(sizes)}")
    (train,) = trains
    left = [f"{name!r} ({n:,} images)" for name, n in sizes.items() if name not in (train, test, *beside)]
    if left and split == "train":
        log(f"{spec}: not read, as neither training nor test images: {'; '.join(left)}")
    if test is not None:
        return train, None
    if split == "train" and (hold_out == "never" or (hold_out == "labeled" and train not in labeled)):
        return train, None
    if sizes[train] < 2:
        raise UserError(f"--data {spec}: one image cannot be parted into train and test")
    log(
        f"{spec}: no test split; a tenth of {train!r} ({max(1, sizes[train] // 10):,} of {sizes[train]:,} images), "
        "chosen by a fixed seed, serves as test"
    )
    return train, split


def _of_role(sizes: Iterable[str], role: str) -> list[str]:
    """The splits that are named `role` or, where none is, that say so."""
    return [name for name in sizes if name == role] or [name for name in sizes if split_of(name) == role]


def held_out(n: int, part: str | None) -> Tensor:
    """Rows of a part, ascending; the two parts are disjoint and together everything."""
    if part is None:
        return torch.arange(n)
    order = torch.randperm(n, generator=generator("held out", n))
    tenth = max(1, n // 10)
    return (order[:tenth] if part == "test" else order[tenth:]).sort().values


# ---- encoded bytes ---------------------------------------------------------------------------------------------------


class Files:
    """Image files of a split under one directory."""

    def __init__(self, directory: Path, paths: list[str], split: str) -> None:
        self.directory, self.paths, self.split = directory, paths, split

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, row: int) -> bytearray:
        return read_regular(self.directory / self.paths[row])

    def where(self, row: int) -> str:
        return str(self.directory / self.paths[row])

    def sizes(self, rows: Tensor) -> np.ndarray:
        return np.array([os.path.getsize(os.path.join(self.directory, self.paths[i])) for i in rows.tolist()], "<i8")


class Rows:
    """A column of encoded images: binary, or structs of bytes and path, memory-mapped and never copied as a whole.

    A row without bytes names its file, which must be in `folder`, the data's own; None: in the caches of the hub.
    """

    def __init__(self, column: Any, split: str, spec: str, folder: Path | None) -> None:
        self.split, self.spec, self.count, self.folder = split, spec, len(column), folder
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
            return bytearray()
        return read_regular(self._file(path))  # data sets saved without embedding their files

    def _file(self, path: str) -> Path:
        """The file that a row names. Raises ValueError unless it is a regular file of the data."""
        if self.folder is None:
            import datasets
            from huggingface_hub.constants import HF_HUB_CACHE

            folders = [Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(HF_HUB_CACHE).resolve()]
        else:
            folders = [self.folder]
        file = (folders[0] / path).resolve()
        if not any(file.is_relative_to(folder) for folder in folders):
            raise ValueError(f"it names the file {shown(path)}, which is outside of the data's folder")
        if not file.is_file():
            raise ValueError(f"it names the file {shown(path)}, which is not there or no regular file")
        return file

    def where(self, row: int) -> str:
        return f"row {row} of split {self.split!r} of {self.spec}"

    def sizes(self, rows: Tensor) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        lengths = pa.chunked_array([pc.fill_null(pc.binary_length(chunk), 0).cast("int64") for chunk in self.bytes])
        return lengths.to_numpy()[rows.numpy()].astype("<i8")


Opened = tuple[Files | Rows, Tensor | None, list[str] | None, str | None, Tensor]


class Joined:
    """Several splits as one, the images of the first before those of the second."""

    def __init__(self, sources: Sequence[Files | Rows]) -> None:
        self.sources, self.starts = sources, [0, *itertools.accumulate(map(len, sources))]
        self.split = "+".join(source.split for source in sources)

    def __len__(self) -> int:
        return self.starts[-1]

    def _place(self, row: int) -> tuple[Files | Rows, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.sources[number], row - self.starts[number]

    def encoded(self, row: int) -> bytearray:
        source, place = self._place(row)
        return source.encoded(place)

    def where(self, row: int) -> str:
        source, place = self._place(row)
        return source.where(place)

    def sizes(self, rows: Tensor) -> np.ndarray:
        """rows: ascending."""
        ends = zip(self.sources, self.starts, self.starts[1:], strict=False)
        return np.concatenate([s.sizes(rows[(rows >= start) & (rows < end)] - start) for s, start, end in ends])


def join(parts: Sequence[Opened]) -> tuple[Files | Rows | Joined, Tensor | None, list[str] | None, str | None, Tensor]:
    """Source, labels, class names, label column and chosen rows of several splits as of one; -1: no label."""
    if len(parts) == 1:
        return parts[0]
    source = Joined([part[0] for part in parts])
    rows = torch.cat([part[4] + start for part, start in zip(parts, source.starts, strict=False)])
    labeled = [part for part in parts if part[1] is not None]
    if not labeled:
        return source, None, None, None, rows
    labels = [torch.full((len(part[0]),), -1) if part[1] is None else part[1] for part in parts]
    return source, torch.cat(labels), labeled[0][2], labeled[0][3], rows


# ---- files ----------------------------------------------------------------------------------------------------------


def check_regular(path: Path) -> None:
    """Raise UserError unless `path` is, or leads to, a regular file: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "is a link to nothing" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}: remove it") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_kind(mode)} and no regular file: remove it")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISDIR: "a folder", stat.S_ISSOCK: "a socket"}
    return next((kind for test, kind in kinds.items() if test(mode)), "a device")


def read_regular(path: Path) -> bytearray:
    """The bytes of a regular file. Raises OSError, or ValueError for a pipe, a device or more than `LARGEST_FILE`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe would wait
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"it is {_kind(about.st_mode)} and no regular file")
        if about.st_size > LARGEST_FILE:
            raise ValueError(f"it has {about.st_size:,} bytes, more than the {LARGEST_FILE:,} that a file may have")
        return bytearray(file.read())


# ---- small parts -----------------------------------------------------------------------------------------------------


def content_hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)  # lengths keep neighbors from running into each other
    return digest.hexdigest()


def spread(n: int, count: int) -> list[int]:
    """At most `count` evenly spaced numbers below n."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


def listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def once(log: Callable[[str], None]) -> Callable[[str], None]:
    """`log`, but each text once, as the splits of one data set say much alike, and without what a terminal would obey:
    the names of files may hold it."""
    said = set()

    def say(text: str) -> None:
        text = "".join(c if c.isprintable() else "?" for c in text)
        if text not in said:
            said.add(text)
            log(text)

    return say
