"""A follower: what other processes write to a log, for the subscriptions of this one that have no group."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from synapse.callosum.bus.delivery.ours import Ours
from synapse.callosum.bus.delivery.watcher import AGAIN, Watcher
from synapse.callosum.log.contract import Log
from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import log as logger
from synapse.errors import SynapseError

PAGE = 256


class Follower:
    """Reads a log from its end on, and passes on what this process does not deliver itself."""

    def __init__(self, log: Log, watcher: Watcher, deliver: Callable[[Message], Awaitable[None]], ours: Ours) -> None:
        self._log, self._watcher, self._deliver, self._ours = log, watcher, deliver, ours
        self._left: deque[Callable[[], Awaitable[object]]] = deque()
        self._ready, self._news = asyncio.Event(), asyncio.Event()
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def ready(self) -> None:
        """Wait until nothing that is written from now on is missed."""
        await self._ready.wait()

    def finish(self, left: Iterable[Callable[[], Awaitable[object]]]) -> None:
        """Do what is left of deliveries that somebody has begun."""
        self._left.extend(left)
        self._news.set()

    async def stop(self) -> None:
        """End."""
        self._stopping = True  # too: a client of a server may not heed being cancelled
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        position: str | None = None
        failures = 0
        await self._watcher.listen(self._news)
        while not self._stopping:
            try:
                if position is None:
                    position = await self._log.end()
                    self._ready.set()
                self._news.clear()
                while self._left:
                    await self._left.popleft()()
                while page := await self._page(position):
                    position = page
                failures = 0
                await self._news.wait()
            except Exception as error:  # a defect as well: nobody would see that the task has ended
                failures += 1
                if failures == 1:
                    defect = not isinstance(error, SynapseError)
                    logger.warning("bus.not_followed", message=str(error), exc_info=defect)
                await asyncio.sleep(AGAIN.wait_s(failures, random.random))

    async def _page(self, position: str) -> str | None:
        """Pass on one page; where the next begins, or None at the end."""
        self._ours.look()
        entries = await self._log.read(position, PAGE)
        for entry in entries:
            if not self._ours.passes(entry.message):
                await self._deliver(entry.message)
        if entries:
            return entries[-1].position
        self._ours.looked()
        return None
