"""The router and the bus in one process, beside `asyncio.PriorityQueue`."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import numpy as np

from synapse.callosum.bus.bus import Bus
from synapse.callosum.message import Message, Tract
from synapse.callosum.payloads import Payload, event
from synapse.callosum.router.router import Router

PEER = "asyncio.PriorityQueue"
BATCH = 256
DEPTHS = (0, 10, 100, 1_000, 10_000)
"""Messages that wait all the time, beside those that are put and got."""
ROOM = 64
"""Messages that each queue holds while waits are measured."""
GAP_S = 0.000_2
"""Between two external messages, when their waits are measured."""


@event("benchmark.done")
class Done(Payload):
    """What the messages say."""

    number: int
    text: str = "some forty characters of a payload's text"


def new_messages(number: int, seed: int = 7) -> list[Message]:
    """Of both tracts and every priority, at random."""
    draw = random.Random(seed)  # noqa: S311 (the same every time)
    return [
        Message("benchmark.done", Done(number=n), draw.choice(tuple(Tract)), draw.randrange(10)) for n in range(number)
    ]


def entry(message: Message, number: int) -> tuple[int, int, int, Message]:
    """What goes into a `PriorityQueue`: external first, higher priorities first, then in the order of the numbers."""
    return (message.tract, -message.priority, number, message)


class Ours:
    """A router that has so many messages already."""

    def __init__(self, depth: int) -> None:
        self.queue = Router(1_000_000, on_expired=print)
        self.waiting = new_messages(depth, 8)
        self.queue.put_many_nowait(self.waiting)
        self.batch = new_messages(BATCH)

    def one_by_one(self) -> None:
        put, get = self.queue.put_nowait, self.queue.get_nowait
        for message in self.batch:
            put(message)
            get()

    def batched(self) -> None:
        self.queue.put_many_nowait(self.batch)
        self.queue.get_many_nowait(BATCH)


class Theirs:
    """A `PriorityQueue` that has so many; its entries are made beforehand."""

    def __init__(self, depth: int) -> None:
        numbers = count()
        self.queue: asyncio.PriorityQueue[tuple[int, int, int, Message]] = asyncio.PriorityQueue()
        self.waiting = [entry(message, next(numbers)) for message in new_messages(depth, 8)]
        for found in self.waiting:
            self.queue.put_nowait(found)
        self.batch = [entry(message, next(numbers)) for message in new_messages(BATCH)]

    def one_by_one(self) -> None:
        put, get = self.queue.put_nowait, self.queue.get_nowait
        for found in self.batch:
            put(found)
            get()

    def batched(self) -> None:
        put, get = self.queue.put_nowait, self.queue.get_nowait
        for found in self.batch:
            put(found)
        for _ in self.batch:
            get()


def put_and_get(rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds of a put and a get, one message at a time and in batches, with so many that wait."""
    rows = []
    for depth in DEPTHS:
        ours, theirs = Ours(depth), Theirs(depth)
        for name in ("one_by_one", "batched"):
            calls = (getattr(ours, name), getattr(theirs, name))
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(rounds):
                for side in (0, 1) if turn % 2 else (1, 0):
                    start = time.perf_counter()
                    calls[side]()
                    times[side].append((time.perf_counter() - start) / BATCH * 1e9)
            mine, other = map(statistics.median, times)
            rows.append(
                {
                    "work": "one by one" if name == "one_by_one" else f"batches of {BATCH}",
                    "waiting": depth,
                    "router_ns": mine,
                    "peer_ns": other,
                    "ratio": other / mine,
                }
            )
    return rows


class Waits:
    """Notes how long after its `put` each external message arrived, in microseconds."""

    def __init__(self, pause_s: float) -> None:
        self.found: list[float] = []
        self._pause_s = pause_s
        self._sent = 0.0
        self._arrived = asyncio.Event()

    def __call__(self, message: Message) -> None:
        if message.tract == Tract.EXTERNAL:
            self.found.append((time.perf_counter() - self._sent) * 1e6)
            self._arrived.set()

    async def measure(self, put: Callable[[Message], object], number: int) -> list[float]:
        """Put external messages one after another, each after the last has arrived and a pause."""
        message = Message("benchmark.done", Done(number=0), Tract.EXTERNAL, 5)
        for _ in range(number):
            await asyncio.sleep(self._pause_s)
            self._arrived.clear()
            self._sent = time.perf_counter()
            put(message)
            await self._arrived.wait()
        return self.found


