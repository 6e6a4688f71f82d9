"""Which models are open in this process, engines and encoders alike: who uses them, and what memory they take.

A model is opened for the first who asks and stays for as long as anybody holds a `Lease` of it. Then it is idle, and is
closed when that has lasted for `keep_alive` seconds, or earlier when another model needs its memory.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

from synapse.commands import Context
from synapse.commands.openings import Openings
from synapse.engines.cache.memory import give_back, machine_memory
from synapse.errors import Unavailable
from synapse.log import Logger

log = Logger(__name__)

SHARE = 0.75
"""The part of the machine's memory that all models of a process may take when nobody says."""

Reason = Literal["idle", "memory", "stopped"]
"""Why a model is closed: nobody has asked for it for a while, another needed the room, or the process ends."""


class NoMemory(Unavailable):
    """A model does not fit beside those that are in use."""

    code = "no_memory"


class Model(Protocol):
    """Something open that takes memory."""

    async def close(self, reason: Reason) -> None:
        """Give the memory back. Nobody uses it any more."""
        ...


M = TypeVar("M", bound=Model)

MakeRoom = Callable[[int], Coroutine[Any, Any, None]]
"""Makes room for so many bytes; who opens a model awaits it before it takes any of them."""
Opener = Callable[[MakeRoom], Coroutine[Any, Any, M]]


@dataclass(slots=True, eq=False)
class _Place:
    """A model that is open, or about to be."""

    key: Hashable
    name: str
    bytes: int = 0
    users: int = 0
    model: Model | None = None
    idle_since: float = 0.0
    closing: bool = False

    @property
    def idle(self) -> bool:
        return self.model is not None and not self.users and not self.closing

    def __str__(self) -> str:
        doing = "being closed" if self.closing else "being opened" if self.model is None else "in use"
        return f"{self.name} ({in_words(self.bytes)}, {'idle' if self.idle else doing})"


class Lease(Generic[M]):
    """The right to use a model, until it is released; one that is dropped is released too."""

    def __init__(self, model: M, release: Callable[[], None]) -> None:
        self.model = model
        self.release = finalizer = weakref.finalize(self, release)
        finalizer.atexit = False


