"""Waking whoever waits for something new, without missing what came between looking and waiting."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary


class Changes:
    """What has changed, as far as each task has seen it. For one event loop.

    A task calls `look` before it looks at what there is, and `wait` when it found nothing: a change in between ends the
    wait at once.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seen: WeakKeyDictionary[asyncio.Task[object], int] = WeakKeyDictionary()
        self._waiting: set[asyncio.Future[None]] = set()

    def look(self) -> None:
        """The task that runs now is about to look: what changes from here on is new to it."""
        if (task := asyncio.current_task()) is not None:
            self._seen[task] = self._count

    def note(self) -> None:
        """Something has changed."""
        self._count += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Return at a change since the task last looked or waited, at the latest after the timeout."""
        task = asyncio.current_task()
        if task is None or self._seen.get(task, self._count) == self._count:
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await asyncio.wait([future], timeout=max(0.0, timeout_s))
            finally:
                self._waiting.discard(future)
        self.look()
