"""Features as a table, neighbors as a page, and backbones as folders that timm loads by itself."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from common.backbones import BackboneSpec, create_backbone, export_backbone, load_backbone
from common.data import open_data
from common.errors import UserError
from common.weights import fill, read_weights, sha256
from eval import embed, export
from eval.card import FORMAT, save_card
from eval.features import extract_features
from methods.cpc.config import PRESETS as CPC
from methods.cpc.train import build as build_cpc

VIT = BackboneSpec(
    "vit_tiny_patch16_224",
    arguments=dict(img_size=32, dynamic_img_size=True, patch_size=8, embed_dim=24, depth=2, num_heads=3),
    image_size=32,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)
RESNET = BackboneSpec("resnet18", layers=(1, 1, 1, 1), channels=(64, 16, 32, 64), image_size=32)
CIFAR = BackboneSpec("resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    export_backbone(tmp_path / "run", create_backbone(VIT), VIT)
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path):
    """24 images in two class folders, of several sizes."""
    generator = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 255, (40 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{i:02}.png")
    return tmp_path / "images"


def expected(run, images) -> torch.Tensor:
    """Features of every image of the folder, file by file."""
    backbone, spec = load_backbone(run)
    files = sorted(images.rglob("*.png"))
    pixels = torch.cat([embed.eval_geometry(embed.decode(bytearray(f.read_bytes()))[None], 32) for f in files])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    with torch.no_grad():
        return backbone((pixels / 255 - mean) / std)


def test_every_file_is_a_row_with_its_name_class_and_features(run, folder, tmp_path, capsys):
    """No tenth is held out, and the order is that of the files."""
    embed.main([str(run), str(folder), "--out", str(tmp_path / "f.parquet")])
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "split", "label", "features"]
    rows = table.to_pydict()
    assert rows["file"] == [f"{kind}/{i:02}.png" for kind in ("cat", "dog") for i in range(12)]
    assert rows["split"] == ["all"] * 24 and rows["label"] == ["cat"] * 12 + ["dog"] * 12
    features = torch.tensor(rows["features"])
    torch.testing.assert_close(features, expected(run, folder), rtol=0, atol=1e-6)
    assert table.schema.field("features").type.value_type == "float"
    about = json.loads(table.schema.metadata[b"about"])
    assert about["sha256"] == sha256(run / "backbone.safetensors") and about["pool"] == "cls"
    assert str(tmp_path) not in json.dumps(about)

    embed.main([str(run), str(folder), "--out", str(tmp_path / "f.npz")])
    arrays = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert sorted(arrays) == ["about", "features", "file", "label", "split"]
    assert arrays["features"].dtype == np.float32 and np.array_equal(arrays["features"], features.numpy())
    assert arrays["file"].tolist() == rows["file"] and arrays["label"].tolist() == rows["label"]
    assert "24 rows of 24 features" in capsys.readouterr().out


def test_rows_of_tables_and_rendered_images_have_numbers(run, tmp_path):
    embed.main([str(run), "pairs", "--out", str(tmp_path / "f.parquet"), "--splits", "test"])
    rows = pq.read_table(tmp_path / "f.parquet").to_pydict()
    store = open_data("pairs", "test", image_size=32)
    assert rows.keys() == {"row", "split", "label", "features"} and rows["row"] == list(range(2000))
    assert rows["label"] == [store.class_names[i] for i in store.labels.tolist()]
    backbone, spec = load_backbone(run)
    features = extract_features(backbone, store, image_size=32, mean=spec.mean, std=spec.std)
    torch.testing.assert_close(torch.tensor(rows["features"]), features, rtol=0, atol=1e-6)


def test_images_with_splits_and_without_labels(run, folder, tmp_path):
    for split, kind in (("train", "cat"), ("val", "dog")):
        (folder / kind).rename(folder / split)
    embed.main([str(run), str(folder), "--out", str(tmp_path / "f.npz")])
    arrays = np.load(tmp_path / "f.npz")
    assert "label" not in arrays and arrays["split"].tolist() == ["train"] * 12 + ["test"] * 12
    assert arrays["file"][0] == "train/00.png" and arrays["file"][12] == "val/00.png"


def test_neighbors_of_a_row_and_of_a_file(run, folder, tmp_path):
    """The file of row 17 finds row 17 first, with similarity 1; the row itself leaves itself out."""
    table, page = tmp_path / "f.parquet", tmp_path / "f.neighbors.html"
    embed.main([str(run), str(folder), "--out", str(table), "--neighbors", str(folder / "dog" / "05.png")])
    features = torch.tensor(pq.read_table(table).to_pydict()["features"])
    names = pq.read_table(table).to_pydict()["file"]
    unit = torch.nn.functional.normalize(features, dim=1)
    order = (unit @ unit[17]).argsort(descending=True).tolist()
    html = page.read_text()
    captions = [part.split("</figcaption>")[0] for part in html.split("<figcaption>")[1:]]
    assert captions[0] == "query" and captions[1] == "dog/05.png · dog 1.00"
    assert [text.split(" ·")[0] for text in captions[1:]] == [names[i] for i in order]
    embed.main([str(run), str(folder), "--out", str(table), "--neighbors", "17"])
    captions = [part.split("</figcaption>")[0] for part in page.read_text().split("<figcaption>")[1:]]
    assert captions[0] == "dog/05.png · dog" and len(captions) == 24
    assert [text.split(" ·")[0] for text in captions[1:]] == [names[i] for i in order if i != 17]
    assert html.count("data:image/") == 25 and "http" not in html.split("</style>")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{run}", "{data}", "--out", "f.csv"), "must end in .parquet or .npz"),
        (("resnet18", "{data}", "--out", "f.npz"), "has random weights: add --pretrained or --weights FILE"),
        (("resnet18", "{data}", "--out", "f.npz", "--pretrained", "--weights", "x"), "two sets of weights"),
        (("{run}", "{data}", "--out", "f.npz", "--normalize", "none"), "--normalize goes with --weights"),
        (("{run}", "{data}", "--out", "f.npz", "--neighbors", "24"), "the table has the rows 0 to 23"),
        (("{run}", "{data}", "--out", "f.npz", "--neighbors", "none.png"), "neither the number of a row nor an image"),
        (("{run}", "{data}", "--out", "f.npz", "--pool", "middle"), "unknown pooling"),
        (("{run}", "{data}/none", "--out", "f.npz"), "there is no such path"),
    ],
)
def test_mistakes(run, folder, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        embed.main([text.format(run=run, data=folder) for text in arguments])
    assert not list(tmp_path.glob("*f.*"))


# ---- export ----------------------------------------------------------------------------------------------------------

CARD = {
    "format": FORMAT,
    "method": "mine",
    "preset": "tiny",
    "git_commit": "abc",
    "seed": 3,
    "data": {"name": "cats | <b>dogs", "fingerprint": "f0", "train_images": 1000, "test_images": 10, "image_size": 32},
    "backbone": "vit, depth 2",
    "epochs": 20.0,
    "batch_size": 64,
    "images_seen": 20000,
    "images_per_second": 5.0,
    "initial_weights": {"name": "dino.pth", "sha256": "99ff"},
    "config": {"base_lr": 0.5},
    "evaluations": [
        {
            "protocol": "linear",
            "target": "label",
            "metric": "top-1",
            "value": 61.25,
            "settings": {},
            "text": "A linear probe.",
            "baselines": {"raw pixels": 30.0, "random init": 20.5},
        }
    ],
}


@pytest.mark.parametrize("spec", [VIT, RESNET], ids=["vit", "resnet"])
def test_timm_loads_the_folder(spec, tmp_path, capsys):
    """By timm alone, with the same features; with a new head; and as weights for a run."""
    torch.manual_seed(0)
    network = create_backbone(spec).eval()
    export_backbone(tmp_path / "run", network, spec)
    save_card(tmp_path / "run" / "result.json", CARD)
    out = tmp_path / "out"
    export.main([str(tmp_path / "run"), str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    headed = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), network(x), rtol=0, atol=1e-6)
        assert headed(x).shape == (3, 7)
        torch.testing.assert_close(headed.forward_features(x), network.forward_features(x), rtol=0, atol=1e-6)
    config = timm.data.resolve_model_data_config(theirs)
    assert (*config["mean"], *config["std"], *config["input_size"]) == (*spec.mean, *spec.std, 3, 32, 32)
    assert config["interpolation"] == "bilinear" and config["crop_pct"] == 1
    text = (out / "config.json").read_text()
    assert "license" not in text and "augreg" not in text and "a1_in1k" not in text  # nothing of timm's own weights
    weights = read_weights(str(out))
    assert weights.statistics == (spec.mean, spec.std)
    other = create_backbone(spec).eval()
    assert not fill(other, weights).missing
    with torch.no_grad():
        assert torch.equal(other(x), network(x))
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: timm\n")
    assert "| linear | label | top-1 | 61.25 | 30.00 | 20.50 |" in readme and "linear: A linear probe." in readme
    assert "| started from | dino.pth (sha256 99ff) |" in readme and '"base_lr": 0.5' in readme
    assert "cats \\| &lt;b>dogs, 1,000 images" in readme
    assert "timm.create_model" in capsys.readouterr().out


def test_the_model_cards_lines_run(run, tmp_path, monkeypatch):
    export.main([str(run), str(tmp_path / "out")])
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "It has not been evaluated." in readme
    monkeypatch.chdir(tmp_path / "out")
    scope = {"image": Image.new("RGB", (40, 50), (200, 0, 0))}
    exec(readme.split("```python\n")[1].split("```")[0], scope)
    pixels = torch.full((1, 3, 32, 32), 0.0)
    pixels[:, 0] = 200 / 255
    backbone, spec = load_backbone(run)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    torch.testing.assert_close(scope["features"], backbone((pixels - mean) / std), rtol=1e-4, atol=1e-5)


def test_networks_that_timm_cannot_build_are_refused(tmp_path, run):
    encoder, spec = build_cpc(CPC["smoke"][1])
    for name, network, described, words in (
        ("cpc", encoder.backbone, spec, "timm does not have Encoder.*eval.load.load"),
        ("cifar", create_backbone(CIFAR), CIFAR, "no argument for a cifar stem.*rebuild"),
    ):
        export_backbone(tmp_path / name, network, described)
        with pytest.raises(UserError, match=words):
            export.main([str(tmp_path / name), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist: give a run directory"):
        export.main(["resnet18", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not an empty folder"):
        export.main([str(run), str(run)])
