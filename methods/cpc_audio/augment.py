"""Windows at random positions of the recordings: CPC's only augmentation of sound (paper section 3.1)."""

import weakref
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator
from common.threads import wait_for, worker_pool
from common.transfer import to_device

from .audio import AudioStore


@dataclass
class Windows:
    """One step: this process's waves, and what is known of the global batch."""

    waves: Tensor  # float32 [b, window], zeros after the end of a recording, on the device
    indices: Tensor  # long [B] into the store: the global batch, on the CPU
    lengths: Tensor  # long [B]: samples of each window that are recording, not padding, on the CPU


class WindowLoader:
    """`loader(step)` is the batch of a step: windows at random positions, a pure function of (seed, step).

    Epoch e visits the recordings in the order of `generator(seed, "order", e)`, without the last incomplete batch; a
    longer recording gives a random window at each visit, a shorter one all of itself, padded with zeros at its end. A
    process gets its contiguous slice of the global batch.

    groups: long [N] or None. With groups (speakers), a batch is made of runs of `group_size` recordings of one group
    each: in every epoch each group's recordings are shuffled, cut into runs, and the runs are shuffled.

    UserError: batch smaller than 2, larger than the data, not divisible by the processes or the runs.
    """

    def __init__(
        self,
        store: AudioStore,
        *,
        window: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Tensor | None = None,
        group_size: int = 1,
        device: str | torch.device = "cpu",
        workers: int = 2,
    ):
        if batch_size < 2:
            raise UserError(f"--batch-size {batch_size}: at least 2 windows are needed, to compare one with another")
        if batch_size % world_size:
            raise UserError(
                f"--batch-size is the global batch: {batch_size} windows do not divide among {world_size} processes"
            )
        if groups is not None and batch_size % group_size:
            raise UserError(f"--batch-size {batch_size} is not a multiple of the {group_size} recordings of a group")
        self.store, self.window, self.batch_size, self.seed = store, window, batch_size, seed
        self.groups, self.group_size, self.device = groups, group_size, torch.device(device)
        local = batch_size // world_size
        self.part = slice(rank * local, (rank + 1) * local)
        self._order = -1, torch.empty(0)
        self.steps_per_epoch = len(self._shuffled(0)) // batch_size
        if not self.steps_per_epoch:
            raise UserError(f"--batch-size {batch_size} is larger than the data: {store.name} has {len(store)}")
        self._pool, self._pending = None, {}
        if store.samples is None:
            self._pool, self._share = worker_pool(workers), max(1, local // (2 * workers))
            self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def _shuffled(self, epoch: int) -> Tensor:
        draw = generator(self.seed, "order", epoch)
        order = torch.randperm(len(self.store), generator=draw)
        if self.groups is None:
            return order
        runs = []
        for group in self.groups.unique():
            members = order[self.groups[order] == group]
            runs += [run for run in members.split(self.group_size) if len(run) == self.group_size]
        if not runs:
            raise UserError(f"no speaker has {self.group_size} recordings: there is no run of them to make a batch of")
        return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=draw).tolist()])

    def plan(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, first samples, lengths) of the global batch, long [B] each."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        indices = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        lengths = self.store.lengths[indices]
        room = (lengths - self.window).clamp(min=0)
        where = torch.rand(self.batch_size, generator=generator(self.seed, "window", step), dtype=torch.float64)
        return indices, (where * (room + 1)).long(), lengths.clamp(max=self.window)

    def __call__(self, step: int) -> Windows:
        indices, starts, lengths = self.plan(step)
        if self._pool is None:
            waves = self.store.cut(indices[self.part], starts[self.part], self.window)
        else:
            ahead = {s: self._pending.get(s) or self._submit(s) for s in (step, step + 1)}
            futures = ahead.pop(step)
            self._pending = ahead
            wait_for(futures)
            waves = torch.cat([future.result() for future in futures])
        return Windows(to_device(waves, self.device), indices, lengths)

    def _submit(self, step: int) -> list[Future]:
        indices, starts, _ = (x[self.part].split(self._share) for x in self.plan(step))
        return [self._pool.submit(self.store.cut, i, s, self.window) for i, s in zip(indices, starts, strict=True)]

    def close(self) -> None:
        """Stop the threads. The loader is of no use afterwards."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
