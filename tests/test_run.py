"""A method as a process: smoke, exact resume after SIGKILL, SIGTERM, refused configs, full disk, forks.

Every directory below methods/ is found and tested; nothing is registered.
"""

import dataclasses
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import methods
from common import environment
from common.backbones import create_backbone
from common.checkpoint import steps
from common.config import ImageDataConfig, published
from common.data import open_data
from common.log import TIME_FIELDS, read_metrics
from common.run import WAIT
from common.schedules import cosine_schedule
from eval.card import earlier_card, read_card
from eval.load import load, random_init
from eval.protocols import DEFAULT, evaluate
from eval.report import NOT_CURVES, UNEXPLAINED
from eval.session import ImageSession, Session
from methods.simclr.augment import two_views
from methods.simclr.config import PRESETS
from methods.simclr.train import SimCLR, compute_loss
from tests.processes import Command, run_command

METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg)
ROOT = Path(__file__).parents[1]


def module(method: str) -> str:
    return f"methods.{method}.train"


def result_of(directory: Path) -> tuple[dict, list[dict]]:
    """(weights, metrics without the fields that depend on the clock)."""
    lines = [
        {k: v for k, v in line.items() if k not in TIME_FIELDS} for line in read_metrics(directory / "metrics.jsonl")
    ]
    return load_file(directory / "backbone.safetensors"), lines


def assert_identical(ours: Path, theirs: Path) -> None:
    (weights, lines), (expected, expected_lines) = result_of(ours), result_of(theirs)
    assert lines == expected_lines
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)


def on_images(method: str) -> bool:
    return issubclass(importlib.import_module(f"methods.{method}.config").Config, ImageDataConfig)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """One finished smoke run a method, trained once for all tests of this file."""
    done: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in done:
            out = tmp_path_factory.mktemp(method)
            code, text = run_command(module(method), "smoke", "--out", out, log=out / "log")
            assert code == 0, text
            done[method] = out / f"{method}-smoke"
        return done[method]

    return of


@pytest.mark.parametrize("method", METHODS)
def test_smoke_writes_the_whole_run_directory(method, uninterrupted):
    run = uninterrupted(method)
    for name in ("config.json", "environment.json", "metrics.jsonl", "tensorboard", "backbone.json", "report.html"):
        assert (run / name).exists(), name
    card = json.loads((run / "result.json").read_text())
    assert (
        card["method"] == method and card["preset"] == "smoke" and card["steps"] > 0 and card["images_per_second"] > 0
    )
    if on_images(method):
        protocols = {row["protocol"] for row in card["evaluations"]}
        assert protocols >= {"knn-20-0.07", "linear", "factor-linear", "label-free"}
    for row in card["evaluations"]:
        if row["protocol"].startswith(("knn", "linear")):
            assert row["baselines"].keys() == {"raw pixels", "random init"}
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    full = max(line.get("queue_age", 0) for line in lines)  # a queue's first, random keys are easy negatives
    losses = [line["loss"] for line in lines if line.get("queue_age", 0) == full]
    assert losses[-1] < losses[0]
    assert (run / "report.html").stat().st_size < 3_000_000
    written = "".join(p.read_text() for p in (run / "result.json", run / "report.html"))
    assert str(run.parent) not in written  # never a path


@pytest.mark.parametrize("method", METHODS)
def test_every_logged_name_is_explained(method, uninterrupted):
    """In the report, by the method's SIGNALS or by what all methods log."""
    run = uninterrupted(method)
    page = (run / "report.html").read_text()
    lines = read_metrics(run / "metrics.jsonl")
    names = {name for line in lines if "kind" not in line for name in line} - NOT_CURVES
    assert {"loss", "lr", "images_per_second"} <= names
    for name in names:
        assert f'<tr><th scope="row">{escape(name)}</th><td>' in page, name
    unexplained = re.findall(rf"<th[^>]*>([^<]*)</th><td>{re.escape(escape(UNEXPLAINED))}", page)
    assert not unexplained


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_bit_identical(method, uninterrupted, tmp_path):
    """SIGKILL right after a random log line, then the same command again."""
    reference = uninterrupted(method)
    lines = [line["step"] for line in read_metrics(reference / "metrics.jsonl") if "loss" in line]
    first_save = json.loads((reference / "config.json").read_text())["config"]["save_every"]
    step = random.Random(method).choice([line for line in lines if first_save < line < lines[-1]])
    arguments = (module(method), "smoke", "--out", tmp_path, "--no-eval")
    directory = tmp_path / f"{method}-smoke"
    command = Command(*arguments, log=tmp_path / "first")
    command.kill_at(step, directory / "metrics.jsonl")
    assert command.wait() == -signal.SIGKILL, command.output()
    code, text = run_command(*arguments, log=tmp_path / "second")
    assert code == 0, text
    assert "resumed" in text
    assert_identical(directory, reference)


FILE_EVENTS = frozenset(("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"))
"""Audit events of Python that are raised before a file or a folder changes."""


def count_file_events(directory: str, counter: str, kill_at: int) -> None:
    """Write the number of file events in `directory` to `counter`; SIGKILL before the event numbered `kill_at`."""
    handle, seen = os.open(counter, os.O_WRONLY | os.O_CREAT), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(directory):
            seen += 1
            os.pwrite(handle, b"%9d" % seen, 0)
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at_file_events(method: str, out: Path, reference: Path, kills: int, dice: random.Random) -> None:
    """Kill a run before `kills` of its file events, continue it each time, and compare its end with `reference`."""
    arguments = (module(method), "smoke", "--out", out, "--no-eval")
    directory, counter = out / f"{method}-smoke", out / "events"

    def run(kill_at: int) -> int:
        before = partial(count_file_events, str(directory), str(counter), kill_at)
        command = Command(*arguments, log=out / "log", before=before)
        code = command.wait()
        assert code in (0, -signal.SIGKILL), command.output()
        return code

    assert run(0) == 0
    total, found = int(counter.read_text()), 0
    assert total > 10
    shutil.rmtree(directory)
    while found < kills:
        if run(dice.randint(1, total)) == 0:  # what was left of the run had fewer events
            assert_identical(directory, reference)
            shutil.rmtree(directory)
        else:
            found += 1
    assert run(0) == 0
    assert_identical(directory, reference)


