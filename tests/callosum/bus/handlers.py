"""Handlers that the tests of the bus subscribe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from synapse.callosum.bus.delivery.backoff import Backoff, Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy
from synapse.callosum.message import Message

AT_ONCE = Backoff(base_s=0, cap_s=0)
NEVER = Backoff(base_s=1000, cap_s=1000, least=1)
STUBBORN = BreakerPolicy(in_a_row=1000, failures=1000, window=1000)
ONCE = Retry(attempts=1)


class Seen:
    """A handler that remembers what the messages say."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, message: Message) -> None:
        self.texts.append(text(message))


class Gate:
    """An asynchronous handler that lets one message end when it is told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._passes = asyncio.Semaphore(0)

    async def __call__(self, message: Message) -> None:
        self.begun.append(text(message))
        await self._passes.acquire()
        self.ended.append(text(message))

    def open(self, count: int = 1) -> None:
        """Let so many messages end."""
        for _ in range(count):
            self._passes.release()


def text(message: Message) -> str:
    """What a message of these tests says."""
    return str(message.payload.model_dump()["text"])


def fails(message: Message) -> None:
    """A handler that never succeeds."""
    raise ValueError(f"no {text(message)}")


async def turns(count: int = 20) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


class Payloads:
    """A handler that remembers payloads."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, message: Message) -> None:
        self.found.append(message.payload)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
