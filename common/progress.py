"""Signs of life of long work: bars on a terminal, elsewhere a line every half minute.

    with Display(console):
        for batch in track(batches, "features", total=len(batches)):
            ...

`track` reports to the innermost open display, however deep in the program it is called, and to nobody where none is.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from common.html import duration

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines where there is no terminal
_open: "list[Display]" = []


class Display:
    """Shows what `track` is told, on `console`, while it is entered.

    every: seconds between two lines where `console` is no terminal; prefix: what these begin with.
    """

    def __init__(self, console: Console, *, every: float = EVERY, prefix: str = ""):
        self.console, self.every, self.prefix = console, every, prefix
        self.about: list[str] = []  # what the work is part of, from the outside in
        self.bars: Progress | None = None
        self._last = time.monotonic()
        if console.is_terminal and not console.quiet:
            columns = (
                TextColumn("[bold]{task.description}", markup=True),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
            )
            self.bars = Progress(*columns, console=console)

    def __enter__(self) -> "Display":
        if self.bars is not None:
            self.bars.start()
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        if self.bars is not None:
            self.bars.stop()

    def add(self, what: str, total: int, completed: int = 0) -> TaskID | None:
        """A bar, or None where there is no terminal."""
        return None if self.bars is None else self.bars.add_task(what, total=total, completed=completed, text="")

    def say(self, text: str) -> None:
        """Print a line, above the bars."""
        self._last = time.monotonic()
        self.console.print(text, markup=False, soft_wrap=True)

    @property
    def due(self) -> bool:
        """Whether nothing was said for `every` seconds and there are no bars."""
        return self.bars is None and time.monotonic() - self._last > self.every

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        what = ", ".join([*self.about, what])
        task, start = self.add(what, total), time.monotonic()
        try:
            for done, item in enumerate(items):
                yield item
                if task is not None and self.bars is not None:
                    self.bars.update(task, completed=done + 1)
                elif self.due:
                    left = (time.monotonic() - start) / (done + 1) * (total - done - 1)
                    self.say(f"{self.prefix}{what}: {100 * (done + 1) / total:.0f} %, {duration(left)} left")
        finally:
            if task is not None and self.bars is not None:
                self.bars.remove_task(task)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """`items`, `total` of them, whose progress is shown as `what`."""
    yield from _open[-1].track(items, what, total) if _open else items


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is tracked inside is part of `name`."""
    display = _open[-1] if _open else None
    if display is not None:
        display.about.append(name)
    try:
        yield
    finally:
        if display is not None:
            display.about.pop()
