"""What an engine has said and its reader has not yet taken: bounded, in the event loop of the reader."""

from __future__ import annotations

import asyncio
from collections import deque

from synapse.engines.request import Delta, Event
from synapse.errors import TimedOut

MOST_UNREAD = 1024
"""Tokens that wait for a reader before its answer is given up: some ten seconds of a fast answer."""


class SlowReader(TimedOut):
    """The answer was given up because nobody read it."""

    code = "slow_reader"


class Unread:
    """The events of one answer. Deltas that wait become one, so a reader that comes late catches up at once.

    For one event loop and one reader.
    """

    def __init__(self, most: int = MOST_UNREAD) -> None:
        self._most = most
        self._events: deque[Event | Exception] = deque()
        self._tokens = 0
        self._reader: asyncio.Future[None] | None = None
        self._full = False

    def put(self, event: Event | Exception) -> bool:
        """Take an event; False once too many tokens wait: the reader gets those, and then `SlowReader`."""
        if self._full:
            return False
        if isinstance(event, Delta):
            self._tokens += len(event.tokens)
            if self._tokens > self._most:
                self._full = True
                event = SlowReader(
                    f"the answer was given up: {self._most} tokens of it waited to be read", hint="read faster"
                )
        self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        return not self._full

    async def get(self) -> Event:
        """The next event, waiting for it. Raises what was put to be raised."""
        while not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Delta):
            deltas = [event]
            while self._events and isinstance(later := self._events[0], Delta):
                deltas.append(later)
                self._events.popleft()
            self._tokens = 0
            return event if len(deltas) == 1 else joined(deltas)
        return event


def joined(deltas: list[Delta]) -> Delta:
    """Deltas of one answer, in order, as one."""
    return Delta(
        deltas[0].request_id,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(entry for delta in deltas for entry in delta.logprobs),
    )
