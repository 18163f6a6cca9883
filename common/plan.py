"""What --plan prints: every setting with its source, and the time and memory that a run takes."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from rich import box
from rich.table import Table

from common.cli import field_docs
from common.environment import peak_memory
from common.html import duration


def settings_table(title: str, config: Any, preset_config: Any, *, last: Collection[str]) -> Table:
    """A row for each field of the dataclass `config`: value, who set it (flag, preset or default), source.

    preset_config: the config without the flags. last: fields at the end of the table.
    """
    config_class: type = type(config)
    docs, defaults = field_docs(config_class), config_class()
    names = sorted((f.name for f in dataclasses.fields(config)), key=lambda name: name in last)
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("setting", overflow="fold")
    table.add_column("value", max_width=22, overflow="fold")
    table.add_column("set by", overflow="fold")
    table.add_column("source", overflow="fold")
    for name in names:
        value, preset_value = getattr(config, name), getattr(preset_config, name)
        by = "flag" if value != preset_value else "preset" if value != getattr(defaults, name) else "default"
        table.add_row(name, str(value), by, docs.get(name, ""))
    return table


def derived_lines(derived: Mapping[str, str]) -> list[str]:
    """The values derived from the settings, one line each, aligned."""
    return [f"{name:>20}  {value}" for name, value in derived.items()]


def timed_steps(
    finish_step: Callable[[], object],
    log: Callable[[str], None],
    *,
    batch_size: int,
    total_steps: int,
    device: torch.device,
    warmup: int = 2,
    timed: int = 5,
    afterwards: Callable[[], str] = str,
) -> Iterator[int]:
    """Yield a few steps for the caller to do, at most a minute of them, and log what `total_steps` of them would take.

    finish_step: waits until the device has finished the steps so far. afterwards: what follows training, in words.
    """
    log(f"timing {timed} steps after {warmup} to warm up ...")
    yield from range(warmup)
    finish_step()
    start, count = time.perf_counter(), 0
    for step in range(warmup, warmup + timed):
        yield step
        finish_step()
        count += 1
        if time.perf_counter() - start > 60:
            break
    seconds = (time.perf_counter() - start) / count
    log(
        f"{batch_size / seconds:.0f} images/s, {seconds:.3f} s a step: about {duration(seconds * total_steps)} for "
        f"{total_steps} steps{afterwards()}; peak memory {peak_memory(device) / 2**30:.2f} GiB on {device}. "
        "Nothing was written."
    )
