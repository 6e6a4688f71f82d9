"""How long work shows in the terminal: a bar on stderr, or now and then a plain line when stderr is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from synapse.cli.output import human_bytes
from synapse.cli.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 5.0
BYTES_FROM = 1 << 16  # totals above this are bytes of a file; below, they are items


class TerminalProgress:
    """The listener that a command's `call.progress` calls, from any thread.

    The bar appears with the first report and disappears when the work is done, so quick commands show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        with self._lock:
            if sys.stderr.isatty():
                self._draw(label, done, total)
            elif not self._quiet:
                self._print(label, done, total)

    def close(self) -> None:
        """Take the bar off the screen."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
                self._tasks.clear()

    def _draw(self, label: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(printable(label), total=total, amount="")
        self._bar.update(self._tasks[label], completed=done, total=total, amount=_amount(done, total))

    def _print(self, label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        if not finished and now - self._last_line.get(label, float("-inf")) < SECONDS_BETWEEN_LINES:
            return
        if finished and self._last_line.get(label) == float("inf"):
            return
        self._last_line[label] = float("inf") if finished else now
        print(f"{label}: {_amount(done, total)}", file=sys.stderr, flush=True)


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )


def _amount(done: int, total: int | None) -> str:
    if total is None:
        return human_bytes(done) if done >= BYTES_FROM else str(done)
    if total >= BYTES_FROM:
        return f"{human_bytes(done)} of {human_bytes(total)}"
    return f"{done} of {total}"
