"""One directory for each method: `python -m methods.NAME.train PRESET`.

Without a preset the command lists them. That takes a method's config.py alone, so it is done here, before train.py
spends seconds on importing torch and timm.
"""

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from common.cli import parse, run_cli
from common.errors import UserError

HERE = Path(__file__).parent
LISTING = ([], ["-h"], ["--help"])
"""What follows a method's name where its presets are to be listed."""


def presets_of(name: str) -> Mapping[str, tuple[str, Any]]:
    """What each preset of methods/`name` is for, and its config. Raises UserError where there is no such method."""
    if not name.isidentifier() or not (HERE / name / "config.py").is_file():
        raise UserError(f"there is no methods/{name}")
    return import_module(f"methods.{name}.config").PRESETS


def preset_of(name: str, preset: str) -> Any:
    """The config of a method's preset. Raises UserError where there is no such method or preset."""
    presets = presets_of(name)
    if preset not in presets:
        raise UserError(f"{name} has no preset {preset}: it has {', '.join(presets)}")
    return presets[preset][1]


def list_presets(name: str, argv: list[str]) -> None:
    """Print the presets of methods/`name` as its train.py does, and end as that ends; argv: of `LISTING`."""
    parse(presets_of(name), f"python -m methods.{name}.train", argv)


if sys.argv[0] == "-m" and sys.argv[1:] in LISTING:  # "-m": Python is looking for the module that it will run
    if found := re.fullmatch(r"(?:-m)?methods\.(\w+)\.train", sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]):
        run_cli(lambda: list_presets(found[1], sys.argv[1:]))