@asynccontextmanager
async def at_work(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Tasks that run meanwhile, and have begun."""
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.sleep(0.01)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def take(get: Callable[[], Awaitable[Message]], note: Waits) -> None:
    """Take message after message, and let others run after each."""
    while True:
        note(await get())
        await asyncio.sleep(0)


async def fill(put: Callable[[Message], Awaitable[object]]) -> None:
    """Keep the internal queues full."""
    messages = [message for message in new_messages(200) if message.tract == Tract.INTERNAL]
    while True:
        for message in messages:
            await put(message)


async def router_waits(number: int, saturated: bool, pause_s: float = GAP_S) -> list[float]:
    """From `put_nowait` to a task that waits in `get`."""
    router, note = Router(ROOM, on_expired=print), Waits(pause_s)
    works = (take(router.get, note), *([fill(router.put)] if saturated else []))
    async with at_work(*works):
        return await note.measure(router.put_nowait, number)


async def bus_waits(number: int, saturated: bool) -> list[float]:
    """From `publish_nowait` to a plain handler."""
    note = Waits(GAP_S)
    async with Bus() as bus:
        bus.subscribe("benchmark.*", note, capacity=ROOM, overflow="wait")
        async with at_work(*([fill(bus.publish)] if saturated else [])):
            return await note.measure(bus.publish_nowait, number)


async def peer_waits(number: int, pause_s: float = GAP_S) -> list[float]:
    """From `put_nowait` to a task that waits in `get`."""
    queue: asyncio.PriorityQueue[tuple[int, int, int, Message]] = asyncio.PriorityQueue()
    note, numbers = Waits(pause_s), count()

    async def get() -> Message:
        return (await queue.get())[3]

    async with at_work(take(get, note)):
        return await note.measure(lambda message: queue.put_nowait(entry(message, next(numbers))), number)


async def waits(number: int, rounds: int) -> list[dict[str, Any]]:
    """How long external messages wait, idle and while the internal tract is saturated: medians of the rounds."""
    kinds: dict[str, Callable[[], Awaitable[list[float]]]] = {
        "router, idle, one after another": lambda: router_waits(number, saturated=False, pause_s=0),
        f"{PEER}, idle, one after another": lambda: peer_waits(number, pause_s=0),
        "router, idle": lambda: router_waits(number, saturated=False),
        "router, internal saturated": lambda: router_waits(number, saturated=True),
        "bus, idle": lambda: bus_waits(number, saturated=False),
        "bus, internal saturated": lambda: bus_waits(number, saturated=True),
        f"{PEER}, idle": lambda: peer_waits(number),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measured in kinds.items():
            found[name].append(await measured())
    return [
        {"what": name, "messages": number * rounds}
        | {f"p{share}_us": float(np.median(np.percentile(each, share, axis=1))) for share in (50, 99)}
        for name, each in found.items()
    ]


class Counter:
    """A handler that counts up to a number."""

    def __init__(self, number: int) -> None:
        self.handled = 0
        self.all = asyncio.Event()
        self._number = number

    def __call__(self, message: Message) -> None:
        self.handled += 1
        if self.handled == self._number:
            self.all.set()


async def by_publish_nowait(bus: Bus, messages: list[Message]) -> None:
    for start in range(0, len(messages), BATCH):
        for message in messages[start : start + BATCH]:
            bus.publish_nowait(message)
        await asyncio.sleep(0)


async def by_publish(bus: Bus, messages: list[Message]) -> None:
    for message in messages:
        await bus.publish(message)


async def by_publish_many(bus: Bus, messages: list[Message]) -> None:
    for start in range(0, len(messages), BATCH):
        await bus.publish_many(messages[start : start + BATCH])


async def to_handler(publish: Callable[[Bus, list[Message]], Awaitable[None]], messages: list[Message]) -> float:
    """Messages a second from publishing to a plain handler in the same process; the messages are there already."""
    counter = Counter(len(messages))
    async with Bus() as bus:
        bus.subscribe("benchmark.*", counter, capacity=len(messages))
        await asyncio.sleep(0)
        start = time.perf_counter()
        await publish(bus, messages)
        await counter.all.wait()
        return len(messages) / (time.perf_counter() - start)


async def to_handler_of_peer(messages: list[Message]) -> float:
    """The same with a `PriorityQueue`, and a task that calls the handler with what it gets."""
    counter = Counter(len(messages))
    queue: asyncio.PriorityQueue[tuple[int, int, int, Message]] = asyncio.PriorityQueue()

    async def handle() -> None:
        while True:
            counter((await queue.get())[3])

    task, numbers = asyncio.create_task(handle()), count()
    start = time.perf_counter()
    for first in range(0, len(messages), BATCH):
        for message in messages[first : first + BATCH]:
            queue.put_nowait(entry(message, next(numbers)))
        await asyncio.sleep(0)
    await counter.all.wait()
    taken = time.perf_counter() - start
    task.cancel()
    return len(messages) / taken


async def publishing(number: int, rounds: int) -> list[dict[str, Any]]:
    """Messages a second from `publish` to a handler, in each way of publishing."""
    messages = new_messages(number)
    ways: dict[str, Callable[[], Awaitable[float]]] = {
        "publish_nowait": lambda: to_handler(by_publish_nowait, messages),
        "publish": lambda: to_handler(by_publish, messages),
        f"publish_many of {BATCH}": lambda: to_handler(by_publish_many, messages),
        f"{PEER} and a task": lambda: to_handler_of_peer(messages),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(await way())
    peer = statistics.median(speeds[f"{PEER} and a task"])
    return [
        {"way": name, "events_per_s": statistics.median(each), "ratio": statistics.median(each) / peer}
        for name, each in speeds.items()
    ]
