"""An outbox: takes messages from any thread at once, and hands them on in batches when it can."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import log
from synapse.errors import InvalidInput, SynapseError, TooLarge

CAPACITY = 10_000
"""Messages that wait while they cannot be handed on; then the oldest are lost, counted and logged."""
BATCH = 500
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between two tries while what takes them is unavailable."""
LAST_SECONDS = 5.0
"""Seconds that the end of the process waits for what is left to be handed on."""

Deliver = Callable[[Sequence[Message]], Awaitable[object]]


def is_refusal(error: Exception) -> bool:
    """Whether something was refused for good. What else goes wrong is tried again later."""
    return isinstance(error, (InvalidInput, TooLarge)) or not isinstance(error, SynapseError)


class Outbox:
    """Messages on their way, in order. Made, run and closed in one event loop; `put` may be called from any thread."""

    def __init__(self, deliver: Deliver, *, capacity: int = CAPACITY, first_pause: float = FIRST_PAUSE) -> None:
        """Make one; `run` is what hands messages on.

        Args:
            deliver: takes a batch, all or none of it. When it cannot (a `SynapseError`), the same is tried again later.
                When it refuses something (`is_refusal`), the batch is tried message by message, and what is refused
                then is logged and dropped.
        """
        self._deliver = deliver
        self._capacity = capacity
        self._first_pause = first_pause
        self._waiting: deque[Message] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._told = False
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Hand messages on in the background, until `close`."""
        self._running = self._loop.create_task(self._run())

    def put(self, message: Message) -> None:
        """Take a message. Never waits: the oldest gives way when there are too many."""
        with self._lock:
            if len(self._waiting) >= self._capacity:
                self._waiting.popleft()
                self._lost += 1
            self._waiting.append(message)
            if self._told:
                return
            self._told = True
        with suppress(RuntimeError):  # the loop has closed since: nobody is left who could hand it on
            self._loop.call_soon_threadsafe(self._begin)

    async def settled(self, seconds: float = LAST_SECONDS) -> bool:
        """Wait until everything was handed on, for so long at most; whether it was."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.sleep(0)  # lets a `put` of just now be heard
                await self._idle.wait()
        return self._idle.is_set()

    async def close(self, seconds: float = LAST_SECONDS) -> None:
        """Try once more to hand on what is left, for so long at most, and end. What is lost is counted in the log."""
        self._closing.set()
        self._wake.set()
        if self._running is not None:
            _, late = await asyncio.wait({self._running}, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._lost += len(self._waiting)
        self._waiting.clear()
        self._tell_lost()

    def _begin(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        pause = self._first_pause
        while True:
            await self._wake.wait()
            self._wake.clear()
            with self._lock:
                self._told = False
            problem = await self._hand_on()
            if problem is not None and pause == self._first_pause:
                log.warning("events.delayed", message=str(problem), hint=problem.hint, waiting=len(self._waiting))
            if self._closing.is_set():
                return
            if problem is None:
                pause = self._first_pause
                if not self._wake.is_set():
                    self._idle.set()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._closing.wait()
            pause = min(pause * 2, LONGEST_PAUSE)
            self._wake.set()

    async def _hand_on(self) -> SynapseError | None:
        """Deliver all that waits, or say why it has to wait longer."""
        self._tell_lost()
        singles = 0
        while batch := self._take(1 if singles else BATCH):
            singles = max(0, singles - 1)
            try:
                await self._deliver(batch)
            except asyncio.CancelledError:
                self._put_back(batch)
                raise
            except Exception as error:
                if isinstance(error, SynapseError) and not is_refusal(error):
                    self._put_back(batch)
                    return error
                if len(batch) > 1:  # one of them, most likely: the others shall not suffer for it
                    self._put_back(batch)
                    singles = len(batch)
                else:
                    log.warning("events.refused", topic=batch[0].topic, message=str(error))
        return None

    def _take(self, most: int) -> list[Message]:
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def _put_back(self, messages: Sequence[Message]) -> None:
        with self._lock:
            self._waiting.extendleft(reversed(messages))
            while len(self._waiting) > self._capacity:
                self._waiting.popleft()
                self._lost += 1

    def _tell_lost(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        if lost:
            log.warning("events.lost", count=lost)
