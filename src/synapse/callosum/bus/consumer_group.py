"""A group within one process: each message goes to one of its subscriptions."""

from __future__ import annotations

from collections import deque

from synapse.callosum.bus.subscription import Subscription
from synapse.callosum.message import Message


class ConsumerGroup:
    """Subscriptions that share what comes. Those whose breaker is closed come first, then those with less to do."""

    def __init__(self) -> None:
        self.members: deque[Subscription] = deque()

    def try_put(self, message: Message) -> bool:
        """Queue a message with one of them; whether there was room."""
        return bool(self.members) and self._best(message).try_put(message)

    def has_room(self, message: Message) -> bool:
        """Whether `try_put` would find room."""
        return self._best(message).has_room(message)

    def overflowed(self, message: Message) -> None:
        """There was no room for a message."""
        self._best(message).overflowed(message)

    async def put(self, message: Message) -> bool:
        """Queue a message for which there was no room just now, as the one it goes to has it. False where none is."""
        while self.members:
            if await self._best(message).put(message):
                return True
        return False

    def _best(self, message: Message) -> Subscription:
        self.members.rotate(-1)  # whoever is as good as another gets it in turn
        return min(self.members, key=lambda member: member.load(message.tract))
