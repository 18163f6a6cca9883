"""Signs of life: on a terminal a bar that moves, elsewhere a line now and then, whatever the loop is deep inside."""

import io
import time

from rich.console import Console

import common.run
from common.progress import Display, part, track
from common.run import Run


def consumed(seconds: float, n: int = 4) -> list[int]:
    found = []
    for i in track(range(n), "features", n):
        time.sleep(seconds)
        found.append(i)
    return found


def test_lines_come_only_when_nothing_was_said_for_long():
    out = io.StringIO()
    with Display(Console(file=out, width=80), every=0.05, prefix="evaluation: "), part("backbone"):
        assert consumed(0.03) == [0, 1, 2, 3]
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("evaluation: backbone, features: 50 %, "), lines
    assert lines[0].endswith(" left")
    out = io.StringIO()
    with Display(Console(file=out)):
        consumed(0.0)
    assert out.getvalue() == ""
    assert consumed(0.0) == [0, 1, 2, 3]  # without a display


def test_a_terminal_shows_a_bar_that_goes_when_its_work_is_done():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Display(console) as display:
        outer = display.add("train", 10, 3)
        display.bars.update(outer, completed=7, text="[b]loss[/b] 1.5")
        for i in track(range(3), "features", 3):
            display.bars.refresh()
            shown = {task.description: task.completed for task in display.bars.tasks}
            assert shown == {"train": 7, "features": i}
        assert [task.description for task in display.bars.tasks] == ["train"]
        assert not display.due
    assert "7/10" in out.getvalue() and "[b]loss[/b] 1.5" in out.getvalue()  # text is no markup


def training(out, **about):
    run = object.__new__(Run)
    run.console, run.start_step, run.last_step = Console(file=out, width=200, **about), 0, 100
    run.batch_size, run.steps_per_epoch, run.afterwards = 8, 10.0, ", then the evaluation"
    return run


def test_training_says_something_before_its_first_window_is_full(monkeypatch):
    monkeypatch.setattr(common.run, "LINE_EVERY", 0.05)
    out = io.StringIO()
    with training(out)._progress() as show:
        show(1, None)
        assert out.getvalue() == ""
        time.sleep(0.06)
        show(2, None)
        assert out.getvalue().startswith("step 2/100  epoch 0.2  ") and " images/s  " in out.getvalue()
        assert out.getvalue().endswith(" left, then the evaluation\n")
        show(20, {"loss": 1.5, "images_per_second": 640.0})  # not so soon again
        time.sleep(0.06)
        show(23, None)
        show(100, {"loss": 1.25, "images_per_second": 640.0})  # the end is always said
    lines = out.getvalue().splitlines()
    assert lines[1] == "step 23/100  epoch 2.3  loss 1.5000  640 images/s  1.0 s left, then the evaluation"
    assert lines[2].startswith("step 100/100  epoch 10.0  loss 1.2500") and len(lines) == 3


def test_the_bar_moves_every_step(monkeypatch):
    seen = []
    with training(io.StringIO(), force_terminal=True)._progress() as show:
        bar = common.progress._open[-1].bars
        for step in range(1, 4):
            show(step, None)
            seen.append((bar.tasks[0].completed, bar.tasks[0].total))
    assert seen == [(1, 100), (2, 100), (3, 100)]
