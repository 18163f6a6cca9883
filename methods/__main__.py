"""The methods: `python -m methods` lists them, `python -m methods simclr quickstart` is `python -m methods.simclr.train
quickstart`. Installed with `pip install -e .`, both are called `ssl-train`.
"""

import ast
import difflib
import runpy
import sys

from common.cli import run_cli
from common.errors import UserError

from . import HERE, LISTING, list_presets


def listing() -> dict[str, str]:
    """Name of each method -> what its train.py says first, up to the citation; nothing is imported."""
    found = {}
    for path in sorted(HERE.glob("*/train.py")):
        first, _, _ = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")
        found[path.parent.name] = " ".join(first.split()).partition(" (")[0]
    return found


def start(argv: list[str]) -> None:
    """Run a method's train.py, or list the methods. Raises UserError for an unknown name."""
    found = listing()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, found))
        lines = (f"  {name:<{width}}  {about}" for name, about in found.items())
        print("usage: python -m methods METHOD PRESET [--field value ...]\n\nmethods:", *lines, sep="\n")
        print("\nWithout a preset, a method lists its presets.")
        return
    name, *rest = argv
    if name not in found:
        near = difflib.get_close_matches(name, found, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{name!r} is not a method: {hint}methods are {', '.join(found)}")
    if rest in LISTING:
        list_presets(name, rest)
    sys.argv = [f"methods.{name}.train", *rest]
    runpy.run_module(f"methods.{name}.train", run_name="__main__", alter_sys=True)


def main() -> None:
    run_cli(lambda: start(sys.argv[1:]))


if __name__ == "__main__":
    main()