class Residency:
    """The models that are open in an event loop, whose methods are for that loop's thread."""

    def __init__(self, keep_alive: float, limit: int = 0) -> None:
        """None is open yet.

        Args:
            keep_alive: seconds that a model stays open when nobody uses it; infinity means for ever.
            limit: bytes that all models may take together; 0 means three quarters of the machine's memory, or what one
                model needs that is alone: most of what is counted is taken only as it fills.
        """
        self.limit = limit or int(SHARE * machine_memory())
        self._strict = bool(limit)
        self._keep_alive = keep_alive
        self._openings: Openings[Hashable, _Place] = Openings()
        self._places: dict[Hashable, _Place] = {}
        self._closing: dict[_Place, asyncio.Task[None]] = {}
        self._memory = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def lease(self, key: Hashable, name: str, opener: Opener[M]) -> Lease[M]:
        """The right to use the model of this key, which is opened if it is not: by an opener of the same type always.

        While it is being closed, it is opened again after that.

        Raises:
            NoMemory: it does not fit beside those that are in use.
            Unavailable: the process ends.
            what `opener` raises.
        """
        loop = asyncio.get_running_loop()
        while ending := [task for place, task in self._closing.items() if place.key == key]:
            await asyncio.wait(ending)
        place = self._places.setdefault(key, _Place(key, name))
        place.users += 1
        try:
            await self._openings.get(key, lambda: self._open(place, opener))
        except BaseException:
            self._release(place)
            raise

        def release() -> None:  # in whichever thread the last reference to the lease is dropped
            with suppress(RuntimeError):  # the loop has closed, and everything with it
                loop.call_soon_threadsafe(self._release, place)

        return Lease(cast(M, place.model), release)

    def open_models(self) -> dict[Hashable, Model]:
        """The models that are open, by their keys, in the order in which they were opened."""
        return {key: place.model for key, place in self._openings.values().items() if place.model is not None}

    def others_in_use(self, key: Hashable) -> bool:
        """Whether somebody uses another model than that of this key."""
        return any(place.users and place.model is not None for k, place in self._places.items() if k != key)

    @property
    def bytes(self) -> int:
        """What the models that are open, being opened or being closed may take together."""
        return sum(place.bytes for place in (*self._places.values(), *self._closing))

    def bytes_of(self, key: Hashable) -> int:
        """What the model of this key may take; 0 when it is not open."""
        place = self._places.get(key)
        return 0 if place is None else place.bytes

    def seconds_left(self, key: Hashable) -> float | None:
        """Until the model of this key is closed if nobody asks for it; None while it is in use, or is never closed."""
        place = self._places.get(key)
        if place is None or not place.idle or self._keep_alive == float("inf"):
            return None
        return max(0.0, place.idle_since + self._keep_alive - asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Give up what is being opened and close everything, whoever uses it."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for place in (await self._openings.close()).values():
            self._close(place, "stopped")
        await asyncio.gather(*self._closing.values())

    async def _open(self, place: _Place, opener: Opener[M]) -> _Place:
        async def make_room(needed: int) -> None:
            await self._make_room(place, needed)

        try:
            place.model = await opener(make_room)
        except BaseException:
            del self._places[place.key]
            raise
        if not place.users:  # whoever wanted it has given up
            self._idle(place)
        return place

    async def _make_room(self, place: _Place, needed: int) -> None:
        """Give a place so many bytes; models that are idle are closed for it, the one first that has been so longest.

        Raises:
            NoMemory: it would not fit if all idle models were closed. Then none is.
        """
        async with self._memory:
            while True:
                others = [each for each in (*self._places.values(), *self._closing) if each is not place]
                limit = self.limit if self._strict else max(self.limit, needed)
                free = limit - sum(each.bytes for each in others)
                if needed <= free:
                    break
                idle = sorted((each for each in others if each.idle), key=lambda each: each.idle_since)
                if needed > free + sum(each.bytes for each in (*idle, *self._closing)):
                    raise _no_memory(place.name, needed, self.limit, [each for each in others if each.bytes])
                if not self._closing:
                    self._close(idle[0], "memory")
                await asyncio.wait(self._closing.values(), return_when=asyncio.FIRST_COMPLETED)
            place.bytes = needed

    def _release(self, place: _Place) -> None:
        place.users -= 1
        if place.idle:
            self._idle(place)

    def _idle(self, place: _Place) -> None:
        place.idle_since = asyncio.get_running_loop().time()
        self._close_overdue()

    def _close_overdue(self) -> None:
        """Close what has been idle for long enough, and come back when the next one will have been."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        idle = [place for place in self._places.values() if place.idle]
        for place in idle:
            if place.idle_since + self._keep_alive <= loop.time():
                self._close(place, "idle")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = min((place.idle_since + self._keep_alive for place in idle if not place.closing), default=float("inf"))
        if due < float("inf"):
            self._timer = loop.call_at(due, self._close_overdue)

    def _close(self, place: _Place, reason: Reason) -> None:
        place.closing = True
        self._places.pop(place.key, None)
        self._openings.forget(place.key)
        task = self._closing[place] = asyncio.create_task(_give_up(place, reason))

        def closed(task: asyncio.Task[None]) -> None:
            del self._closing[place]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("closing a model failed", model=place.name, exc_info=error)

        task.add_done_callback(closed)


async def _give_up(place: _Place, reason: Reason) -> None:
    """Close the model of a place, and return its memory to the system."""
    model, place.model = place.model, None
    assert model is not None  # noqa: S101 (only what is open is closed)
    await model.close(reason)
    del model  # an encoder has no more than memory, which goes with the last who refers to it
    await asyncio.to_thread(give_back)


def _no_memory(name: str, needed: int, limit: int, others: list[_Place]) -> NoMemory:
    used = sum(each.bytes for each in others)
    smaller = "SYNAPSE_KV_CACHE_BYTES, SYNAPSE_MAX_LAYER_BYTES and SYNAPSE_QUANTISATION make a model take less"
    larger = "SYNAPSE_MAX_MODEL_BYTES raises the limit"
    message = f"the model {name} needs {in_words(needed)} of memory; "
    if used:
        message += f"{in_words(used)} of the {in_words(limit)} that all models may take are in use by "
        message += ", ".join(map(str, others))
        hint = f"try again when one of them is idle; {larger}, {smaller}"
    else:
        message += f"all models together may take {in_words(limit)}"
        hint = f"{larger}, {smaller}"
    return NoMemory(message, hint=hint, needed=needed, used=used, limit=limit)


def in_words(count: int) -> str:
    """Bytes as people say them."""
    if count < 10**6:
        return f"{count / 1e3:.3g} kB"
    return f"{count / 1e6:.3g} MB" if count < 10**9 else f"{count / 1e9:.3g} GB"


@asynccontextmanager
async def open_residency(context: Context) -> AsyncIterator[Residency]:
    """Opener of the process' residency, for `Context.get`."""
    residency = Residency(context.settings.keep_alive, context.settings.max_model_bytes)
    try:
        yield residency
    finally:
        await residency.close()
