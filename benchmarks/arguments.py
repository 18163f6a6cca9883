"""Command lines of the benchmarks: numbers above their bounds, methods, presets and devices that exist."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from common.errors import UserError
from methods import preset_of


def check(arguments: Any, least: Mapping[str, int] | None = None) -> None:
    """Raise UserError for the first value of `arguments` (a dataclass or a namespace) that makes no sense.

    Numbers are at least 1, or at least what `least` has for their name; `methods` have the preset
    `preset`, where that is an argument; `device` is one that torch has.
    """
    values = dataclasses.asdict(arguments) if dataclasses.is_dataclass(arguments) else vars(arguments)
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            bound = (least or {}).get(name, 1)
            if isinstance(number, int | float) and not isinstance(number, bool) and not number >= bound:
                raise UserError(f"--{name.replace('_', '-')} is {number}: it must be at least {bound}")
    if "preset" in values:
        for method in values.get("methods", ()):
            preset_of(method, values["preset"])
    try:
        torch.empty(0, device=values.get("device"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {values['device']}: {str(error).partition(chr(10))[0]}") from None
