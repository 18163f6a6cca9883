"""One training run: its directory, log, checkpoints, signals and progress. It never sees model, loss or data.

    run = Run(cfg, method="simclr", preset="quickstart", config=asdict(cfg), accelerator=accelerator, ...)
    run.resume(model=model, optimizer=optimizer)
    for step in run.steps():
        ...                                  # the update
        run.log(loss=loss, lr=lr)

What follows the `yield` in `steps` happens between two updates: closing a log window, the check for non-finite losses,
health warnings, checkpoints, signals.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, parse_flag_from_env
from rich.console import Console

from common import checkpoint, rng
from common.config import RESUMABLE_FIELDS, RunConfig
from common.environment import environment, has_bf16, peak_memory
from common.errors import UserError
from common.files import (
    NUMBER,
    OBJECT,
    TEXT,
    check_fields,
    integer,
    list_of,
    object_of,
    one_line,
    read_json,
    write_atomic,
)
from common.html import duration
from common.log import MetricLog, read_metrics
from common.plan import derived_lines, settings_table, short_plan, timed_steps
from common.progress import Display

CONFIG, ENVIRONMENT, CHECKPOINTS = "config.json", "environment.json", "checkpoints"
WRITTEN = ("metrics.jsonl", "tensorboard", "result.json", "report.html", "backbone.safetensors", "backbone.json")
LONGEST_NAME = 200  # bytes; file systems take 255, and -2, -3 ... may follow
CONFIG_FIELDS = {"method": TEXT, "preset": TEXT, "config": OBJECT}
DATA_FIELDS = {"images": integer(0, 1 << 62), "fingerprint": TEXT}
CHECKPOINT_FIELDS = {"stateful": object_of(OBJECT), "log": OBJECT, "seconds": NUMBER, "warnings": object_of(TEXT)}
LOG_FIELDS = {"names": list_of(TEXT), "window": list_of(list_of(NUMBER)), "lines": integer(0, 1 << 62)}


STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
WAIT = timedelta(hours=2)
"""For how long a process waits for the others. NCCL's ten minutes are too few where the first process alone writes a
large checkpoint to a slow file system or measures something, or where one downloads or decodes the data. A process that
dies is noticed by torchrun, not by this."""
LINE_EVERY = 10.0  # seconds, where there is no terminal
SECOND_SIGNAL = 3.0  # seconds after which another signal means "now"
OF_A_PROCESS = ("workers",)  # fields that may differ among processes
FINITE_HINT = "Try a lower rate, a longer warm-up, or, if this was fp16, --precision no."


class Data(Protocol):
    """Images or other examples, with a hash of their content."""

    fingerprint: str

    def __len__(self) -> int: ...


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


@dataclass
class HealthCheck:
    """A rule on a logged metric: warn when its window mean is out of range."""

    metric: str
    message: str
    below: float = -math.inf
    above: float = math.inf
    after: int = 0

    def trips(self, line: dict) -> bool:
        return line["step"] > self.after and not self.below <= line[self.metric] <= self.above


def make_accelerator(precision: str) -> Accelerator:
    """An Accelerator for `precision`: auto, no, bf16 or fp16.

    auto: bf16 on GPUs with bf16 units, fp16 on other GPUs, no on CPUs.

    What `accelerate config` leaves in the environment changes nothing of a step: gradients are not accumulated, and
    only --compile compiles. Raises UserError where the launch is not what it seems: torchrun on a CPU without
    ACCELERATE_USE_CPU starts N independent runs; fp16 needs a GPU; FSDP, DeepSpeed and Megatron-LM are not supported.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"ACCELERATE_USE_{name} is set, and only data-parallel training is supported: unset it, or choose "
                "multi-GPU or no distributed training in `accelerate config`"
            )
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if precision == "auto":
        precision = "no" if not cuda else "bf16" if has_bf16() else "fp16"
    if precision == "fp16" and not cuda:
        raise UserError("--precision fp16 needs a GPU: its gradient scaler does not run on a CPU. Use no or bf16.")
    # Buffers need no broadcast: BatchNorm's are equal on all processes under --sync-bn, and otherwise only the first
    # process's are exported. Broadcasting them fails on buffers with overlapping memory.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Apple's GPU has no float64, in which crops and metrics are computed: the CPU serves instead.
    on_cpu = {"cpu": True} if torch.backends.mps.is_available() else {}
    accelerator = Accelerator(
        **on_cpu,
        mixed_precision=precision,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=WAIT)],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
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
        config: dict[str, Any],
        accelerator: Accelerator,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        data: Mapping[str, Data],
        initial_weights: Mapping[str, Any] | None = None,
    ):
        """`config` is the whole config as a dict; `batch_size` is global, in images; `data` by the name of their use;
        `initial_weights`: what the networks start from, if not from random weights (`common.weights.Filled.record`).

        Raises UserError for a name that is a path, and if the directory holds checkpoints of another config or
        of other data, is damaged, or is in use by another process.
        """
        _check_name(cfg)
        self.cfg, self.method, self.preset, self.seed, self.config = cfg, method, preset, seed, config
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.total_steps, self.steps_per_epoch, self.batch_size = total_steps, steps_per_epoch, batch_size
        self.last_step = min(total_steps, cfg.max_steps or total_steps)
        self.console = Console(quiet=not self.main, highlight=False, markup=False)
        self.data, self.initial_weights = data_record(data), dict(initial_weights or {})
        self.data_changes: list[str] = []
        self.extended: list[str] = []
        self.watches: list[HealthCheck] = []
        self.afterwards = ""  # what follows training, in words, for the line with the time left
        self.warnings: dict[str, str] = {}
        self.environment = environment(accelerator)  # now: the working tree may change while the run trains
        self.start_step, self.seconds, self._untimed = 0, 0.0, 0.0
        self._stop, self._stop_at = 0, math.inf  # the first signal, and when it came
        # Flags of the host: a gloo group of their own, so that no process waits for its GPU to read them.
        self._flags: dist.ProcessGroup | None = None
        if accelerator.num_processes > 1:
            self._flags = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WAIT))
        self._flag: tuple[dist.Work | None, torch.Tensor] | None = None
        self._stateful: dict[str, Stateful] = {}
        self.directory = directory_of(cfg, method, preset, seed)
        self.checkpoints = self.directory / CHECKPOINTS
        self.metrics = MetricLog(self.directory, active=self.main)
        if not cfg.plan:
            self._open()

    # ---- directory -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        started = {"initial weights": self.initial_weights.get("sha256")}
        self._compare_processes({"method": self.method, "preset": self.preset, **self.config, **self.data, **started})
        found = checkpoint.steps(self.checkpoints)
        if found:
            self._refuse_another_run(found[-1])
        elif self.cfg.extend:
            raise UserError(f"--extend: {self.directory} has no checkpoint, so there is no run to lengthen")
        self.accelerator.wait_for_everyone()  # every process has looked before the first one writes
        if not self.main:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the directory {self.directory} ({error.strerror}): choose another --out"
            ) from None
        _refuse_foreign(self.directory)
        _lock(self.directory)
        record = {"method": self.method, "preset": self.preset, "config": self.config, "data": self.data}
        if self.data_changes:
            record["data_changes"] = self.data_changes
        if self.extended:
            record["extended"] = self.extended
        if self.initial_weights:
            record["initial_weights"] = self.initial_weights
        write_atomic(self.directory / CONFIG, json.dumps(record, indent=1) + "\n")
        if not (found and self._compare_environment()):
            write_atomic(self.directory / ENVIRONMENT, json.dumps(self.environment, indent=1) + "\n")
        if not found:
            self.metrics.path.unlink(missing_ok=True)
            shutil.rmtree(self.metrics.tensorboard_dir, ignore_errors=True)

    def _refuse_another_run(self, newest: int) -> None:
        """Raise UserError where the directory's checkpoints are of another config or of other data.

        newest: the step of the last one. A longer run is none under --extend.
        """
        try:
            before = read_config(self.directory)
        except UserError as error:
            raise UserError(
                f"{error}; {self.directory} has checkpoints, and without this file it is unknown whether they have the "
                "same settings: restore it, or start a new directory with --resume never"
            ) from None
        defaults = {f.name: f.default for f in dataclasses.fields(self.cfg) if f.name in self.config}
        known = {k: v for k, v in defaults.items() if v is not dataclasses.MISSING}  # of fields newer than the record
        changed = _differences(
            {**json.loads(json.dumps(known)), **before["config"]}, json.loads(json.dumps(self.config))
        )
        if (before["method"], before["preset"]) != (self.method, self.preset):
            changed.insert(
                0, f"method or preset ({before['method']} {before['preset']} -> {self.method} {self.preset})"
            )
        longer = len(changed) == 1 and _longer(before["config"], self.config)
        self.extended = before.get("extended", [])
        if longer and self.cfg.extend:
            self.extended = [*self.extended, f"{changed[0]} at step {newest}"]
            self.print(
                f"{self.directory} is lengthened: {self.extended[-1]}; its schedules are those of the new length"
            )
        elif changed:
            hint = "Lengthen it with --extend, choose" if longer else "Choose"
            raise UserError(
                f"{self.directory} holds a run with another config: {'; '.join(changed)}. {hint} another --name, or "
                "start a new directory with --resume never."
            )
        self.data_changes = before.get("data_changes", [])
        known = before.get("data", {})
        if changed := data_differences(known, self.data):
            if not self.cfg.accept_changed_data:
                raise UserError(
                    f"the data of {self.directory} have changed since its first steps: {'; '.join(changed)}. Restore "
                    "them, start over with --resume never, or continue knowingly with --accept-changed-data."
                )
            self.data_changes = [*self.data_changes, *changed]
            self.print(f"continuing with changed data: {'; '.join(changed)}")
        self.data = {**known, **self.data}

    def _compare_processes(self, mine: Mapping[str, Any]) -> None:
        """Raise UserError, on all processes, unless what they hold is equal. Waits for all of them."""
        if self._flags is None:
            return
        held: list[dict] = [{}] * self.accelerator.num_processes
        dist.all_gather_object(held, {k: v for k, v in mine.items() if k not in OF_A_PROCESS}, group=self._flags)
        for number, other in enumerate(held):
            if other != held[0]:
                names = [k for k in {**held[0], **other} if held[0].get(k) != other.get(k)]
                told = "; ".join(f"{k} {held[0].get(k)} and {other.get(k)}" for k in names)
                raise UserError(f"process 0 and process {number} do not train the same: {told}")

    def _compare_environment(self) -> bool:
        """Print what differs from the environment in which the run began; False if its record cannot be read."""
        try:
            before = read_json(self.directory / ENVIRONMENT, limit=1 << 20)
        except UserError as error:
            self.print(f"{error}: written again; whether this environment is that of the first steps is unknown")
            return False
        matter = ("threads", "processes", "device", "torch", "precision")
        if drift := _differences(before, self.environment, keys=matter):
            self.print(f"resuming in another environment, so not bit for bit: {'; '.join(drift)}")
        return True

    def resume(self, **stateful: Stateful | None) -> int:
        """Name everything a checkpoint holds; load the newest good one, if any. Returns the first step to do.

        Raises UserError if there are checkpoints and none can be used, or if one holds other things.
        """
        self._stateful = {name: item for name, item in stateful.items() if item is not None}
        loaded = None if self.cfg.plan else checkpoint.load_newest(self.checkpoints, self.print)
        if loaded:
            if loaded[0] > self.last_step:
                raise UserError(
                    f"{self.directory} has trained {loaded[0]} steps, more than --max-steps {self.cfg.max_steps}: "
                    "leave the option out, or start a shorter run beside it with --resume never"
                )
            self._restore(*loaded)
        if not self.cfg.plan:
            self._compare_checkpoints()
        if loaded:
            self.print(f"resumed {self.directory} at step {self.start_step} of {self.total_steps}")
        return self.start_step

    def _compare_checkpoints(self) -> None:
        digest = checkpoint.digest_of(self.checkpoints, self.start_step) if self.start_step else None
        try:
            self._compare_processes({"step of the checkpoint": self.start_step, "its checksum": digest})
        except UserError as error:
            raise UserError(f"{error}. --out must be a directory that all machines share") from None

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        path = checkpoint.path_of(self.checkpoints, step)
        check_fields(state, CHECKPOINT_FIELDS, path, required=CHECKPOINT_FIELDS)
        check_fields(state["log"], LOG_FIELDS, path, required=LOG_FIELDS)
        if any(len(row) != len(state["log"]["names"]) for row in state["log"]["window"]):
            raise UserError(f"{path}: the rows of its log are not as long as the names of the metrics")
        if state["stateful"].keys() != self._stateful.keys():
            held, needed = (", ".join(sorted(map(str, names))) for names in (state["stateful"], self._stateful))
            raise UserError(
                f"{path} holds the states of {held}, and this program needs those of {needed}: continue with the "
                "program that wrote it, or start a new directory with --resume never"
            )
        for name, item in self._stateful.items():
            try:
                item.load_state_dict(state["stateful"][name])
            except Exception as error:  # each kind of object has its own
                message = f"{path} does not fit this program: {name} cannot be loaded ({one_line(error)})"
                raise UserError(message) from error
        if self.main and (lost := state["log"]["lines"] - self.metrics.resume(step, state["log"])):
            text = f"metrics.jsonl has {abs(lost)} lines {'fewer' if lost > 0 else 'more'} than at step {step}: edited?"
            state["warnings"][text] = text
            self.print(f"WARNING {text}")
        self.start_step, self.seconds, self.warnings = step, state["seconds"], state["warnings"]

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` finished steps (first process; all processes hold the same state).

        Raises UserError, on all processes, if a tensor of the state is not finite.
        """
        state = {name: item.state_dict() for name, item in self._stateful.items()}
        if name := checkpoint.non_finite(state):
            raise UserError(
                f"{name} is not finite after step {step}, so no checkpoint was saved; last good checkpoint: "
                f"{checkpoint.last_good(self.checkpoints)}. {FINITE_HINT}"
            )
        if not self.main:
            return
        log, seconds, warnings = self.metrics.state_dict(), self.seconds, self.warnings
        checkpoint.save(
            self.checkpoints,
            step,
            {"stateful": state, "log": log, "seconds": seconds, "warnings": warnings},
            keep=self.cfg.keep,
        )

    # ---- the loop --------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain. Exits with status 0 under --plan, where it is full after timing a few;
        after SIGTERM, SIGINT or SIGHUP it saves and exits with 128 plus the signal's number."""
        if self.cfg.plan == "short":
            raise SystemExit(0)
        if self.cfg.plan:
            yield from timed_steps(
                self.metrics.read,
                self.print,
                batch_size=self.batch_size,
                total_steps=self.last_step,
                device=self.accelerator.device,
                afterwards=lambda: self.afterwards,
            )
            raise SystemExit(0)
        previous = {s: signal.signal(s, self._on_signal) for s in STOPPING}
        try:
            with self._progress() as show:
                yield from self._steps(show)
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
            self.metrics.close()

    def _steps(self, show: Callable[[int, dict | None], None]) -> Iterator[int]:
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
            show(done, line if ends else None)
            stop = self._agreed_stop()
            if saves or stop:
                self.metrics.read()
                self.save(done)
            if stop and done < self.last_step:
                self.print(
                    f"stopped by a signal after step {done}; checkpoint saved. The same command continues from there."
                )
                self.accelerator.end_training()
                raise SystemExit(128 + stop)

    def log(self, **values: torch.Tensor | float) -> None:
        """This step's metrics, 0-d tensors or numbers: always the same names, loss among them."""
        self.metrics.add(**values)

    def epoch_ends(self, step: int, every: int) -> bool:
        """Whether `step` is the last of an epoch whose number divides by `every` (0: never)."""
        return every > 0 and (step + 1) % (self.steps_per_epoch * every) == 0

    def event(self, step: int, kind: str, **values: float | str) -> None:
        """A metrics line of its own kind after `step`, e.g. an online kNN accuracy."""
        self.metrics.event(step + 1, kind, **values)
        self.print(
            f"step {step + 1}: "
            + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        )

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent here (online evaluation) does not count as training time."""
        start = time.perf_counter()
        yield
        self._untimed += time.perf_counter() - start

    def watch(self, *watches: HealthCheck) -> None:
        """Health rules to check at every log window; each warns once, and the warning goes into the result card."""
        self.watches += watches

    def print(self, message: str) -> None:
        """Print on the first process."""
        self.console.print(message, soft_wrap=True)

    def show_plan(self, config: Any, preset_config: Any, derived: dict[str, str]) -> None:
        """With --plan: the values derived from the settings, and the settings, see `common.plan`."""
        if not self.cfg.plan:
            return
        title = f"{self.method} {self.preset}"
        if self.cfg.plan == "short":
            title += ": nothing is written; --plan full shows more"
            facts = {name: value for name, value in derived.items() if name != "views"}
            self.print("\n".join(short_plan(title, config, preset_config, facts)))
            return
        self.console.print(settings_table(title, config, preset_config, last=RESUMABLE_FIELDS))
        for line in derived_lines(derived):
            self.print(line)

    def _check_finite(self, done: int) -> None:
        rows = self.metrics.read()
        for step, row in enumerate(rows, start=done - len(rows) + 1):
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss is {row['loss']} at step {step} (learning rate {row.get('lr', math.nan):.3g}); "
                    f"last good checkpoint: {checkpoint.last_good(self.checkpoints)}. {FINITE_HINT}"
                )

    def _check_health(self, line: dict) -> None:
        for watch in self.watches:
            if watch.message not in self.warnings and watch.trips(line):
                text = f"step {line['step']}: {watch.metric} is {line[watch.metric]:.3g}. {watch.message}"
                self.warnings[watch.message] = text
                self.metrics.event(line["step"], "warning", metric=watch.metric, text=text)
                self.print(f"WARNING {text}")

    def _seed_foreign_layers(self, step: int) -> None:
        # nn.Dropout inside timm's networks draws from the global generator; everything else has keyed streams.
        torch.manual_seed(rng.generator(self.seed, "step", step, self.accelerator.process_index).initial_seed())

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._stop:
            if now - self._stop_at > SECOND_SIGNAL:
                raise KeyboardInterrupt
            return  # a terminal and torchrun both send the one Ctrl-C
        self._stop, self._stop_at = number, now
        self.print(f"{signal.Signals(number).name} received: finishing the step and saving ...")

    def _agreed_stop(self) -> int:
        """The signal that any process got, the same on all of them: asked after one step and read after the next."""
        if self._flags is None:
            return self._stop
        agreed = 0
        if self._flag is not None:
            work, flag = self._flag
            if work is not None:
                work.wait()
            agreed = int(flag)
        flag = torch.tensor(self._stop)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._flags, async_op=True)
        self._flag = work, flag
        return agreed

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int, dict | None], None]]:
        """show(steps done, the line of a window that they close or None): after every step."""
        start, line = time.monotonic(), None
        with Display(self.console, every=LINE_EVERY) as display:
            task = display.add("train", self.last_step, self.start_step)

            def show(done: int, closed: dict | None) -> None:
                nonlocal line
                line = closed or line
                ends = line is not None and done == self.last_step
                if task is None and not display.due and not ends:
                    return
                if line is not None:
                    rate, text = line["images_per_second"], f"loss {line['loss']:.4f}  "
                else:  # no window is full yet
                    rate = (done - self.start_step) * self.batch_size / max(time.monotonic() - start, 1e-9)
                    text = ""
                text += f"{rate:.{0 if rate >= 10 else 1}f} images/s"
                if task is not None and display.bars is not None:
                    display.bars.update(task, completed=done, text=text + self.afterwards)
                    return
                left = duration((self.last_step - done) * self.batch_size / rate)
                epoch = done / self.steps_per_epoch
                display.say(f"step {done}/{self.last_step}  epoch {epoch:.1f}  {text}  {left} left{self.afterwards}")

            yield show

    # ---- the end ---------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The result card's facts about the run."""
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
            **({"data_changes": self.data_changes} if self.data_changes else {}),
            **({"extended": self.extended} if self.extended else {}),
            **({"initial_weights": self.initial_weights} if self.initial_weights else {}),
            "environment": env,
            "config": {k: v for k, v in self.config.items() if k not in RESUMABLE_FIELDS},
        }

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_metrics(self.metrics.path)


def read_config(directory: Path) -> dict[str, Any]:
    """{"method", "preset", "config"} of a run directory, and {"data", "data_changes", "extended", "initial_weights"}
    where they were recorded.

    Raises UserError if the record is missing or damaged.
    """
    path = directory / CONFIG
    content = read_json(path, limit=1 << 24)
    check_config(content, path)
    return content


def check_config(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where `content`, read from `path`, is no record of a run."""
    kinds = {**CONFIG_FIELDS, "data": object_of(OBJECT), "data_changes": list_of(TEXT)}
    kinds |= {"extended": list_of(TEXT), "initial_weights": OBJECT}
    check_fields(content, kinds, path, required=CONFIG_FIELDS)
    for part in content.get("data", {}).values():
        check_fields(part, DATA_FIELDS, path, required=DATA_FIELDS)


def data_record(data: Mapping[str, Data]) -> dict[str, dict[str, Any]]:
    """What config.json holds of the data, by the name of their use."""
    return {use: {"images": len(part), "fingerprint": part.fingerprint} for use, part in data.items()}


def data_differences(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> list[str]:
    """What differs between two records of data, one phrase for each use that both know."""
    changed = []
    for use in before.keys() & now.keys():
        if before[use]["images"] != now[use]["images"]:
            changed.append(f"{use}: {before[use]['images']} -> {now[use]['images']} images")
        elif before[use]["fingerprint"] != now[use]["fingerprint"]:
            changed.append(f"{use}: other content or labels in its {now[use]['images']} images")
    return sorted(changed)


def directory_of(cfg: RunConfig, method: str, preset: str, seed: int) -> Path:
    """The directory of a run; under --resume never one that does not exist."""
    directory = Path(cfg.out) / (cfg.name or f"{method}-{preset}" + (f"-seed{seed}" if seed else ""))
    return _fresh(directory) if cfg.resume == "never" else directory


def _check_name(cfg: RunConfig) -> None:
    name = cfg.name
    if name == ".." or (name and Path(name).name != name):
        raise UserError(f"--name {name} is a path: give the name of a folder; --out sets its parent folder")
    if not name.isprintable():
        raise UserError(f"--name {name!r} holds characters that cannot be printed: choose another")
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"--name {name[:20]}... is longer than {LONGEST_NAME} bytes: choose a shorter one")


def _refuse_foreign(directory: Path) -> None:
    """Raise UserError where `directory` is not a run's and holds something that a run would replace."""
    path = directory / CONFIG
    found = next((name for name in WRITTEN if (directory / name).exists()), "")
    if path.exists():
        try:
            found = "" if CONFIG_FIELDS.keys() & read_json(path).keys() else CONFIG
        except UserError:  # a damaged one is written again
            return
    if found:
        raise UserError(
            f"{directory} is not a run's directory, and its {found} would be replaced: choose another --name"
        )


def _lock(directory: Path) -> None:
    """Lock `directory` for this process until it ends, however it ends. Raises UserError if another one has it.

    Where the system or the file system has no locks, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # open until the process ends
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = one_line(ValueError(os.read(handle, 200).decode(errors="replace")))
        os.close(handle)
        raise UserError(f"{directory} is in use by {holder}: wait until it ends, or choose another --name") from None
    except OSError:
        return
    with contextlib.suppress(OSError):  # the text is for people; a full disk will be reported by what needs the space
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())


def _fresh(directory: Path) -> Path:
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


def _longer(before: dict, now: dict) -> bool:
    """Whether the run of `now` has more epochs, or steps where it counts those."""
    lengths: list[list[Any]] = [[config.get(name) for config in (before, now)] for name in ("epochs", "steps")]
    return any(all(map(NUMBER.fits, pair)) and pair[0] < pair[1] for pair in lengths)


def _differences(before: dict, now: dict, keys: tuple[str, ...] | None = None) -> list[str]:
    names = keys or tuple(k for k in {**before, **now} if k not in RESUMABLE_FIELDS)
    return [f"{k} {before.get(k)} -> {now.get(k)}" for k in names if before.get(k) != now.get(k)]
