"""Who may use something at once: many together, or one alone. Whoever came first goes first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A lock that is shared or exclusive, for one event loop. Who waits alone lets none pass, so nobody starves."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._queue: deque[tuple[asyncio.Future[None], bool]] = deque()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Together with all others who share."""
        await self._enter(alone=False)
        try:
            yield
        finally:
            self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With nobody else."""
        await self._enter(alone=True)
        try:
            yield
        finally:
            self._closed = False
            self._leave()

    async def _enter(self, *, alone: bool) -> None:
        if not self._queue and self._fits(alone=alone):
            self._take(alone=alone)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, alone)
        self._queue.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if entry in self._queue:
                self._queue.remove(entry)
                self._admit()
            elif future.done() and not future.cancelled():  # it was let in, and does not come
                self._closed = False if alone else self._closed
                self._leave()
            raise

    def _fits(self, *, alone: bool) -> bool:
        return not self._closed and (self._inside == 0 or not alone)

    def _take(self, *, alone: bool) -> None:
        self._inside += 1
        self._closed = alone

    def _leave(self) -> None:
        self._inside -= 1
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._fits(alone=self._queue[0][1]):
            future, alone = self._queue.popleft()
            if not future.cancelled():
                self._take(alone=alone)
                future.set_result(None)
