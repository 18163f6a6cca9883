"""What --plan prints: how large a run is, what it costs by an estimate and what sets it apart from the method's
defaults; under --plan full every setting with its source, and the time and memory of a few steps."""

import dataclasses
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from rich import box
from rich.table import Table

from common.cli import field_docs
from common.config import RESUMABLE_FIELDS
from common.environment import peak_memory
from common.html import duration

WIDTH, INDENT = 80, 20  # columns of a short plan, and of the names in it
UTILIZATION = 0.2
"""Share of a GPU's peak that training reaches: ResNet-50 at about 2,500 images/s of 224 px on an A100, a figure from
memory."""
PEAKS = {"A100": 312, "H100": 989, "RTX 4090": 165}
"""TFLOP/s of dense bfloat16 products, by the data sheets."""
CPU_RATE = 0.076
"""TFLOP/s of two idle cores of an AMD EPYC, as measured: two views through 4.153 MMAC at 1,523 images/s (README,
Speed)."""
SHORTEST_STEP = 0.015  # seconds, on a GPU: small networks wait for their kernels to be launched


def estimate(multiply_adds: int, *, batch_size: int, steps: int, steps_per_epoch: float) -> str:
    """What training costs on common devices, with the formula, in words. `multiply_adds`: of the backbone on all views
    of an image. A forward and a backward pass take three times the forward pass's operations, two a multiply-add."""
    tera = 6 * multiply_adds * batch_size / 1e12  # a step's operations
    seconds = {name: max(tera / (UTILIZATION * peak), SHORTEST_STEP) for name, peak in PEAKS.items()}
    if (cpu := tera / CPU_RATE) * steps < 100 * 3600:
        seconds["two CPU cores"] = cpu
    times = [f"{name} {_about(step * steps_per_epoch)}, {_about(step * steps)}" for name, step in seconds.items()]
    formula = f"6 x {multiply_adds / 1e6:,.0f} MMAC x {batch_size} images a step at {UTILIZATION:.0%} of one GPU's peak"
    return (
        f"an epoch, and all of them: {'; '.join(times)}. Not measured: {formula}, no step under "
        f"{1000 * SHORTEST_STEP:.0f} ms; the backbone on whole views, without heads, teacher, masks, data"
    )


def _about(seconds: float) -> str:
    return duration(seconds) if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


def short_plan(title: str, config: Any, preset_config: Any, facts: Mapping[str, str]) -> list[str]:
    """Lines of `WIDTH` columns: the facts, then the settings that the preset and the flags have changed."""
    defaults = type(config)()
    names = [f.name for f in dataclasses.fields(config) if f.name != "plan"]
    by_flag = [name for name in names if getattr(config, name) != getattr(preset_config, name)]
    others = [name for name in names if name not in by_flag and name not in RESUMABLE_FIELDS]
    by_preset = [name for name in others if getattr(config, name) != getattr(defaults, name)]
    changed = {
        what: ", ".join(f"{name} {_shown(getattr(config, name))}" for name in chosen)
        for what, chosen in (("set by the preset", by_preset), ("set by flags", by_flag))
        if chosen
    }
    lines = [title]
    for name, text in {**facts, **changed}.items():
        first, *more = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False) or [""]
        lines += [f"{name:>{INDENT - 2}}  {first}", *(" " * INDENT + line for line in more)]
    return lines


def _shown(value: Any) -> str:
    return (
        " ".join(map(_shown, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


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
