"""Calls over a connection: one end asks by name, the other answers once, or with a stream that can be stopped."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from synapse.daemon.protocol import Connection, Disconnected, connect
from synapse.engines.request import Event, Finished
from synapse.engines.unread import Unread
from synapse.errors import InternalError, SynapseError
from synapse.log import Logger

log = Logger(__name__)


class Ask(NamedTuple):
    """Please do this."""

    number: int
    method: str
    arguments: tuple[Any, ...]


class Stop(NamedTuple):
    """Nobody wants the rest of the answer to this call."""

    number: int


class Told(NamedTuple):
    """One event of a stream."""

    number: int
    event: Event


class Answer(NamedTuple):
    """The result of a call; of a stream, that it has ended."""

    number: int
    value: Any


class Failure(NamedTuple):
    """Why there is no result."""

    number: int
    error: Exception


class Note(NamedTuple):
    """Something that nobody asked for, such as a heartbeat."""

    value: Any


@dataclass(slots=True)
class _Asked:
    future: asyncio.Future[Any] | None = None
    unread: Unread | None = None

    def settle(self, value: Any) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(value)

    def fail(self, error: Exception) -> None:
        if self.unread is not None:
            self.unread.put(error)
        elif self.future is not None and not self.future.done():
            self.future.set_exception(error)


class Caller:
    """The end that asks.

    Attributes:
        lost: done when the other end is gone.
    """

    def __init__(self, on_note: Callable[[Any], None] = lambda _: None) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_note = on_note
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._connection: Connection | None = None

    async def connect(self, end: socket.socket) -> None:
        """Begin; `end` is one of a connected pair."""
        self._connection = await connect(end, self._take, self._lose)

    async def ask(self, method: str, *arguments: object) -> Any:
        """Call something at the other end.

        Raises:
            Disconnected: the other end is gone.
            Exception: what it raised there.
        """
        future = asyncio.get_running_loop().create_future()
        number = self._send(method, arguments, _Asked(future=future))
        try:
            return await future
        except asyncio.CancelledError:
            self._stop(number)
            raise
        finally:
            self._asked.pop(number, None)

    def tell(self, method: str, *arguments: object) -> None:
        """Call something at the other end, and do not wait for what comes of it.

        Raises:
            Disconnected: the other end is gone.
        """
        self._asked.pop(self._send(method, arguments, _Asked()))

    async def stream(self, method: str, *arguments: object) -> AsyncGenerator[Event]:
        """Call something that answers with events, the last of which is `Finished`. Closing this stops it there.

        Raises:
            Disconnected, Exception: as `ask`.
            SlowReader: too many of them were not read.
        """
        unread = Unread()
        number = self._send(method, arguments, _Asked(unread=unread))
        ended = False
        try:
            while not ended:
                event = await unread.get()
                ended = isinstance(event, Finished)
                yield event
        finally:
            self._asked.pop(number, None)
            if not ended:
                self._stop(number)

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.abort()

    def _send(self, method: str, arguments: tuple[object, ...], asked: _Asked) -> int:
        if self._connection is None:
            raise Disconnected("the connection to the other process is closed")
        number = next(self._numbers)
        self._connection.send(Ask(number, method, arguments))
        self._asked[number] = asked
        return number

    def _stop(self, number: int) -> None:
        if self._connection is not None and not self.lost.done():
            self._connection.send(Stop(number))

    def _take(self, message: Any) -> None:
        if isinstance(message, Note):
            self._on_note(message.value)
            return
        asked = self._asked.get(message.number)
        if asked is None:
            return  # it was given up meanwhile
        if isinstance(message, Told):
            if asked.unread is not None and not asked.unread.put(message.event):
                self._stop(message.number)
        elif isinstance(message, Failure):
            asked.fail(message.error)
        else:
            asked.settle(message.value)

    def _lose(self, error: Exception | None) -> None:
        reason = "the process at the other end has gone" if error is None else f"the connection was cut: {error}"
        for asked in list(self._asked.values()):
            asked.fail(Disconnected(reason))
        if not self.lost.done():
            self.lost.set_result(None)


Method = Callable[..., Awaitable[Any]]
StreamMethod = Callable[..., AsyncGenerator[Event]]


class Answerer:
    """The end that is asked: each call runs in a task of its own.

    Attributes:
        lost: done when the other end is gone; its calls are cancelled then.
    """

    def __init__(self, methods: Mapping[str, Method], streams: Mapping[str, StreamMethod]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._methods = methods
        self._streams = streams
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._connection: Connection | None = None

    async def connect(self, end: socket.socket) -> None:
        """Begin; `end` is one of a connected pair."""
        self._connection = await connect(end, self._take, self._lose)

    def note(self, value: object) -> None:
        """Tell the other end something that it has not asked for."""
        if self._connection is not None and not self.lost.done():
            self._connection.send(Note(value))

    def close(self) -> None:
        """Send what is to be sent, and hang up."""
        if self._connection is not None:
            self._connection.close()

    def _take(self, message: Any) -> None:
        if isinstance(message, Stop):
            task = self._tasks.get(message.number)
            if task is not None:
                task.cancel()
        elif isinstance(message, Ask) and self._connection is not None:
            task = asyncio.ensure_future(self._answer(message, self._connection))
            self._tasks[message.number] = task
            task.add_done_callback(lambda _: self._tasks.pop(message.number, None))

    async def _answer(self, ask: Ask, connection: Connection) -> None:
        try:
            if ask.method in self._streams:
                events = self._streams[ask.method](*ask.arguments)
                try:
                    async for event in events:
                        connection.send(Told(ask.number, event))
                        await connection.writable()
                finally:
                    await events.aclose()
                return
            connection.send(Answer(ask.number, await self._methods[ask.method](*ask.arguments)))
        except Disconnected:
            return
        except SynapseError as error:
            self._fail(ask, error)
        except Exception as error:  # a defect: the other process could not tell what a foreign exception is
            log.exception("a call failed", method=ask.method)
            self._fail(ask, InternalError(f"the worker failed: {error}", hint="the details are in the log"))

    def _fail(self, ask: Ask, error: Exception) -> None:
        if self._connection is not None and not self.lost.done():
            self._connection.send(Failure(ask.number, error))

    def _lose(self, _: Exception | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
