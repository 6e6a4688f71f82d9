"""One watch on a log for everybody in a bus who reads it."""

from __future__ import annotations

import asyncio
import random

from synapse.callosum.bus.delivery.backoff import Backoff
from synapse.callosum.log.contract import Log
from synapse.callosum.publish.publishing import log as logger
from synapse.errors import SynapseError

LONGEST_WAIT_S = 1.0
"""Seconds between two looks at the log when it says nothing: leases that ended elsewhere are seen then."""
AGAIN = Backoff(base_s=0.1, cap_s=5.0, least=0.5)
"""Between two tries while the log cannot be reached."""


class Watcher:
    """Sets the events of those who listen when there may be something new in a log.

    It watches in one task from before anybody looks, and a log tells each task what is new since that task last heard
    of it, so nothing comes between two waits.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._listeners: set[asyncio.Event] = set()
        self._ready = asyncio.Event()
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def listen(self, event: asyncio.Event) -> None:
        """Set this event from now on; returns when nothing that comes after is missed."""
        self._listeners.add(event)
        await self._ready.wait()

    def leave(self, event: asyncio.Event) -> None:
        """No longer set this event."""
        self._listeners.discard(event)

    async def stop(self) -> None:
        """End."""
        self._stopping = True  # too: a client of a server may not heed being cancelled
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                await self._log.changed(LONGEST_WAIT_S if self._ready.is_set() else 0)
                failures = 0
            except Exception as error:  # a defect as well: nobody would see that the task has ended
                failures += 1
                if failures == 1:
                    defect = not isinstance(error, SynapseError)
                    hint = error.hint if isinstance(error, SynapseError) else None
                    logger.warning("bus.log_away", message=str(error), hint=hint, exc_info=defect)
                await asyncio.sleep(AGAIN.wait_s(failures, random.random))
                continue
            self._ready.set()
            for event in self._listeners:
                event.set()
