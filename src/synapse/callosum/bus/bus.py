"""The bus: who publishes does not know who subscribes, and a slow or failing subscriber delays nobody else.

Without a log, messages live in this process: each goes into the queue of every subscription whose pattern matches, and
to one subscription of every group. With a log, `publish` returns when the log has the messages; groups are fed from the
log, in this process or others, and subscriptions without a group get what this process publishes at once, and what
others write as it is read. A bus belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

from pydantic import BaseModel

from synapse.callosum.bus.dead_letters import DeadLetters, letter_of
from synapse.callosum.bus.delivery.backoff import Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy, State
from synapse.callosum.bus.delivery.feed import Feed
from synapse.callosum.bus.delivery.log_link import LogLink
from synapse.callosum.bus.delivery.pump import BURST, Handler
from synapse.callosum.bus.events import (
    CLOSED,
    DEAD,
    OPENED,
    OWN_PRIORITY,
    OWN_TOPICS,
    BreakerClosed,
    BreakerOpened,
    Died,
)
from synapse.callosum.bus.inbox import Inbox, reply_to
from synapse.callosum.bus.routes import Route, Routes, Target
from synapse.callosum.bus.stats import BusStats, Tally
from synapse.callosum.bus.subscription import Overflow, Subscription, Terms, drained
from synapse.callosum.log.contract import DeadLetter, Log, Reason, Start
from synapse.callosum.message import Message, Tract
from synapse.callosum.publish.publishing import log as logger
from synapse.callosum.router.router import Full
from synapse.errors import Conflict, NotFound, Overloaded, TimedOut, Unavailable
from synapse.evidence import Evidence

DRAIN_S = 5.0
"""Seconds that leaving the bus gives to what is on its way."""


class Bus:
    """See the module. Use it as an async context manager."""

    def __init__(self, *, log: Log | None = None, most_dead: int = 10_000, most_on_the_way: int = 10_000) -> None:
        """A bus.

        Args:
            log: where messages are durable. It stays the caller's, who closes it.
            most_dead: dead letters kept of subscriptions that the log does not know; the oldest go first.
            most_on_the_way: messages of `publish_nowait` that wait to be written to the log.
        """
        self._log = log
        self._most_on_the_way = most_on_the_way
        self._open = False
        self._published = 0
        self._past = Tally()
        self._subscriptions: dict[str, Subscription] = {}
        self._routes = Routes()
        self._known = self._routes.known
        self._letters = DeadLetters(most_dead)
        self._inbox = Inbox()
        self._link: LogLink | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if self._log is not None:
            self._link = LogLink(
                self._log, most_on_the_way=self._most_on_the_way, deliver=self._deliver, feeds=self._feeds
            )
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(DRAIN_S if error is None else 0.0)

    def publish_nowait(self, message: Message) -> None:
        """Publish a message and return at once. With a log it is on its way there; `publish` waits until it is.

        Raises:
            Full: a subscription that wants `overflow="wait"` has no room; nobody got the message.
            Overloaded: too much is on its way to the log; nobody got the message.
            Unavailable: the bus is not open.
        """
        route = self._known.get(message.topic) or self._find(message.topic)
        if route.patient:
            self._ask_room(route.patient, message)
        if self._link is not None:
            self._link.send(message)
        self._published += 1
        for target in route.targets:
            if not target.try_put(message):
                target.overflowed(message)

    async def publish(self, message: Message) -> bool:
        """Publish a message. With a log it is durable when this returns.

        Returns:
            False where the log has accepted a message of the same key before; then nobody gets this one.

        Raises:
            TooLarge: it is larger than the log takes.
            Unavailable: the bus is not open, or the log cannot be written.
        """
        if self._link is not None:
            return (await self.publish_many((message,)))[0]
        route = self._known.get(message.topic) or self._find(message.topic)
        self._published += 1
        late = None
        for target in route.targets:
            if not target.try_put(message):
                late = [target] if late is None else [*late, target]
        if late is not None:
            for target in late:
                await target.put(message)
        if not self._published % BURST:
            await asyncio.sleep(0)  # a publisher that never waits must not fill the queues
        return True

    async def publish_many(self, messages: Sequence[Message]) -> list[bool]:
        """Publish messages in their order, durably all or none. For each whether it was accepted, as `publish`."""
        self._check_open()
        accepted = [True] * len(messages)
        if self._link is not None:
            accepted = await self._link.append(messages)
        wanted = deque(message for message, new in zip(messages, accepted, strict=True) if new)
        late: deque[tuple[Target, Message]] = deque()
        try:
            await self._spread(wanted, late)
        except asyncio.CancelledError:
            if self._link is not None:  # publishing them again would reach nobody: they are accepted
                first = [partial(target.put, message) for target, message in late]
                self._link.finish([*first, *(partial(self._deliver, message) for message in wanted)])
            raise
        return accepted

    async def request(self, message: Message, timeout_s: float) -> Message:
        """Publish a message and wait for the answer that a handler gives with `reply`.

        The message gets a deadline no later than the timeout, so that nobody answers what nobody waits for.

        Raises:
            TimedOut: no answer came in time.
            Conflict: the log has accepted a message of the same key before.
            Unavailable: the bus is not open or closes meanwhile, or the log cannot be written.
        """
        request, answer = self._inbox.asked(message, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                if self._link is not None:
                    await self._link.follow().ready()
                if not await self.publish(request):
                    raise Conflict(f"a request with the key {message.dedupe_key} was made before")
                return await answer
        except TimeoutError as error:
            raise TimedOut(f"nobody answered {message.topic} within {timeout_s:g} s") from error
        finally:
            self._inbox.forget(request)

    def reply(self, request: Message, payload: BaseModel, *, evidence: Evidence = Evidence.KNOWN) -> bool:
        """Answer a request, from its handler; False where nobody asked for an answer. Raises as `publish_nowait`."""
        answer = reply_to(request, payload, evidence)
        if answer is None:
            return False
        if answer.topic == self._inbox.topic:
            self._inbox.take(answer)
        else:
            self.publish_nowait(answer)
        return True

    def subscribe(
        self,
        pattern: str,
        handler: Handler,
        *,
        group: str | None = None,
        name: str | None = None,
        capacity: int = 1024,
        concurrency: int = 1,
        overflow: Overflow = "dead",
        retry: Retry | None = None,
        breaker: BreakerPolicy | None = None,
        start: Start = "new",
        lease_s: float = 30.0,
    ) -> Subscription:
        """Give a handler every message of a pattern that is published from now on.

        A handler that returns has handled the message; one that raises gets it again later, behind those that wait, and
        a dead letter is made of it after the last attempt. With a concurrency of 1 it gets messages one by one, in the
        order of the router.

        Args:
            pattern: of topics; see `synapse.callosum.topics`.
            handler: gets a message; plain or async. A plain one runs in the event loop and must be short.
            group: each message goes to one subscription of the group only. With a log the group outlives the process
                and gets what was published while nobody of it was there.
            name: for statistics and dead letters; None: the group or the pattern, with a number where it is taken.
            capacity: messages of each tract and priority that wait at most; of a durable group, the rest stay in
                the log.
            concurrency: messages that an async handler has at a time.
            overflow: what happens when there is no room and no durable group: "dead" makes a dead letter of the
                message, "wait" makes `publish` wait and `publish_nowait` raise. A handler must not publish to itself
                with "wait".
            retry: how often and when a message is given again.
            breaker: when the handler gets nothing for a while; each tract has a breaker of its own.
            start: where a new durable group begins: behind the newest message or at the first one kept.
            lease_s: seconds after which a message of a durable group that was not handled goes to another of the
                group; longer than a handler takes.

        Raises:
            InvalidInput: the pattern, the name of the group or a number makes no sense.
            Conflict: the name is taken, or the group has another pattern.
            Unavailable: the bus is not open.
        """
        self._check_open()
        terms = Terms(
            self._free_name(name, group or pattern),
            pattern,
            group,
            capacity,
            concurrency,
            overflow,
            start,
            lease_s,
            retry or Retry(),
            breaker or BreakerPolicy(),
        )
        for other in self._subscriptions.values():
            if group is not None and other.terms.group == group and other.terms.pattern != pattern:
                raise Conflict(f"the group {group} has the pattern {other.terms.pattern} already, not {pattern}")
        subscription = Subscription(terms, handler, self, self._link)
        self._subscriptions[terms.name] = subscription
        if subscription.feed is None:
            self._routes.add(subscription)
            if self._link is not None:
                self._link.follow()
        return subscription

    async def dead(self, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of this process and of the log, newest first. Raises as `Log.dead`."""
        letters = self._letters.newest(limit)
        if self._log is not None:
            letters += await self._log.dead(limit)
        return sorted(letters, key=lambda letter: letter.at, reverse=True)[:limit]

    async def replay(self, ids: Sequence[str] | None = None) -> int:
        """Give dead letters back to whom they belong (None: all), as far as there is room. Returns how many.

        Raises:
            NotFound: there is no such dead letter; none was given back.
            Unavailable: the log cannot be reached.
        """
        ours, others = self._split(ids)
        count = await self._log.replay(others) if self._log is not None and others != [] else 0
        return count + self._letters.replay(ours)

    async def drop(self, ids: Sequence[str] | None = None) -> int:
        """Forget dead letters (None: all). Returns how many. Raises as `replay`."""
        ours, others = self._split(ids)
        count = await self._log.drop(others) if self._log is not None and others != [] else 0
        return count + self._letters.drop(ours)

    def stats(self) -> BusStats:
        """What the bus and its subscriptions have now and have done."""
        found = tuple(subscription.stats() for subscription in self._subscriptions.values())
        tally = sum((stats.tally for stats in found), self._past)
        return BusStats(self._published, tally, self._letters.lost, found)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all that this process has is handled for good, or until the timeout; whether it is.

        What an open breaker holds, and what waits for another attempt, is not handled for good.
        """
        await asyncio.sleep(0)

        def busy() -> bool:
            written = self._link is None or self._link.on_the_way == 0
            return not written or any(subscription.busy for subscription in self._subscriptions.values())

        return await drained(busy, timeout_s)

    async def close(self, drain_s: float = 0.0) -> int:
        """End: take nothing more, after so many seconds at most in which what is here is handled.

        Returns:
            How many messages were forgotten: not handled, and in no log.
        """
        if not self._open:
            return 0
        subscriptions = list(self._subscriptions.values())
        for feed in self._feeds():
            feed.end_claims()
        if drain_s > 0:
            await self.drain(drain_s)
        self._open = False
        self._known.clear()
        self._inbox.close()
        if self._link is not None:
            await self._link.stop_reading()
        forgotten = sum(await asyncio.gather(*(subscription.close() for subscription in subscriptions)))
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        if forgotten:
            logger.warning("bus.forgotten", messages=forgotten)
        return forgotten

    # as subscriptions see it

    def died(self, subscription: Subscription, message: Message, reason: Reason, error: str, attempts: int) -> None:
        """Keep the dead letter where the log does not, and publish that there is one."""
        group = subscription.terms.group or subscription.name
        if subscription.feed is None:
            owner = self._routes.group(subscription.terms.group) or subscription
            self._letters.add(owner, letter_of(message, group, reason, error, attempts))
        if message.topic.startswith(OWN_TOPICS):
            return  # or a message that says that a message died could die, and so on
        died = Died(group=group, reason=reason, error=error, attempts=attempts, topic=message.topic, message=message.id)
        self._announce(DEAD, died, message.evidence)

    def breaker_changed(self, subscription: Subscription, tract: Tract, state: State, error: str) -> None:
        """Publish that a breaker has opened or closed."""
        name, which = subscription.name, tract.name.lower()
        if state is State.OPEN:
            opened = BreakerOpened(subscription=name, tract=which, error=error)
            self._announce(OPENED, opened, Evidence.KNOWN)
        elif state is State.CLOSED:
            closed = BreakerClosed(subscription=name, tract=which)
            self._announce(CLOSED, closed, Evidence.KNOWN)

    def leaving(self, subscription: Subscription) -> None:
        """Give it nothing more."""
        del self._subscriptions[subscription.name]
        self._routes.remove(subscription)

    def ending(self, task: asyncio.Task[None]) -> None:
        """Wait for it before the bus ends."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def left(self, subscription: Subscription, messages: Sequence[Message]) -> int:
        """Give what it did not handle to the others of its group; how many messages found nobody."""
        self._past += subscription.tally()
        group = self._routes.group(subscription.terms.group)
        return sum(group is None or not group.try_put(message) for message in messages)

    # within

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable("the bus is not open", hint="use it within `async with Bus() as bus:`")

    def _find(self, topic: str) -> Route:
        self._check_open()
        return self._routes.find(topic)

    def _ask_room(self, patient: Sequence[Target], message: Message) -> None:
        if not all(target.has_room(message) for target in patient):
            raise Full(f"a subscription to {message.topic} has no room", hint="wait with `publish`")

    async def _spread(self, wanted: deque[Message], late: deque[tuple[Target, Message]]) -> None:
        """Give messages to the subscriptions of this process. What is left in the queues when it raises was not."""
        while wanted or late:
            if self._link is not None and not self._open:
                return  # it was closed meanwhile: the log has them, and nobody here wants them
            for _ in range(min(BURST, len(wanted))):
                message = wanted[0]
                route = self._known.get(message.topic) or self._find(message.topic)
                for target in route.targets:
                    if not target.try_put(message):
                        late.append((target, message))
                wanted.popleft()
                self._published += 1
            while late:
                target, message = late[0]
                await target.put(message)
                late.popleft()
            await asyncio.sleep(0)

    def _feeds(self) -> list[Feed]:
        return [subscription.feed for subscription in self._subscriptions.values() if subscription.feed is not None]

    async def _deliver(self, message: Message) -> None:
        """Give the subscriptions of this process what another has published."""
        if message.topic == self._inbox.topic:
            self._inbox.take(message)
            return
        for target in (self._known.get(message.topic) or self._find(message.topic)).targets:
            await target.put(message)

    def _announce(self, topic: str, payload: BaseModel, evidence: Evidence) -> None:
        try:
            self.publish_nowait(Message(topic, payload, Tract.INTERNAL, OWN_PRIORITY, evidence))
        except (Overloaded, Unavailable) as error:
            logger.info("bus.not_announced", topic=topic, message=str(error))

    def _free_name(self, name: str | None, otherwise: str) -> str:
        if name is not None:
            if name in self._subscriptions:
                raise Conflict(f"a subscription is called {name} already")
            return name
        count = 1
        while (found := otherwise if count == 1 else f"{otherwise} {count}") in self._subscriptions:
            count += 1
        return found

    def _split(self, ids: Sequence[str] | None) -> tuple[list[str] | None, list[str] | None]:
        """Which dead letters this process has, and which the log may have."""
        if ids is None:
            return None, None
        ours = [one for one in ids if self._letters.has(one)]
        others = [one for one in ids if not self._letters.has(one)]
        if others and self._log is None:
            raise NotFound(f"there is no dead letter {others[0]}", hint="an old one may have been let go")
        return ours, others