def test_killed_at_file_events_is_bit_identical(uninterrupted, tmp_path):
    killed_at_file_events("simclr", tmp_path, uninterrupted("simclr"), 3, random.Random(0))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_killed_many_times_is_bit_identical(method, uninterrupted, tmp_path):
    """Ten times at a step, ten times at a file event."""
    reference = uninterrupted(method)
    directory, dice, found = tmp_path / f"{method}-smoke", random.Random(1), 0
    metrics = directory / "metrics.jsonl"
    lines = [line["step"] for line in read_metrics(reference / "metrics.jsonl") if "loss" in line]
    while found < 10:
        done = [line["step"] for line in read_metrics(metrics)] if metrics.exists() else []
        command = Command(module(method), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "log")
        command.kill_at(dice.choice([step for step in lines if step > max(done, default=0)] or lines), metrics)
        if command.wait() == 0:  # the kill came too late
            assert_identical(directory, reference)
            shutil.rmtree(directory)
        else:
            assert command.wait() == -signal.SIGKILL, command.output()
            found += 1
    code, text = run_command(module(method), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "last")
    assert code == 0, text
    assert_identical(directory, reference)
    shutil.rmtree(directory)
    killed_at_file_events(method, tmp_path, reference, 10, dice)


@pytest.mark.parametrize("method", [m if m == "simclr" else pytest.param(m, marks=pytest.mark.soak) for m in METHODS])
def test_one_of_two_processes_is_killed(method, tmp_path):
    """The other one ends by itself, and the same command, given to both again, ends as an uninterrupted run."""
    arguments = ("--no-eval", "--out")
    for command in two_processes(tmp_path, method, *arguments, tmp_path / "reference"):
        assert command.wait() == 0, command.output()
    reference, directory = (tmp_path / name / f"{method}-smoke" for name in ("reference", "killed"))
    lines = [line["step"] for line in read_metrics(reference / "metrics.jsonl") if "loss" in line]
    for victim in (0, 1):
        commands = two_processes(tmp_path, method, *arguments, tmp_path / "killed")
        commands[victim].kill_at(lines[(1 + victim) * len(lines) // 3], directory / "metrics.jsonl")
        assert commands[victim].wait() == -signal.SIGKILL, commands[victim].output()
        assert commands[1 - victim].wait() == 1, commands[1 - victim].output()
        assert "another process of this run has ended" in commands[1 - victim].output()
    for command in two_processes(tmp_path, method, *arguments, tmp_path / "killed"):
        assert command.wait() == 0, command.output()
    assert_identical(directory, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_save_and_the_same_command_continues(uninterrupted, tmp_path, number):
    """A second signal at once is the same one: a terminal and torchrun both pass on Ctrl-C."""
    arguments = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval", "--save-every", 1000)
    directory = tmp_path / "simclr-smoke"
    command = Command(*arguments, log=tmp_path / "first")
    for _ in range(2):
        command.kill_at(4, directory / "metrics.jsonl", number)
    assert command.wait() == 128 + number and "Traceback" not in command.output(), command.output()
    assert "checkpoint saved" in command.output() and steps(directory / "checkpoints")
    code, text = run_command(*arguments, log=tmp_path / "second")
    assert code == 0 and "resumed" in text
    assert_identical(directory, uninterrupted("simclr"))


def test_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    reference = uninterrupted("simclr")
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(reference, directory)
    first, last = steps(directory / "checkpoints")
    state = directory / "checkpoints" / f"step-{last:08d}" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "log")
    assert code == 0 and "cannot be used" in text and f"at step {first} " in text
    assert_identical(directory, reference)


def test_commit_says_changes(tmp_path, monkeypatch):
    """Of a changed file and of a Python file that git does not know, such as a copied method; not of other files."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_commit() == "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    for name, text in ((".gitignore", "runs/"), ("train.py", "1"), ("README.md", "2")):
        (tmp_path / name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")[:12]
    assert environment.git_commit() == commit
    (tmp_path / "runs").mkdir()
    for name in ("runs/own.py", "notes.txt"):
        (tmp_path / name).write_text("3")
    assert environment.git_commit() == commit
    (tmp_path / "methods" / "mine").mkdir(parents=True)
    (tmp_path / "methods" / "mine" / "loss.py").write_text("4")
    assert environment.git_commit() == f"{commit}+changes"
    git("add", "-A")
    git("commit", "-qm", "second")
    (tmp_path / "README.md").write_text("5")
    assert environment.git_commit() == git("rev-parse", "HEAD")[:12] + "+changes"


def test_resume_in_another_environment_is_said(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    environment = json.loads((directory / "environment.json").read_text())
    (directory / "environment.json").write_text(json.dumps({**environment, "threads": 7}))
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "log")
    assert code == 0 and "not bit for bit: threads 7 -> 1" in text


def test_changed_config_is_refused_with_its_fields(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    before = sorted(p.name for p in directory.rglob("*"))
    arguments = ("smoke", "--out", tmp_path, "--no-eval")
    code, text = run_command(
        module("simclr"), *arguments, "--temperature", 0.3, "--batch-size", 128, log=tmp_path / "log"
    )
    assert (
        code == 2 and "temperature 0.2 -> 0.3" in text and "batch_size 64 -> 128" in text and "--resume never" in text
    )
    assert "Traceback" not in text and sorted(p.name for p in directory.rglob("*")) == before
    free = run_command(module("simclr"), *arguments, "--log-every", 7, "--keep", 5, log=tmp_path / "log")
    assert free[0] == 0, free[1]  # fields that cannot change the result may change


def test_run_directory_in_use_is_refused(uninterrupted, tmp_path):
    """Two processes in one directory would mix their metrics; a killed one leaves no lock behind."""
    arguments = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval", "--save-every", 2)
    metrics = tmp_path / "simclr-smoke" / "metrics.jsonl"
    first = Command(*arguments, log=tmp_path / "first")
    first.kill_at(2, metrics, signal.SIGSTOP)
    code, text = run_command(*arguments, log=tmp_path / "second")
    assert code == 2 and f"is in use by process {first.child.pid} on" in text and "Traceback" not in text
    os.kill(first.child.pid, signal.SIGKILL)
    first.wait()
    code, text = run_command(*arguments, log=tmp_path / "third")
    assert code == 0, text
    assert_identical(tmp_path / "simclr-smoke", uninterrupted("simclr"))


@pytest.mark.parametrize("content", [None, "", "{", "5", '{"method": "simclr", "preset": "smoke", "config": []}'])
def test_damaged_config_is_named_and_nothing_is_overwritten(uninterrupted, tmp_path, content):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    config = directory / "config.json"
    config.unlink() if content is None else config.write_text(content)
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "log")
    *_, last = text.splitlines()
    assert code == 2 and last.startswith("error: ") and "config.json" in last and "--resume never" in last, text
    assert content == (config.read_text() if config.exists() else None)


def class_folders(folder: Path, **images: int) -> None:
    """PNG images of one color a class: images[name] of them in folder/train/name and as many in folder/test/name."""
    for split in ("train", "test"):
        for number, (name, count) in enumerate(images.items()):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (60 * number + 20, 4 * i, 99)).save(folder / split / name / f"{i}.png")


def test_changed_data_are_refused_at_resume_and_evaluation(tmp_path):
    """Images that are gone, other images, swapped labels: they are named, and nothing is trained or merged."""
    data, log = tmp_path / "data", tmp_path / "log"
    class_folders(data, a=24, b=24, c=24)
    words = (module("simclr"), "smoke", "--data", data, "--limit", 0, "--batch-size", 24, "--out", tmp_path)
    assert run_command(*words, "--max-steps", 4, "--no-eval", log=log)[0] == 0

    kept = tmp_path / "kept"
    shutil.copytree(data, kept)
    (data / "train" / "a").rename(data / "train" / "x")
    (data / "train" / "b").rename(data / "train" / "a")
    (data / "train" / "x").rename(data / "train" / "b")
    code, text = run_command(*words, log=log)
    assert code == 2 and "training images: other content or labels in its 72 images" in text, text
    for i in range(24):
        (data / "train" / "c" / f"{i}.png").unlink()
    code, text = run_command(*words, log=log)
    assert code == 2 and "training images: 72 -> 48 images" in text and "--accept-changed-data" in text, text

    shutil.rmtree(data)
    shutil.copytree(kept, data)
    code, text = run_command(*words, "--eval-protocols", "metrics", "--no-eval-baselines", log=log)
    assert code == 0, text  # the same images again, and the test images for the first time
    card = tmp_path / "simclr-smoke" / "result.json"
    before = card.read_text()
    assert "data_changes" not in json.loads(before)
    (data / "test" / "c" / "3.png").unlink()
    code, text = run_command("eval.__main__", tmp_path / "simclr-smoke", "--protocols", "knn", log=log)
    assert code == 2 and "test images: 72 -> 71 images" in text and "--out FILE" in text, text
    scores = tmp_path / "scores.json"
    other = ("--data", data, "--out", scores)
    assert run_command("eval.__main__", tmp_path / "simclr-smoke", "--protocols", "knn", *other, log=log)[0] == 0
    assert json.loads(scores.read_text())["data"]["test_images"] == 71 and card.read_text() == before

    knowingly = ("--accept-changed-data", "--eval-protocols", "metrics", "--no-eval-baselines")
    code, text = run_command(*words, *knowingly, log=log)
    assert code == 0 and "continuing with changed data" in text, text
    assert json.loads(card.read_text())["data_changes"] == ["test images: 72 -> 71 images"]


def flat_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (32, 32), (5 * i, 255 - 5 * i, 40)).save(folder / f"{i:02}.png")
    return folder


def used(run: Path) -> dict[str, int]:
    """How many images the run has used for what."""
    return {use: part["images"] for use, part in json.loads((run / "config.json").read_text())["data"].items()}


@pytest.mark.parametrize("method", ["simclr", "dim"])
def test_other_data_to_judge_on(tmp_path, method):
    """Unlabeled images train, all of them; kNN, card, report and a later evaluation use the labeled ones elsewhere."""
    photos, pets, log = flat_folder(tmp_path / "photos", 48), tmp_path / "pets", tmp_path / "log"
    class_folders(pets, a=24, b=24, c=24)
    words = (module(method), "smoke", "--data", photos, "--eval-data", pets, "--limit", 0, "--batch-size", 24)
    words += ("--epochs", 1, "--knn-every", 1, "--eval-protocols", "knn", "--no-eval-baselines", "--out", tmp_path)
    code, text = run_command(*words, log=log)
    assert code == 0 and "will not be run" not in text and "serves as test" not in text, text
    run = tmp_path / f"{method}-smoke"
    assert used(run) == {"training images": 48, "probed images": 72, "test images": 72}
    assert [line["kind"] for line in read_metrics(run / "metrics.jsonl") if "kind" in line].count("online_knn") == 1
    card = json.loads((run / "result.json").read_text())
    judged = card["data"].pop("judged_on")
    assert (judged["name"], judged["train_images"]) == ("pets", 72) and card["config"]["eval_data"] == "pets"
    assert (card["data"]["name"], card["data"]["train_images"], card["data"]["test_images"]) == ("photos", 48, 72)
    assert card["data"]["fingerprint"] != judged["fingerprint"] and card["data"]["label_name"] == "folder"
    rows = {row["protocol"]: row for row in card["evaluations"]}
    assert (
        rows["knn-20-0.07"]["settings"]["train_images"] == 72 and str(tmp_path) not in (run / "result.json").read_text()
    )
    assert "photos, 48 train; judged on pets, 72 train, 72 test" in (run / "report.html").read_text()

    evaluate = ("eval.__main__", run, "--protocols", "knn")
    code, text = run_command(*evaluate, log=log)
    assert code == 0 and "merged into" in text, text
    (pets / "test" / "c" / "3.png").unlink()
    code, text = run_command(*evaluate, log=log)
    assert code == 2 and "test images: 72 -> 71 images" in text, text
    code, text = run_command(*words, log=log)
    assert code == 2 and "test images: 72 -> 71 images" in text, text


def test_without_labels_nothing_is_held_out(tmp_path):
    photos, log = flat_folder(tmp_path / "photos", 40), tmp_path / "log"
    words = (module("simclr"), "smoke", "--data", photos, "--limit", 0, "--batch-size", 20, "--epochs", 1)
    code, text = run_command(*words, "--out", tmp_path / "a", "--no-eval", log=log)
    assert code == 0 and used(tmp_path / "a" / "simclr-smoke") == {"training images": 40}, text
    code, text = run_command(*words, "--out", tmp_path / "b", "--no-eval-baselines", log=log)
    run = tmp_path / "b" / "simclr-smoke"
    assert code == 0 and used(run) == {"training images": 40, "probed images": 36, "test images": 4}, text
    assert "nothing is held out of the training" in text and "--eval-data" in text and text.count("serves as test") == 1
    assert json.loads((run / "result.json").read_text())["data"]["train_images"] == 40
    for directory, told in ((tmp_path / "a" / "simclr-smoke", "the run has not ended yet"), (run, "merged into")):
        code, text = run_command("eval.__main__", directory, "--protocols", "rotation", log=log)
        assert code == 0 and told in text, text  # on the 36, and tested on the 4


def test_labels_for_a_few_images_cost_only_what_needs_more(tmp_path):
    """What cannot be evaluated is named before the first step, and card and report are written."""
    class_folders(tmp_path / "data", a=6, b=6)
    for i in range(12):
        Image.new("RGB", (32, 32), (9, 4 * i, 200)).save(tmp_path / "data" / "train" / f"{i}.png")
    words = (module("simclr"), "smoke", "--data", tmp_path / "data", "--limit", 0, "--batch-size", 24, "--epochs", 1)
    words += ("--knn-every", 1, "--no-eval-baselines", "--out", tmp_path)
    code, text = run_command(*words, log=tmp_path / "log")
    assert code == 0, text
    note = "NOTE linear will not be run: linear needs at least 20 labeled training images"
    assert note in text and text.index(note) < text.index("step 1")
    assert "12 of the 24 images of 'train' have no label" in text
    run = tmp_path / "simclr-smoke"
    protocols = {row["protocol"] for row in json.loads((run / "result.json").read_text())["evaluations"]}
    assert (
        protocols == {"knn-12-0.07", "knn-12-0.1", "label-free"}
        and "linear was not run" in (run / "report.html").read_text()
    )


def test_a_record_without_a_newer_setting_has_its_default(tmp_path):
    words = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval")
    assert run_command(*words, "--max-steps", 2, log=tmp_path / "log")[0] == 0
    path = tmp_path / "simclr-smoke" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["eval_data"]
    path.write_text(json.dumps(record))
    code, text = run_command(*words, "--max-steps", 3, log=tmp_path / "log")
    assert code == 0 and "at step 2" in text, text
    del record["config"]["batch_size"]  # whose default is not the preset's
    path.write_text(json.dumps(record))
    code, text = run_command(*words, "--max-steps", 4, log=tmp_path / "log")
    assert code == 2 and "another config: batch_size" in text, text


def test_published_numbers_are_compared_with_the_published_run_alone(tmp_path):
    """A paper's preset on other images for one epoch: its number is in the card, with the reasons, and next to none."""
    class_folders(tmp_path / "data", a=24, b=24)
    words = ("cifar10-r18", "--data", tmp_path / "data", "--batch-size", 24, "--epochs", 1, "--warmup-epochs", 0)
    words += ("--backbone", "resnet10t", "--stem", "timm", "--eval-protocols", "knn", "--no-eval-baselines")
    code, text = run_command(module("simclr"), *words, "--out", tmp_path, log=tmp_path / "log")
    assert code == 0, text
    card = json.loads((tmp_path / "simclr-cifar10-r18" / "result.json").read_text())
    assert any(entry["protocol"] == "knn-200-0.1" for entry in card["published"])
    for entry in card["published"]:
        assert "other data" in entry["not_compared"] and "epochs 1, not 1000" in entry["not_compared"]
    page = (tmp_path / "simclr-cifar10-r18" / "report.html").read_text()
    assert "not compared" in page and "epochs 1, not 1000" in page and ", gap " not in page and "compared" not in card

    session = object.__new__(Session)  # the preset itself, whatever changes no number
    session.preset, session.presets, session.total_steps = "cifar10-r18", PRESETS, 97_000
    session.cfg = dataclasses.replace(PRESETS["cifar10-r18"][1], seed=3, out="elsewhere", precision="bf16")
    session.run = SimpleNamespace(extended=[])
    entry = {"value": 1.0, "protocol": "linear", "source": "A paper"}
    session.reported = [entry]
    assert session.published == [entry]
    session.run.extended = ["epochs 500 -> 1000 at step 9"]
    assert session.published == [{**entry, "not_compared": "extended, epochs 500 -> 1000 at step 9"}]
    session.run.extended = []
    session.cfg = dataclasses.replace(session.cfg, init_from="over/there/w.pth")
    assert session.published == [{**entry, "not_compared": "started from w.pth"}]
    session.cfg = dataclasses.replace(session.cfg, init_from="")
    session.cfg = dataclasses.replace(session.cfg, max_steps=10)
    assert session.published == [{**entry, "not_compared": "10 of 97000 steps"}]


def publish() -> None:
    """In the process of a run: numbers for the preset smoke."""
    importlib.import_module("methods.simclr.config").PUBLISHED["smoke"] = [
        published(90.0, "knn-20-0.07", "arXiv:0000.00000", "a note"),
        published(1.0, "knn-200-0.1", "A benchmark"),
        published(2.0, "conv-mlp", "Another method"),
    ]


def test_the_gap_to_published_numbers_is_said(tmp_path):
    """By terminal, card and report; after another evaluation card and report say it again."""
    words = ("smoke", "--eval-protocols", "knn", "--no-eval-baselines", "--out", tmp_path)
    code, text = run_command(module("simclr"), *words, log=tmp_path / "log", before=publish)
    assert code == 0, text
    directory = tmp_path / "simclr-smoke"
    card, page = read_card(directory / "result.json"), (directory / "report.html").read_text()
    (near, _), (far, _) = values = [(row["value"], row["protocol"]) for row in card["evaluations"]]
    assert [protocol for _, protocol in values] == ["knn-20-0.07", "knn-200-0.1"]
    assert card["compared"] == [
        f"knn-20-0.07, top-1: paper 90.00, ours {near:.2f}, gap {near - 90:+.2f} (arXiv:0000.00000; a note)",
        f"knn-200-0.1, top-1: published 1.00, ours {far:.2f}, gap {far - 1:+.2f} (A benchmark)",
    ]
    lines = text.splitlines()
    assert lines[-3:-1] == card["compared"] and lines[-1].startswith("cost: 4 epochs in ")
    assert all(escape(line) in page.split("</header>")[0] for line in card["compared"])

    (directory / "result.json").write_text(json.dumps({**card, "evaluations": card["evaluations"][:1]}))
    code, text = run_command("eval.__main__", directory, "--protocols", "knn", log=tmp_path / "log")
    assert code == 0 and "result.json and " in text, text
    again = (directory / "report.html").read_text()
    assert read_card(directory / "result.json")["compared"] == card["compared"]
    assert all(escape(line) in again.split("</header>")[0] for line in card["compared"])
    assert "random init" in again and "random init" not in page


def test_a_presets_own_run_is_evaluated_as_its_papers_do():
    _, cfg = PRESETS["smoke"]
    papers = {"smoke": [published(1.0, "linear-augmented", "A paper"), published(2.0, "knn-20-0.07", "A paper")]}

    def protocols(**changes) -> tuple[str, ...]:
        changed = dataclasses.replace(cfg, **changes)
        return ImageSession(changed, "simclr", "smoke", PRESETS, two_views(changed), published=papers).protocols

    assert protocols(seed=3) == (*DEFAULT, "linear-augmented")
    assert protocols(temperature=0.9) == protocols(max_steps=2) == DEFAULT
    assert protocols(eval_protocols=("mlp",)) == ("mlp",)


def test_a_finished_run_is_lengthened_only_knowingly(tmp_path):
    """Two epochs, then four: from the last step on under the schedule of four; told in config.json and the card."""
    words = ("smoke", "--warmup-epochs", 0, "--log-every", 1, "--eval-protocols", "knn", "--no-eval-baselines")
    words += ("--out", tmp_path, "--name", "run")
    folder = tmp_path / "run"

    def train(*flags: object) -> tuple[int, str]:
        return run_command(module("simclr"), *words, *flags, log=tmp_path / "log")

    code, text = train("--epochs", 2, "--extend")
    assert code == 2 and "has no checkpoint, so there is no run to lengthen" in text, text
    code, text = train("--epochs", 2)
    assert code == 0, text
    done = json.loads((folder / "result.json").read_text())["steps"]
    code, text = train("--epochs", 4)
    assert code == 2 and "epochs 2 -> 4. Lengthen it with --extend, choose another --name" in text, text
    for flags in (("--epochs", 1, "--extend"), ("--epochs", 4, "--temperature", 0.3, "--extend")):
        code, text = train(*flags)
        assert code == 2 and "Choose another --name" in text, text
    code, text = train("--epochs", 4, "--extend", "--max-steps", done + 1)
    assert code == 0 and f"is lengthened: epochs 2 -> 4 at step {done}" in text, text
    code, text = train("--epochs", 4, "--extend")  # stopped and continued: lengthened once
    assert code == 0 and "is lengthened" not in text, text
    told = [f"epochs 2 -> 4 at step {done}"]
    card = json.loads((folder / "result.json").read_text())
    assert card["extended"] == json.loads((folder / "config.json").read_text())["extended"] == told
    assert card["steps"] == 2 * done and card["epochs"] == 4
    rates = {line["step"]: line["lr"] for line in read_metrics(folder / "metrics.jsonl") if "lr" in line}
    first = rates[1]
    for step, total in ((done, done), (done + 1, 2 * done), (2 * done, 2 * done)):
        assert rates[step] == pytest.approx(cosine_schedule(step - 1, base=first, total=total), rel=1e-4)
    assert "epochs 2 -&gt; 4 at step" in (folder / "report.html").read_text()


def test_fewer_steps_than_were_trained_are_refused(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    card = (directory / "result.json").read_text()
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--max-steps", 2, log=tmp_path / "log")
    assert code == 2 and "has trained 16 steps, more than --max-steps 2" in text, text
    assert (directory / "result.json").read_text() == card


def test_a_finished_runs_command_given_again_drops_no_row(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    before = read_card(directory / "result.json")
    words = ("--eval-protocols", "rotation", "knn", "--no-eval-baselines")
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, *words, log=tmp_path / "log")
    assert code == 0, text
    after = read_card(directory / "result.json")
    assert after["evaluations"][:-1] == before["evaluations"] and after["evaluations"][-1]["protocol"] == "rotation"
    assert after["evaluations"][0]["baselines"].keys() == {"raw pixels", "random init"}
    other = {**after, "steps": 3}  # of another run: nothing is kept
    assert earlier_card(other, directory / "result.json") is None


@pytest.mark.parametrize("method", ["simclr", "amdim"])  # amdim: with rows of its own
def test_a_death_in_the_evaluation_keeps_what_was_measured(method, uninterrupted, tmp_path):
    directory = tmp_path / f"{method}-smoke"
    shutil.copytree(uninterrupted(method), directory)
    card = directory / "result.json"
    expected = read_card(card)["evaluations"]
    (directory / "report.html").unlink()
    for _ in range(5):  # on a busy machine the kill may come too late
        card.unlink()
        command = Command(module(method), "smoke", "--out", tmp_path, log=tmp_path / "first")
        command.kill_when('"raw pixels": ["knn"', card)
        killed, left = command.wait() == -signal.SIGKILL, read_card(card)
        if killed and "unfinished" in left:
            break
    done = left["unfinished"]["done"]
    assert done["backbone"] == ["knn", "linear", "metrics", "factors"] and len(done["random init"]) < 4, done
    assert {row["protocol"] for row in left["evaluations"]} == {row["protocol"] for row in expected}
    code, text = run_command(module(method), "smoke", "--out", tmp_path, log=tmp_path / "second")
    assert code == 0 and "continuing what" in text and "evaluation: backbone" not in text, text
    after = read_card(card)
    assert after["evaluations"] == expected and "unfinished" not in after
    assert (directory / "report.html").exists()

    left["unfinished"]["weights"] = "another network's"  # nothing of that is taken over
    card.write_text(json.dumps(left))
    words = ("--eval-protocols", "knn", "--no-eval-baselines")
    code, text = run_command(module(method), "smoke", "--out", tmp_path, *words, log=tmp_path / "third")
    assert code == 0 and "continuing" not in text and "evaluation: backbone" in text, text


def train_and_export(out: str) -> dict[str, bool]:
    """Two steps of SimCLR: what is held at their end, and what is left after the export."""
    cfg = dataclasses.replace(PRESETS["smoke"][1], out=out, max_steps=2, eval=False)
    session = ImageSession(cfg, "simclr", "smoke", PRESETS, two_views(cfg))
    spec = cfg.resnet_spec()
    model = SimCLR(create_backbone(spec), cfg.projector_dim)
    optimizer = torch.optim.AdamW(model.parameters())
    model, unwrapped, optimizer = session.prepare(model, optimizer)
    session.start(plan={}, model=unwrapped, optimizer=optimizer)
    for step in session.steps():
        views = session.views(step)
        loss, _ = compute_loss(model, views, cfg)
        session.backward(loss)
        optimizer.step()
        session.log(loss=loss)
    held = {
        "state": len(optimizer.state) > 0,
        "gradients": any(p.grad is not None for p in model.parameters()),
        "views": len(views) == 2,
        "buckets": hasattr(model, "reducer"),
    }
    session.export(unwrapped.backbone, spec)
    left = {
        "state": len(optimizer.state) > 0,
        "gradients": any(p.grad is not None for p in model.parameters()),
        "views": len(views) > 0,
        "buckets": hasattr(model, "reducer"),
    }
    return {"held": held, "left": left}


EXPORT = "import json, sys; from tests.test_run import train_and_export as f; print(json.dumps(f(sys.argv[1])))"


def test_export_frees_what_only_training_needs(tmp_path):
    script = tmp_path / "export.py"
    script.write_text(EXPORT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, script, tmp_path],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, done.stderr
    for process in found:
        assert all(process["held"].values())
        assert not any(process["left"].values()), process


def test_missing_metrics_are_noticed_at_resume(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2] + lines[3:]))
    words = ("--eval-protocols", "metrics", "--no-eval-baselines")
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, *words, log=tmp_path / "log")
    assert code == 0 and "metrics.jsonl has 1 lines fewer than at step 16" in text, text
    assert any("lines fewer" in warning for warning in json.loads((directory / "result.json").read_text())["warnings"])


