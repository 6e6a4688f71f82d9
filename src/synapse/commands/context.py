"""What a command may reach while it runs: the settings, and whatever it opens through the context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from synapse.config import Settings

T = TypeVar("T")


class Context:
    """The life of one process' resources: each is opened once, shared, and closed with the context.

    A room offers an *opener*, a function from the context to an async context manager::

        @asynccontextmanager
        async def open_store(context: Context) -> AsyncIterator[Store]: ...

        store = await context.get(open_store)

    Resources close in the reverse of the order they were opened in, so an opener may use other openers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = AsyncExitStack()
        self._opened: dict[Callable[..., Any], asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.clear()
        await self._stack.aclose()

    async def get(self, opener: Callable[[Context], AbstractAsyncContextManager[T]]) -> T:
        """The resource of this opener, opened on the first call.

        Callers that ask while it is being opened wait for that one opening. An opening that fails raises in all of
        them and is tried anew on the next call.
        """
        waiting = self._opened.get(opener)
        if waiting is not None:
            return cast(T, await asyncio.shield(waiting))
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._opened[opener] = future
        try:
            resource = await self._stack.enter_async_context(opener(self))
        except BaseException as error:
            del self._opened[opener]
            future.set_exception(error)
            future.exception()  # retrieved here, so that nobody waiting is not an "exception was never retrieved"
            raise
        future.set_result(resource)
        return resource
