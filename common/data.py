"""From a spec to batches of views: `open_data` makes a store of images, `ViewLoader` makes step k's views from it.

A store is resident (`ImageStore`: one uint8 tensor, decoded once) or streamed (`ImageStream`: encoded bytes, decoded
on demand). Both carry labels, names and a content hash, and crop images for evaluation in one fixed way. What a loader
returns depends only on the seed and the step: not on processes, threads, or the steps requested before.
"""

import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torchvision.io  # noqa: F401  loads the decoders behind torch.ops.image
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from common import shapes
from common.errors import UserError
from common.files import one_line
from common.rng import generator
from common.sources import (
    GENERATED,
    HUB_NAMES,
    KNOWN,
    Files,
    Folder,
    HoldOut,
    Joined,
    Rows,
    content_hash,
    is_path,
    join,
    load_hub,
    load_parquet,
    open_table,
    parquet_files,
    scan_folder,
    spread,
)
from common.threads import wait_for, worker_pool
from common.transfer import to_device
from common.views.recipe import ViewRecipe
from common.views.sampling import ViewParams

# Per-channel mean and standard deviation of the training images, scaled to [0, 1], as published code uses them.
STATS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "shapes": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "shapes-textured": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "pairs": ((0.28, 0.28, 0.28), (0.215, 0.215, 0.215)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "imagenet-1k": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# What PIL may take the bytes for. Some of its other formats start programs, such as Ghostscript for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
LARGEST_IMAGE = 89_478_485
"""Pixels, a quarter of a gigabyte decoded; where PIL warns of a decompression bomb, too."""

_SHAPES_COUNT = {"train": 10_000, "test": 2_000}
_SHAPES_SEED = {"train": 0, "test": 1}


def mean_std(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, std) of the channels for `--normalize NAME`: those of `STATS`, or 0 and 1 for "none".

    Raises UserError for another name.
    """
    if name == "none":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if name not in STATS:
        raise UserError(f"--normalize {name}: choose none or one of {', '.join(STATS)}")
    return STATS[name]


# ---- stores ----------------------------------------------------------------------------------------------------------


class Images(Protocol):
    """A set of images with what is known of them: what training and evaluation ask of a store."""

    name: str
    fingerprint: str
    labels: Tensor | None
    class_names: list[str] | None
    label_name: str | None
    factors: dict[str, Tensor] | None

    @property
    def images(self) -> Tensor | None:
        """uint8 [N, 3, H, W] where all are decoded, None where `read` decodes one at a time."""

    @property
    def side(self) -> int:
        """Shorter side in pixels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]."""

    def eval_images(self, start: int, stop: int, size: int) -> Tensor:
        """Images start to stop, uint8 [b, 3, size, size], by `eval_geometry`."""

    def subset(self, indices: Tensor) -> "Images":
        """The images at `indices` (long [n], on the CPU), with their labels and factors, in that order."""


@dataclass(kw_only=True, eq=False)
class Store:
    """Metadata common to both stores."""

    name: str  # "shapes", "cifar10", a folder's last part: never a path
    fingerprint: str  # hash of the content, equal on every machine
    labels: Tensor | None = None  # LongTensor [N]; -1 where a single image has no label
    class_names: list[str] | None = None
    label_name: str | None = None  # the labels' column; "shape" for shapes, "folder" for class folders
    factors: dict[str, Tensor] | None = None  # drawn images only: [N] each, see common.shapes


@dataclass(kw_only=True, eq=False)
class ImageStore(Store):
    """Images of one size, decoded: `images` is uint8 [N, 3, H, W] on the store's device."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def side(self) -> int:
        """Shorter side in pixels."""
        return min(self.images.shape[-2:])

    def read(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W] on the store's device."""
        return self.images[i]

    def eval_images(self, start: int, stop: int, size: int) -> Tensor:
        """uint8 [b, 3, size, size] on the store's device, by `eval_geometry`."""
        return eval_geometry(self.images[start:stop], size)

    def subset(self, indices: Tensor) -> "ImageStore":
        """See `Images.subset`. The fingerprint stays that of all images."""
        if torch.equal(indices, torch.arange(len(self))):
            return self
        return replace(
            self,
            images=self.images[indices.to(self.images.device)],
            labels=None if self.labels is None else self.labels[indices],
            factors=None if self.factors is None else {k: v[indices] for k, v in self.factors.items()},
        )


