"""The shape of the house: import directions, flat configs whose every field is read, files of a reader's size."""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest

import methods
from common.run import FREE_FIELDS

ROOT = Path(__file__).parents[1]
METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__))
ALLOWED = {"common": {"common"}, "eval": {"eval", "common"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def test_imports_go_one_way():
    ours = {"methods", "eval", "common", "tests", "benchmarks", "studies"}  # studies see all, and nothing sees them
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            wrong = {name for name in imports(path) if name.split(".")[0] in ours - allowed}
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
    for path in (ROOT / "methods").rglob("*.py"):
        wrong = {name for name in imports(path) if name.split(".")[0] in ours - {"eval", "common"}}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: methods use relative imports and no other method"


def test_common_knows_no_method_by_name():
    for path in [*(ROOT / "common").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        strings = {
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not strings & set(METHODS), f"{path.relative_to(ROOT)} names a method"


@pytest.mark.parametrize("method", METHODS)
def test_every_config_field_is_read(method):
    config = importlib.import_module(f"methods.{method}.config").Config
    read = set()
    for path in (ROOT / "methods" / method).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg":
                read.add(node.attr)
    fields = {f.name for f in dataclasses.fields(config)} - FREE_FIELDS
    assert not fields - read, f"fields nobody reads: {sorted(fields - read)}"


def test_every_run_field_is_read():
    text = (
        (ROOT / "common" / "run.py").read_text()
        + (ROOT / "eval" / "finish.py").read_text()
        + "".join(p.read_text() for p in (ROOT / "methods").rglob("train.py"))
    )
    assert not [name for name in FREE_FIELDS if f"cfg.{name}" not in text]


@pytest.mark.parametrize("method", METHODS)
def test_directory_is_complete_and_readable(method):
    directory = ROOT / "methods" / method
    for name in ("train.py", "config.py", "loss.py", "augment.py", "README.md", "__init__.py"):
        assert (directory / name).exists(), name
    assert len((directory / "train.py").read_text().splitlines()) <= 250
    assert (directory / "__init__.py").read_text() == ""
    readme = (directory / "README.md").read_text()
    presets = importlib.import_module(f"methods.{method}.config").PRESETS
    assert {"quickstart", "smoke", "cifar10-cpu"} <= presets.keys()
    for preset in presets:
        assert f"`{preset}`" in readme, f"{preset} is not in the README"
