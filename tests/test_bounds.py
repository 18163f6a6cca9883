"""Numbers that make no sense are refused before anything is read: the flag and its bound in one sentence."""

import dataclasses
import importlib
import math
import pkgutil
import re
import resource
from typing import get_args, get_type_hints

import pytest

import methods
from common.bounds import AT_MOST_1, AT_MOST_1000, BELOW_1, MOST, PIXELS, POSITIVE, bound_of, check_numbers, problem
from common.cli import field_docs, parse
from common.errors import UserError
from tests.processes import run_command

METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg)


def presets(method: str) -> dict:
    return {name: cfg for name, (_, cfg) in importlib.import_module(f"methods.{method}.config").PRESETS.items()}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_within_bounds_and_no_field_takes_nonsense(method):
    for cfg in presets(method).values():
        check_numbers(cfg)
    cfg = presets(method)["smoke"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        several = isinstance(value, tuple) and value and all(map(is_number, value))
        if field.name == "seed" or not (several or is_number(value)):
            continue
        bad = [-1, -0.5, math.nan, math.inf, -math.inf, 1e31]
        bad += [0] if field.name in POSITIVE - cfg.zero_is_off else []
        bad += [1.5, 1e30] if field.name in AT_MOST_1 else []
        bad += [1001] if field.name in AT_MOST_1000 else []
        bad += [8193] if field.name in PIXELS else []
        bad += [1.0, 1.5] if field.name in BELOW_1 else []
        bad += [(1 << 53) + 1] if isinstance(value[-1] if several else value, int) else []
        for number in bad:
            wrong = (*value[:-1], number) if several else number
            with pytest.raises(UserError, match=re.escape(f"--{field.name.replace('_', '-')} is {number}: it must")):
                check_numbers(dataclasses.replace(cfg, **{field.name: wrong}))


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_bounds_of_every_number(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(f"methods.{method}.config")
    with pytest.raises(SystemExit):
        parse(module.PRESETS, "train", ["smoke", "--help"])
    parts = re.split(r"\n│? {1,4}--(?=[a-z])", capsys.readouterr().out)
    shown = {part.split()[0]: " ".join(re.sub("[│╭╮╰╯─]", " ", part).split()) for part in parts}
    numbers = 0
    for field in dataclasses.fields(presets(method)["smoke"]):
        kind = get_type_hints(module.Config)[field.name]
        number = next((n for n in (int, float) if n in (kind, *get_args(kind))), None)
        if number:
            numbers += 1
            bound = ">= 0" if field.name in module.Config.zero_is_off else bound_of(field.name, number)
            assert f"({bound}) (default" in shown[field.name.replace("_", "-")]
    assert numbers > 15 and ("temperature" not in shown or "(> 0)" in shown["temperature"])
    docs = field_docs(module.Config)
    contradicted = [n for n in POSITIVE - module.Config.zero_is_off if re.search(r"\b0( |:)", docs.get(n, ""))]
    assert not contradicted  # a text that says what 0 means, beside a bound that forbids it


@pytest.mark.parametrize(
    ("name", "kind", "words", "inside", "outside"),
    [
        ("temperature", float, "> 0", 1e-9, 0.0),
        ("epochs", int, ">= 1", 1, 0),
        ("warmup_epochs", float, ">= 0", 0.0, -0.1),
        ("momentum", float, "0 to 1", 0.0, 1.1),
        ("momentum", float, "0 to 1", 1.0, -0.1),
        ("layer_decay", float, "> 0, at most 1", 1.0, 0.0),
        ("layers", int, "1 to 1000", 1, 1001),
        ("copies", int, "1 to 1000", 1000, 0),
        ("image_size", int, "1 to 8192", 8192, 8193),
        ("betas", float, ">= 0, below 1", 0.999, 1.0),
        ("local_views", int, "0 to 1000", 0, 1001),
        ("save_every", int, ">= 1", 1 << 53, (1 << 53) + 1),
        ("seed", int, "64 bits", -5, 1 << 64),
    ],
)
def test_what_help_says_is_what_is_checked(name, kind, words, inside, outside):
    assert bound_of(name, kind) == words and not problem(name, inside) and problem(name, outside)


def test_every_bound_is_of_a_field():
    fields = {f.name for method in METHODS for f in dataclasses.fields(presets(method)["smoke"])}
    assert fields >= POSITIVE | BELOW_1 and fields >= MOST.keys()


def test_seeds_have_64_bits():
    assert not problem("seed", -5) and not problem("seed", (1 << 64) - 1)
    assert problem("seed", 1 << 64) == "a number of 64 bits"


@pytest.mark.parametrize(
    "words", [("--epochs", "0"), ("--temperature", "nan"), ("--weight-decay", "-0.5"), ("--seed", str(1 << 70))]
)
def test_the_command_line_refuses_them(tmp_path, words):
    code, text = run_command("methods.simclr.train", "smoke", "--out", tmp_path, *words, log=tmp_path / "log")
    assert code == 2 and text.startswith(f"error: {words[0]} is {words[1]}: it must be") and text.count("\n") == 1, text
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_more_memory_than_there_is(tmp_path):
    arguments = ("smoke", "--out", tmp_path, "--no-eval", "--channels", 8, 8, 8, 10**12)
    code, text = run_command("methods.simclr.train", *arguments, log=tmp_path / "log")
    assert code == 2 and "error: not enough memory: a smaller batch" in text and "Traceback" not in text, text


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_every_number_ends_in_a_step_or_a_sentence(tmp_path, method):
    """The real script with 0 and with something huge in each field in turn: no traceback and no hang."""
    cfg = presets(method)["smoke"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        several = isinstance(value, tuple) and value and all(map(is_number, value))
        if not (several or is_number(value)):
            continue
        whole = isinstance(value[-1] if several else value, int)
        for number in ("0", "1000000000000000" if whole else "1e30"):
            words = {"--max-steps": ["1"], "--workers": ["1"]}
            words[f"--{field.name.replace('_', '-')}"] = [*map(str, value[:-1]), number] if several else [number]
            flat = [word for name, values in words.items() for word in (name, *values)]
            out = tmp_path / f"{field.name}-{number}"
            code, text = run_command(
                f"methods.{method}.train",
                "smoke",
                "--no-eval",
                "--out",
                out,
                *flat,
                log=tmp_path / "log",
                before=limited,
            )
            assert code in (0, 2) and "Traceback" not in text and ("error: " in text) == (code == 2), (flat, code, text)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # so that no number can fill the machine's memory


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("cpc", ("--stride", "0")),
        ("cpc", ("--prediction-steps", "0")),
        ("ijepa", ("--min-keep", "0")),
        ("ijepa", ("--blocks", "0")),
        ("mae", ("--mask-window", "0")),
    ],
)
def test_before_a_network_is_made_of_them(tmp_path, method, words):
    code, text = run_command(f"methods.{method}.train", "smoke", "--out", tmp_path, *words, log=tmp_path / "log")
    assert code == 2 and text == f"error: {words[0]} is 0: it must be at least 1\n", text
