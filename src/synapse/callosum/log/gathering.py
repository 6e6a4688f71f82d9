"""Many small requests made at once, sent as one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gathering(Generic[T, R]):
    """While one request is on its way, what is asked for meanwhile is gathered into the next one.

    A request alone is sent at once. What one caller gives is never divided over two requests.
    """

    def __init__(
        self, send: Callable[[list[T]], Awaitable[Sequence[R]]], weight: Callable[[T], int], most: int
    ) -> None:
        """How they are sent.

        Args:
            send: sends some and returns one answer for each of them.
            weight: how much one counts towards `most`.
            most: how much a request has at most, unless one caller gives more than that.
        """
        self._send, self._weight, self._most = send, weight, most
        self._waiting: deque[tuple[Sequence[T], asyncio.Future[Sequence[R]]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def ask(self, parts: Sequence[T]) -> Sequence[R]:
        """One answer for each part. Raises what `send` raises."""
        future: asyncio.Future[Sequence[R]] = asyncio.get_running_loop().create_future()
        self._waiting.append((parts, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._run())
        return await future

    async def close(self) -> None:
        """Wait until nothing is on its way."""
        if self._sender is not None:
            await asyncio.wait([self._sender])

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._send_next()
        finally:
            self._sender = None

    async def _send_next(self) -> None:
        together: list[T] = []
        callers: list[tuple[int, asyncio.Future[Sequence[R]]]] = []
        room = self._most
        while self._waiting:
            parts, future = self._waiting[0]
            room -= sum(map(self._weight, parts))
            if callers and room < 0:
                break
            self._waiting.popleft()
            together += parts
            callers.append((len(parts), future))
        try:
            answers = await self._send(together)
        except Exception as error:
            for _, future in callers:
                if not future.done():
                    future.set_exception(error)
            return
        first = 0
        for count, future in callers:
            if not future.done():  # whoever asked may have been cancelled
                future.set_result(answers[first : first + count])
            first += count
