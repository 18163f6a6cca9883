"""Checkpoints are whole or absent; the log is exact over a resume."""

import json
import math
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.errors import UserError
from common.log import MetricLog, read_metrics
from tests.processes import CONTEXT


def state(step: int) -> dict:
    return {"weights": torch.full((1000,), float(step)), "step": step, "nested": {"list": [1, 2.5, "x"]}}


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [20, 30]
    step, loaded = checkpoint.load_newest(tmp_path)
    assert step == 30 and loaded["nested"] == {"list": [1, 2.5, "x"]} and loaded["weights"][0] == 30
    assert checkpoint.load_newest(tmp_path / "empty") is None


DAMAGES = {  # what happens to the newest checkpoint: the reason that is given
    "truncated": "has .* bytes of",
    "flipped": "does not match its checksum",
    "no state": "No such file",
    "no manifest": "does not exist",
    "empty manifest": "it is empty",
    "manifest of another step": "its manifest is of step 10",
    "manifest of other types": "bytes is nan, not a whole number",
    "manifest that is a list": "holds list",
    "other content": "holds a list, not a dict",
    "not finite": "model.weight is not finite",
}


def damage(path: Path, kind: str) -> None:
    state_file, manifest = path / "state.pt", path / "manifest.json"
    content = state_file.read_bytes()
    match kind:
        case "truncated":
            state_file.write_bytes(content[:-100])
        case "flipped":
            state_file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        case "no state":
            state_file.unlink()
        case "no manifest":
            manifest.unlink()
        case "empty manifest":
            manifest.write_text("")
        case "manifest of another step":
            shutil.rmtree(path)
            shutil.copytree(path.with_name("step-00000010"), path)
        case "manifest of other types":
            manifest.write_text(manifest.read_text().replace(f"{len(content)}", "NaN"))
        case "manifest that is a list":
            manifest.write_text("[1, 2]")
        case "other content":
            shutil.rmtree(path)
            checkpoint.save(path.parent, 20, [1, 2])
        case "not finite":
            shutil.rmtree(path)
            checkpoint.save(
                path.parent, 20, {"model": {"bias": torch.zeros(3), "weight": torch.tensor([1.0, math.nan])}}
            )


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_falls_back_and_is_named(tmp_path, kind):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, state(step))
    damage(tmp_path / "step-00000020", kind)
    lines = []
    assert checkpoint.load_newest(tmp_path, lines.append)[0] == 10
    assert len(lines) == 1 and "step-00000020 cannot be used" in lines[0] and "falling back" in lines[0]
    assert re.search(DAMAGES[kind], lines[0])


def test_a_run_does_not_start_again_over_damaged_checkpoints(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, state(step))
        damage(tmp_path / f"step-{step:08d}", "truncated")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoint.load_newest(tmp_path, lambda line: None)


def test_folders_of_other_names_are_left_alone(tmp_path):
    others = ["step-00000008 (copy)", "step-00000008-backup", "step-old", "step-8", "step-000000008", "step--0000001"]
    others += ["step-٠٠٠٠٠٠٠٩"]
    for name in others:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "step-00000099").write_text("a file")
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), keep=1)
    assert checkpoint.steps(tmp_path) == [30] and checkpoint.load_newest(tmp_path)[0] == 30
    assert all((tmp_path / name).exists() for name in [*others, "step-00000099"])
    for keep in (0, -1):
        with pytest.raises(ValueError, match="at least the new checkpoint"):
            checkpoint.save(tmp_path, 40, state(40), keep=keep)
    assert checkpoint.steps(tmp_path) == [30]


def test_leftover_of_a_kill_is_not_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 10, state(10))
    (tmp_path / ".writing-00000020").mkdir()
    (tmp_path / ".writing-00000020" / "state.pt").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path)[0] == 10
    checkpoint.save(tmp_path, 30, state(30))
    assert not list(tmp_path.glob(".writing-*"))


def _save_on_a_full_disk(folder, sender):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        checkpoint.save(folder, 20, {"weights": torch.zeros(100_000)})
        sender.send("saved")
    except UserError as error:
        sender.send(str(error))


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 10, state(10))
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_save_on_a_full_disk, args=(tmp_path, sender))
    child.start()
    assert receiver.poll(60)
    message = receiver.recv()
    child.join()
    assert (
        "could not save the checkpoint of step 20" in message and "step-00000010" in message and "disk full" in message
    )
    assert checkpoint.load_newest(tmp_path)[0] == 10 and not list(tmp_path.glob(".writing-*"))


def test_log_windows_survive_a_resume(tmp_path):
    values = [0.1 * i + 1 / 3 for i in range(12)]

    def lines(directory, cut=None):
        directory.mkdir()
        log = MetricLog(directory)
        step = 0
        while step < 12:
            log.add(loss=torch.tensor(values[step]), lr=0.5)
            step += 1
            if step % 4 == 0:
                log.close_window(step, epoch=step / 4)
            if step == cut:  # saved here, killed three steps later, resumed in a new process
                log.read()
                saved = json.loads(json.dumps(log.state_dict()))
                for lost in range(step, step + 3):
                    log.add(loss=9.9, lr=9.9)
                    if (lost + 1) % 4 == 0:
                        log.close_window(lost + 1, epoch=9)
                log.event(step + 2, "online_knn", accuracy=1.0)
                log.close()
                log = MetricLog(directory)
                log.resume(step, saved)
        log.close()
        return read_metrics(directory / "metrics.jsonl")

    whole = lines(tmp_path / "whole")
    assert [line["step"] for line in whole] == [4, 8, 12]
    assert whole[0]["loss"] == pytest.approx(sum(values[:4]) / 4, abs=1e-7)
    assert lines(tmp_path / "cut", cut=6) == whole
    assert lines(tmp_path / "aligned", cut=8) == whole


def test_log_refuses_changing_names_and_survives_a_cut_line(tmp_path):
    log = MetricLog(tmp_path)
    log.add(loss=1.0, lr=1.0)
    with pytest.raises(ValueError, match="same metrics"):
        log.add(loss=1.0)
    log.close_window(1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
