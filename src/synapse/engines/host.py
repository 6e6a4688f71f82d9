"""Engines by the name of their base model: opened on first use, one for each model file, closed together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from synapse.callosum.publish.publishing import publish
from synapse.commands import Context
from synapse.commands.openings import Openings
from synapse.config import Settings, load_settings
from synapse.engines.client import EngineClient
from synapse.engines.engine import Engine
from synapse.engines.events import EngineOpened
from synapse.engines.front_end import front_end_of
from synapse.engines.limits import Backend, Limits, limits_from
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.opening import open_engine_file
from synapse.engines.runner import EngineRunner
from synapse.models.adapters.files import LAYERS_FOLDER
from synapse.models.library import ModelLibrary, open_library


def open_engine(model: str, backend: Backend = "auto", *, limits: Limits | None = None) -> Engine:
    """Open an engine for a model that is pulled, or for a GGUF file.

    Args:
        model: a name of `synapse model list`, or a path.
        backend: `reference`, `native` or `auto`; see `open_engine_file`.
        limits: the settings' limits when left out.

    Raises:
        NotFound: there is no such model here; the hint says how to pull it.
        ModelFileCorrupt, UnsupportedModel: its file cannot be used.
    """
    settings = load_settings()
    path = ModelLibrary(settings.folder("models")).resolve(model)
    return open_engine_file(path, backend, limits or limits_from(settings), path.parent.name)


class EngineHost:
    """The engines of this process, by the content of their model files: one file under two names is one engine."""

    def __init__(self, library: ModelLibrary, settings: Settings) -> None:
        self._library = library
        self._settings = settings
        self._openings: Openings[str, _Opened] = Openings()

    async def get(self, model: str) -> EngineClient:
        """A client of a model's engine, which is opened if it is not yet: that takes seconds, and holds up nobody else.

        Raises:
            as `open_engine`.
        """
        path = self._library.resolve(model)
        sha256 = await asyncio.to_thread(source_sha256, path, self._settings.folder("packed"))
        return (await self._openings.get(sha256, lambda: self._open(path))).client

    async def _open(self, path: Path) -> _Opened:
        backend = cast(Backend, self._settings.backend)
        name = path.parent.name
        started = time.perf_counter()
        opening = asyncio.create_task(
            asyncio.to_thread(open_engine_file, path, backend, limits_from(self._settings), name)
        )
        try:
            engine = await asyncio.shield(opening)
        except asyncio.CancelledError:  # nothing stops the thread: what it opens is closed
            (await opening).close()
            raise
        runner = EngineRunner(engine, max_active=self._settings.max_concurrent_requests)
        publish("engine.opened", EngineOpened(model=name, seconds=time.perf_counter() - started))
        return _Opened(
            EngineClient(front_end_of(engine, path, name), runner, self._settings.home / LAYERS_FOLDER), runner
        )

    @property
    def loaded(self) -> dict[str, EngineRunner]:
        """The engines that are open, by the sha256 of their model files."""
        return {sha256: opened.runner for sha256, opened in self._openings.values().items()}

    def clients(self) -> list[EngineClient]:
        """Clients of the engines that are open."""
        return [opened.client for opened in self._openings.values().values()]

    async def close(self) -> None:
        """Stop all engines."""
        for opened in (await self._openings.close()).values():
            await opened.runner.close()


@dataclass(frozen=True, slots=True)
class _Opened:
    client: EngineClient
    runner: EngineRunner


@asynccontextmanager
async def open_engines(context: Context) -> AsyncIterator[EngineHost]:
    """Opener of the process' engines, for `Context.get`."""
    host = EngineHost(await context.get(open_library), context.settings)
    try:
        yield host
    finally:
        await host.close()
