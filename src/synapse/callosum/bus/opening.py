"""Opening the bus of a process, and what observes it, as resources of a context."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from synapse.callosum.bus.bus import Bus
from synapse.callosum.log.opening import open_log
from synapse.callosum.observe.observers import Observer
from synapse.callosum.router.native import PATH
from synapse.commands import Context
from synapse.hotpath.paths import ready

OBSERVER = "observer"
CAPACITY = 16_384
"""Messages of each tract and priority that may wait for the observer, when very many are published at once."""


@asynccontextmanager
async def open_bus(context: Context) -> AsyncIterator[Bus]:
    """Opener of the process' bus, on the log of the settings, for `Context.get`. Raises as `connect_log`."""
    async with Bus(log=await context.get(open_log)) as bus:
        yield bus


@asynccontextmanager
async def open_observer(context: Context) -> AsyncIterator[Observer]:
    """Opener of what observes the process' bus, from when it is first asked for. Raises as `connect_log`."""
    bus = await context.get(open_bus)
    await asyncio.to_thread(ready, PATH)  # a subscription keeps the router it begins with
    observer = Observer()
    subscription = bus.subscribe("**", observer.see, name=OBSERVER, capacity=CAPACITY)
    try:
        yield observer
    finally:
        await subscription.close()
