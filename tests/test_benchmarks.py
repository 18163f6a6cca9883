"""Benchmarks refuse what makes no sense in one sentence, before they measure."""

import pytest

from tests.processes import run_command


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        ("step", ("--steps", 0), "--steps is 0: it must be at least 6"),
        ("step", ("--threads", 0), "--threads is 0: it must be at least 1"),
        ("step", ("--methods", "nope"), "there is no methods/nope"),
        ("step", ("--methods", "../x"), "there is no methods/../x"),
        ("step", ("--methods", "mae", "--preset", "nope"), "mae has no preset nope: it has quickstart"),
        ("memory", ("--batch-size", 0), "--batch-size is 0: it must be at least 1"),
        ("memory", ("--micro-batch", 0), "--micro-batch is 0: it must be at least 1"),
        ("memory", ("--micro-batch", 100), "--micro-batch 100 does not divide the 2048 images of a process"),
        ("memory", ("--preset", "nope"), "simclr has no preset nope"),
        ("mae", ("--rounds", -1), "--rounds is -1: it must be at least 1"),
        ("mae", ("--preset", "nope"), "mae has no preset nope"),
        ("views", ("--sizes", 0), "--sizes is 0: it must be at least 1"),
        ("views", ("--device", "nope"), "--device nope: "),
        ("loading", ("--images", 0), "--images is 0: it must be at least 1"),
        ("loading", ("--seconds", "nan"), "--seconds is nan: it must be at least 0"),
    ],
)
def test_mistakes_are_one_sentence(module, words, sentence, tmp_path):
    code, text = run_command(f"benchmarks.{module}", *words, log=tmp_path / "log")
    assert code == 2 and text.startswith(f"error: {sentence}") and text.count("\n") == 1, text
