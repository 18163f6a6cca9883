"""Structure: import directions, flat configs whose every field is read, train.py mostly the method."""

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path

import pytest

import methods
from common.cli import field_docs
from common.config import RESUMABLE_FIELDS

ROOT = Path(__file__).parents[1]
METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg)
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


def attributes_of(paths: Iterable[Path], *owners: str) -> set[str]:
    """Names read as `owner.name` in the files; an owner is written as in the source: "cfg", "self.cfg"."""
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners}


SHARED_READS = attributes_of([ROOT / "eval" / "session.py"], "cfg", "self.cfg") | attributes_of(
    [ROOT / "common" / "config.py"], "self"
)


@pytest.mark.parametrize("method", METHODS)
def test_every_config_field_is_read(method):
    config = importlib.import_module(f"methods.{method}.config").Config
    read = attributes_of((ROOT / "methods" / method).glob("*.py"), "cfg", "self.cfg") | SHARED_READS
    fields = {f.name for f in dataclasses.fields(config)} - RESUMABLE_FIELDS
    assert not fields - read, f"fields nobody reads: {sorted(fields - read)}"


@pytest.mark.parametrize("method", METHODS)
def test_every_config_field_is_documented(method):
    config = importlib.import_module(f"methods.{method}.config").Config
    docs = field_docs(config)
    assert not [f.name for f in dataclasses.fields(config) if not docs.get(f.name)]


def test_shared_fields_are_typed_once():
    """A method repeats a shared field only for another default or its paper's word on it."""
    repeated = []
    for method in METHODS:
        config = importlib.import_module(f"methods.{method}.config").Config
        for base in config.__mro__[1:]:
            if not dataclasses.is_dataclass(base):
                continue
            shared = {f.name: f for f in dataclasses.fields(base)}
            for f in dataclasses.fields(config):
                if f.name in config.__annotations__ and f.name in shared and f.default == shared[f.name].default:
                    if field_docs(config)[f.name] == field_docs(base)[f.name]:
                        repeated.append(f"{method}: {f.name} repeats {base.__name__}")
    assert not repeated


def test_every_run_field_is_read():
    paths = [ROOT / "common" / name for name in ("run.py", "plan.py", "config.py")]
    paths += [ROOT / "eval" / name for name in ("finish.py", "session.py")]
    read = attributes_of([p for p in paths if p.exists()], "cfg", "self.cfg", "run.cfg", "self.run.cfg")
    read |= attributes_of((ROOT / "methods").rglob("*.py"), "cfg", "run.cfg")
    assert not RESUMABLE_FIELDS - read


def method_share(train: str) -> float:
    """Share of a train.py's non-blank lines that are the paper's: networks, loss, optimizer, schedules, loop.

    The rest is the docstring, imports, opening the session, the plan and checks, export and evaluation, and the call
    of main.
    """
    lines = train.splitlines()
    tree = ast.parse(train)
    plumbing: set[int] = set()

    def mark(node: ast.AST) -> None:
        plumbing.update(range(node.lineno, node.end_lineno + 1))

    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.If) or isinstance(node, ast.Expr):
            mark(node)
    calls = ("Session(", "ImageSession(", "session.start(", "session.export(", "session.evaluate(", "session.print(")
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    plumbing.add(main.lineno)
    for statement in ast.walk(main):
        if isinstance(statement, ast.Expr | ast.Assign) and ast.unparse(statement).split(" = ")[-1].startswith(calls):
            mark(statement)
    ours = [i for i, line in enumerate(lines, start=1) if line.strip()]
    return sum(i not in plumbing for i in ours) / len(ours)


@pytest.mark.parametrize("method", METHODS)
def test_train_is_mostly_the_method(method):
    assert method_share((ROOT / "methods" / method / "train.py").read_text()) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_directory_is_complete_and_readable(method):
    directory = ROOT / "methods" / method
    for name in ("train.py", "config.py", "loss.py", "augment.py", "README.md", "__init__.py"):
        assert (directory / name).exists(), name
    assert (directory / "__init__.py").read_text() == ""
    readme = (directory / "README.md").read_text()
    presets = importlib.import_module(f"methods.{method}.config").PRESETS
    assert {"quickstart", "smoke"} <= presets.keys()
    assert any(preset.endswith("-cpu") for preset in presets), "a preset on real data for two cores"
    for preset in presets:
        assert f"`{preset}`" in readme, f"{preset} is not in the README"
