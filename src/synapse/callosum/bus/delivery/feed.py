"""A feed: brings a group's messages from a durable log to the queue of one consumer, and their outcomes back.

It claims a few messages at a time, so that the rest stay in the log for the group's other consumers: as many as were
handled lately in an eighth of the lease. What the handler has not begun when its lease is about to end, or when the
feed ends, goes back to the log, and that it was here counts for nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from synapse.callosum.bus.delivery.backoff import Draw, Retry
from synapse.callosum.bus.delivery.breaker import State
from synapse.callosum.bus.delivery.outcomes import Bury
from synapse.callosum.bus.delivery.watcher import AGAIN, Watcher
from synapse.callosum.log.contract import Delivery, Log, Reason, Start
from synapse.callosum.message import LANES, Message, Tract
from synapse.callosum.publish.publishing import log as logger
from synapse.callosum.router.router import Full
from synapse.errors import SynapseError, Unavailable

FIRST_CLAIM, LARGEST_CLAIM = 16, 256
RELEASE_S = 1.0
"""Seconds that giving back what is left may take at the end."""
LOST = 5
"""Deliveries without any outcome, beyond the attempts of a retry, after which a message counts as what ends its
handler's process."""
TICK_S = 0.005
"""The log's clock may be so much behind ours."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The group that a consumer belongs to, as `Log.join` takes it."""

    group: str
    pattern: str
    start: Start = "new"
    lease_s: float = 30.0


@dataclass(slots=True)
class _Claimed:
    delivery: Delivery
    at: float


