"""A router whose tracts can be held: what is held is not given, and keeps its order and its bounds."""

from __future__ import annotations

from collections.abc import Callable

from synapse.callosum.message import Message, Tract
from synapse.callosum.router.router import Empty, Router


class HoldingQueue:
    """A router, and beside it one for each tract that is held.

    Attributes:
        put_nowait: as `Router.put_nowait`.
        get_nowait: as `Router.get_nowait`; gives nothing of a tract that is held.
    """

    def __init__(self, capacity: int, on_expired: Callable[[Message], object]) -> None:
        self._capacity, self._on_expired = capacity, on_expired
        self._router = self._made()
        self._aside: dict[Tract, Router] = {}
        self.put_nowait: Callable[[Message], None] = self._router.put_nowait
        self.get_nowait: Callable[[], Message] = self._router.get_nowait

    def __len__(self) -> int:
        return sum(len(router) for router in self._routers())

    def oldest(self) -> float | None:
        """As `Router.oldest`, of what is held too."""
        return min((made for router in self._routers() if (made := router.oldest()) is not None), default=None)

    def has_room(self, message: Message) -> bool:
        """Whether `put_nowait` would take a message."""
        router = self._aside.get(message.tract, self._router)
        return router.depth(message.tract, message.priority) < self._capacity

    def hold(self, tract: Tract) -> None:
        """Give nothing of a tract from now on. Takes time in proportion to what is queued."""
        aside = self._aside[tract] = self._made()
        for message in drained(self._router):
            (aside if message.tract == tract else self._router).put_nowait(message)
        self.put_nowait = self._put

    def release(self, tract: Tract) -> None:
        """Give what was held in its turn."""
        for message in drained(self._aside.pop(tract)):
            self._router.put_nowait(message)
        if not self._aside:
            self.put_nowait = self._router.put_nowait

    def take_held(self, tract: Tract) -> Message:
        """The next message of a tract that is held. Raises `Empty`."""
        return self._aside[tract].get_nowait()

    def take_all(self) -> list[Message]:
        """Everything, held or not, in its order."""
        return [message for router in self._routers() for message in drained(router)]

    def _put(self, message: Message) -> None:
        self._aside.get(message.tract, self._router).put_nowait(message)

    def _routers(self) -> tuple[Router, ...]:
        return (self._router, *self._aside.values())

    def _made(self) -> Router:
        return Router(self._capacity, on_expired=self._on_expired)


def drained(router: Router) -> list[Message]:
    """All that a router has, in its order; that of a tract and priority is as it came."""
    found: list[Message] = []
    try:
        while True:
            found.append(router.get_nowait())
    except Empty:
        return found
