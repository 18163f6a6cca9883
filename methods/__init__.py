"""One directory for each method: `python -m methods.NAME.train PRESET`.

Without a preset the command lists them. That takes a method's config.py alone, so it is done here, before train.py
spends seconds on importing torch and timm.
"""

import re
import sys
from importlib import import_module

from common.cli import parse, run_cli

LISTING = ([], ["-h"], ["--help"])
"""What follows a method's name where its presets are to be listed."""


def list_presets(name: str, argv: list[str]) -> None:
    """Print the presets of methods/`name` as its train.py does, and end as that ends; argv: of `LISTING`."""
    parse(import_module(f"methods.{name}.config").PRESETS, f"python -m methods.{name}.train", argv)


if sys.argv[0] == "-m" and sys.argv[1:] in LISTING:  # "-m": Python is looking for the module that it will run
    if found := re.fullmatch(r"(?:-m)?methods\.(\w+)\.train", sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]):
        run_cli(lambda: list_presets(found[1], sys.argv[1:]))