@dataclass(kw_only=True, eq=False)
class ImageStream(Store):
    """Encoded images, decoded on demand.

    `source` holds the bytes, `rows` (long [N]) selects its images, in order.
    """

    source: "Files | Rows | Joined"
    rows: Tensor
    side: int  # median shorter side of a sample of the images, in pixels
    device: torch.device
    workers: int = 2

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> None:
        """Nothing: the images are decoded when asked."""

    def read(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W] on the CPU. UserError names the image when it cannot be decoded."""
        return _read(self.source, int(self.rows[i]))

    def eval_images(self, start: int, stop: int, size: int) -> Tensor:
        """uint8 [b, 3, size, size] on the stream's device, by `eval_geometry`, decoded by threads."""
        stop = min(stop, len(self))
        images = torch.empty(stop - start, 3, size, size, dtype=torch.uint8)

        def cut(i: int) -> None:
            images[i - start] = eval_geometry(self.read(i).unsqueeze(0), size)[0]

        with worker_pool(self.workers) as pool:
            wait_for(pool.submit(cut, i) for i in range(start, stop))
        return images.to(self.device)

    def subset(self, indices: Tensor) -> "ImageStream":
        """See `Images.subset`. The fingerprint stays that of all images."""
        if torch.equal(indices, torch.arange(len(self))):
            return self
        return replace(
            self,
            rows=self.rows[indices],
            labels=None if self.labels is None else self.labels[indices],
            factors=None if self.factors is None else {k: v[indices] for k, v in self.factors.items()},
        )


