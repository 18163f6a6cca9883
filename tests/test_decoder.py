"""The feature decoder against slow, obvious versions, and its command line from exported backbones to the picture."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torchvision.io import read_image

from common.backbones import BackboneSpec, export_backbone
from common.data import open_data
from common.errors import UserError
from eval.decoder import Constants, Decoder, PixelPCA, decode, main, mean_of, sheet, squared_error, train_decoder
from eval.features import extract_features
from eval.load import load, random_init

SMALL = Constants(channels=(16, 16, 8), epochs=1, min_steps=0)


def images(count: int, size: int = 32, seed: int = 0):
    """Uint8 pictures with some structure: drawn ones, shrunk where asked."""
    return open_data("shapes", split="train", limit=count + seed, image_size=size).images[seed:]


def noise(count: int, width: int, seed: int = 0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def r2(x, target, train_images, reconstruct) -> float:
    base = squared_error(target, target, lambda _: mean_of(train_images))
    return 1 - squared_error(x, target, reconstruct) / base


# ---- the decoder -----------------------------------------------------------------------------------------------------


def test_decoder_overfits_a_few_images():
    pictures, x = images(32), noise(32, 24)
    decoder = train_decoder(x, pictures, constants=Constants(min_steps=150, validation=0))
    assert r2(x, pictures, pictures, lambda part: decode(decoder, part)) > 0.97


def test_scale_and_dead_dimensions_of_features_do_not_matter():
    pictures, x = images(64), noise(64, 8)
    plain = train_decoder(x, pictures, constants=SMALL)
    scaled = train_decoder(1e4 * x + 3e4, pictures, constants=SMALL)
    torch.testing.assert_close(decode(plain, x), decode(scaled, 1e4 * x + 3e4), rtol=0, atol=0.02)
    dead = torch.cat([x, torch.full((64, 3), 5.0)], 1)
    assert torch.isfinite(decode(train_decoder(dead, pictures, constants=SMALL), dead)).all()


def test_constant_features_give_the_mean_image():
    pictures, held_out = images(256), images(64, seed=300)
    constant = torch.full((320, 12), 0.1)
    decoder = train_decoder(constant[:256], pictures, constants=dataclasses.replace(SMALL, epochs=10))
    assert abs(r2(constant[256:], held_out, pictures, lambda part: decode(decoder, part))) < 0.03


def test_features_that_say_nothing_do_not_end_below_the_mean_image():
    pictures, held_out = images(200), images(200, seed=300)
    found = {}
    for validation in (0, 10):
        constants = dataclasses.replace(SMALL, epochs=60, validation=validation)
        decoder = train_decoder(noise(200, 64), pictures, constants=constants)
        found[validation] = r2(noise(200, 64, 1), held_out, pictures, lambda part, d=decoder: decode(d, part))
    assert found[0] < -0.1 and -0.03 < found[10] < 0.03


@pytest.mark.parametrize("size", [8, 20, 32, 48])
def test_an_untrained_decoder_gives_the_mean_image_at_any_size(size):
    pictures = images(20, size)
    decoder = Decoder(noise(20, 6), mean_of(pictures), SMALL)
    out = decode(decoder, noise(5, 6, 1), batch_size=2)
    expected = pictures.double().mean(0) / 255
    assert out.shape == (5, 3, size, size)
    torch.testing.assert_close(out[3].double(), expected, rtol=0, atol=1e-6)
    assert r2(noise(20, 6), pictures, pictures, lambda part: decode(decoder, part)) == pytest.approx(0, abs=1e-6)


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    pictures, x = images(40), noise(40, 6)
    state = torch.random.get_rng_state()
    one, two, other = (train_decoder(x, pictures, constants=SMALL, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_squared_error_equals_the_loop():
    pictures, guess = images(7), torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = np.mean([(g.double() - p.double() / 255).pow(2).mean() for g, p in zip(guess, pictures, strict=True)])
    for batch in (2, 7):
        assert squared_error(guess, pictures, lambda part: part, batch) == pytest.approx(expected, rel=1e-6)


def test_features_and_images_must_match():
    for x, pictures in ((noise(3, 4), images(4)), (noise(0, 4), images(4)[:0])):
        with pytest.raises(UserError, match="one image for every feature"):
            train_decoder(x, pictures)
    with pytest.raises(UserError, match="at least 20 training images"):
        train_decoder(noise(19, 4), images(19))


# ---- PCA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [50, 300])  # fewer and more images than pixels
def test_pca_equals_numpy(count):
    pictures, held_out = images(count, 8), images(40, 8, seed=400)
    x, y = (part.flatten(1).numpy().astype(np.float64) / 255 for part in (pictures, held_out))
    mean = x.mean(0)
    basis = np.linalg.svd(x - mean, full_matrices=True)[2]
    pca = PixelPCA(pictures)
    for width in (1, 5, 40):
        expected = (y - mean) @ basis[:width].T @ basis[:width] + mean
        found = pca.reconstruct(held_out, width)
        assert found.shape == held_out.shape
        np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)
    assert squared_error(pictures, pictures, lambda part: pca.reconstruct(part, 192)) < 1e-10


# ---- the sheet -------------------------------------------------------------------------------------------------------


def test_sheet_holds_the_images_in_their_order():
    pictures = images(3)
    float_row = torch.stack([torch.full((3, 32, 32), value) for value in (-0.5, 0.5, 1.5)])
    figure = sheet(pictures, {"one": pictures.flip(0), "two": float_row})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["original", "one", "two"]
    canvas, pitch = axes.images[0].get_array(), 34

    def cell(row, column):
        return torch.tensor(np.asarray(canvas[row * pitch : row * pitch + 32, column * pitch : column * pitch + 32]))

    for i in range(3):
        torch.testing.assert_close(cell(0, i), pictures[i].permute(1, 2, 0) / 255)
        torch.testing.assert_close(cell(1, i), pictures[2 - i].permute(1, 2, 0) / 255)
        assert (cell(2, i) == (0, 0.5, 1)[i]).all()
    with pytest.raises(UserError, match="3 images of 32 px"):
        sheet(pictures, {"one": pictures[:2]})


# ---- command line ----------------------------------------------------------------------------------------------------


def tiny_spec(**changes):
    return BackboneSpec(
        "resnet18",
        stem="cifar",
        layers=(1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        stem_width=8,
        **({"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | changes),
    )


def exported(directory, seed=0, config=None, **changes):
    spec = tiny_spec(**changes)
    export_backbone(directory, random_init(spec, seed), spec)
    if config is not None:
        (directory / "config.json").write_text(json.dumps({"method": "any", "preset": "any", "config": config}))
    return str(directory)


def test_command_line_from_runs_to_picture_and_numbers(tmp_path, capsys):
    runs = [
        exported(tmp_path / name, seed, {"data": "shapes", "image_column": ""})
        for seed, name in ((4, "one"), (5, "two"))
    ]
    for again in ("a", "b"):
        main(
            [
                *runs,
                "--limit",
                "96",
                "--epochs",
                "2",
                "--images",
                "3",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / again / "sheet.png"),
                "--json",
                str(tmp_path / again / "numbers.json"),
            ]
        )
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / again).iterdir()} for again in ("a", "b"))
    assert first == second and set(first) == {"sheet.png", "numbers.json"}
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("one", "two", "random init", "raw pixels", "PCA, 16", "R2"))
    assert read_image(str(tmp_path / "a" / "sheet.png")).shape[0] in (3, 4)

    content = json.loads(first["numbers.json"])
    assert str(tmp_path) not in first["numbers.json"].decode()
    assert [row["name"] for row in content["results"]] == ["one", "two", "random init", "raw pixels", "PCA of pixels"]
    assert [row["features"] for row in content["results"]] == [16, 16, 16, 3072, 16]
    assert content["data"]["shown"] == [0, 32, 64] and content["constants"]["epochs"] == 2

    # The numbers are those of the functions.
    stores = [open_data("shapes", split=split, limit=96, image_size=32) for split in ("train", "test")]
    backbone, spec = load(runs[0])
    x, test_x = (extract_features(backbone, s, image_size=32, mean=spec.mean, std=spec.std) for s in stores)
    decoder = train_decoder(x, stores[0].images, constants=Constants(epochs=2, min_steps=0))
    expected = r2(test_x, stores[1].images, stores[0].images, lambda part: decode(decoder, part))
    assert content["results"][0]["r2"] == pytest.approx(expected, abs=1e-6)
    pca = PixelPCA(stores[0].images)
    best = r2(stores[1].images, stores[1].images, stores[0].images, lambda part: pca.reconstruct(part, 16))
    assert content["results"][4]["r2"] == pytest.approx(best, abs=1e-6)
    assert content["results"][0]["r2"] < best


def test_command_line_without_baselines_and_files(tmp_path, capsys):
    weights = exported(tmp_path / "run") + "/backbone.safetensors"
    main([weights, "--data", "shapes", "--limit", "20", "--epochs", "1", "--no-baselines", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "not saved" in printed and "run" in printed and "raw pixels" not in printed


def test_command_line_mistakes(tmp_path):
    run = exported(tmp_path / "run", config={"data": "shapes"})
    other_data = exported(tmp_path / "other", config={"data": "cifar10"})
    other_size = exported(tmp_path / "large", config={"data": "shapes"}, image_size=48)
    bare = exported(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "no run is given"),
        ([run, "--images", "0"], "--images 0"),
        ([run, "--epochs", "0"], "--epochs 0"),
        ([run, "--out", "picture.jpg"], r"ends in \.png"),
        ([run, run], "given twice"),
        ([run, other_size], "different sizes.*run 32 px, large 48 px"),
        ([run, other_data], "different data: run shapes, other cifar10.*--data"),
        ([bare], "say which data"),
        ([run, str(tmp_path / "empty")], "does not exist"),
        ([run, str(tmp_path / "nowhere")], "is not a run directory"),
        ([run, "--device", "gpu"], "--device gpu"),
        ([run, "--data", str(tmp_path / "nothing")], "no such path"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
