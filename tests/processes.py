"""Child processes for tests: members of a gloo group, and complete runs that can be killed.

A forkserver imports torch, timm and the rest once; each child is then a fork of that clean process and starts in
milliseconds instead of the ten seconds of a fresh interpreter.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
LIMIT = 240  # seconds after which a child counts as hung


def run_ranks(function: Callable, world_size: int, *args) -> list:
    """Call `function(*args)` in each process of a gloo group and return the results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        results = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        children = []
        for rank, (_, sender) in enumerate(results):
            child = CONTEXT.Process(target=_rank, args=(function, rank, world_size, folder, sender, args))
            child.start()
            sender.close()
            children.append(child)
        try:
            return [_receive(receiver, rank) for rank, (receiver, _) in enumerate(results)]
        finally:
            for child in children:
                child.join(10)
                child.kill()


def _receive(receiver, rank: int):
    if not receiver.poll(LIMIT):
        pytest.fail(f"rank {rank} did not answer within {LIMIT} s")
    try:
        value, error = receiver.recv()
    except EOFError:
        pytest.fail(f"rank {rank} died without an answer")
    if error:
        pytest.fail(f"rank {rank}:\n{error}")
    return torch.load(io.BytesIO(value), weights_only=False)


def _rank(function: Callable, rank: int, world_size: int, folder: str, sender, args: tuple) -> None:
    torch.set_num_threads(1)
    answer = io.BytesIO()  # bytes, because a tensor in a pipe lives only as long as its sender
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        torch.save(function(*args), answer)
        error = None
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        error = traceback.format_exc()
    sender.send((answer.getvalue(), error))


class Command:
    """`python -m methods.NAME.train ARGS` (or another run_cli main) as a forked child; output goes to `log`."""

    def __init__(
        self, module: str, *args: object, log: Path, env: dict[str, str] | None = None, before: Callable | None = None
    ):
        self.log = log
        self.child = CONTEXT.Process(
            target=_command, args=(module, [str(a) for a in args], str(log), env or {}, before)
        )
        self.child.start()

    def wait(self) -> int:
        self.child.join(LIMIT)
        if self.child.exitcode is None:
            self.child.kill()
            pytest.fail(f"hung: {self.output()[-2000:]}")
        return self.child.exitcode

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill_at(self, step: int, metrics: Path, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal once metrics.jsonl speaks of `step` (or the child is gone)."""
        self.kill_when(f'"step": {step},', metrics, number)

    def kill_when(self, wanted: str, path: Path, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal once `wanted` is in the file (or the child is gone)."""
        deadline = time.monotonic() + LIMIT
        while self.child.is_alive() and time.monotonic() < deadline:
            if path.exists() and wanted in path.read_text():
                break
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, number)


def _command(module: str, args: list[str], log: str, env: dict[str, str], before: Callable | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [module, *args]
    if before:
        before()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_command(module: str, *args: object, log: Path, **kwargs) -> tuple[int, str]:
    """(exit code, everything printed) of a command that runs to its end."""
    command = Command(module, *args, log=log, **kwargs)
    return command.wait(), command.output()
