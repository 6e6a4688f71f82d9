"""A follower: what other processes write to a log, for the subscriptions of this one that have no group."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

from synapse.callosum.log import Log
from synapse.callosum.message import Message
from synapse.callosum.publishing import log as diary
from synapse.callosum.watcher import AGAIN, Watcher
from synapse.errors import SynapseError

PAGE = 256


class Follower:
    """Reads a log from its end on, and passes on what this process has not written itself."""

    def __init__(self, log: Log, watcher: Watcher, deliver: Callable[[Message], Awaitable[None]]) -> None:
        self._log, self._watcher, self._deliver = log, watcher, deliver
        self._ours: set[int] = set()
        self._written: set[int] = set()
        self._ready = asyncio.Event()
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def ready(self) -> None:
        """Wait until nothing that is written from now on is missed."""
        await self._ready.wait()

    def writing(self, messages: Iterable[Message]) -> None:
        """This process is about to write these, and delivers them itself."""
        self._ours.update(message.number for message in messages)

    def wrote(self, messages: Sequence[Message]) -> None:
        """They are written, or were refused: once they were not in a read that began after this, they never will be."""
        self._written.update(message.number for message in messages)

    async def stop(self) -> None:
        """End."""
        self._stopping = True  # too: a client of a server may not heed being cancelled
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        position: str | None = None
        failures = 0
        news = asyncio.Event()
        await self._watcher.listen(news)
        while not self._stopping:
            try:
                if position is None:
                    position = await self._log.end()
                    self._ready.set()
                news.clear()
                while page := await self._page(position):
                    position = page
                failures = 0
                await news.wait()
            except SynapseError as error:
                failures += 1
                if failures == 1:
                    diary.warning("bus.not_followed", message=str(error))
                await asyncio.sleep(AGAIN.wait_s(failures, random.random))

    async def _page(self, position: str) -> str | None:
        """Pass on one page; where the next begins, or None at the end."""
        written, self._written = self._written, set()
        entries = await self._log.read(position, PAGE)
        for entry in entries:
            if entry.message.number in self._ours:
                self._ours.discard(entry.message.number)
            else:
                await self._deliver(entry.message)
        if entries:
            self._written |= written & self._ours
            return entries[-1].position
        self._ours -= written
        return None