def eval_geometry(images: Tensor, size: int) -> Tensor:
    """The one evaluation crop: uint8 [b, 3, H, W] to uint8 [b, 3, size, size].

    Images of that size are left alone. Otherwise the shorter side is resized (bilinear, antialiased) to size / 0.875
    from 160 pixels on (256 for 224, the usual ImageNet test crop) and to size below, then the center is cut out. On the
    CPU this equals torchvision's Resize and CenterCrop; on a GPU, which resizes floats, it may be one level off.
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    short = round(size / 0.875) if size >= 160 else size
    if min(height, width) != short:
        if height <= width:
            height, width = short, int(short * width / height)
        else:
            height, width = int(short * height / width), short
        native = images.device.type == "cpu"
        pixels = images if native else images.float()
        pixels = interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
        images = pixels if native else pixels.round_().clamp_(0, 255).to(torch.uint8)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top : top + size, left : left + size]


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_data(
    spec: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    image_size: int | None = None,
    hold_out: HoldOut = "always",
    memory_budget: int = 4 << 30,
    device: str | torch.device = "cpu",
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> ImageStore | ImageStream:
    """Open the images that `spec` names.

    spec: "pairs", "shapes" or "shapes-textured" (rendered at `image_size`, 32 by default; 10,000 train and 2,000 test
        images);
        "cifar10", "cifar100", "stl10", "imagenet-1k" or any "org/name" or "org/name:configuration" of the Hugging Face
        hub; or a path: an image folder (one subfolder a class, or no classes; in folders of splits or in one set) or a
        directory of parquet files. Folders and files are splits by their names, as in the `datasets` library
        (`common.sources.split_of`). Files keep their size: `image_size` is for rendered images.
    split: "train", "test", any other split that the data has ("unlabeled" of STL-10), or several, joined by "+", as
        one; labels are -1 where a split has none. "test" means test, otherwise
        validation; a test split without labels (ImageNet's on the hub) is passed over for a labeled one. Data with
        neither has a tenth of its images, chosen by a fixed seed, held out as "test" and left out of "train".
    label_column: of tables; "folder" of folders. Classes are compared by name over all splits, and numbered.
    hold_out: whether "train" leaves out that tenth: "always", "labeled" (where there are labels) or "never".
    limit: use this many images, a random subset with a fixed seed, in their original order. Smaller limits are subsets
        of larger ones; for shapes, the first ones.
    memory_budget: bytes. Images of one size that fit are decoded now, by `workers` threads, and live on `device`
        (`ImageStore`); all others are decoded when needed (`ImageStream`).
    log: receives notices (network tried, splits guessed, images left out or without a label, with their counts); pass a
        function that does nothing on all processes but one.

    JPEG and PNG are decoded by torchvision, the other `FORMATS` by PIL, to RGB. EXIF orientation is not applied, as in
    the loaders behind published numbers. The fingerprint hashes the number of images, each one's encoded size and
    label, and the bytes of up to 1,024 of them, evenly spaced; for shapes the generator's version and arguments.

    Raises UserError for a spec, path, split or column that does not exist (the existing ones are listed), a folder
    without images, a hub name without network, and a corrupt image (named by path, or by split and row).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least one image is needed")
    device = torch.device(device)
    if spec in (*GENERATED, *HUB_NAMES) and Path(spec).is_dir():
        log(f"--data {spec} is a known name: the folder here is not read, which is --data ./{spec}")
    if spec in GENERATED:
        return _open_shapes(spec, split, limit, image_size or 32, device)

    if is_path(spec):
        path = Path(spec).expanduser().resolve()
        if not path.exists():
            raise UserError(f"--data {spec}: there is no such path")
        if not path.is_dir():
            raise UserError(f"--data {spec}: this is a file; give the directory that holds the images or parquet files")
        name = path.name
        parquet = parquet_files(path)
        data = load_parquet(path, parquet) if parquet else scan_folder(path)
    else:
        name = spec.split(":")[0].split("/")[-1]
        data = load_hub(spec, log)
    names = split.split("+")
    source, labels, class_names, label_name, rows = join(
        [
            data.open(spec, part, label_column, hold_out, log, beside=names)
            if isinstance(data, Folder)
            else open_table(data, spec, part, image_column, label_column, hold_out, log, beside=names)
            for part in names
        ]
    )

    if limit is not None and limit < len(rows):
        rows = rows[torch.randperm(len(rows), generator=generator("limit", len(rows)))[:limit].sort().values]
    if not len(rows):
        raise UserError(f"--data {spec}: split {split!r} has no images")
    if labels is not None:
        labels = labels[rows]
        if (labels < 0).all():  # how STL-10 and ImageNet's test split say that there are none
            labels = class_names = label_name = None
        elif none := int((labels < 0).sum()):
            log(f"{spec}: {none:,} of the {len(labels):,} images of {split!r} have no label")
    about: dict[str, Any] = {"name": name, "labels": labels, "class_names": class_names, "label_name": label_name}
    about["fingerprint"] = _fingerprint(source, rows, labels)

    sample = [_read(source, int(rows[i])).shape for i in spread(len(rows), 32)]
    side = sorted(min(shape[1:]) for shape in sample)[len(sample) // 2]
    if len(set(sample)) == 1 and len(rows) * sample[0].numel() <= memory_budget:
        images = _decode_all(source, rows, sample[0], workers)
        if images is not None:
            return ImageStore(images=images.to(device), **about)
    return ImageStream(source=source, rows=rows, side=side, device=device, workers=workers, **about)


def known_data(spec: str, split: str = "train", limit: int | None = None) -> ImageStream | None:
    """A stand-in for the images of `KNOWN` data that `open_data` would open, for a plan; None for other data.

    Their number, side and count of classes are right, their labels are made up, and none can be read."""
    if spec not in KNOWN or is_path(spec):
        return None
    known, parts = KNOWN[spec], split.split("+")
    if not set(parts) <= known.images.keys():
        return None
    labels = [
        torch.full((known.images[part],), -1)
        if part == "unlabeled"
        else torch.arange(known.images[part]) % known.classes
        for part in parts
    ]
    all_labels = torch.cat(labels)[:limit]
    return ImageStream(
        name=spec.split(":")[0].split("/")[-1],
        fingerprint="",
        labels=all_labels if bool((all_labels >= 0).any()) else None,
        label_name="label",
        source=Files(Path(), [], split),
        rows=torch.arange(len(all_labels)),
        side=known.side,
        device=torch.device("cpu"),
    )


def _open_shapes(name: str, split: str, limit: int | None, size: int, device: torch.device) -> ImageStore:
    if split not in _SHAPES_SEED:
        raise UserError(f"--data {name} has the splits train and test, not {split!r}")
    n, seed = _SHAPES_COUNT[split], _SHAPES_SEED[split]
    if name == "pairs":
        factors = shapes.sample_pair_factors(n, seed)
    else:
        factors = shapes.sample_factors(n, seed, texture=name == "shapes-textured")
    factors = {key: value[:limit] for key, value in factors.items()}
    n = min(n, limit or n)
    return ImageStore(
        images=shapes.render(factors, size).to(device),
        labels=factors["shape"],
        class_names=list(shapes.SHAPES),
        label_name="shape",
        factors=factors,
        name=name,
        fingerprint=content_hash(f"{name} version {shapes.VERSION} seed {seed} n {n} size {size}".encode()),
    )


# ---- decoding --------------------------------------------------------------------------------------------------------


def _read(source: Files | Rows | Joined, row: int) -> Tensor:
    """Decoded image, uint8 [3, H, W]. Raises UserError that names the image, and why it cannot be decoded."""
    try:
        return decode(source.encoded(row))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read an image, {source.where(row)}: {one_line(error)}; replace or remove it"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"not enough memory to decode {source.where(row)}: use fewer --workers, or smaller images"
        ) from error


def decode(data: bytearray) -> Tensor:
    """Encoded bytes to RGB, uint8 [3, H, W], a pixel's channels side by side in memory (which the native resize wants).

    Raises ValueError that says what is wrong with the bytes: empty, truncated, no image, too large, a mode.
    """
    if not data:
        raise ValueError("it is empty")
    check_pixels(*header_size(data))
    native = None
    # The operators behind torchvision.io.decode_jpeg and decode_png: since torchvision 0.29 those functions warn of
    # their removal on every call. Where a torchvision comes without the operators, PIL does all.
    if data[:3] == JPEG:
        native = getattr(torch.ops.image, "decode_jpeg", None)
    elif data[:8] == PNG:
        native = getattr(torch.ops.image, "decode_png", None)
    if native is not None:
        try:
            image = native(torch.frombuffer(data, dtype=torch.uint8), 3, False)  # 3: RGB
            if image.dtype == torch.uint8:
                return image
        except RuntimeError:
            pass  # a color space that it does not know, or corrupt: PIL decides
    return _decode_by_pil(data)


def _decode_by_pil(data: bytearray) -> Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_pixels(*picture.size)
            picture.load()
            if picture.mode.startswith("I"):  # 16-bit gray, which PIL would clip instead of scaling
                levels = torch.from_numpy(np.array(picture, dtype=np.int32))
                return (levels >> 8).clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
            if picture.mode == "F":  # PIL would clip these, too, and nothing says what their range is
                raise ValueError("its mode F, floating-point pixels, is not supported: save it with 8 or 16 bits")
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (ValueError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"it is too large ({one_line(error)})") from error
    except UnidentifiedImageError as error:
        if any(data.startswith(start) for start in (JPEG, PNG, b"GIF8", b"RIFF", b"II*", b"MM\0*", b"BM")):
            raise ValueError("it is truncated or damaged: no image follows its first bytes") from error
        raise ValueError(f"it is not an image, or of a format that is not read ({', '.join(FORMATS)} are)") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"it is truncated or damaged ({one_line(error)})") from error


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for a picture that is larger than `LARGEST_IMAGE`, before its pixels need memory."""
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"it is too large: {width} x {height} pixels, more than {LARGEST_IMAGE:,}")


def header_size(data: bytearray) -> tuple[int, int]:
    """(width, height) by the header of a PNG or JPEG file, (0, 0) if it does not say."""
    if data[:8] == PNG:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    place = 2
    while data[:3] == JPEG and place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return int.from_bytes(data[place + 7 : place + 9], "big"), int.from_bytes(
                data[place + 5 : place + 7], "big"
            )
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0


def _decode_all(source: Files | Rows | Joined, rows: Tensor, shape: torch.Size, workers: int) -> Tensor | None:
    """All images as uint8 [N, 3, H, W], or None as soon as one has another shape, or if memory is short."""
    try:
        images = torch.empty(len(rows), *shape, dtype=torch.uint8)
    except (MemoryError, RuntimeError):  # less memory than the budget
        return None
    stop = threading.Event()

    def work(start: int, end: int) -> None:
        try:
            for i, row in enumerate(rows[start:end].tolist(), start):
                if stop.is_set():
                    return
                image = _read(source, row)
                if image.shape != shape:
                    stop.set()
                else:
                    images[i] = image
        except UserError:
            stop.set()
            raise

    step = max(1, min(512, len(rows) // (4 * workers)))
    with worker_pool(workers) as pool:
        wait_for(pool.submit(work, start, start + step) for start in range(0, len(rows), step))
    return None if stop.is_set() else images


def _fingerprint(source: Files | Rows | Joined, rows: Tensor, labels: Tensor | None) -> str:
    def encoded(row: int) -> bytes:
        try:
            return bytes(source.encoded(row))
        except (OSError, ValueError) as error:  # a dangling link, no permission, a file elsewhere
            raise UserError(f"cannot read an image, {source.where(row)}: {one_line(error)}") from error

    try:
        parts = [source.sizes(rows).tobytes(), b"" if labels is None else labels.numpy().astype("<i8").tobytes()]
    except OSError as error:
        raise UserError(f"cannot read an image: {error}") from error
    return content_hash(*parts, *(encoded(int(rows[i])) for i in spread(len(rows), 1024)))


# ---- views -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One process's part of a step."""

    views: list[Tensor]  # float [b, 3, s, s] each, normalized, on the device
    indices: Tensor  # long [b] into the store, on the CPU
    labels: Tensor | None  # long [b], on the device


