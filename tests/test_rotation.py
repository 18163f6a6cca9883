"""Rotation prediction against images turned by hand, and networks whose score is known."""

import json

import pytest
import torch
from torch import Tensor, nn
from torchvision.io import write_png

from common.backbones import BackboneSpec, export_backbone
from common.data import ImageStore, ImageStream, open_data
from common.errors import UserError
from eval import linear
from eval.__main__ import main
from eval.features import RawPixels, extract_features
from eval.load import random_init
from eval.protocols import DEFAULT, evaluate
from eval.rotation import TURNS, arranged, rotation_probe, sample, turned_features

STATISTICS = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
QUIET = {"log": lambda _: None}


def drawn(split: str, limit: int):
    return open_data("shapes", split=split, limit=limit, image_size=32)


def noise(count: int, seed: int, bright: int = 8) -> ImageStore:
    """Unlabelled noise with a bright square in the upper left corner."""
    images = torch.randint(200, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[:, :, :bright, :bright] = 255
    return ImageStore(images=images, name="noise", fingerprint="none")


class Corner(nn.Module):
    """Mean brightness of the upper left and the upper right corner, which tell all four turns apart."""

    def forward(self, x: Tensor) -> Tensor:
        left, right, below = x[..., :8, :8], x[..., :8, -8:], x[..., -8:, :8]
        return torch.stack([part.mean((1, 2, 3)) for part in (left, right, below)], 1)


class Average(nn.Module):
    """The mean colour: the same at every turn."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double().mean((2, 3)).float()


def test_features_are_those_of_images_turned_by_hand():
    store, count = drawn("train", 30), 7
    upright = extract_features(RawPixels(), store, **STATISTICS)
    found = turned_features(RawPixels(), store, upright, count, batch_size=3, **STATISTICS)
    assert found.shape == (7, 4, 3 * 32 * 32)
    for row, i in enumerate([0, 4, 8, 12, 17, 21, 25]):  # evenly spaced over 30
        image = (store.eval_images(i, i + 1, 32)[0].float() / 255 - 0.5) / 0.25
        for turn in range(4):
            assert torch.equal(found[row, turn], torch.rot90(image, turn, (1, 2)).flatten()), (row, turn)
            rolled = torch.empty_like(image)  # a quarter to the left: the last column becomes the first row
            for k in range(32):
                rolled[:, k] = image[:, :, 31 - k]
            image_turned = torch.rot90(image, 1, (1, 2))
            assert torch.equal(image_turned, rolled)


def test_a_sample_is_evenly_spaced_also_of_streamed_images(tmp_path):
    g = torch.Generator().manual_seed(0)
    for i in range(9):
        image = torch.randint(256, (3, 20 + i, 24), generator=g, dtype=torch.uint8)
        write_png(image, str(tmp_path / f"{i}.png"))
    streamed = open_data(str(tmp_path), split="train", log=lambda _: None)
    assert isinstance(streamed, ImageStream)
    for store in (streamed, drawn("train", 9), noise(9, 0)):
        part, index = sample(store, 4)
        assert len(part) == 4
        whole = store.eval_images(0, len(store), 20)
        assert torch.equal(part.eval_images(0, 4, 20), whole[index])
        assert torch.equal(sample(store, 100)[0].eval_images(0, 100, 20), whole)


@pytest.mark.parametrize("images", [10, 130])
@pytest.mark.parametrize("seed", [0, 7])
def test_all_turns_of_an_image_are_on_one_side_of_the_validation_split(images, seed):
    rows, turns = arranged(images, seed)
    assert turns.tolist() == [0, 1, 2, 3] * images
    assert sorted(zip(rows.tolist(), turns.tolist(), strict=True)) == [(i, t) for i in range(images) for t in range(4)]
    fit, held_out = linear.validation_split(turns, seed)
    apart = set(rows[fit].tolist()), set(rows[held_out].tolist())
    assert not apart[0] & apart[1] and len(apart[1]) == images // 10 and len(held_out) == 4 * images // 10
    assert not torch.equal(rows, arranged(images, seed + 1)[0])


def test_a_network_that_reads_corners_solves_it_and_an_invariant_one_is_at_chance():
    train, test = noise(203, 1), noise(60, 2)

    def score(module: nn.Module) -> linear.ProbeResult:
        x = [
            turned_features(module, store, extract_features(module, store, **STATISTICS), 1000, **STATISTICS)
            for store in (train, test)
        ]
        return rotation_probe(*x)

    corner = score(Corner())
    assert corner.accuracy == 100 and max(corner.validation.values()) == 100
    assert corner.predictions.tolist() == [0, 1, 2, 3] * 60
    assert abs(score(Average()).accuracy - 25) < 3


def test_row_without_labels():
    train, test = noise(105, 1), noise(45, 2)
    result = evaluate(
        Average(), train, test, protocols=["rotation", "linear"], random_init=Corner(), **QUIET, **STATISTICS
    )
    assert set(result.skipped) == {"linear"} and "rotation" not in DEFAULT
    (row,) = result.rows
    assert (row["protocol"], row["target"], row["metric"]) == ("rotation", "rotation", "top-1")
    assert abs(row["value"] - 25) < 3 and row["baselines"] == {"raw pixels": 100, "random init": 100}
    settings = row["settings"]
    assert settings["images"] == [100, 45] and settings["chance"] == 25 and settings["degrees"] == [0, 90, 180, 270]
    assert "labelled_train_images" not in settings and "standardised" in settings
    assert row["chosen"]["learning_rate"] in linear.LEARNING_RATES
    json.dumps(row, allow_nan=False)


def test_labels_change_nothing_and_the_number_is_that_of_the_function():
    stores = drawn("train", 30), drawn("test", 20)
    options = {"protocols": ["rotation"], **QUIET, **STATISTICS}
    row = evaluate(RawPixels(), *stores, **options).rows[0]
    x = [extract_features(RawPixels(), store, **STATISTICS) for store in stores]
    x = [turned_features(RawPixels(), store, part, 1000, **STATISTICS) for store, part in zip(stores, x, strict=True)]
    assert x[0].shape == (30, TURNS, 3072) and row["value"] == rotation_probe(*x).accuracy
    for store in stores:
        store.labels = store.factors = None
    assert evaluate(RawPixels(), *stores, **options).rows[0] == row


def test_too_few_images():
    with pytest.raises(UserError, match="rotation needs at least 10 training images, but there are 9"):
        rotation_probe(torch.zeros(9, 4, 3), torch.zeros(5, 4, 3))


def test_command_line(tmp_path, capsys):
    spec = BackboneSpec(
        "resnet18", stem="cifar", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8, **STATISTICS
    )
    export_backbone(tmp_path / "run", random_init(spec, 0), spec)
    main(
        [
            str(tmp_path / "run"),
            "--data",
            "shapes",
            "--limit",
            "40",
            "--protocols",
            "rotation",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "scores.json"),
        ]
    )
    assert "rotation" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "scores.json").read_text())["evaluations"]
    assert row["protocol"] == "rotation" and set(row["baselines"]) == {"raw pixels", "random init"}
