"""Files from outside are data: whatever is smuggled into one is refused, and nothing in it runs."""

import io
import json
import os
import pickle
import resource
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from common import checkpoint
from common.backbones import BackboneSpec, create_backbone, export_backbone, load_backbone
from common.checkpoint import MANIFEST, STATE
from common.data import decode, open_data
from common.errors import UserError
from common.log import read_metrics
from common.run import read_config
from common.sources import LARGEST_FILE
from common.weights import read_weights
from eval.card import load_cards, read_card
from eval.load import load_foreign, run_record

TINY = BackboneSpec("resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that must not exist afterwards."""
    path = tmp_path / "code ran"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()  # the bomb works
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def exported(tmp_path):
    export_backbone(tmp_path / "run", create_backbone(TINY), TINY)
    return tmp_path / "run"


def test_checkpoints(mark, tmp_path):
    for step, bomb in ((1, {"weights": torch.zeros(2)}), (2, {"weights": torch.zeros(2), "x": Bomb(mark)})):
        checkpoint.save(tmp_path, step, bomb)
    lines = []
    assert checkpoint.load_newest(tmp_path, lines.append)[0] == 1
    assert "step-00000002 cannot be used" in lines[0] and "which is code and not data" in lines[0]
    path = checkpoint.path_of(tmp_path, 1)
    (path / MANIFEST).write_text(json.dumps({"step": 1, "bytes": 3, "blake2b": {"__reduce__": "os.system"}}))
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoint.load_newest(tmp_path, lines.append)
    assert (path / STATE).exists()


@pytest.mark.parametrize("write", [torch.save, lambda x, path: Path(path).write_bytes(pickle.dumps(x))])
def test_weights_from_elsewhere(mark, tmp_path, write):
    for name in ("mae.pth", "model.safetensors", "pytorch_model.bin"):
        write({"model": {"patch_embed.proj.weight": Bomb(mark)}}, tmp_path / name)
        with pytest.raises(UserError, match=rf"--init-from .*{name}.*cannot be read"):
            read_weights(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read"):  # a folder in timm's layout
        read_weights(str(tmp_path))
    write({"model": {"weight": torch.zeros(2, 2), "x": Bomb(mark)}}, tmp_path / "mixed.pth")
    with pytest.raises(UserError, match=r"mixed\.pth cannot be read as weights"):
        load_foreign("resnet18", str(tmp_path / "mixed.pth"))


def test_a_pickle_named_safetensors(mark, exported):
    torch.save({"conv1.weight": Bomb(mark)}, exported / "backbone.safetensors")
    with pytest.raises(UserError, match="truncated or not safetensors"):
        load_backbone(exported)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "{code}"},
        {"name": "resnet18(pretrained={code})"},
        {"stem": "{code}"},
        {"stem_width": "{code}"},
        {"layers": ["{code}"] * 4},
        {"channels": "[{code}]"},
        {"norm": "{code}"},
        {"image_size": "{code}"},
        {"mean": ["{code}"] * 3},
        {"arguments": {"drop_path_rate": "{code}"}},
        {"arguments": {"{code}": 1}},
        {"arguments": {"img_size=32, x={code}": 1}},
        {"arguments": {"pretrained_cfg_overlay": {"url": "http://localhost/x"}}},
        {"arguments": {"pretrained_cfg": {"url": "http://localhost/x"}}},
        {"arguments": {"checkpoint_path": "/etc/passwd"}},
        {"encoder": "os:system"},
        {"rebuild_with": "{code}"},
    ],
)
def test_descriptions_of_a_backbone(mark, exported, change):
    path = exported / "backbone.json"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    text = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text.replace("{code}", code.replace("\\", "\\\\").replace('"', '\\"')))
    with pytest.raises(UserError, match=r"backbone\.json|no model|no encoder|unknown"):
        load_backbone(exported)


def test_the_lines_that_rebuild_a_backbone_are_for_people(mark, exported):
    path = exported / "backbone.json"
    content = json.loads(path.read_text())
    content["rebuild"] = [f"__import__('pathlib').Path({str(mark)!r}).touch()"]
    path.write_text(json.dumps(content))
    load_backbone(exported)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '"x"', "{", "", "[" * 100_000, '{"config": 3}', '{"seed": {"a": 1}}']
)
def test_records_of_a_run(tmp_path, text):
    """Settings, cards and metrics of the wrong kind, cut short or nested without end are refused in a sentence."""
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (tmp_path / name).write_text(text)
    for read in (read_config, lambda folder: read_card(folder / "result.json")):
        with pytest.raises(UserError, match=r"(config|result)\.json"):
            read(tmp_path)
    with pytest.raises(UserError, match=r"result\.json"):
        load_cards([tmp_path / "result.json"])
    if text not in ('{"config": 3}',):
        with pytest.raises(UserError, match=r"config\.json"):
            run_record(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"step": 1}}\n')
    if text:
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
            read_metrics(tmp_path / "metrics.jsonl")


