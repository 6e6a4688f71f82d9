"""What connects a bus with its log: writing to it, and reading what others write."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from synapse.callosum.feed import Feed
from synapse.callosum.follower import Follower
from synapse.callosum.log import Log
from synapse.callosum.message import Message
from synapse.callosum.outbox import Outbox
from synapse.callosum.watcher import Watcher
from synapse.errors import Overloaded, Unavailable


class LogLink:
    """Made, used and closed in one event loop.

    Attributes:
        on_the_way: messages that were sent and are not yet written.
    """

    def __init__(
        self,
        log: Log,
        *,
        most_on_the_way: int,
        deliver: Callable[[Message], Awaitable[None]],
        feeds: Callable[[], Iterable[Feed]],
    ) -> None:
        """Begin.

        Args:
            deliver: gives the subscriptions of this process what another has written.
            feeds: those of the groups of this process, who must be known to the log before it is written to.
        """
        self.log = log
        self.watcher = Watcher(log)
        self.on_the_way = 0
        self._most, self._deliver, self._feeds = most_on_the_way, deliver, feeds
        self._follower: Follower | None = None
        self._outbox = Outbox(self._write, capacity=most_on_the_way + 1)
        self._outbox.start()

    def send(self, message: Message) -> None:
        """Have a message written soon.

        Raises:
            Overloaded: too many are on their way.
        """
        if self.on_the_way >= self._most:
            raise Overloaded(f"{self.on_the_way:,} messages are on their way to the log", hint="wait with `publish`")
        self.on_the_way += 1
        if self._follower is not None:
            self._follower.writing((message,))
        self._outbox.put(message)

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        """As `Log.append`; the groups of this process get the messages, however new they are."""
        for feed in self._feeds():
            if not feed.joined:
                await feed.join()
        follower = self._follower
        if follower is None:
            return await self.log.append(messages)
        follower.writing(messages)
        try:
            return await self.log.append(messages)
        finally:
            follower.wrote(messages)

    def follow(self) -> Follower:
        """Deliver what others write from now on, if it is not done already."""
        if self._follower is None:
            self._follower = Follower(self.log, self.watcher, self._deliver)
        return self._follower

    async def stop_reading(self) -> None:
        """Deliver nothing more."""
        if self._follower is not None:
            await self._follower.stop()
        await self.watcher.stop()

    async def close(self) -> None:
        """Write what is on its way, as far as it goes within seconds, and end."""
        await self._outbox.close()

    async def _write(self, messages: Sequence[Message]) -> None:
        """Write what was sent; what the log refuses for good comes here alone."""
        try:
            await self.append(messages)
        except Unavailable:
            raise
        except Exception:
            self.on_the_way -= len(messages) == 1
            raise
        self.on_the_way -= len(messages)
