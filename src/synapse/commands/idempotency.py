"""Carrying out a call once, however often it is sent: the idea is that of the `Idempotency-Key` header.

Source: IETF draft-ietf-httpapi-idempotency-key-header. What was carried out is remembered for as long as the process
lives, at most a day and a thousand calls; a call that failed is not, so that it can be tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import BaseModel

from synapse.commands.context import Context
from synapse.errors import Conflict, InvalidInput, Overloaded

MOST = 1000
SECONDS = 86_400.0
LONGEST_KEY = 200

Place = tuple[str | None, str, str]
"""The caller's API key, the command and the idempotency key."""


@dataclass(slots=True)
class _Carried:
    params: str
    since: float
    task: asyncio.Task[BaseModel]


class CarriedOut:
    """The calls with an idempotency key that this process has carried out, or is carrying out."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Place, _Carried] = OrderedDict()

    async def once(self, place: Place, params: BaseModel, work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
        """The result of `work`, or of the earlier call at the same place.

        The work goes on when a caller is cancelled: whoever sends the call again gets its result.

        Raises:
            InvalidInput: the key is empty or too long.
            Conflict: the earlier call had other parameters.
            Overloaded: too many are being carried out.
        """
        if not 0 < len(place[2]) <= LONGEST_KEY:
            raise InvalidInput(f"an idempotency key has 1 to {LONGEST_KEY} characters, not {len(place[2])}")
        self._forget_old()
        text = params.model_dump_json()
        known = self._calls.get(place)
        if known is None:
            if len(self._calls) >= MOST:
                raise Overloaded(f"{MOST} calls with an idempotency key are being carried out, which is the limit")
            known = _Carried(text, time.monotonic(), asyncio.ensure_future(_awaited(work)))
            self._calls[place] = known
            known.task.add_done_callback(lambda task: self._ended(place, task))
        elif known.params != text:
            raise Conflict(
                f"the idempotency key {place[2]!r:.60} was used for {place[1]} with other parameters",
                hint="send a new key with a new call",
            )
        return await asyncio.shield(known.task)

    async def close(self) -> None:
        """Cancel what is still being carried out, and wait for its end."""
        running = [carried.task for carried in self._calls.values() if not carried.task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _ended(self, place: Place, task: asyncio.Task[BaseModel]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._calls.pop(place, None)

    def _forget_old(self) -> None:
        now = time.monotonic()
        for place in [p for p, carried in self._calls.items() if carried.task.done()]:
            if len(self._calls) < MOST and now - self._calls[place].since < SECONDS:
                break
            del self._calls[place]


async def _awaited(work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
    return await work()


@asynccontextmanager
async def open_carried_out(context: Context) -> AsyncIterator[CarriedOut]:
    """Opener of what this process has carried out, for `Context.get`."""
    carried = CarriedOut()
    try:
        yield carried
    finally:
        await carried.close()