def table(folder: Path, cells: list, kind: pa.DataType) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": [0] * len(cells)}), folder / "train.parquet")
    return folder


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_rows_that_name_files_elsewhere(tmp_path):
    """A table of strangers reads files of its own folder, and no other of this machine."""
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "private.png")
    for number, path in enumerate((str(tmp_path / "private.png"), "../private.png")):
        folder = table(tmp_path / f"outside{number}", [{"bytes": None, "path": path}] * 4, STRUCT)
        with pytest.raises(UserError, match="outside of the data's folder"):
            open_data(str(folder), "train", image_column="image").eval_images(0, 4, 8)
    folder = table(tmp_path / "inside", [{"bytes": None, "path": "own.png"}] * 4, STRUCT)
    Image.new("RGB", (8, 8), (0, 200, 0)).save(folder / "own.png")
    images = open_data(str(folder), "train", image_column="image").eval_images(0, 1, 8)
    assert images[0, 1].float().mean() == 200


def test_formats_that_start_programs(tmp_path):
    """EPS would be handed to Ghostscript; PIL is told which formats there are."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\nshowpage\n"
    with pytest.raises(ValueError, match="not an image, or of a format that is not read"):
        decode(bytearray(script))
    folder = table(tmp_path / "eps", [script] * 4, pa.binary())
    with pytest.raises(UserError, match="row 0"):
        open_data(str(folder), "train", image_column="image").eval_images(0, 4, 8)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file of a header and compressed bytes, whatever these hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB", size: int = 32) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 60).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"not an image at all", r"it is not an image, or of a format that is not read \(BMP, .* WEBP are\)"),
        (saved("JPEG")[:300], "it is truncated or damaged"),
        (saved("PNG")[:60], "it is truncated or damaged"),
        (saved("PNG")[:20], "it is truncated or damaged"),
        (saved("WEBP")[:40], "it is truncated or damaged"),
        (saved("TIFF")[:30], "it is truncated or damaged"),
        (saved("GIF")[:100], "it is truncated or damaged"),
        (saved("TIFF", "F"), "its mode F, floating-point pixels, is not supported"),
        (png(16_000, 16_000, bytes(10**7)), "it is too large: 16000 x 16000 pixels, more than 89,478,485"),
        (b"P6 20000 20000 255\n", "it is too large"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff" + bytes(40), "it is too large: 65535 x 65535"),
    ],
)
def test_reasons_for_unreadable_images_are_words(tmp_path, data, reason):
    """Empty, truncated, no image, too large, a mode: never an object's address, and nothing is decoded for its size."""
    folder = tmp_path / "data"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / split / "good.png")
    (folder / "train" / "bad.png").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"bad.png: {reason}.*; replace or remove it$") as caught:
        open_data(str(folder), "train")
    assert " object at 0x" not in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10  # KiB


@pytest.mark.parametrize("kind", ["jpg", "parquet"])
def test_pipes_and_devices_are_named_and_not_waited_for(tmp_path, kind):
    for make, what in ((os.mkfifo, "a pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")):
        folder = tmp_path / what.split()[1]
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        make(folder / f"train.{kind}")
        with pytest.raises(UserError, match=f"train.{kind} is {what} and no regular file: remove it"):
            open_data(str(folder), "train", log=lambda text: None)


def test_a_row_that_names_a_pipe_or_a_huge_file(tmp_path):
    folder = table(tmp_path / "data", [{"bytes": None, "path": "own.png"}] * 4, STRUCT)
    os.mkfifo(folder / "own.png")
    with pytest.raises(UserError, match="own.png', which is not there or no regular file"):
        open_data(str(folder), "train", image_column="image")
    (folder / "own.png").unlink()
    with (folder / "own.png").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse: it takes no space
    with pytest.raises(UserError, match="it has 1,073,741,825 bytes, more than"):
        open_data(str(folder), "train", image_column="image")


def test_links_of_folders_are_read_once(tmp_path):
    """A cycle, folders that link to one another in a chain, a class that is a link to another, a link to elsewhere."""
    root = tmp_path / "data"
    for name in ("train/cat", "train/dog", "test/cat"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    (root / "train" / "cat" / "all").symlink_to(root / "train")
    (root / "train" / "itself").symlink_to("itself")
    lines = []
    store = open_data(str(root), "train", log=lines.append)
    assert store.labels.bincount().tolist() == [4, 4]
    assert any("train/cat/all is a link to a folder that is read already" in line for line in lines), lines

    (root / "train" / "cat" / "all").unlink()
    (root / "train" / "owl").symlink_to(root / "train" / "dog")
    assert open_data(str(root), "train", log=lines.append).labels.bincount().tolist() == [4, 4, 4]
    (root / "train" / "owl").unlink()

    (root / "train" / "itself.png").symlink_to("itself.png")
    with pytest.raises(UserError, match="itself.png is a link to nothing: remove it"):
        open_data(str(root), "train", log=lines.append)
    (root / "train" / "itself.png").unlink()

    depth = 25  # 2 ** 25 ways through it
    for number in range(depth):
        (tmp_path / "chain" / str(number)).mkdir(parents=True)
        for side in "lr":
            (tmp_path / "chain" / str(number) / side).symlink_to(tmp_path / "chain" / str(number + 1))
    (tmp_path / "chain" / str(depth)).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "chain" / str(depth) / "end.png")
    (root / "train" / "dog" / "chain").symlink_to(tmp_path / "chain" / "0")
    lines.clear()
    assert open_data(str(root), "train", log=lines.append).labels.bincount().tolist() == [4, 5]
    assert any("links lead out of the folder, and what they lead to is read" in line for line in lines), lines
