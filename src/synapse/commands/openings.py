"""What takes a while to open is opened once, however many ask for it meanwhile, and whoever gives up stops no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from synapse.errors import Unavailable

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Openings(Generic[K, T]):
    """Things by key: open, or being opened, each in a task of its own that belongs to none of those who wait."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}
        self._closed = False

    async def get(self, key: K, opened: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What is kept under this key; `opened` opens it if nobody has yet.

        An opening that fails raises in all who wait for it, and is tried anew by the next who asks.

        Raises:
            Unavailable: everything was closed meanwhile.
        """
        task = self._tasks.get(key)
        if task is None:
            if self._closed:
                raise _closed()
            task = self._tasks[key] = asyncio.create_task(opened())
            task.add_done_callback(lambda done: self._settle(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if task.cancelled() and asking is not None and not asking.cancelling():
                raise _closed() from None
            raise

    def values(self) -> dict[K, T]:
        """What is open."""
        return {key: task.result() for key, task in self._tasks.items() if task.done() and not _failed(task)}

    def forget(self, key: K) -> None:
        """Let the next who asks have it opened anew. Whoever waits for an opening still gets what it opens."""
        self._tasks.pop(key, None)

    async def close(self) -> dict[K, T]:
        """Give up what is being opened, forget everything, and return what was open."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        opened = self.values()
        self._tasks.clear()
        return opened

    def _settle(self, key: K, task: asyncio.Task[T]) -> None:
        if _failed(task) and self._tasks.get(key) is task:
            del self._tasks[key]


def _failed(task: asyncio.Task[Any]) -> bool:
    """Whether a task that is done has no result. Its exception counts as seen: nobody may be waiting any more."""
    return task.cancelled() or task.exception() is not None


def _closed() -> Unavailable:
    return Unavailable("this was closed while it was being opened")