def test_what_accelerate_config_leaves_behind_changes_nothing(uninterrupted, tmp_path):
    left = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_DYNAMO_BACKEND": "inductor"}
    words = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval")
    code, text = run_command(*words, log=tmp_path / "log", env=left)
    assert code == 0, text
    assert_identical(tmp_path / "simclr-smoke", uninterrupted("simclr"))
    code, text = run_command(*words, "--name", "sharded", log=tmp_path / "log", env={"ACCELERATE_USE_FSDP": "true"})
    assert code == 2 and "ACCELERATE_USE_FSDP is set" in text, text


@pytest.mark.parametrize("content", [None, "", "[1]"])
def test_damaged_environment_is_named_and_written_again(uninterrupted, tmp_path, content):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    environment = directory / "environment.json"
    environment.unlink() if content is None else environment.write_text(content)
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--no-eval", log=tmp_path / "log")
    assert code == 0 and "environment.json" in text and "written again" in text
    assert json.loads(environment.read_text())["threads"] == 1


def test_full_disk_at_a_restart_leaves_the_records_complete(uninterrupted, tmp_path):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    before = {name: (directory / name).read_text() for name in ("config.json", "environment.json")}
    arguments = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval")
    code, text = run_command(*arguments, log=tmp_path / "log", before=partial(_small_files, 600))
    assert code == 2 and "no space left on device while writing" in text and "config.json" in text, text
    assert before == {name: (directory / name).read_text() for name in before}
    assert run_command(*arguments, log=tmp_path / "log")[0] == 0