class ViewLoader:
    """`loader(step)` is the batch of a step, a pure function of (seed, step) and of the process's slice of the batch.

    Epoch e = step // steps_per_epoch visits the images in the order of `generator(seed, "order", e)`, leaving out the
    last incomplete batch. The views' random numbers are drawn for the global batch from
    `generator(seed, "views", step)`. Each process takes its contiguous slice of both, so the processes' batches,
    concatenated, are the batch of a single process.

    recipe: see `common.views.recipe`. batch_size is global. From a stream, `workers` threads decode each image
    once for all its views and crop; the following `prefetch` steps are prepared meanwhile. The default is 2 with a
    GPU and 0 on a CPU: there, workers would take the cores from the training step, whose OpenMP threads wait for each
    other by spinning, and nothing would be gained. `close()`, or garbage collection of the loader, drops pending work.

    Raises UserError for a batch smaller than 2, larger than the data or not divisible by the number of processes, for
    images smaller than a view and, when called, for a corrupt image of that step.
    """

    def __init__(
        self,
        store: Images,
        recipe: ViewRecipe,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        workers: int = 2,
        prefetch: int | None = None,
    ) -> None:
        if batch_size < 2:
            raise UserError(f"--batch-size {batch_size}: at least 2 images are needed, to compare one with another")
        if batch_size % world_size:
            raise UserError(
                f"--batch-size {batch_size} is the global batch and must be divisible by the {world_size} processes"
            )
        if batch_size > len(store):
            raise UserError(f"--batch-size {batch_size} is larger than the data: {store.name} has {len(store)} images")
        size = max(view.size for view in recipe.views)
        if store.side < size:
            raise UserError(
                f"views of {size} pixels cannot be cut from {store.name}, whose images have a shorter side of "
                f"{store.side}: use --image-size {store.side} or less, or larger images"
            )
        self.store, self.recipe, self.batch_size, self.seed = store, recipe, batch_size, seed
        self.device = torch.device(device)
        self.steps_per_epoch = len(store) // batch_size
        self._part = slice(rank * (batch_size // world_size), (rank + 1) * (batch_size // world_size))
        self._labels = None if store.labels is None else store.labels.to(self.device)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._workers = workers
        self._prefetch = prefetch if prefetch is not None else 0 if self.device.type == "cpu" else 2
        self._pending: dict[int, _Crops] = {}
        self._pool: ThreadPoolExecutor | None = None
        if store.images is None:
            self._pool = worker_pool(workers)
            self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        indices = self.indices(step)
        source = self.store.images
        if source is not None:
            images = source[to_device(indices, source.device)].to(self.device)
            views = self.recipe(images, self._params(step).to(self.device))
        else:
            views = self._streamed(step)
        labels = None if self._labels is None else self._labels[to_device(indices, self.device)]
        return Batch(views, indices, labels)

    def indices(self, step: int) -> Tensor:
        """The process's images at a step: long [b], on the CPU."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(self.store), generator=generator(self.seed, "order", epoch))
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size][self._part]

    def close(self) -> None:
        """Stop the threads and drop the steps prepared ahead. The loader is of no use afterwards."""
        if self._pool is not None:
            self._pending.clear()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _params(self, step: int) -> ViewParams:
        return self.recipe.sample(self.batch_size, generator(self.seed, "views", step))[self._part]

    def _streamed(self, step: int) -> list[Tensor]:
        wanted = range(step, step + 1 + self._prefetch)
        for other in [s for s in self._pending if s not in wanted]:  # the step jumped: these will not be requested
            for future in self._pending.pop(other).futures:
                future.cancel()
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = self._submit(s)
        crops = self._pending.pop(step)
        wait_for(crops.futures)
        on_device = [to_device(view, self.device) for view in crops.views]
        return self.recipe.finish(on_device, crops.params.to(self.device))

    def _submit(self, step: int) -> "_Crops":
        indices, params = self.indices(step).tolist(), self._params(step)
        store, recipe, pool = self.store, self.recipe, self._pool  # a queued task must not keep the loader alive
        assert pool is not None  # as the store has no decoded images
        pinned = self.device.type == "cuda"
        views = [
            torch.empty(len(indices), 3, view.size, view.size, dtype=torch.uint8, pin_memory=pinned)
            for view in recipe.views
        ]

        def work(places: range) -> None:
            for place in places:
                crops = recipe.crop_one(store.read(indices[place]), params, place)
                for view, crop in zip(views, crops, strict=True):
                    view[place] = crop

        share = max(1, len(indices) // (4 * self._workers))
        starts = range(0, len(indices), share)
        futures = [pool.submit(work, range(s, min(s + share, len(indices)))) for s in starts]
        return _Crops(views, params, futures)


@dataclass
class _Crops:
    """A step on its way: uint8 [b, 3, s, s] a view, filled by the futures."""

    views: list[Tensor]
    params: ViewParams
    futures: list[Future]
