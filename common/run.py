"""One training run: its directory, log, checkpoints, signals, progress and plan. It never sees model, loss or data.

    run = Run(cfg, method="simclr", preset="quickstart", config=asdict(cfg), accelerator=accelerator, ...)
    run.resume(model=model, optimizer=optimizer)
    for step in run.steps():
        ...                                  # the whole update
        run.log(loss=loss, lr=lr)

What stands in `steps` after the `yield` happens between two updates: closing a log window, the non-finite check, health
warnings, checkpoints, signals.
"""

import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import accelerate
import timm
import torch
import torchvision
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common import checkpoint, rng
from common.cli import field_docs
from common.errors import UserError
from common.log import MetricLog, read_metrics


@dataclass(kw_only=True)
class RunConfig:
    """Fields that cannot change the result of a run; a resumed run may change them."""

    out: str = "runs"
    """Folder of all run directories."""
    name: str = ""
    """Name of the run directory; default METHOD-PRESET, with -seedN for another seed than 0."""
    data_name: str = ""
    """Name of the data in the result card, e.g. "CIFAR-10 (JPEG)"; default: that of the hub or the folder."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues the newest whole checkpoint of the same run; never starts a new directory NAME-2, NAME-3 ..."""
    eval: bool = True
    """Evaluate at the end and write result.json and report.html."""
    eval_protocols: tuple[Literal["knn", "linear", "linear-augmented", "metrics", "factors", "rotation", "finetune",
                                  "lowshot"], ...] = ()  # fmt: skip
    """What to evaluate, as in python -m eval; default: the method's own list."""
    eval_baselines: bool = True
    """Score raw pixels and random weights too. Off: a fifth of the time, for runs whose baselines stand elsewhere."""
    plan: bool = False
    """Print every resolved setting, time a few steps, estimate hours and memory, and exit without writing."""
    max_steps: int = 0
    """Stop training after this many steps (0: the whole schedule, which stays the same)."""
    log_every: int = 20
    """Steps averaged in one line of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; SIGTERM and the last step save too."""
    keep: int = 2
    """Checkpoints kept."""
    workers: int = 2
    """Threads that decode images where the data does not fit in memory."""


FREE_FIELDS = frozenset(f.name for f in dataclasses.fields(RunConfig))


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> object: ...


@dataclass
class Watch:
    """A health rule on a logged metric: warn in plain words when its window mean is out of range."""

    metric: str
    message: str
    below: float = -math.inf
    above: float = math.inf
    after: int = 0

    def trips(self, line: dict) -> bool:
        return line["step"] > self.after and not self.below <= line[self.metric] <= self.above


def make_accelerator(precision: str) -> Accelerator:
    """An Accelerator for `precision`: auto (bf16 on a GPU that has it, else no), no, bf16 or fp16.

    Raises UserError where the launch is not what it seems: torchrun on a CPU without ACCELERATE_USE_CPU starts N
    independent runs, and fp16 needs a GPU.
    """
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "no"
    if precision == "fp16" and not cuda:
        raise UserError("--precision fp16 needs a GPU: its gradient scaler does not run on a CPU. Use no or bf16.")
    accelerator = Accelerator(mixed_precision=precision)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but Accelerate sees {accelerator.num_processes}: each would train "
            "alone. On CPUs set ACCELERATE_USE_CPU=true before torchrun."
        )
    return accelerator