@pytest.mark.parametrize("flags", [("--keep", 0), ("--keep", -1), ("--save-every", 0), ("--log-every", 0)])
def test_settings_of_the_run_have_bounds(uninterrupted, tmp_path, flags):
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(uninterrupted("simclr"), directory)
    kept = steps(directory / "checkpoints")
    code, text = run_command(module("simclr"), "smoke", "--out", tmp_path, "--no-eval", *flags, log=tmp_path / "log")
    assert code == 2 and f"{flags[0]} is {flags[1]}: it must be at least 1" in text and "Traceback" not in text
    assert steps(directory / "checkpoints") == kept


def test_name_is_no_path(tmp_path):
    code, text = run_command(
        module("simclr"), "smoke", "--out", tmp_path / "out", "--name", "../other", log=tmp_path / "log"
    )
    assert code == 2 and "--name ../other is a path" in text and not (tmp_path / "other").exists()


def test_resume_never_starts_beside_the_old_run(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("simclr"), tmp_path / "simclr-smoke")
    arguments = ("smoke", "--out", tmp_path, "--no-eval", "--resume", "never", "--max-steps", 2)
    assert run_command(module("simclr"), *arguments, log=tmp_path / "log")[0] == 0
    assert (tmp_path / "simclr-smoke-2" / "backbone.safetensors").exists()


