"""What connects a bus with its log: writing to it, and reading what others write."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from synapse.callosum.bus.delivery.feed import Feed
from synapse.callosum.bus.delivery.follower import Follower
from synapse.callosum.bus.delivery.ours import Ours
from synapse.callosum.bus.delivery.watcher import Watcher
from synapse.callosum.log.contract import Log
from synapse.callosum.message import Message
from synapse.callosum.publish.outbox import Outbox, is_refusal
from synapse.errors import Overloaded


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
        self._ours = Ours()
        self._follower: Follower | None = None
        self._outbox = Outbox(self._write, capacity=most_on_the_way + 1)
        self._outbox.start()

    def send(self, message: Message) -> None:
        """Have a message written soon, which this process delivers now.

        Raises:
            Overloaded: too many are on their way.
        """
        if self.on_the_way >= self._most:
            raise Overloaded(f"{self.on_the_way:,} messages are on their way to the log", hint="wait with `publish`")
        self.on_the_way += 1
        self._ours.gave(message)
        self._outbox.put(message)

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        """As `Log.append`; the groups of this process get the messages, however new they are.

        The caller delivers what was accepted. If this raises, what was accepted all the same is delivered when it is
        read.
        """
        await self._join()
        self._ours.writing(messages)
        accepted = [False] * len(messages)
        try:
            accepted = await self.log.append(messages)
        finally:
            left = self._ours.wrote(messages, accepted)
            self.finish([partial(self._deliver, message) for message in left])
        return accepted

    def finish(self, left: Sequence[Callable[[], Awaitable[object]]]) -> None:
        """Do what is left of deliveries, for somebody who no longer can."""
        if self._follower is not None:
            self._follower.finish(left)

    def follow(self) -> Follower:
        """Deliver what others write from now on, if it is not done already."""
        if self._follower is None:
            self._ours.read = True
            self._follower = Follower(self.log, self.watcher, self._deliver, self._ours)
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
            await self._join()
            await self.log.append(messages)
        except Exception as error:
            if is_refusal(error) and len(messages) == 1:
                self._written(messages)
            raise
        self._written(messages)

    def _written(self, messages: Sequence[Message]) -> None:
        self.on_the_way -= len(messages)
        self._ours.wrote_given(messages)

    async def _join(self) -> None:
        """Make the groups of this process known to the log."""
        for feed in self._feeds():
            if not feed.joined:
                await feed.join()
