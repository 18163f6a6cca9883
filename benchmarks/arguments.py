"""Command lines of the benchmarks: numbers above their bounds, methods, presets and devices that exist."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from common.errors import UserError


def check(arguments: Any, least: Mapping[str, int] | None = None) -> None:
    """Raise UserError for the first value of `arguments` (a dataclass or a namespace) that makes no sense.

    Numbers are at least 1, or at least what `least` has for their name; `methods` have directories, and a config with
    the preset in `preset`, if there is one; `device` is one that torch has.
    """
    values = dataclasses.asdict(arguments) if dataclasses.is_dataclass(arguments) else vars(arguments)
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            bound = (least or {}).get(name, 1)
            if isinstance(number, int | float) and not isinstance(number, bool) and not number >= bound:
                raise UserError(f"--{name.replace('_', '-')} is {number}: it must be at least {bound}")
    for method in values.get("methods", ()):
        check_preset(method, values.get("preset"))
    try:
        torch.empty(0, device=values.get("device"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {values['device']}: {str(error).partition(chr(10))[0]}") from None


def check_preset(method: str, preset: str | None) -> None:
    """Raise UserError for a method that is not there, or that has no such preset (None: any)."""
    if not method.isidentifier() or importlib.util.find_spec(f"methods.{method}") is None:
        raise UserError(f"there is no methods/{method}")
    presets = importlib.import_module(f"methods.{method}.config").PRESETS
    if preset is not None and preset not in presets:
        raise UserError(f"{method} has no preset {preset}: it has {', '.join(presets)}")