def _small_files(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_full_disk_is_one_sentence_and_the_last_checkpoint_survives(uninterrupted, tmp_path):
    reference = uninterrupted("simclr")
    directory = tmp_path / "simclr-smoke"
    shutil.copytree(reference, directory)
    kept, dropped = steps(directory / "checkpoints")
    shutil.rmtree(directory / "checkpoints" / f"step-{dropped:08d}")
    arguments = (module("simclr"), "smoke", "--out", tmp_path, "--no-eval")
    code, text = run_command(*arguments, log=tmp_path / "log", before=partial(_small_files, 100_000))
    assert (
        code == 2 and "could not save the checkpoint" in text and f"step-{kept:08d}" in text and "Traceback" not in text
    )
    code, text = run_command(*arguments, log=tmp_path / "log")
    assert code == 0 and f"at step {kept} " in text
    assert_identical(directory, reference)


def test_non_finite_loss_stops_with_step_rate_and_checkpoint(tmp_path):
    arguments = (
        "smoke",
        "--out",
        tmp_path,
        "--no-eval",
        "--base-lr",
        1e30,
        "--warmup-epochs",
        0,
        "--epochs",
        8,
        "--save-every",
        1,
    )
    code, text = run_command(module("simclr"), *arguments, log=tmp_path / "log")
    assert (
        code == 2 and "the loss is nan at step" in text and "learning rate" in text and "last good checkpoint" in text
    )
    assert "Traceback" not in text


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path):
    """The loss of the last step is finite and its update is not: no further loss would show it."""
    arguments = ("smoke", "--out", tmp_path, "--no-eval", "--max-steps", 2)
    arguments += ("--lr", "1e30", "--trust-coefficient", "1e30")
    for _ in range(2):
        code, text = run_command(module("swav"), *arguments, log=tmp_path / "log")
        assert code == 2 and "conv1.weight is not finite after step 2" in text and "Traceback" not in text
    directory = tmp_path / "swav-smoke"
    assert not steps(directory / "checkpoints") and not (directory / "backbone.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
def test_copied_method_runs_unedited(method, tmp_path):
    """`cp -r methods/simclr methods/mine`: no import names the method, and the run carries the new name."""
    target = ROOT / "methods" / f"copy_of_{method}"
    try:
        shutil.copytree(ROOT / "methods" / method, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
        arguments = ("smoke", "--out", tmp_path, "--no-eval", "--max-steps", 1)
        code, text = run_command(f"methods.{target.name}.train", *arguments, log=tmp_path / "log")
        assert code == 0, text
        assert json.loads((tmp_path / f"{target.name}-smoke" / "config.json").read_text())["method"] == target.name
    finally:
        shutil.rmtree(target, ignore_errors=True)


@pytest.mark.parametrize("method", METHODS)
def test_fork_begins_without_results_and_published_numbers(method, tmp_path):
    """`make fork`: a copy that imports nothing of the original's and claims none of its numbers, with its tests."""
    for part in ("methods", "tests"):
        (tmp_path / part).mkdir()
    shutil.copytree(ROOT / "methods" / method, tmp_path / "methods" / method)
    shutil.copy(ROOT / "tests" / f"test_{method}.py", tmp_path / "tests")
    fork = runpy.run_path(str(ROOT / "ci" / "fork"))["fork"]
    made = fork(method, "mine", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in made] == ["methods/mine", "tests/test_mine.py"]
    assert not (made[0] / "results").exists()
    for path in (*made[0].glob("*.py"), made[1]):
        text = path.read_text()
        compile(text, str(path), "exec")
        assert not re.search(rf"methods[./]{method}\b", text), path
    assert "PUBLISHED" not in (config := (made[0] / "config.py").read_text()) or re.search(
        r"^PUBLISHED.* = {}$", config, re.M
    )
    rows = [line.split("|") for line in (made[0] / "README.md").read_text().splitlines() if line.startswith("| `")]
    rows = [cells for cells in rows if len(cells) == 7]
    assert rows and all((cells[3].strip(), cells[4].strip()) == ("-", "not run yet") for cells in rows)
    for source, target, message in (
        ("none", "other", "there is no method 'none'"),
        (method, "mine", "methods/mine exists already"),
        (method, "../mine", "is no name for a method"),
    ):
        with pytest.raises(SystemExit, match=message):
            fork(source, target, tmp_path)


def low_rates(method: str) -> list[str]:
    """Flags that set every learning rate of `smoke` to a hundredth.

    The first steps of a BatchNorm network at its working rate amplify rounding: one process with one thread and one
    with two differ as much.
    """
    cfg = importlib.import_module(f"methods.{method}.config").PRESETS["smoke"][1]
    rates = [f.name for f in dataclasses.fields(cfg) if f.name in RATES]
    assert rates, f"{method}: name its learning rate in RATES"
    return [word for name in rates for word in (f"--{name.replace('_', '-')}", str(getattr(cfg, name) / 100))]


RATES = ("base_lr", "base_lr_biases", "lr", "discriminator_lr", "lr_start", "lr_end", "start_lr", "end_lr", "min_lr")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, tmp_path):
    """The real script with two gloo processes logs what one process logs, to float32 rounding."""
    arguments = ["--no-eval", "--log-every", "1", "--max-steps", "4", *low_rates(method), "--out"]
    for command in two_processes(tmp_path, method, *arguments, tmp_path / "two"):
        assert command.wait() == 0, command.output()
        assert "broadcast_buffers" not in command.output()  # a notice that nobody can act on
    code, text = run_command(module(method), "smoke", *arguments, tmp_path / "one", log=tmp_path / "log")
    assert code == 0, text
    ours, theirs = (result_of(tmp_path / name / f"{method}-smoke")[1] for name in ("two", "one"))
    steps = [line for line in theirs if "loss" in line]
    assert len(steps) == 4 and [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, expected in zip([line for line in ours if "loss" in line], steps, strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert mine == pytest.approx(expected, rel=5e-3, abs=1e-3)


def two_processes(
    tmp_path: Path,
    method: str,
    *words: object,
    flags: tuple = ((), ()),
    folders: tuple = (None, None),
    before: Callable[[], None] | None = None,
) -> list[Command]:
    """A method's script as processes 0 and 1, as torchrun starts them, each with flags and a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = []
    for number in range(2):
        ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        commands.append(
            Command(
                module(method),
                "smoke",
                *words,
                *flags[number],
                log=tmp_path / f"log{number}",
                env={**env, "ACCELERATE_USE_CPU": "true"},
                before=before or partial(os.chdir, folders[number] or tmp_path),
            )
        )
    return commands


def test_processes_with_other_settings_are_refused(tmp_path):
    for command in two_processes(tmp_path, "simclr", "--no-eval", flags=(("--hue", 0.1), ("--hue", 0.2))):
        assert command.wait() == 2 and "do not train the same: hue 0.1 and 0.2" in command.output(), command.output()


def test_processes_that_load_different_checkpoints_are_refused(uninterrupted, tmp_path):
    """Two machines without a common folder: the second has no checkpoint."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    shutil.copytree(uninterrupted("simclr"), tmp_path / "0" / "runs" / "simclr-smoke")
    for command in two_processes(
        tmp_path, "simclr", "--no-eval", "--out", "runs", folders=(tmp_path / "0", tmp_path / "1")
    ):
        text = command.wait() and command.output()
        assert command.wait() == 2 and "step of the checkpoint 16 and 0" in text and "machines share" in text, text


def test_a_signal_to_one_process_stops_all_within_two_steps(tmp_path):
    commands = two_processes(tmp_path, "simclr", "--no-eval", "--log-every", 4, "--save-every", 100, "--out", tmp_path)
    directory = tmp_path / "simclr-smoke"
    commands[1].kill_at(4, directory / "metrics.jsonl", signal.SIGTERM)
    assert [command.wait() for command in commands] == [128 + signal.SIGTERM] * 2, commands[0].output()
    assert 4 < steps(directory / "checkpoints")[-1] < 8


def torchrun(processes: int, *arguments: object, use_cpu: bool = True) -> subprocess.CompletedProcess:
    """A module under torchrun, on CPUs if Accelerate is configured so."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the processes find each other")
def test_processes_that_would_train_alone_are_stopped(tmp_path):
    alone = torchrun(2, module("simclr"), "smoke", "--no-eval", "--out", tmp_path, use_cpu=False)
    assert alone.returncode != 0 and "each would train alone" in alone.stderr


def test_two_processes_end_with_a_card(tmp_path):
    """The first process evaluates after the others have left: no collective may wait for them. Their share of the
    features changes nothing."""
    arguments = ("--max-steps", "4", "--knn-every", "1", "--eval-protocols", "knn", "--out", tmp_path)
    done = torchrun(2, module("simclr"), "smoke", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    directory, cfg = tmp_path / "simclr-smoke", PRESETS["smoke"][1]
    card = read_card(directory / "result.json")
    assert card["environment"]["processes"] == 2

    backbone, spec = load(directory)
    stores = [open_data(cfg.data, split, limit=limit) for split, limit in (("train", cfg.limit), ("test", None))]
    inputs = {"image_size": spec.image_size, "mean": spec.mean, "std": spec.std}
    alone = evaluate(backbone, *stores, **inputs, protocols=("knn",), random_init=random_init(spec, cfg.seed))
    assert len(alone.rows) == 2
    found = {(row["protocol"], row["metric"]): row for row in card["evaluations"]}
    for row in alone.rows:
        ours = found[row["protocol"], row["metric"]]
        assert (ours["value"], ours["baselines"]) == (row["value"], row["baselines"]), row["protocol"]
    (online,) = [line for line in read_metrics(directory / "metrics.jsonl") if line.get("kind") == "online_knn"]
    assert online["accuracy"] == found["knn-20-0.07", "top-1"]["value"]  # of the same weights


def tell_timeouts() -> None:
    """Print how long the process groups that are made from now on wait."""
    for name in ("init_process_group", "new_group"):
        made = getattr(torch.distributed, name)

        def make(*args, made=made, timeout=None, **kwargs):
            print("waits", timeout, flush=True)
            return made(*args, timeout=timeout, **kwargs)

        setattr(torch.distributed, name, make)


def test_processes_wait_for_hours(tmp_path):
    """While the first one saves or measures; ten minutes are NCCL's limit."""
    for command in two_processes(tmp_path, "simclr", "--plan", before=tell_timeouts):
        assert command.wait() == 0, command.output()
        assert re.findall(r"waits (.*)", command.output()) == [str(WAIT)] * 2 and WAIT >= timedelta(hours=1)
