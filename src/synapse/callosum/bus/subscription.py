"""A subscription: whose messages of a pattern go to one handler, at its own pace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from synapse.callosum.bus.delivery.backoff import Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy, State
from synapse.callosum.bus.delivery.feed import Feed, Membership
from synapse.callosum.bus.delivery.holding import HoldingQueue
from synapse.callosum.bus.delivery.outcomes import Outcomes, Retries
from synapse.callosum.bus.delivery.pump import Handler, Pump
from synapse.callosum.bus.delivery.watcher import Watcher
from synapse.callosum.bus.stats import SubscriptionStats, Tally
from synapse.callosum.ids import new_id
from synapse.callosum.log.contract import Log, Reason, Start, checked_join
from synapse.callosum.message import Message, Tract
from synapse.callosum.router.router import Full
from synapse.callosum.topics import matcher
from synapse.errors import InvalidInput

GRACE_S = 1.0
"""Seconds that a handler has to end when its subscription is closed."""
POLL_S = 0.002
Overflow = Literal["dead", "wait"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a subscription was asked to be; `Bus.subscribe` explains each."""

    name: str
    pattern: str
    group: str | None = None
    capacity: int = 1024
    concurrency: int = 1
    overflow: Overflow = "dead"
    start: Start = "new"
    lease_s: float = 30.0
    retry: Retry = field(default_factory=Retry)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)

    def __post_init__(self) -> None:
        matcher(self.pattern)
        if self.group is not None:
            checked_join(self.group, self.pattern, self.lease_s)
        if self.capacity < 1 or self.concurrency < 1 or self.lease_s <= 0:
            raise InvalidInput("a subscription needs a capacity, a concurrency and a lease of more than nothing")


class Source(Protocol):
    """Where durable groups get their messages."""

    log: Log
    watcher: Watcher


class Host(Protocol):
    """The bus, as a subscription sees it."""

    def died(self, subscription: Subscription, message: Message, reason: Reason, error: str, attempts: int) -> None:
        """A message of this subscription has become a dead letter."""
        ...

    def breaker_changed(self, subscription: Subscription, tract: Tract, state: State, error: str) -> None:
        """Its breaker of a tract has changed."""
        ...

    def leaving(self, subscription: Subscription) -> None:
        """It gets no more messages."""
        ...

    def ending(self, task: asyncio.Task[None]) -> None:
        """It tells the log of its last outcomes in this task."""
        ...

    def left(self, subscription: Subscription, messages: Sequence[Message]) -> int:
        """It is closed, and did not handle these. Returns how many of them nobody will."""
        ...


