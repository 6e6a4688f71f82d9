"""What becomes of messages that a handler was given: in this process, they are tried again or die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol

from synapse.callosum.bus.delivery.backoff import Draw, Retry
from synapse.callosum.log.contract import Reason
from synapse.callosum.message import Message

Bury = Callable[[Message, Reason, str, int], None]
"""Makes a dead letter of a message: why, the error, how often a handler had it."""
NO_ROOM_S = 0.05
"""Seconds until a message that finds no room when its turn comes again looks for it once more."""


class Outcomes(Protocol):
    """Told what happened to each message; none of it waits."""

    @property
    def retried(self) -> int:
        """Attempts after the first that were asked for."""
        ...

    @property
    def attentive(self) -> bool:
        """Whether `wanted` and `handled` have to be asked and told just now."""
        ...

    def wanted(self, message: Message) -> bool:
        """Whether the message just taken from the queue is still to be handled here."""
        ...

    def handled(self, message: Message) -> None:
        """The handler returned."""
        ...

    def failed(self, message: Message, error: str) -> None:
        """The handler raised."""
        ...

    def expired(self, message: Message) -> None:
        """Its deadline passed before its turn came."""
        ...


class Retries:
    """The outcomes of a subscription that has no log: a message that failed waits here for its next attempt.

    Attributes:
        retried: attempts after the first that were asked for.
    """

    def __init__(
        self, retry: Retry, *, most: int, give_back: Callable[[Message], bool], bury: Bury, draw: Draw = random.random
    ) -> None:
        """Outcomes.

        Args:
            most: messages that wait here at most; one more dies at its first failure.
            give_back: puts a message in the queue again; whether there was room.
        """
        self._retry, self._most, self._give_back, self._bury, self._draw = retry, most, give_back, bury, draw
        self._failures: dict[Message, int] = {}
        self._timers: dict[Message, asyncio.TimerHandle] = {}
        self.retried = 0

    def __len__(self) -> int:
        return len(self._timers)

    @property
    def attentive(self) -> bool:
        """While a message that failed waits for its next attempt or has it."""
        return bool(self._failures)

    def wanted(self, message: Message) -> bool:
        """Always."""
        return True

    def handled(self, message: Message) -> None:
        """Forget its failures."""
        self._failures.pop(message, None)

    def failed(self, message: Message, error: str) -> None:
        """Give it back after the back-off, or bury it after the last attempt."""
        failures = self._failures.pop(message, 0) + 1
        if failures >= self._retry.attempts or len(self._timers) >= self._most:
            self._bury(message, "failed", error, failures)
            return
        self.retried += 1
        self._failures[message] = failures
        self._later(message, self._retry.backoff.wait_s(failures, self._draw))

    def expired(self, message: Message) -> None:
        """Bury it."""
        self._bury(message, "deadline", "its deadline passed while it waited", self._failures.pop(message, 0))

    def take_all(self) -> list[Message]:
        """What waits here, which then no longer does. What fails after this dies."""
        found = list(self._timers)
        self._most = 0
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._failures.clear()
        return found

    def _later(self, message: Message, wait_s: float) -> None:
        self._timers[message] = asyncio.get_running_loop().call_later(wait_s, self._due, message)

    def _due(self, message: Message) -> None:
        del self._timers[message]
        if not self._give_back(message):
            self._later(message, NO_ROOM_S)
