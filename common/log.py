"""metrics.jsonl and TensorBoard. Values stay on the device until a window is full, so logging costs no host sync."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import world_size
from common.errors import UserError
from common.files import one_line, write_atomic

TIME_FIELDS = ("seconds", "images_per_second")
"""Fields of metrics.jsonl that depend on the clock; all others are bit-identical after a resume."""


class MetricLog:
    """Averages per-step values over windows of steps, which its user closes.

    A line of metrics.jsonl is {"step": steps done, "epoch", <means over the window and the processes>, <TIME_FIELDS>};
    `event` adds lines of another kind ({"step", "kind", ...}). The values of an unfinished window belong to the
    checkpoint (`state_dict`), which is what makes a resumed file equal to an uninterrupted one.
    """

    def __init__(self, directory: Path, *, active: bool = True):
        self.path, self.active = directory / "metrics.jsonl", active
        self.names: list[str] = []
        self.pending: list[Tensor] = []  # one [len(names)] tensor per step, still on the device
        self.window: list[list[float]] = []  # the same on the host, averaged over processes
        self.tensorboard_dir = directory / "tensorboard"
        self._writer: Any = None  # torch's SummaryWriter
        self._purge: int | None = None
        self.lines = 0  # written so far

    def add(self, **values: Tensor | float) -> None:
        """Take one step's values: 0-d tensors or numbers. No host sync."""
        names = list(values)
        if (self.pending or self.window) and names != self.names:
            raise ValueError(f"a window holds the same metrics at every step: {self.names}, now {names}")
        self.names = names
        tensors = [torch.as_tensor(v, dtype=torch.float64).detach() for v in values.values()]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        self.pending.append(torch.stack([t.to(device, non_blocking=True) for t in tensors]))

    def read(self) -> list[dict[str, float]]:
        """The open window on the host, one dict a step. Waits for the device and the processes: call on all of them."""
        if self.pending:
            rows = torch.stack(self.pending)
            if world_size() > 1:
                dist.all_reduce(rows)
                rows /= world_size()
            self.window += rows.tolist()
            self.pending = []
        return [dict(zip(self.names, row, strict=True)) for row in self.window]

    def close_window(self, step: int, **extra: float) -> dict[str, float]:
        """Write the line of the window that ends after `step` steps and return it."""
        rows = self.read()
        means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in self.names}
        self.window = []
        line = {"step": step, **means, **extra}
        self._write(line)
        return line

    def event(self, step: int, kind: str, **values: float | str) -> None:
        """Write a line of its own kind at once, e.g. an online kNN accuracy or a warning."""
        self._write({"step": step, "kind": kind, **values})

    def _write(self, line: dict[str, Any]) -> None:
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines += 1
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first process needs it

            self._writer = SummaryWriter(str(self.tensorboard_dir), purge_step=self._purge)
        prefix = f"{line['kind']}/" if "kind" in line else "train/"
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(prefix + name, value, line["step"])

    def state_dict(self) -> dict[str, Any]:
        """The open window. `read` first: only the first process calls this."""
        return {"names": self.names, "window": self.window, "lines": self.lines}

    def resume(self, step: int, state: dict[str, Any]) -> int:
        """Continue after `step` steps: cut metrics.jsonl back to them, tell TensorBoard, restore the open window.

        Returns the number of lines that are left.
        """
        self.names, self.window, self._purge = state["names"], list(state["window"]), step + 1
        if self.active and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.lines = len(kept)
        return self.lines

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a kill cut short is dropped. Raises UserError for other damage."""
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("it is no object with a step")
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                raise UserError(f"line {number} of {path} is damaged ({one_line(error)}): remove or mend it") from error
        else:
            lines.append(line)
    return lines