class Feed:
    """The outcomes of a subscription that belongs to a durable group.

    Attributes:
        joined: whether the log knows the group.
        retried: attempts after the first that were asked for.
    """

    def __init__(
        self,
        log: Log,
        watcher: Watcher,
        membership: Membership,
        consumer: str,
        *,
        capacity: int,
        retry: Retry,
        bury: Bury,
        draw: Draw = random.random,
    ) -> None:
        """A feed that `start` sets going.

        Args:
            capacity: messages that the queue holds of each tract and priority.
            bury: told of each message that died, which the log then has as a dead letter.
        """
        self._log, self._watcher, self._membership = log, watcher, membership
        self._consumer, self._retry = consumer, retry
        self._bury, self._draw = bury, draw
        self._put: Callable[[Message], None]
        self._state: Callable[[Tract], State]
        self._waiting: dict[Message, _Claimed] = {}
        self._running: dict[Message, _Claimed] = {}
        self._out = [0 for _ in Tract]
        self._largest = min(LARGEST_CLAIM, capacity)
        self._most = min(FIRST_CLAIM, capacity)
        self._slow_at = 0.0
        self._done: list[Delivery] = []
        self._steps: list[Callable[[], Awaitable[None]]] = []
        self._settling = False
        self._due: list[float] = []
        self._more, self._unsettled = asyncio.Event(), asyncio.Event()
        self._closing = self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._joining = asyncio.Lock()
        self.joined = False
        self.retried = 0

    def start(self, put: Callable[[Message], None], state: Callable[[Tract], State]) -> None:
        """Join the group and begin.

        Args:
            put: puts a message in the queue, or raises `Full`.
            state: the state of a tract's breaker: nothing is claimed for an open one.
        """
        self._put, self._state = put, state
        self._tasks = [self._loop.create_task(self._bring()), self._loop.create_task(self._settle())]

    async def join(self) -> None:
        """Make sure that the log knows the group. Raises as `Log.join`."""
        async with self._joining:
            if not self.joined:
                asked = self._membership
                await self._log.join(asked.group, asked.pattern, start=asked.start, lease_s=asked.lease_s)
                self.joined = True

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def settled(self) -> bool:
        """Whether the log knows the outcome of everything that was handled."""
        return not (self._done or self._steps or self._settling)

    def look(self) -> None:
        """Look for something to claim: there is room, or a breaker has changed."""
        self._more.set()

    def end_claims(self) -> None:
        """Claim nothing more."""
        self._closing = True
        self._more.set()

    async def stop(self) -> None:
        """End. What was claimed and not handled is given back at once; where the log is away, its lease ends it."""
        self._watcher.leave(self._more)
        self._closing = self._stopping = True  # too: a client of a server may not heed being cancelled
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = [claimed.delivery for claimed in (*self._waiting.values(), *self._running.values())]
        if left and self.joined:
            with suppress(Exception):  # the log is away, or a client of it is broken: there is nothing left to try
                async with asyncio.timeout(RELEASE_S):
                    await self._log.release(self._membership.group, left)

    @property
    def attentive(self) -> bool:
        """Always."""
        return True

    def wanted(self, message: Message) -> bool:
        """Whether its lease still runs, with a tenth to spare."""
        claimed = self._waiting.pop(message, None)
        if claimed is None:
            return False
        self._running[message] = claimed
        if self._loop.time() - claimed.at < 0.9 * self._membership.lease_s:
            return True
        self._release(self._gone(message))
        return False

    def handled(self, message: Message) -> None:
        """Acknowledge it."""
        delivery = self._gone(message)
        if delivery is not None:
            self._done.append(delivery)
            self._unsettled.set()

    def failed(self, message: Message, error: str) -> None:
        """Have it delivered again after the back-off, or bury it after the last attempt."""
        delivery = self._gone(message)
        if delivery is None:
            return
        if delivery.attempt >= self._retry.attempts:
            self._die(delivery, "failed", error)
            return
        self.retried += 1
        wait_s = self._retry.backoff.wait_s(delivery.attempt, self._draw)

        async def again() -> None:
            await self._log.retry(self._membership.group, delivery, wait_s)
            self._due.append(self._loop.time() + wait_s + TICK_S)

        self._step(again)

    def expired(self, message: Message) -> None:
        """Bury it."""
        delivery = self._gone(message)
        if delivery is not None:
            self._die(delivery, "deadline", "its deadline passed while it waited")

    def _release(self, delivery: Delivery | None) -> None:
        """Give back what the handler has not begun."""
        if delivery is not None:
            self._step(partial(self._log.release, self._membership.group, [delivery]))

    def _die(self, delivery: Delivery, reason: Reason, error: str) -> None:
        handled = delivery.attempt if reason == "failed" else delivery.attempt - 1

        async def bury() -> None:
            await self._log.bury(self._membership.group, delivery, reason, error)
            self._bury(delivery.message, reason, error, handled)

        self._step(bury)

    def _step(self, step: Callable[[], Awaitable[None]]) -> None:
        self._steps.append(step)
        self._unsettled.set()

    def _gone(self, message: Message) -> Delivery | None:
        """Forget that it is claimed, and claim fewer at a time when it was long."""
        claimed = self._running.pop(message, None) or self._waiting.pop(message, None)
        if claimed is None:
            return None
        out = self._out[message.tract] = self._out[message.tract] - 1
        now = self._loop.time()
        if now - claimed.at > self._membership.lease_s / 8:
            if claimed.at >= self._slow_at:  # once for all that were claimed together
                self._slow_at = now
                self._most = max(1, self._most // 2)
        elif out == 0:
            self._most = min(self._largest, 2 * self._most)
        if out <= self._most // 2:
            self._more.set()
        return claimed.delivery

    def _room(self, tract: Tract) -> int:
        oldest = next(iter(self._waiting.values()), None)
        if oldest is not None and self._loop.time() - oldest.at > self._membership.lease_s / 2:
            return 0  # the handler does not keep up: others of the group may
        state = self._state(tract)
        most = {State.CLOSED: self._most, State.HALF_OPEN: 1, State.OPEN: 0}[state]
        return max(0, most - self._out[tract])

    async def _bring(self) -> None:
        failures = 0
        await self._watcher.listen(self._more)
        while not self._closing:
            try:
                await self.join()
                self._more.clear()
                if not await self._claim():
                    await self._news()
                failures = 0
            except Exception as error:  # a defect as well: nobody would see that the task has ended
                failures += 1
                if not isinstance(error, Unavailable):
                    self.joined = False
                if failures == 1:
                    self._complain("bus.not_claimed", error)
                await asyncio.sleep(AGAIN.wait_s(failures, self._draw))

    async def _claim(self) -> int:
        """Claim what there is room for; how many came."""
        found = 0
        for tract in Tract:
            room = self._room(tract)
            if not room:
                continue
            before = self._loop.time()
            claimed = await self._log.claim(self._membership.group, self._consumer, room, tract)
            deadly = self._deadly(claimed)
            for delivery in claimed:
                message = delivery.message
                self._gone(message)  # where its lease has ended meanwhile and it has come to us again
                self._out[tract] += 1
                self._waiting[message] = _Claimed(delivery, before)
                found += 1
                if delivery is deadly:
                    self._gone(message)
                    self._die(delivery, "failed", f"{_lost(delivery)} deliveries of it ended without an outcome")
                    continue
                try:
                    self._put(message)
                except Full:  # of what was delivered twice: the log delivers it again
                    self._release(self._gone(message))
        return found

    def _deadly(self, claimed: Sequence[Delivery]) -> Delivery | None:
        """Of those that were delivered again and again without an outcome, the one that would be handled first.

        It ended the processes that had it, and those claimed beside it came to nothing too: they get another chance.
        """
        most = self._retry.attempts + LOST
        suspects = [delivery for delivery in claimed if _lost(delivery) >= most]
        return max(suspects, key=lambda delivery: delivery.message.lane % LANES, default=None)

    async def _news(self) -> None:
        """Wait until there may be something to claim, at the latest until a retry of ours is due."""
        now = self._loop.time()
        self._due = [due for due in self._due if due > now]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(self._due, default=None)):
                await self._more.wait()

    async def _settle(self) -> None:
        """Tell the log of outcomes, many at a time: while it writes some, others gather."""
        while not self._stopping:
            await self._unsettled.wait()
            self._unsettled.clear()
            done, self._done = self._done, []
            steps, self._steps = self._steps, []
            self._settling = True
            if done:
                await self._insist(partial(self._log.acknowledge, self._membership.group, done))
            for step in steps:
                await self._insist(step)
            if steps:
                self._more.set()  # its time may have come already
            self._settling = False

    async def _insist(self, step: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while not self._stopping:
            try:
                await step()
            except Unavailable:
                failures += 1
                await asyncio.sleep(AGAIN.wait_s(failures, self._draw))
            except Exception as error:
                self._complain("bus.not_settled", error)
                return
            else:
                return

    def _complain(self, what: str, error: Exception) -> None:
        defect = not isinstance(error, SynapseError)
        logger.warning(what, group=self._membership.group, message=str(error), exc_info=defect)


def _lost(delivery: Delivery) -> int:
    """How many deliveries before this one ended without an outcome: the process that had it ended."""
    return delivery.deliveries - delivery.attempt
