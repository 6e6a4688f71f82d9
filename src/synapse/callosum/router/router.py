"""The queue between those who send messages and one who handles them: what a person waits for goes first.

There is a bounded queue for each tract and priority. Within one it is first in, first out; a higher priority goes
before a lower one; the external tract goes before the internal one. So that the internal tract is never starved, one
message of it is given after every `share` external ones that were given while it waited.

A router belongs to one event loop: no method may be called from another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from synapse.callosum.message import LANES, PRIORITIES, Message, Tract
from synapse.callosum.router.native import open_core
from synapse.callosum.router.state import Hooks
from synapse.callosum.router.waiters import Waiters
from synapse.errors import InvalidInput, Overloaded, Unavailable


class Full(Overloaded):
    """The queue of a message's tract and priority has no room."""

    code = "queue_full"


class Closed(Unavailable):
    """The router takes nothing more, and nothing is left in it."""

    code = "router_closed"


class Empty(Exception):
    """There is no message just now."""


class Router:
    """Bounded queues for each tract and priority. See the module for the order in which they are emptied.

    A message whose deadline has passed when its turn comes is not given: `on_expired` gets it, and it counts for the
    share as if it had been given. Until then it takes up room.

    Attributes:
        put_nowait: queues a message. Raises `Full` where there is no room, `Closed` when the router is closed.
        get_nowait: the next message. Raises `Empty` when there is none, `Closed` when there will be none any more.
    """

    __slots__ = (
        *("_capacity", "_clock", "_closed", "_core", "_getters", "_on_expired", "_putters"),
        *("get_nowait", "put_nowait"),
    )

    def __init__(
        self,
        capacity: int = 1024,
        share: int = 8,
        *,
        on_expired: Callable[[Message], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """An empty router.

        Args:
            capacity: messages that each of the 20 queues holds at most.
            share: external messages that go before an internal one that waits.
            on_expired: gets the messages whose deadline has passed. It must not raise.
            clock: seconds since 1970.

        Raises:
            InvalidInput: a number is not positive.
        """
        if capacity < 1 or share < 1:
            raise InvalidInput(f"capacity and share are at least 1, not {capacity} and {share}")
        self._capacity = capacity
        self._on_expired = on_expired
        self._clock = clock
        self._closed = False
        self._getters = Waiters()
        self._putters = [Waiters() for _ in range(LANES)]
        self._core = core = open_core(capacity, share, Hooks(self._refused, self._nothing, self._arrived, self._given))
        self.put_nowait: Callable[[Message], None] = core.put
        self.get_nowait: Callable[[], Message] = core.take

    def __len__(self) -> int:
        return sum(self._core.depths())

    def depth(self, tract: Tract, priority: int) -> int:
        """Messages in one queue."""
        return self._core.depths()[priority if tract else priority + PRIORITIES]

    def depths(self) -> dict[tuple[Tract, int], int]:
        """Messages in each queue that has any, in the order in which they would go without a share."""
        lanes = reversed(list(enumerate(self._core.depths())))
        return {(Tract(lane < PRIORITIES), lane % PRIORITIES): depth for lane, depth in lanes if depth}

    def oldest(self) -> float | None:
        """When the oldest message that is next in a queue was made, in seconds since 1970; None when there is none."""
        return min((message.time for message in self._core.heads()), default=None)

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    def close(self) -> None:
        """Take nothing more. What is queued can still be got; who waits in vain gets `Closed`."""
        self._closed = True
        self._core.room = 0
        self._getters.wake(len(self._getters.futures))
        for putters in self._putters:
            putters.wake(len(putters.futures))

    async def put(self, message: Message) -> None:
        """Queue a message, when there is room. Tasks that wait for room in the same queue get it in order.

        One that is cancelled has not queued its message.

        Raises:
            Closed: it is closed.
        """
        lane = message.lane % LANES
        if self._full(lane) or (self._putters[lane].tasks and not self._closed):
            await self._wait_for_room(lane)
        self.put_nowait(message)
        self._offer_room(lane)

    async def get(self) -> Message:
        """The next message, when there is one. Being cancelled takes none.

        Raises:
            Closed: there is none, and there will be none.
        """
        waited = False
        while True:
            try:
                return self.get_nowait()
            except Empty:
                self._core.waiting = 1
                await self._getters.wait(self.__len__, first=waited)
                waited = True

    def put_many_nowait(self, messages: Sequence[Message]) -> int:
        """Queue messages in their order, up to the first one that finds no room.

        Returns:
            How many were queued.

        Raises:
            Closed: it is closed, and none was queued.
        """
        if self._closed:
            raise Closed("the router is closed")
        count = self._core.put_many(messages if type(messages) is list else list(messages))
        if self._getters.futures:
            self._getters.wake(count)
        return count

    def get_many_nowait(self, limit: int) -> list[Message]:
        """The next messages, at most `limit`; none when there is none.

        Raises:
            InvalidInput: the limit is not positive.
        """
        if limit < 1:
            raise InvalidInput(f"a limit is at least 1, not {limit}")
        messages = taken = self._core.take_many(limit)
        if self._core.chores:
            messages = list(filter(self._kept, taken))
            while taken and len(messages) < limit:  # some had expired
                taken = self._core.take_many(limit - len(messages))
                messages += filter(self._kept, taken)
        return messages

    async def put_many(self, messages: Sequence[Message]) -> None:
        """Queue messages in their order, waiting for room where there is none.

        One that is cancelled may have queued some of them, the first ones.

        Raises:
            Closed: it is closed; some may have been queued.
        """
        done = 0
        while done < len(messages):
            await self.put(messages[done])
            done += 1
            if done < len(messages):
                done += self.put_many_nowait(messages[done:])

    async def get_many(self, limit: int) -> list[Message]:
        """The next messages, at most `limit`, when there is at least one. Being cancelled takes none.

        Raises:
            InvalidInput: the limit is not positive.
            Closed: there is none, and there will be none.
        """
        waited = False
        while True:
            messages = self.get_many_nowait(limit)
            if messages:
                return messages
            if self._closed:
                raise Closed("the router is closed")
            self._core.waiting = 1
            await self._getters.wait(self.__len__, first=waited)
            waited = True

    def _full(self, lane: int) -> bool:
        return not self._closed and self._core.depths()[lane] >= self._capacity

    async def _wait_for_room(self, lane: int) -> None:
        """Wait for room in a lane, behind those who wait already."""
        self._core.chores += 1
        try:
            await self._putters[lane].wait(lambda: not self._full(lane))
            while self._full(lane):  # somebody was faster
                await self._putters[lane].wait(lambda: not self._full(lane), first=True)
        finally:
            self._core.chores -= 1

    def _offer_room(self, lane: int) -> None:
        """Who came while others were woken waits behind them, even if there is room for all."""
        if self._putters[lane].futures and not self._full(lane):
            self._putters[lane].wake()

    def _refused(self, message: Message) -> NoReturn:
        if self._closed:
            raise Closed("the router is closed")
        if not 0 <= message.lane < 2 * LANES:
            raise InvalidInput(f"there is no lane {message.lane}: a message is not to be changed once it is made")
        raise Full(
            f"{self._capacity} messages of the {message.tract.name.lower()} tract and priority {message.priority} wait",
            hint="send it a little later",
        )

    def _nothing(self) -> NoReturn:
        if self._closed:
            raise Closed("the router is closed")
        raise Empty

    def _arrived(self) -> None:
        self._getters.wake()
        if self._getters.futures:
            self._core.waiting = 1

    def _given(self, message: Message) -> Message:
        """The message, or the next one that has not expired."""
        taken = [message]
        while not self._kept(taken[0]):
            taken = self._core.take_many(1)
            if not taken:
                self._nothing()
        return taken[0]

    def _kept(self, message: Message) -> bool:
        """See to what comes with having taken a message. False when it has expired."""
        self._putters[message.lane % LANES].wake()
        if message.deadline is None:
            return True
        self._core.chores -= 1
        if message.expired(self._clock()):
            self._on_expired(message)
            return False
        return True
