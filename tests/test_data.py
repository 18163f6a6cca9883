"""Opening data of every form, and batches as a pure function of the step."""

import io
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from common.data import GENERATED, STATS, Batch, ImageStore, ImageStream, ViewLoader, decode, eval_geometry, mean_std
from common.data import open_data as open_data_aloud
from common.errors import UserError
from common.shapes import SHAPES, render
from common.sources import SPLIT_WORDS, once, split_of


def open_data(*args, **kwargs) -> ImageStore | ImageStream:
    return open_data_aloud(*args, **{"log": lambda line: None} | kwargs)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    """Smooth random content, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, height: int = 24, width: int = 24, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_folder(root: Path, splits: dict[str, int], *, classes: tuple[str, ...] = ("ant", "bee"), **kwargs) -> Path:
    """`splits` images of each class in each split ("" for the root itself); classes () for a flat folder."""
    seed = 0
    for split, count in splits.items():
        for name in classes or ("",):
            for i in range(count):
                write(root / split / name / f"{i:03}.png", encoded(seed, **kwargs))
                seed += 1
    return root


def make_parquet(
    root: Path,
    splits: dict[str, int],
    *,
    folder: str = "",
    label: str | None = "label",
    kind: str = "PNG",
    shards: int = 1,
    extra: dict[str, list] | None = None,
    bad: int | None = None,
    size: int = 24,
) -> Path:
    """Files as the hub lays them out; row `bad` of train is cut short."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, n in splits.items():
        data = [encoded(1000 * len(split) + i, size, size, kind=kind) for i in range(n)]
        if bad is not None and split == "train":
            data[bad] = data[bad][:60]
        columns: dict = {"img": [{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)]}
        features: dict = {"img": datasets.Image()}
        if label is not None:
            columns[label] = [i % 3 for i in range(n)]
            features[label] = datasets.ClassLabel(names=["cat", "dog", "emu"])
        for name, values in (extra or {}).items():
            columns[name] = (values * n)[:n]
            features[name] = datasets.Value("int64" if isinstance(values[0], int) else "string")
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        for k in range(shards):
            part = table.shard(shards, k, contiguous=True)
            part.to_parquet(root / folder / f"{split}-{k:05}-of-{shards:05}.parquet")
    return root


# ---- a recipe that can be checked by eye: each view is a window of the image, brightened by where it starts ----------


@dataclass
class WindowParams:
    values: Tensor  # [n, V, 2] in [0, 1): where the window starts

    def __getitem__(self, part: slice) -> "WindowParams":
        return WindowParams(self.values[part])

    def to(self, device: str | torch.device) -> "WindowParams":
        return WindowParams(self.values.to(device))


class WindowRecipe:
    """The least that has the interface of ViewRecipe; the same bits batched and one by one."""

    def __init__(self, *sizes: int) -> None:
        self.views = [SimpleNamespace(size=size) for size in sizes]

    def sample(self, n: int, generator: torch.Generator) -> WindowParams:
        return WindowParams(torch.rand(n, len(self.views), 2, generator=generator))

    def crop_one(self, image: Tensor, params: WindowParams, i: int) -> list[Tensor]:
        crops = []
        for view, start in zip(self.views, params.values[i], strict=True):
            top, left = (int(s * (side - view.size + 1)) for s, side in zip(start, image.shape[1:], strict=True))
            crops.append(image[:, top : top + view.size, left : left + view.size])
        return crops

    def finish(self, crops: list[Tensor], params: WindowParams) -> list[Tensor]:
        return [crop.float() / 255 + params.values[:, v, :1, None, None] for v, crop in enumerate(crops)]

    def __call__(self, images: Tensor, params: WindowParams) -> list[Tensor]:
        crops = zip(*(self.crop_one(image, params, i) for i, image in enumerate(images)), strict=True)
        return self.finish([torch.stack(crop) for crop in crops], params)


RECIPE = WindowRecipe(16, 16, 8)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.indices, b.indices)
    assert (a.labels is None) == (b.labels is None) and (a.labels is None or torch.equal(a.labels, b.labels))
    assert len(a.views) == len(b.views) and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_have_labels_factors_and_disjoint_splits() -> None:
    train, test = open_data("shapes"), open_data("shapes", "test")
    assert (len(train), len(test)) == (10_000, 2_000) and train.images.shape == (10_000, 3, 32, 32)
    assert train.name == "shapes" and train.label_name == "shape" and train.class_names == list(SHAPES)
    assert torch.equal(train.labels, train.factors["shape"])
    assert torch.equal(train.images, open_data("shapes").images)
    assert torch.equal(test.images[:50], render({k: v[:50] for k, v in test.factors.items()}, 32))
    places = torch.cat([torch.stack([store.factors[key] for key in ("hue", "x", "y")], 1) for store in (train, test)])
    assert len(places.unique(dim=0)) == 12_000
    assert train.fingerprint == open_data("shapes").fingerprint != test.fingerprint


def test_pairs_have_labels_factors_and_statistics() -> None:
    train, test = open_data("pairs", limit=4000), open_data("pairs", "test")
    assert train.name == "pairs" and train.label_name == "shape" and train.class_names == list(SHAPES)
    assert torch.equal(train.images, render(train.factors, 32)) and torch.equal(train.labels, train.factors["shape"])
    assert len(test) == 2000 and len(open_data("pairs")) == 10_000
    prints = {s.fingerprint for s in (train, test, open_data("pairs", limit=10), open_data("shapes", limit=4000))}
    assert len(prints) == 4
    mean, std = mean_std("pairs")
    pixels = train.images.float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(mean), atol=0.01)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(std), atol=0.01)


