"""What a command may reach while it runs: the settings, and whatever it opens through the context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from synapse.commands.openings import Openings
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
        self._openings: Openings[Callable[..., Any], Any] = Openings()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openings.close()
        await self._stack.aclose()

    async def get(self, opener: Callable[[Context], AbstractAsyncContextManager[T]]) -> T:
        """The resource of this opener, opened on the first call.

        It is opened in a task of its own, which goes on when the caller is cancelled: others may wait for it too. An
        opening that fails raises in all who wait for it and is tried anew on the next call.

        Raises:
            Unavailable: the context was closed meanwhile.
        """
        resource: T = await self._openings.get(opener, lambda: self._stack.enter_async_context(opener(self)))
        return resource
