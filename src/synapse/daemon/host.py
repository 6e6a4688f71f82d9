"""Models for whoever asks: in workers, in this process, or in a server of the same home that runs already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from synapse.commands import Context
from synapse.config import Settings
from synapse.daemon.calls import Caller
from synapse.daemon.door import find_server
from synapse.daemon.protocol import Disconnected
from synapse.daemon.supervisor import Supervisor
from synapse.daemon.worker import Start
from synapse.engines.background import Background
from synapse.engines.client import EngineClient
from synapse.engines.front_end import front_end_from
from synapse.engines.host import EngineHost, ModelToOpen, OpenModel, open_engines
from synapse.engines.limits import limits_from
from synapse.engines.native.packed.file import prepare_packed
from synapse.engines.opening import needed_bytes
from synapse.engines.request import Event, Request
from synapse.engines.residency import Lease, open_residency
from synapse.engines.runner import EngineStats
from synapse.models.adapters.files import LAYERS_FOLDER
from synapse.models.head import read_head
from synapse.models.library import open_library

SLACK_BYTES = 2**30
"""What the process of a worker may take beside its model, caches and layers: interpreter, tokenizer, grammars."""


async def open_in_workers(model: ModelToOpen) -> OpenModel:
    """Open a model in processes of its own, which map the same weights."""
    settings, limits = model.settings, limits_from(model.settings)
    native = settings.backend != "reference"
    async with AsyncExitStack() as stack:
        if model.beside_others:  # somebody may be answering meanwhile
            background = await stack.enter_async_context(Background())
            head = await background.run(partial(read_head, model.path))
        else:
            head = await asyncio.to_thread(read_head, model.path)
        needed = needed_bytes(head, limits, native=native)
        await model.make_room(needed)
        if model.beside_others and native:
            packed = settings.folder("packed")
            await background.run(partial(prepare_packed, model.path, model.sha256, packed, limits.quantisation))
    supervisor = Supervisor(
        Start(model.path, model.name, settings),
        workers=settings.daemon.workers,
        max_active=settings.max_concurrent_requests,
        memory_bytes=settings.daemon.worker_bytes or needed + SLACK_BYTES,
    )
    opening = asyncio.to_thread(front_end_from, head, limits, model.name)
    try:
        front, _ = await asyncio.gather(opening, supervisor.start())
    except BaseException:
        await supervisor.close()
        raise
    return OpenModel(front, supervisor)


class Models(Protocol):
    """Models, wherever they run."""

    async def get(self, model: str) -> EngineClient:
        """A client of a model's engine; see `EngineHost.get`."""
        ...

    def clients(self) -> list[EngineClient]:
        """Clients of the engines that this process has open; see `EngineHost.clients`."""
        ...

    def models(self) -> dict[str, OpenModel]:
        """The models that this process has open; see `EngineHost.models`."""
        ...


class SharedHost:
    """The models of the server of this home while one runs; otherwise, and from then on, those of this process."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._server: Caller | None = None
        self._here: EngineHost | None = None

    async def get(self, model: str) -> EngineClient:
        """As `EngineHost.get`."""
        server = await self._running()
        if server is not None:
            with suppress(Disconnected):  # it has just been stopped
                opened = await server.ask("open", model)
                runner = _RemoteRunner(server, opened.number)
                layers = self._context.settings.home / LAYERS_FOLDER
                return EngineClient(opened.front, runner, layers, Lease(runner, runner.release))
        self._here = await self._context.get(open_engines)
        return await self._here.get(model)

    def clients(self) -> list[EngineClient]:
        """As `Models.clients`."""
        return self._here.clients() if self._here is not None else []

    def models(self) -> dict[str, OpenModel]:
        """As `Models.models`."""
        return self._here.models() if self._here is not None else {}

    async def _running(self) -> Caller | None:
        if self._server is None or self._server.lost.done():
            self._server = await find_server(self._context.settings)
        return self._server


class _RemoteRunner:
    """A model that another process has open."""

    def __init__(self, server: Caller, number: int) -> None:
        self._server = server
        self._number = number

    def generate(self, request: Request, request_id: str | None = None) -> AsyncGenerator[Event]:
        return self._server.stream("generate", self._number, request, request_id)

    async def cancel(self, request_id: str) -> None:
        await self._server.ask("cancel", self._number, request_id)

    async def load_layer(self, path: Path) -> str:
        await self._server.ask("load_layer", self._number, path.name)
        return path.name

    async def stats(self) -> EngineStats:
        stats: EngineStats = await self._server.ask("stats", self._number)
        return stats

    def release(self) -> None:
        """Let the model go."""
        with suppress(RuntimeError, Disconnected):
            self._server.tell("close", self._number)


def for_a_server(settings: Settings) -> Settings:
    """The settings as a process wants them that serves others: models run in workers unless something else is said."""
    if settings.daemon.pool != "auto":
        return settings
    return settings.model_copy(update={"daemon": settings.daemon.model_copy(update={"pool": "process"})})


@asynccontextmanager
async def open_models(context: Context) -> AsyncIterator[Models]:
    """Opener of the models that this process uses, for `Context.get`."""
    pool = context.settings.daemon.pool
    if pool == "here":
        yield await context.get(open_engines)
    elif pool == "auto":
        yield SharedHost(context)
    else:
        library, residency = await context.get(open_library), await context.get(open_residency)
        yield EngineHost(library, context.settings, residency, open_in_workers)
