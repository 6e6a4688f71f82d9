"""Waiting for something new in a Valkey server, without missing what came between looking and waiting."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from synapse.callosum.log.valkey.client import reachable
from synapse.callosum.log.valkey.script import Steps
from synapse.errors import Unavailable

if TYPE_CHECKING:
    from valkey.asyncio import Valkey


WAITED = "waited"
"""Where it is kept what a task has heard of by waiting: it counts until the task looks."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a task saw when it looked.

    Attributes:
        number: all messages up to this one.
        bell: all changes of when something is due, up to this one.
        due: when something is to be delivered again, by `time.monotonic`.
    """

    number: int
    bell: int
    due: float = math.inf


class Changes:
    """What each task has seen, and waiting for more."""

    def __init__(self, server: Valkey, steps: Steps, prefix: str, timeout_s: float) -> None:
        """For the log with this prefix; the server answers within the timeout."""
        self._steps, self._timeout_s = steps, timeout_s
        self._execute: Callable[..., Awaitable[Any]] = server.execute_command
        self._streams = tuple(prefix + name for name in ("external", "internal", "bell"))
        self._looks: WeakKeyDictionary[asyncio.Task[object], dict[str, Look]] = WeakKeyDictionary()

    def saw(self, what: str, look: Look) -> None:
        """The task that runs now has looked at `what`."""
        if (task := asyncio.current_task()) is not None:
            looks = self._looks.setdefault(task, {})
            looks.pop(WAITED, None)
            looks[what] = look

    async def wait(self, timeout_s: float) -> None:
        """Return when there is something that the task that runs now has not seen, at the latest after the timeout."""
        self._steps.check_open()
        end = time.monotonic() + timeout_s
        task = asyncio.current_task()
        looks = list(self._looks.get(task, {}).values()) if task is not None else []
        if not looks:
            looks = [Look(*map(int, await self._steps.run("newest")))]
        number, bell = min(look.number for look in looks), min(look.bell for look in looks)
        due = min(look.due for look in looks)
        news = False
        while not news and (left := min(end, due) - time.monotonic()) > 0:
            try:
                found = await self._listen(number, bell, left)
            except Unavailable:
                if self._steps.closed:
                    return
                raise
            news = bool(found)
            number, bell = max([number, *found[:2]]), max([bell, *found[2:]])
        if task is not None:
            self._looks[task] = {WAITED: Look(number, bell, due if time.monotonic() < due else math.inf)}

    async def _listen(self, number: int, bell: int, longest_s: float) -> list[int]:
        """The next number of either tract and the next of the bell; nothing when there was none for so long."""
        ids = (f"{number}-0", f"{number}-0", f"{bell}-0")
        wait_ms = max(1, math.ceil(min(longest_s, self._timeout_s / 2) * 1000))
        async with reachable(self._timeout_s):
            found = await self._execute("XREAD", "COUNT", 1, "BLOCK", wait_ms, "STREAMS", *self._streams, *ids)
        first = {name.decode(): int(entries[0][0].split(b"-")[0]) for name, entries in found}
        if not first:
            return []
        return [first.get(stream, least) for stream, least in zip(self._streams, (number, number, bell), strict=True)]