def test_shapes_options_change_pixels_and_fingerprint() -> None:
    few = open_data("shapes", limit=20)
    assert torch.equal(few.images, open_data("shapes", limit=30).images[:20]) and len(few.factors["x"]) == 20
    large, striped = open_data("shapes", limit=20, image_size=64), open_data("shapes-textured", limit=20)
    assert large.images.shape == (20, 3, 64, 64)
    assert striped.name == "shapes-textured" and "texture_phase" in striped.factors
    stores = few, large, striped, open_data("shapes", limit=30)
    assert len({store.fingerprint for store in stores}) == 4
    with pytest.raises(UserError, match="train and test, not 'extra'"):
        open_data("shapes", "extra")


def test_statistics_are_there_for_each_known_name() -> None:
    assert set(GENERATED) < set(STATS) and mean_std("cifar10") == STATS["cifar10"]
    assert mean_std("none") == ((0, 0, 0), (1, 1, 1))
    with pytest.raises(UserError, match="--normalize my-photos: choose none or one of shapes"):
        mean_std("my-photos")


# ---- image folders ---------------------------------------------------------------------------------------------------


def test_folder_with_train_and_validation(tmp_path) -> None:
    root = make_folder(tmp_path / "mine", {"train": 4, "val": 2})
    write(root / "val" / "cow" / "0.png", encoded(99))  # a class that train lacks must not shift the others
    write(root / "train" / ".hidden" / "x.png", b"ignored")
    write(root / "train" / "ant" / "notes.txt", b"ignored")
    lines: list[str] = []
    train, test = open_data(str(root)), open_data(str(root), "test", log=lines.append)
    assert isinstance(train, ImageStore) and (len(train), len(test)) == (8, 5)
    assert train.name == "mine" and train.label_name == "folder"
    assert train.class_names == test.class_names == ["ant", "bee", "cow"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 and test.labels.tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(train.images[5], torch.from_numpy(picture(5)).permute(2, 0, 1))
    assert lines == [f"{root}: the split 'validation' serves as test"]


def test_single_folder_holds_out_a_tenth(tmp_path) -> None:
    root = make_folder(tmp_path / "one", {"": 20})
    lines: list[str] = []
    train, test = open_data(str(root), log=lines.append), open_data(str(root), "test")
    assert (len(train), len(test)) == (36, 4) and len(lines) == 1 and "a tenth of 'train' (4 of 40 images)" in lines[0]
    assert [len(open_data(str(root), hold_out=way)) for way in ("labeled", "never")] == [36, 40]
    pixels = torch.cat([train.images, test.images]).flatten(1)
    assert len(pixels.unique(dim=0)) == 40  # disjoint, and nothing lost
    assert torch.equal(test.images, open_data(str(root), "test").images)


def test_flat_folder_is_unlabeled(tmp_path) -> None:
    root = make_folder(tmp_path / "flat", {"": 12}, classes=())
    store = open_data(str(root))
    assert [len(open_data(str(root), hold_out=way)) for way in ("labeled", "never")] == [12, 12]
    assert len(store) == 11 and store.labels is None and store.class_names is None and store.label_name is None
    batch = ViewLoader(store, RECIPE, batch_size=4, seed=0)(0)
    assert batch.labels is None and batch.views[0].shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match="its labels are its subfolders"):
        open_data(str(root), label_column="label")


def test_images_of_many_sizes_are_streamed(tmp_path) -> None:
    for i in range(6):
        write(tmp_path / "train" / "a" / f"{i}.png", encoded(i, 20 + i, 40))
    write(tmp_path / "test" / "a" / "0.png", encoded(9))
    stream = open_data(str(tmp_path))
    assert isinstance(stream, ImageStream) and stream.side == 23
    assert [tuple(stream.read(i).shape) for i in range(6)] == [(3, 20 + i, 40) for i in range(6)]
    assert torch.equal(stream.read(3), torch.from_numpy(picture(3, 23, 40)).permute(2, 0, 1))


def test_memory_budget_decides_between_store_and_stream(tmp_path) -> None:
    root = make_folder(tmp_path, {"train": 5, "test": 1})
    need = 10 * 3 * 24 * 24
    store, stream = open_data(str(root), memory_budget=need), open_data(str(root), memory_budget=need - 1)
    assert isinstance(store, ImageStore) and isinstance(stream, ImageStream)
    assert all(torch.equal(store.images[i], stream.read(i)) for i in range(10))
    assert store.fingerprint == stream.fingerprint and store.side == stream.side == 24


