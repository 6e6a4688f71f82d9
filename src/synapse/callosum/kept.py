"""What was read from the store, kept until an event says that it may have changed.

An event of this process counts before `publish` returns, one of another process as soon as its log tells. What changes
without an event (`data/update`, another process while the log is away) is seen within `LONGEST_S`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import connect
from synapse.commands import Context

T = TypeVar("T")

PATTERNS = ("key.*", "persona.*", "genome.*", "layer.*", "model.*")
IN_MEMORY = frozenset({"layer.loaded", "layer.evicted"})
"""Topics of these patterns that change nothing in the store."""
LONGEST_S = 5.0
MOST = 4096
"""Values kept at once. What is not found is not kept, so nobody can fill it with names that do not exist."""


class Kept:
    """Values by key; none before `listen` was called. One event loop reads, any thread may tell of changes."""

    def __init__(self, longest_s: float = LONGEST_S) -> None:
        self._longest_s = longest_s
        self._listening = False
        self._state = object()
        """Another object after each change: a value read before it is worth nothing."""
        self._values: dict[Hashable, tuple[object, float, Any]] = {}

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """The value of a key, read if need be. What `read` raises is raised, and not kept."""
        found = self._values.get(key)
        if found is not None and found[0] is self._state and time.monotonic() < found[1]:
            return cast(T, found[2])
        state = self._state
        value = await read()
        if self._listening and state is self._state:
            if len(self._values) >= MOST:
                self._values.clear()
            self._values[key] = (state, time.monotonic() + self._longest_s, value)
        return value

    def forget(self, key: Hashable) -> None:
        """Forget one value."""
        self._values.pop(key, None)

    def heard(self, message: Message) -> None:
        """Forget everything if this event tells of a change. May be called from any thread."""
        family = message.topic.partition(".")[0]
        if f"{family}.*" in PATTERNS and message.topic.count(".") == 1 and message.topic not in IN_MEMORY:
            self._state = object()

    async def listen(self, context: Context) -> Callable[[], None]:
        """Hear the events of this and of every other process, and keep values from now on. Returns what ends that.

        Raises:
            Unavailable: the log cannot be reached.
        """
        from synapse.callosum.bus.opening import open_bus  # noqa: PLC0415 - large, and a list in the terminal needs none

        bus = await context.get(open_bus)

        async def heard(message: Message) -> None:
            self.heard(message)

        for pattern in PATTERNS:
            bus.subscribe(pattern, heard, name=f"kept {pattern}")
        end = connect(self.heard)
        self._listening = True

        def stop() -> None:
            self._listening = False
            self._values.clear()
            end()

        return stop


@asynccontextmanager
async def open_kept(context: Context) -> AsyncIterator[Kept]:
    """Opener of what this process keeps of the store, for `Context.get`."""
    yield Kept()
