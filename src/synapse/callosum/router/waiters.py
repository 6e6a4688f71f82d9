"""Tasks that wait their turn for something, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Waiters:
    """Tasks of one event loop that wait until `wake` is called for them.

    Being woken is a hint to look again, not a promise: somebody else may have been faster. A task that is cancelled
    after it was woken wakes the next one in its place.

    Attributes:
        futures: one for each task that waits to be woken, in order.
        tasks: how many wait, or were woken and have not run yet.
    """

    __slots__ = ("futures", "tasks")

    def __init__(self) -> None:
        self.futures: deque[asyncio.Future[None]] = deque()
        self.tasks = 0

    async def wait(self, worth_waking: Callable[[], object], *, first: bool = False) -> None:
        """Wait for `wake`.

        Args:
            worth_waking: whether there is something for another waiter, asked when this one is cancelled too late.
            first: wait before all others, for a task that was woken for nothing.
        """
        future = asyncio.get_running_loop().create_future()
        if first:
            self.futures.appendleft(future)
        else:
            self.futures.append(future)
        self.tasks += 1
        try:
            await future
        except BaseException:
            if not future.done() or future.cancelled():
                self._forget(future)
            elif worth_waking():
                self.wake()
            raise
        finally:
            self.tasks -= 1

    def wake(self, count: int = 1) -> None:
        """Wake the first ones that wait."""
        while count > 0 and self.futures:
            future = self.futures.popleft()
            if not future.done():
                future.set_result(None)
                count -= 1

    def _forget(self, future: asyncio.Future[None]) -> None:
        if future in self.futures:
            self.futures.remove(future)