def test_folder_mistakes(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no such path"):
        open_data(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="there is no such path"):
        open_data("./absent")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no images .* and no parquet files"):
        open_data(str(tmp_path / "empty"))
    image = write(tmp_path / "a.png", encoded(0))
    with pytest.raises(UserError, match="this is a file"):
        open_data(str(image))
    make_folder(tmp_path / "only", {"test": 2})
    assert len(open_data(str(tmp_path / "only"), "test")) == 4
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        open_data(str(tmp_path / "only"))


@pytest.mark.parametrize("budget", [4 << 30, 100], ids=["resident", "stream"])
def test_corrupt_file_is_named(tmp_path, budget: int) -> None:
    root = make_folder(tmp_path, {"train": 40, "test": 1}, kind="JPEG")
    bad = root / "train" / "bee" / "001.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match=f"cannot read an image, {bad}: it is truncated or damaged"):
        store = open_data(str(root), memory_budget=budget)
        loader = ViewLoader(store, RECIPE, batch_size=8, seed=0)
        for step in range(loader.steps_per_epoch):
            loader(step)
    (root / "test" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.png is a link to nothing: remove it"):
        open_data(str(root), "test")


# ---- parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_parquet_as_the_hub_lays_it_out(tmp_path, folder: str, kind: str) -> None:
    root = make_parquet(tmp_path / "set", {"train": 30, "test": 6}, folder=folder, kind=kind, shards=2)
    train, test = open_data(str(root)), open_data(str(root), "test")
    assert (len(train), len(test)) == (30, 6) and train.name == "set"
    assert train.label_name == "label" and train.class_names == ["cat", "dog", "emu"]
    assert train.labels.dtype == torch.long and train.labels.tolist() == [i % 3 for i in range(30)]
    for i in range(30):
        with Image.open(io.BytesIO(encoded(5000 + i, kind=kind))) as image:
            want = torch.from_numpy(np.array(image)).permute(2, 0, 1).int()
        assert (train.images[i].int() - want).abs().max() <= (0 if kind == "PNG" else 2)  # decoders round differently


def test_parquet_split_folders_and_validation(tmp_path) -> None:
    make_parquet(tmp_path / "a", {"train": 6, "validation": 3})
    assert len(open_data(str(tmp_path / "a"), "test")) == 3
    for split, n in {"train": 5, "test": 2}.items():
        make_parquet(tmp_path / "b" / split, {split: n})
        (tmp_path / "b" / split / f"{split}-00000-of-00001.parquet").rename(tmp_path / "b" / split / "0000.parquet")
    assert len(open_data(str(tmp_path / "b"))) == 5 and len(open_data(str(tmp_path / "b"), "test")) == 2
    make_parquet(tmp_path / "c", {"train": 20})
    assert len(open_data(str(tmp_path / "c"))) == 18 and len(open_data(str(tmp_path / "c"), "test")) == 2
    make_parquet(tmp_path / "d", {"train": 4, "test": 2, "unlabeled": 7}, label=None)
    assert len(open_data(str(tmp_path / "d"), "unlabeled")) == 7
    with pytest.raises(UserError, match="no split 'extra'; it has test, train, unlabeled"):
        open_data(str(tmp_path / "d"), "extra")


@pytest.mark.parametrize("budget", [4 << 30, 0])
def test_several_splits_as_one(tmp_path, budget) -> None:
    root = str(make_parquet(tmp_path / "a", {"train": 5, "test": 2, "unlabeled": 7}))
    parts = [open_data(root, split, memory_budget=budget) for split in ("train", "unlabeled")]
    lines: list[str] = []
    both = open_data(root, "train+unlabeled", memory_budget=budget, log=lines.append)
    assert not lines  # nothing is left unread
    assert len(both) == 12 and len({both.fingerprint, *(part.fingerprint for part in parts)}) == 3
    assert both.labels.tolist() == [*parts[0].labels.tolist(), *parts[1].labels.tolist()]
    whole = torch.cat([part.eval_images(0, len(part), 24) for part in parts])
    assert torch.equal(both.eval_images(0, 12, 24), whole)
    few = open_data(root, "train+unlabeled", memory_budget=budget, limit=6)  # of both
    found = [(whole == image).flatten(1).all(1).nonzero()[0].item() for image in few.eval_images(0, 6, 24)]
    assert found == sorted(found) and min(found) < 5 <= max(found)
    with pytest.raises(UserError, match="no split 'extra'; it has test, train, unlabeled"):
        open_data(root, "train+extra")
    for split, name in (("train", "cat"), ("test", "cat")):
        write(tmp_path / "b" / split / name / "0.png", encoded(0))
    with pytest.raises(UserError, match="no split 'unlabeled'"):
        open_data(str(tmp_path / "b"), "train+unlabeled")


def test_an_unlabeled_split_beside_a_labeled_one(tmp_path) -> None:
    write(tmp_path / "train" / "cat" / "0.png", encoded(0))
    write(tmp_path / "train" / "dog" / "0.png", encoded(0))
    write(tmp_path / "test" / "0.png", encoded(0))
    both = open_data(str(tmp_path), "train+test")
    assert both.labels.tolist() == [0, 1, -1] and both.class_names == ["cat", "dog"]


def test_parquet_label_columns(tmp_path) -> None:
    extra = {"kind": ["x", "y", "x"], "number": [4, 7]}
    root = make_parquet(tmp_path / "a", {"train": 6, "test": 4}, extra=extra)
    kinds = open_data(str(root), label_column="kind")
    assert kinds.labels.tolist() == [0, 1, 0] * 2 and kinds.class_names == ["x", "y"] and kinds.label_name == "kind"
    numbers = open_data(str(root), label_column="number")
    assert numbers.labels.tolist() == [0, 1] * 3 and numbers.class_names == ["4", "7"]
    with pytest.raises(UserError, match="no such column; it has img, label, kind, number"):
        open_data(str(root), label_column="breed")
    with pytest.raises(UserError, match="--image-column pic: .* no such column; it has img, label, kind, number"):
        open_data(str(root), image_column="pic")
    with pytest.raises(UserError, match="holds string, not encoded images"):
        open_data(str(root), image_column="kind")
    with pytest.raises(UserError, match="holds struct.*, not integers or strings"):
        open_data(str(root), label_column="img")
    assert open_data(str(make_parquet(tmp_path / "b", {"train": 5, "test": 2}, label=None))).labels is None


def test_labels_below_zero_are_none(tmp_path) -> None:
    """STL-10's unlabeled images and ImageNet's test split on the hub carry -1."""
    minus = {"target": [-1]}
    root = make_parquet(tmp_path / "a", {"train": 6, "test": 4}, label=None, extra=minus)
    assert open_data(str(root)).labels is None and len(open_data(str(root), "test")) == 4
    make_parquet(tmp_path / "b", {"train": 6, "validation": 5}, label=None, extra={"target": [0, 1]})
    make_parquet(tmp_path / "b", {"test": 4}, label=None, extra=minus)
    assert len(open_data(str(tmp_path / "b"), "test")) == 5  # the labeled split serves as test


def test_parquet_without_hints_is_found_by_name_or_explained(tmp_path) -> None:
    data = [encoded(i) for i in range(8)]
    (tmp_path / "a").mkdir()
    table = pa.table({"image": pa.array(data, pa.binary()), "y": pa.array([0, 1] * 4, pa.int32())})
    pq.write_table(table, tmp_path / "a" / "train.parquet", row_group_size=3)
    store = open_data(str(tmp_path / "a"), memory_budget=1)
    assert len(store) == 8 - 1 and store.label_name == "y" and store.read(0).shape == (3, 24, 24)
    (tmp_path / "b").mkdir()
    pq.write_table(table.rename_columns(["blob", "y"]), tmp_path / "b" / "train.parquet")
    with pytest.raises(UserError, match="no column holds images; its columns are blob, y; name one"):
        open_data(str(tmp_path / "b"))
    assert len(open_data(str(tmp_path / "b"), image_column="blob")) == 7
    write(tmp_path / "c" / "train.parquet", b"no parquet at all")
    with pytest.raises(UserError, match="cannot read the parquet files in "):
        open_data(str(tmp_path / "c"))


@pytest.mark.parametrize("budget", [4 << 30, 100], ids=["resident", "stream"])
def test_corrupt_row_is_named(tmp_path, budget: int) -> None:
    root = make_parquet(tmp_path, {"train": 40, "test": 2}, bad=34)
    with pytest.raises(UserError, match=f"cannot read an image, row 34 of split 'train' of {root}: "):
        store = open_data(str(root), memory_budget=budget)
        loader = ViewLoader(store, RECIPE, batch_size=8, seed=0)
        for step in range(loader.steps_per_epoch):
            loader(step)


# ---- splits and classes by name --------------------------------------------------------------------------------------


def test_split_words_are_those_of_datasets() -> None:
    from datasets.data_files import SPLIT_KEYWORDS

    assert {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()} == SPLIT_WORDS


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"),
        ("train2017", "train"),
        ("birds-train.parquet", "train"),
        ("test_set", "test"),
        ("TESTING", "test"),
        ("my eval 2", "test"),
        ("dev", "validation"),
        ("trainer", None),
        ("contest", None),
        ("unlabeled", None),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("folders", "train", "test", "notice"),
    [
        (
            ["Training/cat 4", "Training/dog 4", "Testing/cat 2", "Testing/dog 2"],
            (8, ["cat", "dog"]),
            (4, ["cat", "dog"]),
            "Testing is test, Training is train",
        ),
        (
            ["birds/train/cat 4", "birds/train/dog 4", "birds/val/cat 2"],
            (8, ["cat", "dog"]),
            (2, ["cat", "dog"]),
            "all images are in birds/",
        ),
        (["a/b/cat 10", "a/b/dog 10"], (18, ["cat", "dog"]), (2, ["cat", "dog"]), "all images are in a/b/"),
        (
            ["bus 10", "car 10", "train 10"],
            (27, ["bus", "car", "train"]),
            (3, ["bus", "car", "train"]),
            "train is read as a class, not as a split, as it is beside bus, car",
        ),
        (["train/a 4", "train/b 4", "dev/a 2", "dev/b 2"], (8, ["a", "b"]), (4, ["a", "b"]), "'validation' serves"),
        (["train/train 8", "test/test 4"], (8, None), (4, None), ""),
        (
            ["training_set/a 4", "training_set/b 4", "test_set/a 2"],
            (8, ["a", "b"]),
            (2, ["a", "b"]),
            "test_set is test",
        ),
        (
            ["train/a 3", "train/b 3", "test/b 1", "unlabeled 9"],
            (6, ["a", "b"]),
            (1, ["a", "b"]),
            "not read, as neither training nor test images: 'unlabeled' (9 images)",
        ),
        (
            ["cat/train 4", "cat/test 2", "dog/train 4", "dog/test 2"],
            (8, ["cat", "dog"]),
            (4, ["cat", "dog"]),
            "splits by the names of the folders below",
        ),
        (["train/a 10", "train/b 10", "logos 2"], (18, ["a", "b"]), (2, ["a", "b"]), "'logos' (2 images)"),
        (
            ["train/a 3", "train/b 3", "test/a 2", ". 2"],
            (6, ["a", "b"]),
            (2, ["a", "b"]),
            "images beside the folders of the splits are not read (2): 0.png, 1.png",
        ),
        (
            ["train/a 3", "train/b 3", "train 1", "test/a 2"],
            (7, ["a", "b"]),
            (2, ["a", "b"]),
            "images of 'train' beside the folders of its classes have no label (1): 0.png",
        ),
        (["a 2", "b 2", ". 6"], (9, None), (1, None), "6 images of 'train' are in no folder and 4 in a, b"),
        (["train/all 8", "test/all 4"], (8, None), (4, None), "all folders of 'train' are one, all"),
        (
            ["train/a/1 3", "train/a/2 3", "train/b 3", "test/a 3"],
            (9, ["a", "b"]),
            (3, ["a", "b"]),
            "classes of 'train' are the 2 folders of the first level; the 2 folders below them",
        ),
    ],
)
def test_splits_and_classes_of_folders(tmp_path, folders: list[str], train: tuple, test: tuple, notice: str) -> None:
    seed = 0
    for folder, count in (entry.rsplit(" ", 1) for entry in folders):
        for i in range(int(count)):
            write(tmp_path / folder / f"{i}.png", encoded(seed := seed + 1))
    lines: list[str] = []
    stores = [open_data(str(tmp_path), split, log=lines.append) for split in ("train", "test")]
    assert [(len(store), store.class_names) for store in stores] == [train, test], lines
    assert notice in "\n".join(lines) and all(line.startswith(f"{tmp_path}: ") for line in lines), lines
    for store in stores:
        assert store.labels is None or set(store.labels.tolist()) <= set(range(-1, len(store.class_names)))


def test_an_image_beside_its_classes_is_trained_on_without_a_label(tmp_path) -> None:
    root = make_folder(tmp_path, {"train": 4, "test": 2})
    write(root / "train" / "overview.png", encoded(99))
    lines: list[str] = []
    store = open_data(str(root), label_column="folder", log=lines.append)
    assert sorted(store.labels.tolist()) == [-1, *[0] * 4, *[1] * 4]
    assert any("1 of the 9 images of 'train' have no label" in line for line in lines)
    assert len(open_data(str(make_folder(tmp_path / "u", {"train": 2, "test": 1, "unlabeled": 3})), "unlabeled")) == 6


def test_notices_are_said_once_and_command_no_terminal() -> None:
    lines: list[str] = []
    say = once(lines.append)
    for text in ("\x1b[2Ja.png\n", "b", "b"):
        say(text)
    assert lines == ["?[2Ja.png?", "b"]


def small_parquet(path: Path, labels: object, name: str = "label", image: str = "image", seed: int = 0) -> None:
    """A file of as many pictures as labels: an arrow array, or a list for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    pictures = pa.array([encoded(seed + i, 8, 8) for i in range(len(labels))], pa.binary())
    pq.write_table(pa.table({image: pictures, name: labels}), path)


@pytest.mark.parametrize(
    ("files", "sizes"),
    [
        (("birds-train.parquet", "birds-test.parquet"), {"train": 4, "test": 4}),
        (("birds-0.parquet", "fish-0.parquet"), {"train": 8}),
        (("train.parquet", "test.parquet", "unlabeled.parquet"), {"train": 4, "test": 4, "unlabeled": 4}),
        (("extra-00000-of-00001.parquet", "train-00000-of-00001.parquet"), {"extra": 4, "train": 4}),
        (("Training/0000.parquet", "Testing/0000.parquet"), {"train": 4, "test": 4}),
        (("data/photos_dev.parquet", "data/photos_train.parquet"), {"validation": 4, "train": 4}),
    ],
)
def test_splits_of_parquet_files_follow_the_rule_of_datasets(tmp_path, files: tuple, sizes: dict[str, int]) -> None:
    for file in files:
        small_parquet(tmp_path / file, [0, 1, 0, 1])
    for split, n in sizes.items():
        assert len(open_data(str(tmp_path), split, hold_out="never")) == n
    with pytest.raises(UserError, match="no split 'other'; it has (.*)") as caught:
        open_data(str(tmp_path), "other")
    assert sorted(str(caught.value).split("it has ")[1].split(", ")) == sorted(sizes)


CAT, DOG, OWL = "cat", "dog", "owl"


@pytest.mark.parametrize(
    ("train", "test", "names", "numbers"),
    [
        ([20240131, 20240201, 20240131], [20240201], ["20240131", "20240201"], ([0, 1, 0], [1])),
        ([10, 9, 1300723], [9, 8], ["8", "9", "10", "1300723"], ([2, 1, 3], [1, 0])),
        (pa.array([2**63, 2**63 + 1], pa.uint64()), [], [str(2**63), str(2**63 + 1)], ([0, 1], None)),
        ([1.0, None, 0.0], [1.0], ["0", "1"], ([1, -1, 0], [1])),
        ([-1, 1, 0], [1], ["0", "1"], ([-1, 1, 0], [1])),
        ([True, False], [True], ["False", "True"], ([1, 0], [1])),
        ([OWL, None, "", CAT], [DOG], [CAT, DOG, OWL], ([2, -1, -1, 0], [1])),
        ([b"owl", b"cat"], [CAT], [CAT, OWL], ([1, 0], [0])),
        (pa.array([OWL, CAT]).dictionary_encode(), [OWL], [CAT, OWL], ([1, 0], [1])),
        (pa.array([OWL, CAT], pa.string_view()), pa.array([OWL], pa.large_string()), [CAT, OWL], ([1, 0], [1])),
    ],
)
def test_labels_are_compared_by_name(tmp_path, train, test, names: list[str], numbers: tuple) -> None:
    small_parquet(tmp_path / "train.parquet", train)
    if len(test):
        small_parquet(tmp_path / "test.parquet", test)
    for split, wanted in zip(("train", "test"), numbers, strict=True):
        if wanted is not None:
            store = open_data(str(tmp_path), split, hold_out="never")
            assert (store.class_names, store.labels.tolist()) == (names, wanted)


def test_class_lists_that_differ_are_compared_by_name(tmp_path) -> None:
    def labeled(path: Path, names: list[str] | None, labels: list) -> None:
        features = {"image": datasets.Image()}
        if names is not None:
            features["label"] = datasets.ClassLabel(names=names)
        columns = {"image": [{"bytes": encoded(i, 8, 8), "path": None} for i in range(len(labels))], "label": labels}
        if names is None:
            features["label"] = datasets.Value("string" if isinstance(labels[0], str) else "int64")
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)

    def test_labels(root: Path) -> tuple[list[str], list[int]]:
        train, test = open_data(str(root)), open_data(str(root), "test")
        assert train.class_names == test.class_names and train.labels.tolist() == [0, 1, 2]
        return test.class_names, test.labels.tolist()

    for name, names, labels, wanted in (
        ("fewer", [OWL, CAT], [0, 1], ([DOG, CAT, OWL], [2, 1])),
        ("more", ["ant", OWL], [0, 1], ([DOG, CAT, OWL, "ant"], [3, 2])),
        ("texts", None, [OWL, "bee"], ([DOG, CAT, OWL, "bee"], [2, 3])),
        ("places", None, [2, 0], ([DOG, CAT, OWL], [2, 0])),  # written by a program that dropped the names
    ):
        labeled(tmp_path / name / "train.parquet", [DOG, CAT, OWL], [0, 1, 2])
        labeled(tmp_path / name / "test.parquet", names, labels)
        assert test_labels(tmp_path / name) == wanted
    labeled(tmp_path / "shards" / "train-00000-of-00002.parquet", [CAT, DOG], [0, 1])
    labeled(tmp_path / "shards" / "train-00001-of-00002.parquet", [DOG, CAT], [0, 1])
    with pytest.raises(UserError, match="00001-of-00002.parquet numbers the classes of its column 'label' otherwise"):
        open_data(str(tmp_path / "shards"))


def test_label_columns_are_found_whatever_their_case_and_splits_may_lack_them(tmp_path) -> None:
    small_parquet(tmp_path / "train.parquet", [0, 1, 1], "Label", "Image")
    small_parquet(tmp_path / "test.parquet", [3, 4], "id", "Image")
    small_parquet(tmp_path / "validation.parquet", [1, 0], "Label", "Image")
    store = open_data(str(tmp_path))
    assert store.labels.tolist() == [0, 1, 1] and store.label_name == "Label"
    assert open_data(str(tmp_path), "test").labels.tolist() == [1, 0]  # the split with labels


@pytest.mark.parametrize(
    ("labels", "notice"),
    [
        ([[1, 0], [0, 1]], "the column 'label' holds list<.*>, which are no classes: it is not read"),
        ([0.25, 1.5], "the column 'label' is not read as labels: .* numbers such as 0.25, which are no classes"),
        ([b"\xff\xfe", b"a"], "the column 'label' is not read as labels: .* bytes that are no text"),
    ],
)
def test_columns_that_are_no_classes_are_named_and_not_read(tmp_path, labels: list, notice: str) -> None:
    small_parquet(tmp_path / "train.parquet", labels)
    lines: list[str] = []
    assert open_data(str(tmp_path), hold_out="labeled", log=lines.append).labels is None
    assert any(re.search(notice, line) for line in lines), lines
    with pytest.raises(UserError, match="--label-column|no classes|no text"):
        open_data(str(tmp_path), label_column="label")


def test_a_class_beyond_its_names_is_named(tmp_path) -> None:
    make_parquet(tmp_path, {"train": 4, "test": 2})
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet")
    table = table.set_column(1, table.schema.field("label"), pa.array([0, 1, 7, 2], pa.int64()))
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match="row 2 of the split 'train' .* has the class 7 in its column 'label', .* for 3"
    ):
        open_data(str(tmp_path), label_column="label")


# ---- decoding, evaluation geometry, limit, fingerprint ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("BMP", "RGB"),
        ("GIF", "P"),
        ("WEBP", "RGB"),
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("TIFF", "RGB"),
    ],
)
def test_decode_reads_every_common_format(kind: str, mode: str) -> None:
    data = encoded(7, 21, 33, kind, mode)
    image = decode(bytearray(data))
    assert image.shape == (3, 21, 33) and image.dtype == torch.uint8
    with Image.open(io.BytesIO(data)) as picture:
        want = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert (image.int() - want.int()).abs().max() <= (3 if kind == "JPEG" else 0)


def test_decode_scales_16_bit_gray() -> None:
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    image = decode(bytearray(buffer.getvalue()))
    assert torch.equal(image, torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1))


@pytest.mark.parametrize("shape", [(300, 400), (333, 200), (256, 256), (224, 300), (90, 120), (32, 32)])
@pytest.mark.parametrize("size", [32, 160, 224])
def test_eval_geometry_equals_torchvision(shape: tuple[int, int], size: int) -> None:
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = eval_geometry(images, size)
    if shape == (size, size):
        assert torch.equal(got, images)
        return
    resized = TF.resize(images, [{32: 32, 160: 183, 224: 256}[size]], antialias=True)
    assert torch.equal(got, TF.center_crop(resized, [size, size]))


def test_eval_images_of_store_and_stream_are_equal(tmp_path) -> None:
    root = make_folder(tmp_path, {"train": 6, "test": 1}, height=30, width=45)
    store, stream = open_data(str(root)), open_data(str(root), memory_budget=1)
    for size in (24, 30, 200):
        assert torch.equal(store.eval_images(2, 9, size), stream.eval_images(2, 9, size))
    assert stream.eval_images(10, 50, 24).shape == (2, 3, 24, 24)  # as slicing does


def test_limit_is_a_fixed_nested_subset_in_order(tmp_path) -> None:
    root = make_folder(tmp_path, {"train": 30, "test": 1})
    everything = open_data(str(root)).images.flatten(1)

    def rows(limit: int) -> list[int]:
        images = open_data(str(root), limit=limit).images.flatten(1)
        return [int((everything == image).all(1).nonzero()) for image in images]

    ten, twenty = rows(10), rows(20)
    assert len(ten) == 10 and ten == sorted(ten) and ten == rows(10) and set(ten) < set(twenty)
    assert ten != list(range(10)) and len(set(open_data(str(root), limit=20).labels.tolist())) == 2
    assert len(open_data(str(root), limit=1000)) == 60
    with pytest.raises(UserError, match="--limit 0"):
        open_data(str(root), limit=0)


def test_fingerprint_follows_content_not_place(tmp_path) -> None:
    a = make_folder(tmp_path / "a", {"train": 5, "test": 1})
    b = make_folder(tmp_path / "elsewhere" / "b", {"train": 5, "test": 1})
    prints = [open_data(str(a)).fingerprint]
    assert prints[0] == open_data(str(b)).fingerprint
    prints += [open_data(str(a), "test").fingerprint, open_data(str(a), limit=9).fingerprint]
    (b / "train" / "bee").rename(b / "train" / "aaa")  # other labels and order
    prints.append(open_data(str(b)).fingerprint)
    write(a / "train" / "ant" / "000.png", encoded(77))  # other pixels
    prints.append(open_data(str(a)).fingerprint)
    assert len(set(prints)) == len(prints)
    files = sorted((a / "train").glob("*/*.png"))
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [0] * 5 + [1] * 5},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}),
    )
    (tmp_path / "p").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "p" / f"{split}.parquet")
    assert open_data(str(tmp_path / "p")).fingerprint == prints[-1]  # the same images and labels in another form


# ---- names and the hub -----------------------------------------------------------------------------------------------


def test_a_folder_in_the_shadow_of_a_known_name_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pairs", {"train": 3, "test": 1})
    lines: list[str] = []
    assert len(open_data("pairs", "test", limit=5, log=lines.append)) == 5
    assert lines == ["--data pairs is a known name: the folder here is not read, which is --data ./pairs"]
    assert len(open_data("./pairs")) == 6


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    make_parquet(tmp_path / "set", {"train": 4, "test": 2})
    blocked = write(tmp_path / "file", b"")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(blocked / "cache"))
    with pytest.raises(
        UserError, match="cannot read the parquet files in .*set HF_HOME to a folder that can be written"
    ):
        open_data(str(tmp_path / "set"))


def test_unknown_name_suggests_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"no such data \(did you mean cifar10\?\); give one of pairs, shapes, .* a folder"
    ):
        open_data("cifra10")


@pytest.mark.parametrize("spec", ["cifar10", "no-one/nothing"])
def test_without_network_the_offline_specs_are_named(monkeypatch, spec: str) -> None:
    # What HF_HUB_OFFLINE=1 sets, had it been there when the hub's client was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    lines: list[str] = []
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_data(spec, log=lines.append)
    assert time.monotonic() - start < 5  # retries on a network that is there or not would take 23 s
    hub_id = {"cifar10": "uoft-cs/cifar10"}.get(spec, spec)
    assert len(lines) == 1 and lines[0].startswith(f"looking for {hub_id} on the Hugging Face hub")
    message = str(caught.value)
    assert message.startswith(f"--data {spec}: cannot load {hub_id} from the Hugging Face hub (ConnectionError: ")
    assert "\n" not in message and message.endswith(
        "without a network these work: `--data pairs` (rendered, needs no file), an image folder, or a directory of "
        "parquet files"
    )


# ---- the loader ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[ImageStore, ImageStream]:
    """The same 30 images resident and streamed."""
    root = make_folder(tmp_path_factory.mktemp("pair"), {"train": 15, "test": 1})
    return open_data(str(root)), open_data(str(root), memory_budget=1)


def test_an_epoch_visits_each_image_once(pair) -> None:
    loader = ViewLoader(pair[0], RECIPE, batch_size=8, seed=3)
    assert loader.steps_per_epoch == 3  # 30 images, the last 6 of the order are left out
    epochs = [torch.cat([loader(step).indices for step in range(3 * e, 3 * e + 3)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 24 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0][:8], ViewLoader(pair[0], RECIPE, batch_size=8, seed=4)(0).indices)
    batch = loader(4)
    assert torch.equal(batch.labels, pair[0].labels[batch.indices])
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 16, 16), (8, 3, 16, 16), (8, 3, 8, 8)]
    assert not torch.equal(batch.views[0], batch.views[1])


def test_views_are_the_recipe_applied_to_the_indexed_images(pair) -> None:
    from common.rng import generator

    batch = ViewLoader(pair[0], RECIPE, batch_size=8, seed=3)(5)
    want = RECIPE(pair[0].images[batch.indices], RECIPE.sample(8, generator(3, "views", 5)))
    assert all(torch.equal(a, b) for a, b in zip(batch.views, want, strict=True))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_stream_equals_resident_whatever_was_asked_before(pair, workers: int, prefetch: int) -> None:
    resident = ViewLoader(pair[0], RECIPE, batch_size=8, seed=3)
    stream = ViewLoader(pair[1], RECIPE, batch_size=8, seed=3, workers=workers, prefetch=prefetch)
    for step in (0, 1, 2, 3, 100, 101, 4, 4, 7):  # straight on, into another epoch, a jump, back, twice the same
        assert_same(stream(step), resident(step))
    assert_same(ViewLoader(pair[1], RECIPE, batch_size=8, seed=3, workers=workers)(101), resident(101))
    stream.close()


@pytest.mark.parametrize("index", [0, 1], ids=["resident", "stream"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_concatenate_to_the_global_batch(pair, index: int, world_size: int) -> None:
    store = pair[index]
    one = ViewLoader(store, RECIPE, batch_size=8, seed=1)
    ranks = [ViewLoader(store, RECIPE, batch_size=8, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for step in (0, 5):
        whole, parts = one(step), [rank(step) for rank in ranks]
        joined = [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]
        labels = torch.cat([part.labels for part in parts])
        assert_same(Batch(joined, torch.cat([part.indices for part in parts]), labels), whole)


def test_loader_mistakes(pair) -> None:
    for kwargs, message in [
        ({"batch_size": 9, "world_size": 2}, "--batch-size 9 .* divisible by the 2 processes"),
        ({"batch_size": 31}, "--batch-size 31 is larger than the data: .* has 30 images"),
        ({"batch_size": 1}, "--batch-size 1: at least 2"),
    ]:
        with pytest.raises(UserError, match=message):
            ViewLoader(pair[0], RECIPE, seed=0, **kwargs)
    for store in pair:
        with pytest.raises(UserError, match="views of 32 pixels .* shorter side of 24: use --image-size 24 or less"):
            ViewLoader(store, WindowRecipe(16, 32), batch_size=4, seed=0)
    with pytest.raises(UserError, match="--workers 0"):
        ViewLoader(pair[1], RECIPE, batch_size=4, seed=0, workers=0)


def test_threads_end_with_the_loader_and_leave_torch_its_own(pair) -> None:
    def alive() -> int:
        return sum(thread.name.startswith("images") for thread in threading.enumerate())

    before, intra_op = alive(), torch.get_num_threads()
    loader = ViewLoader(pair[1], RECIPE, batch_size=8, seed=0, workers=3)
    assert torch.get_num_threads() == intra_op and alive() == before + 3
    inside = loader._pool.submit(lambda: (torch.rand(1000, 1000).to(torch.uint8).sum(), torch.get_num_threads())[1])
    assert inside.result() == 1
    loader(0)
    loader.close()
    assert alive() == before
    forgotten = ViewLoader(pair[1], RECIPE, batch_size=8, seed=0, prefetch=2)
    forgotten(0)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("images")]
    del forgotten
    for thread in threads:
        thread.join(timeout=10)
    assert alive() == before


def test_an_image_is_decoded_once_for_all_views(pair, monkeypatch) -> None:
    reads: list[int] = []
    read = ImageStream.read

    def counted(self: ImageStream, i: int) -> Tensor:
        reads.append(i)
        return read(self, i)

    monkeypatch.setattr(ImageStream, "read", counted)
    loader = ViewLoader(pair[1], RECIPE, batch_size=8, seed=0)
    assert sorted(reads + loader(0).indices.tolist()) == sorted(2 * reads) and len(reads) == 8
    loader.close()


def test_error_waits_for_its_step(tmp_path) -> None:
    """A corrupt image that was prepared ahead stops the step that needs it, not the one before."""
    root = make_parquet(tmp_path, {"train": 40, "test": 2}, bad=34)
    loader = ViewLoader(open_data(str(root), memory_budget=1), RECIPE, batch_size=8, seed=0, prefetch=2)
    bad = next(step for step in range(5) if 34 in loader.indices(step))
    for step in range(5):
        if step == bad:
            with pytest.raises(UserError, match="row 34"):
                loader(step)
        else:
            loader(step)
    loader.close()


def test_the_real_recipe_runs_both_ways(pair) -> None:
    from common.views.recipe import ViewRecipe
    from common.views.spec import View

    recipe = ViewRecipe(
        [View(size=24, scale=(0.3, 1.0), color_jitter_prob=0.8, hue=0.2), View(size=16, scale=(0.3, 1.0))]
    )
    resident = ViewLoader(pair[0], recipe, batch_size=8, seed=3)
    stream = ViewLoader(pair[1], recipe, batch_size=8, seed=3)
    for step in (0, 4):
        a, b = resident(step), stream(step)
        assert [tuple(view.shape) for view in b.views] == [(8, 3, 24, 24), (8, 3, 16, 16)]
        for x, y in zip(a.views, b.views, strict=True):  # the stream's crop is rounded to 8 bits before the colors
            assert (x - y).abs().mean() < 0.01
    stream.close()
