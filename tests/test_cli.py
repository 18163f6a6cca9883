"""The command line: presets, near matches, plan, and every mistake as one sentence with exit status 2."""

import json

import pytest
from PIL import Image

from common.cli import field_docs
from common.log import read_metrics
from methods.simclr.config import Config
from tests.processes import run_command

SIMCLR = "methods.simclr.train"


@pytest.fixture
def fails(tmp_path):
    def run(*arguments: object, module: str = SIMCLR) -> str:
        code, text = run_command(module, *arguments, log=tmp_path / "log")
        assert code == 2, text
        assert "Traceback" not in text
        return text

    return run


def test_no_preset_lists_them_with_a_line_each(fails):
    text = fails()
    for name in ("quickstart", "smoke", "cifar10-r18", "imagenet-r50-b256"):
        assert name in text
    assert "official README" in text and "no preset given" in text


def test_help_without_preset_is_no_mistake(tmp_path):
    code, text = run_command(SIMCLR, "--help", log=tmp_path / "log")
    assert code == 0 and "quickstart" in text
    code, text = run_command(SIMCLR, "cifar10-r50", "--help", log=tmp_path / "log")
    assert code == 0 and "--temperature" in text and "resnet50" in text and "Paper App. B.9" in text


def test_unknown_preset_suggests_near_ones(fails):
    text = fails("cifar-r18")
    assert "'cifar-r18' is not a preset: did you mean cifar10-r18" in text
    assert "the preset comes before '--epochs'" in fails("--epochs", "3", "smoke")


def test_unknown_flag_and_choice_suggest_valid_ones(fails):
    assert "--epochs" in fails("smoke", "--epoch", "3")
    text = fails("smoke", "--optimizer", "adam")
    assert "lars" in text and "adamw" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "./nowhere"], "there is no such path"),
        (["--data", "cifar10"], "directory of parquet files"),  # a hub name without network
        (["--batch-size", "1"], "batch"),
        (["--batch-size", "512"], "256"),
        (["--backbone", "resnet19"], "timm has no model 'resnet19'"),
        (["--micro-batch", "24"], "does not divide the 64 images"),
        (["--micro-batch", "32", "--activation-checkpointing"], "choose one of"),
        (["--micro-batch", "32", "--drop-path", "0.1"], "take --activation-checkpointing"),
        (["--drop-path", "0.1"], "--drop-path is an option of ViTs"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--normalize", "mnist"], "choose none or one of shapes"),
        (["--norm", "group", "--backbone", "vit_tiny_patch16_224", "--stem", "timm"], "options of ResNets"),
    ],
)
def test_mistakes_are_one_sentence(fails, arguments, sentence, tmp_path):
    text = fails("smoke", "--out", tmp_path, *arguments)
    error = next(line for line in text.splitlines() if line.startswith("error: "))
    assert sentence in error
    assert not (tmp_path / "simclr-smoke").exists()  # found before anything was written


def test_plan_prints_sources_and_writes_nothing(tmp_path):
    code, text = run_command(SIMCLR, "smoke", "--plan", "--out", tmp_path, "--temperature", 0.3, log=tmp_path / "log")
    assert code == 0, text
    for word in ("temperature", "0.3", "flag", "preset", "default", "App.", "peak learning rate", "images/s", "GiB"):
        assert word in text, word
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_every_field_has_a_docstring():
    docs = field_docs(Config)
    assert set(docs) >= set(Config.__dataclass_fields__) and all(len(d) > 10 for d in docs.values())


def folder_of_images(directory, count: int, size: int = 32, labelled: bool = True) -> None:
    for i in range(count):
        folder = directory / ("ab"[i % 2] if labelled else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (3 * i % 256, 90, 7 * i % 256)).save(folder / f"{i}.png")


def test_image_smaller_than_the_crop(fails, tmp_path):
    folder_of_images(tmp_path / "data", 80, size=16)
    text = fails("smoke", "--data", tmp_path / "data", "--out", tmp_path)
    assert "16" in text and "32" in text and "--image-size" in text


def test_corrupt_image_and_empty_folder_are_named(fails, tmp_path):
    folder_of_images(tmp_path / "data", 80)
    (tmp_path / "data" / "a" / "40.png").write_bytes(b"not an image")
    assert "40.png" in fails("smoke", "--data", tmp_path / "data", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty" in fails("smoke", "--data", tmp_path / "empty", "--out", tmp_path)


def test_unlabelled_images_train_and_say_what_cannot_be_measured(tmp_path, fails):
    folder_of_images(tmp_path / "data", 100, labelled=False)
    arguments = ("smoke", "--data", tmp_path / "data", "--out", tmp_path, "--epochs", 2)
    code, text = run_command(SIMCLR, *arguments, log=tmp_path / "log")
    assert code == 0, text
    assert "knn is skipped" in text and "have no labels" in text
    card = json.loads((tmp_path / "simclr-smoke" / "result.json").read_text())
    assert {row["protocol"] for row in card["evaluations"]} == {"label-free"}
    text = fails(tmp_path / "simclr-smoke", "--protocols", "knn", module="eval.__main__")
    assert "have no labels, which knn needs" in text


def test_bf16_stays_near_float32(tmp_path):
    """Losses of a run in bfloat16 autocast on a CPU: within 3 % of float32 in every window, at a low rate."""
    losses = {}
    for precision in ("no", "bf16"):
        arguments = ("smoke", "--no-eval", "--base-lr", 0.01, "--precision", precision, "--out", tmp_path / precision)
        code, text = run_command(SIMCLR, *arguments, log=tmp_path / "log")
        assert code == 0, text
        lines = read_metrics(tmp_path / precision / "simclr-smoke" / "metrics.jsonl")
        losses[precision] = [line["loss"] for line in lines if "loss" in line]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.03)


def test_micro_batches_say_what_batchnorm_does(tmp_path):
    arguments = ("smoke", "--no-eval", "--max-steps", 2, "--micro-batch", 16, "--out")
    code, text = run_command(SIMCLR, *arguments, tmp_path / "batch", log=tmp_path / "log")
    assert code == 0 and "statistics are taken over 16 images" in text
    code, text = run_command(SIMCLR, *arguments, tmp_path / "group", "--norm", "group", log=tmp_path / "log")
    assert code == 0 and "statistics are taken" not in text
