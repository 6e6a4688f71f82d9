"""Frames between two processes of Synapse on one machine, over a Unix socket.

A frame is a header and a body. The header is ``<4sHHI``: the magic ``SYND``, the version of the protocol, zero, and the
length of the body in bytes. The body is a pickled list of messages: those of one turn of the event loop travel
together, so that the tokens of a whole step cost one write. Both ends are processes of the same user and installation,
started by one another: a socket to which others could connect must not be given to this.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

from synapse.errors import Corrupt, Unavailable
from synapse.log import Logger

log = Logger(__name__)

MAGIC = b"SYND"
VERSION = 1
HEADER = struct.Struct("<4sHHI")
MOST_BYTES = 2**26
"""The longest body. A request with its prompt takes some thousands of bytes."""


class Disconnected(Unavailable):
    """The process at the other end has gone, or the connection to it was cut."""

    code = "disconnected"


class Connection(asyncio.Protocol):
    """Messages to and from another process. All calls are for the event loop it was opened in.

    Attributes:
        on_message: called with each message that arrives.
        on_lost: called once, when nothing can come any more; with what was wrong, or None when the other end closed.
    """

    def __init__(self, on_message: Callable[[Any], None], on_lost: Callable[[Exception | None], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._leaving: list[Any] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = False

    def send(self, message: object) -> None:
        """Have a message sent with the others of this turn of the loop.

        Raises:
            Disconnected: the other end is gone.
        """
        if self._lost or self._transport is None:
            raise Disconnected("the connection to the other process is closed")
        if not self._leaving:
            self._loop.call_soon(self._flush)
        self._leaving.append(message)

    async def writable(self) -> None:
        """Wait while the other end reads more slowly than this one sends."""
        await self._writable.wait()

    def close(self) -> None:
        """Send what is to be sent, and hang up."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Hang up at once: the other end may never read again."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        leaving, self._leaving = self._leaving, []
        if leaving and self._transport is not None and not self._transport.is_closing():
            try:
                body = pickle.dumps(leaving, pickle.HIGHEST_PROTOCOL)
            except Exception:  # a defect: the other end would wait for ever for what cannot be sent
                log.exception("a message cannot be sent to another process")
                self.abort()
                return
            self._transport.write(HEADER.pack(MAGIC, VERSION, 0, len(body)) + body)

    # What follows is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while (messages := self._next_frame()) is not None:
                for message in messages:
                    self._on_message(message)
        except Corrupt as error:
            self.abort()
            self._lose(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(exc)

    def _next_frame(self) -> list[Any] | None:
        if len(self._received) < HEADER.size:
            return None
        magic, version, _, length = HEADER.unpack_from(self._received)
        if magic != MAGIC or version != VERSION or length > MOST_BYTES:
            raise Corrupt(
                f"the other process does not speak version {VERSION} of the protocol of workers",
                hint="stop all processes of Synapse and start them again, if it was just upgraded",
            )
        end = HEADER.size + length
        if len(self._received) < end:
            return None
        with memoryview(self._received) as view:
            messages: list[Any] = pickle.loads(view[HEADER.size : end])  # noqa: S301 - see the top of this file
        del self._received[:end]
        return messages

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._writable.set()
            self._on_lost(error)


async def connect(
    end: socket.socket, on_message: Callable[[Any], None], on_lost: Callable[[Exception | None], None]
) -> Connection:
    """A connection over a connected Unix socket, which it owns from now on."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_unix_connection(lambda: Connection(on_message, on_lost), sock=end)
    return connection
