"""`synapse up`: the server as a process, from binding its address to the last answer before it stops."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import shlex
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from synapse.commands import Context
from synapse.config import Settings
from synapse.daemon.door import Control, open_door
from synapse.daemon.host import for_a_server, open_models
from synapse.engines import EngineClient
from synapse.errors import Conflict, Forbidden, InvalidInput, Unavailable
from synapse.log import Logger
from synapse.server.access import MAKE_A_KEY, is_loopback
from synapse.server.app import create_app
from synapse.server.catalogue import list_served
from synapse.server.http.connections import (
    BACKLOG,
    HEADER_SECONDS,
    UNREAD_SECONDS,
    guarded_protocol,
    most_connections,
)
from synapse.server.http.request_log import configure_logging
from synapse.server.keys import any_key_exists
from synapse.store import open_store

STOPPING_TIME = 30
"""Seconds that answers in progress get to finish once the server was told to stop."""
HEADER_BYTES = 32 * 1024
IDLE_CONNECTION = 15

log = Logger(__name__)


class NeedsKey(Forbidden):
    """The address can be reached from other machines, and no API key protects it."""

    code = "needs_key"


class PortInUse(Conflict):
    """Another program listens on the address already."""

    code = "port_in_use"


class Server(uvicorn.Server):
    """uvicorn, which SIGINT and SIGTERM stop without ending the process: its context is still to be closed."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        caught: list[signal.Signals] = []
        for name in (signal.SIGINT, signal.SIGTERM):
            with suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread: nothing to catch
                loop.add_signal_handler(name, self.stop, name)
                caught.append(name)
        try:
            yield
        finally:
            for name in caught:
                loop.remove_signal_handler(name)

    def stop(self, name: signal.Signals = signal.SIGTERM) -> None:
        """Stop when the answers in progress are done; a second call stops at once."""
        self._on_stop()
        self.force_exit = self.should_exit
        self.handle_exit(name, None)


def serve(settings: Settings) -> None:
    """Serve until told to stop (Ctrl-C, SIGTERM).

    Raises:
        NeedsKey: the host is not a loopback address and no API key exists.
        PortInUse: another program listens there.
        InvalidInput, Unavailable: the host cannot be bound.
        NotFound: the default model is not here.
    """
    configure_logging()
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with Context(for_a_server(settings)) as context:
        listener = await bind(context)
        server = make_server(create_app(context))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        engines = await context.get(open_models)
        loading = asyncio.create_task(engines.get(settings.default_model))

        async def about() -> str:
            await asyncio.shield(loading)
            return await greeting(context, listener)

        try:
            async with _door(context, Control(about, server.stop)):
                await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    client = await loading  # keeps it open while it is spoken of
                    print(await greeting(context, listener), flush=True)
                    client.close()
                await asyncio.wait({serving})
        except BaseException:
            server.stop()
            raise
        finally:
            await serving


@asynccontextmanager
async def _door(context: Context, control: Control) -> AsyncIterator[None]:
    """Other processes of this home use the models of this one. Where that cannot be, they open their own."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(open_door(context, await context.get(open_models), control))
        except (Conflict, Unavailable) as error:
            log.warning("other processes of this home open models of their own", reason=error.message, hint=error.hint)
        yield


def make_server(
    app: FastAPI, *, header_seconds: float = HEADER_SECONDS, unread_seconds: float = UNREAD_SECONDS
) -> Server:
    """A server for an application; `serve(sockets=[…])` runs it. Its connections are those of `connections`."""

    def stopping() -> None:
        app.state.server.stop.set()

    config = uvicorn.Config(
        app,
        http=guarded_protocol(most_connections(), header_seconds=header_seconds, unread_seconds=unread_seconds),
        backlog=BACKLOG,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=IDLE_CONNECTION,
        timeout_graceful_shutdown=STOPPING_TIME,
    )
    return Server(config, stopping)


async def bind(context: Context) -> socket.socket:
    """A listening socket on the settings' host and port.

    Raises:
        NeedsKey, PortInUse, InvalidInput, Unavailable: see `serve`.
    """
    settings = context.settings
    host, port = settings.host, settings.port
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidInput(f"the host {host!r} cannot be found: {error.strerror}", hint="set SYNAPSE_HOST") from error
    family, _, _, _, address = found[0]
    if not is_loopback(str(address[0])) and not await any_key_exists(await context.get(open_store)):
        raise NeedsKey(
            f"{host} can be reached from other machines, and there is no API key to keep strangers out",
            hint=f"{MAKE_A_KEY}; or stay on 127.0.0.1",
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        where = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"another program listens on {where} already",
                hint="stop it, or choose another port with SYNAPSE_PORT; 0 picks a free one",
            ) from error
        raise Unavailable(f"cannot listen on {where}: {error.strerror}", hint="choose another port or host") from error


def _reachable(host: str) -> str:
    """An address to ask, for one to listen on: `0.0.0.0` and `::` stand for all of this machine's, and are none."""
    if not ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        return host
    family, elsewhere = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere, 9))  # sends nothing: it only asks which of our addresses would be used
        return str(probe.getsockname()[0])
    return "::1" if ":" in host else "127.0.0.1"


async def greeting(context: Context, listener: socket.socket) -> str:
    """What a person who starts the server wants to know: where it is, who is there, how to ask."""
    served = await list_served(context)
    personas = [each.name for each in served if each.is_persona]
    host, port = listener.getsockname()[:2]
    host = _reachable(host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if await any_key_exists(await context.get(open_store)) else ""
    model = personas[0] if personas else context.settings.default_model
    who = f"personas: {', '.join(personas)}" if personas else "no personas yet: `synapse persona create NAME` makes one"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    engines = "".join([await _engine_line(client) for client in (await context.get(open_models)).clients()])
    return (
        f"Synapse answers at {url} ({who}).\n{engines}Try:\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


async def _engine_line(client: EngineClient) -> str:
    answering = (await client.stats()).answering
    hint = f" ({answering.hint})" if answering.hint else ""
    return f"{client.front.name}: {answering}{hint}\n"
