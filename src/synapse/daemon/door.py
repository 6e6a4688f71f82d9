"""The socket of a running server, in its home: other processes of the same user use its models instead of their own.

It lies in a folder that only its user may enter, and whoever connects has to be that user.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from synapse import __version__
from synapse.commands import Call, Context, find_command
from synapse.config import Settings
from synapse.daemon.calls import Answerer, Caller
from synapse.engines.client import EngineClient
from synapse.engines.front_end import FrontEnd
from synapse.engines.request import Event, Request
from synapse.engines.runner import EngineStats
from synapse.errors import Conflict, NotFound, SynapseError, Unavailable
from synapse.log import Logger

FOLDER, NAME = "run", "server.sock"
CONNECT_SECONDS = 2.0
BUSY_SECONDS = 1.0
"""How long nobody is let in after a connection could not be taken."""
BACKLOG = 64
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of who connects (socket(7), SO_PEERCRED)."""

log = Logger(__name__)


class Sources(Protocol):
    """Where clients of models come from; see `synapse.daemon.host.Models`."""

    async def get(self, model: str) -> EngineClient: ...


@dataclass(frozen=True, slots=True)
class Control:
    """What can be asked of the server itself.

    Attributes:
        about: what it tells a person who starts it, once it is ready.
        stop: has it stop when the answers in progress are done.
    """

    about: Callable[[], Awaitable[str]]
    stop: Callable[[], None]


class Opened(NamedTuple):
    """A model that the server has open for whoever asked; `number` is what they call it."""

    number: int
    front: FrontEnd


class _Visit:
    """One process that is connected, and the models that are kept open for it."""

    def __init__(self, context: Context, models: Sources, control: Control) -> None:
        self._context = context
        self._models = models
        self._control = control
        self._clients: dict[int, EngineClient] = {}
        self._numbers = itertools.count(1)
        self.answerer = Answerer(
            {
                "version": self.version,
                "about": self.about,
                "stop": self.stop,
                "open": self.open,
                "close": self.close,
                "cancel": self.cancel,
                "load_layer": self.load_layer,
                "stats": self.stats,
                "command": self.command,
            },
            {"generate": self.generate},
        )

    async def version(self) -> str:
        return __version__

    async def about(self) -> str:
        return await self._control.about()

    async def stop(self) -> int:
        """Have the server stop; returns its process id."""
        self._control.stop()
        return os.getpid()

    async def open(self, model: str) -> Opened:
        client = await self._models.get(model)
        number = next(self._numbers)
        self._clients[number] = client
        return Opened(number, client.front)

    async def close(self, number: int) -> None:
        self._clients.pop(number).close()

    def generate(self, number: int, request: Request, request_id: str | None) -> AsyncGenerator[Event]:
        return self._client(number).generate(request, request_id)

    async def cancel(self, number: int, request_id: str) -> None:
        await self._client(number).cancel(request_id)

    async def load_layer(self, number: int, sha256: str) -> None:
        await self._client(number).load_layer(sha256)

    async def stats(self, number: int) -> EngineStats:
        return await self._client(number).stats()

    async def command(self, name: str, params: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command of the registry; the caller may do everything, as at a terminal of this machine."""
        command = find_command(name)
        result = await command.run(command.params.model_validate(params), self._context, Call("terminal"))
        return result.model_dump(mode="json")

    def leave(self) -> None:
        """Let everything go."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _client(self, number: int) -> EngineClient:
        if number not in self._clients:
            raise NotFound(f"no model is open under the number {number}")
        return self._clients[number]


@asynccontextmanager
async def open_door(context: Context, models: Sources, control: Control) -> AsyncIterator[None]:
    """Let other processes in, for as long as the block lasts.

    Raises:
        Conflict: another server of this home does so already.
        Unavailable: the socket cannot be made.
    """
    folder = context.settings.folder(FOLDER)
    listener = await _listen(folder)
    visits: set[asyncio.Task[None]] = set()

    async def receive(end: socket.socket) -> None:
        visit = _Visit(context, models, control)
        try:
            await visit.answerer.connect(end)
            await visit.answerer.lost
        finally:
            visit.leave()
            visit.answerer.close()

    async def accept() -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                end, _ = await loop.sock_accept(listener)
            except OSError as error:  # most often too many open files, which passes
                log.warning("a process could not be let in", reason=error.strerror)
                await asyncio.sleep(BUSY_SECONDS)
                continue
            if sys.platform == "linux" and _user_of(end) != os.getuid():
                end.close()
                continue
            end.setblocking(False)
            task = asyncio.create_task(receive(end))
            visits.add(task)
            task.add_done_callback(visits.discard)

    accepting = asyncio.create_task(accept())
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / NAME).unlink()
        for task in (accepting, *visits):
            task.cancel()
        await asyncio.gather(accepting, *visits, return_exceptions=True)
        listener.close()


async def find_server(settings: Settings) -> Caller | None:
    """A connection to the server of this home, if one runs that is of this version."""
    folder = settings.home / FOLDER
    if not (folder / NAME).exists():
        return None
    caller = Caller()
    with suppress(OSError, TimeoutError, SynapseError):
        async with asyncio.timeout(CONNECT_SECONDS):
            await caller.connect(await _connect(folder))
            if await caller.ask("version") == __version__:
                return caller
    caller.close()
    return None


async def _listen(folder: Path) -> socket.socket:
    """A listening socket in a folder. What a server that was killed has left there is taken away."""
    with suppress(OSError):
        other = await _connect(folder)
        other.close()
        raise Conflict("another server of this home runs already", hint="`synapse status` asks it how it is")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        with suppress(FileNotFoundError):
            (folder / NAME).unlink()
        with _reachable(folder) as path:
            listener.bind(path)
        (folder / NAME).chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(f"the socket {folder / NAME} cannot be made: {error.strerror}") from error
    return listener


async def _connect(folder: Path) -> socket.socket:
    """Raises OSError when nobody listens there."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.setblocking(False)
    try:
        with _reachable(folder) as path:
            await asyncio.get_running_loop().sock_connect(end, path)
    except BaseException:
        end.close()
        raise
    return end


@contextmanager
def _reachable(folder: Path) -> Iterator[str]:
    """The path of the socket, however deep the folder lies: the address of a Unix socket has 107 bytes."""
    if not Path("/proc/self/fd").is_dir():
        yield str(folder / NAME)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{NAME}"
    finally:
        os.close(descriptor)


def _user_of(end: socket.socket) -> int:
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
