"""The core of a router in Python: it specifies what the kernel `router` does, and stands in for it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from synapse.callosum.message import LANES, PRIORITIES, Message
from synapse.callosum.router.state import Hooks


class ReferenceCore:
    """See `synapse.callosum.router.state.Core`. A queue for each lane; the one that is next is at hand."""

    __slots__ = ("_front", "_hooks", "_lane", "_lanes", "_others", "_share", "_streak", "chores", "room", "waiting")

    def __init__(self, capacity: int, share: int, hooks: Hooks) -> None:
        self.room = capacity
        self.chores = self.waiting = 0
        self._share = share
        self._hooks = hooks
        self._lanes: list[deque[Message]] = [deque() for _ in range(LANES)]
        self._lane = 0
        self._front = self._lanes[0]
        """The highest lane that has messages; empty when all are."""
        self._others: list[int] = []
        """The other lanes that have messages, ascending."""
        self._streak = 0
        """External messages given since the last internal one, while one waited."""

    def put(self, message: Message) -> None:
        """Queue a message."""
        if not self._append(message):
            self._hooks.refused(message)
        if self.waiting:
            self.waiting = 0
            self._hooks.arrived()

    def take(self) -> Message:
        """The next message."""
        if not self._front:
            self._hooks.nothing()
        message = self._next()
        return self._hooks.given(message) if self.chores else message

    def put_many(self, messages: list[Message]) -> int:
        """Queue messages up to the first that is refused."""
        for count, message in enumerate(messages):
            if not self._append(message):
                return count
        return len(messages)

    def take_many(self, limit: int) -> list[Message]:
        """The next messages."""
        messages: list[Message] = []
        while self._front and len(messages) < limit:
            messages.append(self._next())
        return messages

    def heads(self) -> list[Message]:
        """The first message of each lane that has any."""
        return [queue[0] for queue in self._lanes if queue]

    def depths(self) -> list[int]:
        """Messages in each of the 20 lanes."""
        return list(map(len, self._lanes))

    def _append(self, message: Message) -> bool:
        """Queue a message, unless there is no room or no such lane."""
        lane = message.lane
        if not 0 <= lane < 2 * LANES:
            return False
        queue = self._lanes[lane % LANES]
        if len(queue) >= self.room:
            return False
        queue.append(message)
        if lane >= LANES:
            self.chores += 1
        if len(queue) == 1:
            self._begin(lane % LANES)
        return True

    def _begin(self, lane: int) -> None:
        """A lane has got its first message."""
        if not self._front or lane == self._lane:
            self._lane = lane
        elif lane > self._lane:
            self._others.append(self._lane)
            self._lane = lane
        else:
            insort(self._others, lane)
        self._front = self._lanes[self._lane]

    def _next(self) -> Message:
        queue, others = self._front, self._others
        if others and others[0] < PRIORITIES <= self._lane:
            if self._streak >= self._share:
                return self._internal()
            self._streak += 1
        else:
            self._streak = 0
        message = queue.popleft()
        if others and not queue:
            self._lane = others.pop()
            self._front = self._lanes[self._lane]
        return message

    def _internal(self) -> Message:
        """The next internal message, although external ones wait."""
        self._streak = 0
        last = bisect_left(self._others, PRIORITIES) - 1
        queue = self._lanes[self._others[last]]
        message = queue.popleft()
        if not queue:
            del self._others[last]
        return message