class Run:
    def __init__(
        self,
        cfg: RunConfig,
        *,
        method: str,
        preset: str,
        seed: int,
        config: dict,
        accelerator: Accelerator,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
    ):
        """`config` is the whole config as a dict; `batch_size` is global, in images. Raises UserError if the directory
        holds checkpoints of another config."""
        self.cfg, self.method, self.preset, self.seed, self.config = cfg, method, preset, seed, config
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.total_steps, self.steps_per_epoch, self.batch_size = total_steps, steps_per_epoch, batch_size
        self.last_step = min(total_steps, cfg.max_steps or total_steps)
        self.console = Console(quiet=not self.main, highlight=False)
        self.watches: list[Watch] = []
        self.warnings: dict[str, str] = {}
        self.environment = environment(accelerator)  # now: the working tree may change while the run trains
        self.start_step, self.seconds, self._untimed, self._stop = 0, 0.0, 0.0, 0
        self._stateful: dict[str, Stateful] = {}
        self.directory = Path(cfg.out) / (cfg.name or f"{method}-{preset}" + (f"-seed{seed}" if seed else ""))
        if cfg.resume == "never":
            self.directory = _fresh(self.directory)
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = MetricLog(self.directory, every=cfg.log_every, active=self.main)
        if not cfg.plan:
            self._open()

    # ---- directory -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        saved = self.directory / "config.json"
        found = checkpoint.steps(self.checkpoints)
        if found and saved.exists():
            before = json.loads(saved.read_text())
            changed = _differences(before["config"], json.loads(json.dumps(self.config)))
            if (before["method"], before["preset"]) != (self.method, self.preset):
                changed.insert(
                    0, f"method or preset ({before['method']} {before['preset']} -> {self.method} {self.preset})"
                )
            if changed:
                raise UserError(
                    f"{self.directory} holds a run with another config: {'; '.join(changed)}. Give the new run its own "
                    "--name, or start over beside it with --resume never."
                )
        self.accelerator.wait_for_everyone()  # every rank has looked before rank 0 writes
        if not self.main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {"method": self.method, "preset": self.preset, "config": self.config}
        saved.write_text(json.dumps(record, indent=1) + "\n")
        if found:
            before = json.loads((self.directory / "environment.json").read_text())
            matter = ("threads", "processes", "device", "torch", "precision")
            if drift := _differences(before, self.environment, keys=matter):
                self.say(f"resuming in another environment, so not bit for bit: {'; '.join(drift)}")
        else:
            self.metrics.path.unlink(missing_ok=True)
            shutil.rmtree(self.metrics.tensorboard_dir, ignore_errors=True)
            (self.directory / "environment.json").write_text(json.dumps(self.environment, indent=1) + "\n")

    def resume(self, **stateful: Stateful | None) -> int:
        """Name everything a checkpoint holds; load the newest whole one, if any. Returns the first step to do."""
        self._stateful = {name: item for name, item in stateful.items() if item is not None}
        loaded = None if self.cfg.plan else checkpoint.load_newest(self.checkpoints, self.say)
        if loaded:
            self.start_step, state = loaded
            for name, item in self._stateful.items():
                item.load_state_dict(state["stateful"][name])
            self.metrics.resume(self.start_step, state["log"])
            self.seconds, self.warnings = state["seconds"], state["warnings"]
            self.say(f"resumed {self.directory} at step {self.start_step} of {self.total_steps}")
        return self.start_step

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` finished steps (rank 0; all ranks hold the same state)."""
        if not self.main:
            return
        state = {name: item.state_dict() for name, item in self._stateful.items()}
        log, seconds, warnings = self.metrics.state_dict(), self.seconds, self.warnings
        checkpoint.save(
            self.checkpoints,
            step,
            {"stateful": state, "log": log, "seconds": seconds, "warnings": warnings},
            keep=self.cfg.keep,
        )

    # ---- the loop --------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain. Exits with status 0 after --plan's timing, or after a SIGTERM and its save."""
        if self.cfg.plan:
            yield from self._timed_steps()
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self._progress() as show:
                yield from self._steps(show)
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
            self.metrics.close()

    def _steps(self, show: Callable[[int, dict], None]) -> Iterator[int]:
        window_start = time.perf_counter()
        window_steps, self._untimed = 0, 0.0
        for step in range(self.start_step, self.last_step):
            self._seed_foreign_layers(step)
            yield step
            done, window_steps = step + 1, window_steps + 1
            ends = done % self.cfg.log_every == 0 or done == self.last_step
            saves = done % self.cfg.save_every == 0 or done == self.last_step
            if ends or saves:
                self._check_finite(done)
            if ends or saves:
                now = time.perf_counter()
                elapsed = max(now - window_start - self._untimed, 1e-9)
                self.seconds += elapsed
                window_start, self._untimed = now, 0.0
                rate, window_steps = window_steps * self.batch_size / elapsed, 0
            if ends:
                line = self.metrics.close_window(
                    done, epoch=done / self.steps_per_epoch, images_per_second=rate, seconds=self.seconds
                )
                self._check_health(line)
                show(done, line)
            stop = self._agreed_stop() if ends or self.accelerator.num_processes == 1 else 0
            if saves or stop:
                self.metrics.read()
                self.save(done)
            if stop and done < self.last_step:
                self.say(
                    f"stopped by a signal after step {done}; checkpoint saved. The same command continues from there."
                )
                self.accelerator.end_training()
                raise SystemExit(0 if stop == signal.SIGTERM else 130)

    def log(self, **values: torch.Tensor | float) -> None:
        """This step's metrics, 0-d tensors or numbers: always the same names, loss among them."""
        self.metrics.add(**values)

    def epoch_ends(self, step: int, every: int) -> bool:
        """Whether `step` is the last of an epoch whose number divides by `every` (0: never)."""
        return every > 0 and (step + 1) % (self.steps_per_epoch * every) == 0

    def event(self, step: int, kind: str, **values: float | str) -> None:
        """A metrics line of its own kind after `step`, e.g. an online kNN accuracy."""
        self.metrics.event(step + 1, kind, **values)
        self.say(
            f"step {step + 1}: "
            + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        )

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent here (online evaluation) does not count as training time."""
        start = time.perf_counter()
        yield
        self._untimed += time.perf_counter() - start

    def watch(self, *watches: Watch) -> None:
        """Health rules to check at every log window; each warns once, and the warning goes into the result card."""
        self.watches += watches

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    def _check_finite(self, done: int) -> None:
        rows = self.metrics.read()
        for step, row in enumerate(rows, start=done - len(rows) + 1):
            if not math.isfinite(row["loss"]):
                good = checkpoint.steps(self.checkpoints)
                kept = self.checkpoints / f"step-{good[-1]:08d}" if good else "none yet"
                raise UserError(
                    f"the loss is {row['loss']} at step {step} (learning rate {row.get('lr', math.nan):.3g}); "
                    f"last good checkpoint: {kept}. Try a lower rate, a longer warm-up, or, if this was fp16, "
                    "--precision no."
                )

    def _check_health(self, line: dict) -> None:
        for watch in self.watches:
            if watch.message not in self.warnings and watch.trips(line):
                text = f"step {line['step']}: {watch.metric} is {line[watch.metric]:.3g}. {watch.message}"
                self.warnings[watch.message] = text
                self.metrics.event(line["step"], "warning", metric=watch.metric, text=text)
                self.say(f"WARNING {text}")

    def _seed_foreign_layers(self, step: int) -> None:
        # nn.Dropout inside foreign networks draws from the global generator; all else has its own keyed streams.
        torch.manual_seed(rng.generator(self.seed, "step", step, self.accelerator.process_index).initial_seed())

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = number
        self.say(f"{signal.Signals(number).name} received: finishing the step and saving ...")

    def _agreed_stop(self) -> int:
        if self.accelerator.num_processes == 1:
            return self._stop
        flag = torch.tensor(self._stop, device=self.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int, dict], None]]:
        if not self.console.is_terminal:
            last = time.perf_counter()

            def show(done: int, line: dict) -> None:
                nonlocal last
                if done == self.last_step or time.perf_counter() - last > 10:
                    last = time.perf_counter()
                    left = (self.last_step - done) * self.batch_size / line["images_per_second"]
                    self.say(
                        f"step {done}/{self.last_step}  epoch {line['epoch']:.1f}  loss {line['loss']:.4f}  "
                        f"{line['images_per_second']:.0f} images/s  {_duration(left)} left"
                    )

            yield show
            return
        columns = (
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("", total=self.last_step, completed=self.start_step, text="")

            def show(done: int, line: dict) -> None:
                text = f"loss {line['loss']:.4f}  {line['images_per_second']:.0f} images/s"
                bar.update(task, completed=done, text=text)

            yield show

    # ---- plan ------------------------------------------------------------------------------------------------------

    def show_plan(self, config: object, preset_config: object, derived: dict[str, str]) -> None:
        """With --plan: every field with its value, who set it and its source, and the values derived from them."""
        if not self.cfg.plan:
            return
        docs, defaults = field_docs(type(config)), type(config)()
        names = sorted((f.name for f in dataclasses.fields(config)), key=lambda name: name in FREE_FIELDS)
        table = Table(box=box.SIMPLE, title=f"{self.method} {self.preset}", title_justify="left")
        for title, width in (("setting", None), ("value", 22), ("set by", None), ("source", None)):
            table.add_column(title, max_width=width, overflow="fold")
        for name in names:
            value, preset_value = getattr(config, name), getattr(preset_config, name)
            by = "flag" if value != preset_value else "preset" if value != getattr(defaults, name) else "default"
            table.add_row(name, str(value), by, docs.get(name, ""))
        self.console.print(table)
        for name, value in derived.items():
            self.say(f"{name:>20}  {value}")

    def _timed_steps(self, warmup: int = 2, timed: int = 5) -> Iterator[int]:
        self.say(f"timing {timed} steps after {warmup} to warm up ...")
        for step in range(warmup):
            yield step
        self.metrics.read()
        start, count = time.perf_counter(), 0
        for step in range(warmup, warmup + timed):
            yield step
            self.metrics.read()
            count += 1
            if time.perf_counter() - start > 60:
                break
        seconds = (time.perf_counter() - start) / count
        memory = peak_memory(self.accelerator.device) / 2**30
        self.say(
            f"{self.batch_size / seconds:.0f} images/s, {seconds:.3f} s a step: about "
            f"{_duration(seconds * self.last_step)} for {self.last_step} steps, evaluation not counted; peak memory "
            f"{memory:.2f} GiB on "
            f"{self.accelerator.device}. Nothing was written."
        )
        raise SystemExit(0)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def facts(self) -> dict:
        """What the result card says about the run itself."""
        done = self.last_step
        env = self.environment
        return {
            "method": self.method,
            "preset": self.preset,
            "seed": self.seed,
            "git_commit": env["git_commit"],
            "epochs": done / self.steps_per_epoch,
            "steps": done,
            "batch_size": self.batch_size,
            "images_seen": done * self.batch_size,
            "images_per_second": done * self.batch_size / max(self.seconds, 1e-9),
            "wall_time_s": self.seconds,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "device": env["device"],
            "precision": env["precision"],
            "warnings": list(self.warnings.values()),
            "environment": env,
            "config": {k: v for k, v in self.config.items() if k not in FREE_FIELDS},
        }

    def history(self) -> list[dict]:
        return read_metrics(self.metrics.path)


def environment(accelerator: Accelerator) -> dict:
    """Commit, versions, device, threads and processes: what a result depends on beside its config."""
    device = accelerator.device
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "command": " ".join(["python -m", *_module_and_flags()]),
    }


def _module_and_flags() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *(Path(a).name if os.sep in a else a for a in sys.argv[1:])]


def git_commit() -> str:
    """The commit of the code that runs, with "+changes" if the working tree differs, or "unknown" outside git."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip()[:12] + ("+changes" if changes.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fresh(directory: Path) -> Path:
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


def _differences(before: dict, now: dict, keys: tuple[str, ...] | None = None) -> list[str]:
    names = keys or tuple(k for k in {**before, **now} if k not in FREE_FIELDS)
    return [f"{k} {before.get(k)} -> {now.get(k)}" for k in names if before.get(k) != now.get(k)]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