class Subscription:
    """One handler's messages. Made by `Bus.subscribe`, ended by `close`."""

    def __init__(self, terms: Terms, handler: Handler, host: Host, source: Source | None) -> None:
        self.terms = terms
        self.open = True
        self._host = host
        self._queue = HoldingQueue(terms.capacity, self._expired)
        self._dead = self._died_waiting = 0
        self._loop = asyncio.get_running_loop()
        self.feed: Feed | None = None
        self._retries = Retries(terms.retry, most=terms.capacity, give_back=self._give_back, bury=self.bury)
        self._outcomes: Outcomes = self._retries
        if source is not None and terms.group is not None:
            self._outcomes = self.feed = self._fed(source, terms.group)
        self._pump = Pump(
            self._queue,
            handler,
            self._outcomes,
            concurrency=terms.concurrency,
            policy=terms.breaker,
            on_change=self._breaker_changed,
        )
        self._sleeping = self._pump.sleeping
        if self.feed is not None:
            self.feed.start(self._pump.put, lambda tract: self._pump.breakers[tract].state)

    @property
    def name(self) -> str:
        """Its name, that no other open subscription of the bus has."""
        return self.terms.name

    @property
    def patient(self) -> bool:
        """Whether it has who publishes wait, rather than lose a message."""
        return self.terms.overflow == "wait"

    def matches(self, topic: str) -> bool:
        """Whether it wants the messages of a topic."""
        return matcher(self.terms.pattern)(topic)

    def try_put(self, message: Message) -> bool:
        """Queue a message; whether there was room. A closed one has none."""
        if not self.open:
            return False
        try:
            self._queue.put_nowait(message)
        except Full:
            return False
        if self._sleeping:
            self._pump.wake()
        return True

    def has_room(self, message: Message) -> bool:
        """Whether `try_put` would find room."""
        return self._queue.has_room(message)

    def overflowed(self, message: Message) -> None:
        """There was no room for a message."""
        self.bury(message, "overflow", f"{self.terms.capacity} messages of its kind waited already", 0)

    async def put(self, message: Message) -> bool:
        """Queue a message for which there was no room just now, as `overflow` says. False where it is closed."""
        if self.patient:
            while self.open and not self.try_put(message):
                await self._pump.room(message)
        elif not self.try_put(message):
            await asyncio.sleep(0)  # a publisher that never waits is no reason to lose messages
            if self.open and not self.try_put(message):
                self.overflowed(message)
        return self.open

    def load(self, tract: Tract) -> tuple[bool, int]:
        """How well it could do with a message of this tract, the less the better."""
        return self._pump.breakers[tract].state is not State.CLOSED, len(self._queue) + self._pump.running

    @property
    def busy(self) -> bool:
        """Whether it has anything that is not handled for good."""
        feed = self.feed
        claimed = feed is not None and (len(feed) > 0 or not feed.settled)
        return claimed or not self._pump.idle or len(self._retries) > 0 or len(self._queue) > 0

    def tally(self) -> Tally:
        """What it has done."""
        pump = self._pump
        return Tally(pump.handled, pump.failed, self._outcomes.retried, self._dead, self._died_waiting)

    def stats(self) -> SubscriptionStats:
        """What it has now and has done."""
        oldest, pump = self._queue.oldest(), self._pump
        return SubscriptionStats(
            name=self.name,
            pattern=self.terms.pattern,
            group=self.terms.group,
            waiting=len(self._queue),
            running=pump.running,
            retrying=len(self._retries),
            oldest_s=None if oldest is None else max(0.0, time.time() - oldest),
            tally=self.tally(),
            breakers={tract: pump.breakers[tract].refresh() for tract in Tract},
        )

    async def close(self, drain_s: float = 0.0) -> int:
        """Get no more messages. Those that wait are handled for up to so many seconds.

        What is left then stays in the log, goes to the others of the group, or is forgotten where there is neither. A
        message that is with its handler may take `GRACE_S`, and is cancelled then. A handler may close its own
        subscription: what comes of its message counts, within `GRACE_S` where the group is durable.

        Returns:
            How many messages were forgotten.
        """
        if not self.open:
            return 0
        self.open = False
        self._host.leaving(self)
        feed = self.feed
        if feed is not None:
            feed.end_claims()
        await drained(lambda: self.busy, drain_s)
        interrupted = await self._pump.stop(GRACE_S)
        left = [*self._queue.take_all(), *self._retries.take_all()]
        if feed is None:
            return interrupted + self._host.left(self, left)
        ending = self._loop.create_task(self._end(feed))
        self._host.ending(ending)
        if not self._pump.running:  # else it is the handler that closes: its own outcome is still to come
            await asyncio.shield(ending)
        return 0

    async def _end(self, feed: Feed) -> None:
        """Tell the log of the last outcomes."""
        await drained(lambda: self._pump.running > 0 or not feed.settled, GRACE_S)
        await feed.stop()
        self._host.left(self, ())

    def bury(self, message: Message, reason: Reason, error: str, attempts: int) -> None:
        """Count a dead letter, and tell the bus."""
        self._dead += 1
        self._died_waiting += reason == "deadline"
        self._host.died(self, message, reason, error, attempts)

    def _fed(self, source: Source, group: str) -> Feed:
        return Feed(
            source.log,
            source.watcher,
            Membership(group, self.terms.pattern, self.terms.start, self.terms.lease_s),
            f"{self.name[:100]}-{new_id():x}",
            capacity=self.terms.capacity,
            retry=self.terms.retry,
            bury=self.bury,
        )

    def _give_back(self, message: Message) -> bool:
        try:
            self._pump.put(message)
        except Full:
            return False
        return True

    def _expired(self, message: Message) -> None:
        self._loop.call_soon(self._after_expiry, message)  # not from within the queue: it may be put to again

    def _after_expiry(self, message: Message) -> None:
        self._pump.made_room(message)
        self._outcomes.expired(message)

    def _breaker_changed(self, tract: Tract, state: State, error: str) -> None:
        if self.feed is not None:
            self.feed.look()
        self._host.breaker_changed(self, tract, state, error)


async def drained(busy: Callable[[], bool], timeout_s: float) -> bool:
    """Wait while something is busy, for so long at most; whether it no longer is."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while busy():
        if loop.time() >= until:
            return False
        await asyncio.sleep(POLL_S)
    return True
