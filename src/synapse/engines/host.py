"""Engines by the name of their base model: opened on first use, one for each model file, closed when not in use."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from synapse.callosum.publish.publishing import publish
from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.engines.background import Background
from synapse.engines.client import EngineClient, Runner
from synapse.engines.engine import Engine
from synapse.engines.events import EngineClosed, EngineOpened
from synapse.engines.front_end import FrontEnd, front_end_of
from synapse.engines.limits import Backend, Limits, limits_from
from synapse.engines.native.packed.file import prepare_packed
from synapse.engines.native.packed.source_hash import known_sha256, source_sha256
from synapse.engines.native.steps import Supervised, Unsupervised
from synapse.engines.opening import NativeParts, check_backend, computes_natively, engine_of, needed_bytes
from synapse.engines.residency import MakeRoom, Reason, Residency, open_residency
from synapse.engines.runner import EngineRunner
from synapse.models.adapters.files import LAYERS_FOLDER
from synapse.models.head import read_head
from synapse.models.library import ModelLibrary, open_library
from synapse.models.record import pre_tokenizer_of

SWITCH_SECONDS = 0.0005
"""How soon a thread that wants the interpreter gets it while a model is opened: a step of an engine wants it several
times, and by default each would wait for ten times as long."""


def open_engine(
    model: str, backend: Backend = "auto", *, limits: Limits | None = None, settings: Settings | None = None
) -> Engine:
    """Open an engine for a model that is pulled, or for a GGUF file. No database is opened and no process started.

    So nothing watches the kernel: a build is used that has passed its checks (see `synapse kernels build`).

    Args:
        model: a name of `synapse model list`, or a path.
        backend: `reference` is the NumPy engine in float32, `native` the kernel on packed weights; `auto` is `native`
            where that works, and the log says why where it does not.
        limits: the settings' limits when left out.
        settings: those of the environment when left out.

    Raises:
        NotFound: there is no such model here; the hint says how to pull it.
        ModelFileCorrupt, UnsupportedModel: its file cannot be used.
        Unavailable: `native` was asked for and does not work here; the message says why.
        DiskFull: there is no room for the packed weights.
    """
    check_backend(backend)
    settings = settings or load_settings()
    path = ModelLibrary(settings.folder("models")).resolve(model)
    native = NativeParts(Unsupervised(settings), settings.folder("packed"))
    return engine_of(read_head(path), backend, limits or limits_from(settings), path.parent.name, native)


@dataclass(frozen=True, slots=True)
class ModelToOpen:
    """What is known of a model that is to be opened.

    Attributes:
        sha256: of its file.
        beside_others: whether somebody uses another model meanwhile.
        make_room: to be awaited with the memory that it may take, before that is taken.
    """

    path: Path
    sha256: str
    settings: Settings
    beside_others: bool
    make_room: MakeRoom

    @property
    def name(self) -> str:
        """What the model is called here."""
        return self.path.parent.name


class OpenRunner(Runner, Protocol):
    """A runner that can be closed."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that is open, in this process or in others."""

    front: FrontEnd
    runner: OpenRunner

    async def close(self, reason: Reason) -> None:
        await self.runner.close()
        publish("engine.closed", EngineClosed(model=self.front.name, reason=reason))


class EngineHost:
    """Engines, by the content of their model files: one file under two names is one engine.

    Attributes:
        residency: opens them, and closes those that nobody uses.
    """

    def __init__(
        self,
        library: ModelLibrary,
        settings: Settings,
        residency: Residency,
        opener: Callable[[ModelToOpen], Awaitable[OpenModel]] | None = None,
    ) -> None:
        """No engine is open yet.

        Args:
            opener: opens a model; `open_here` when left out.
        """
        self._library = library
        self._settings = settings
        self._opener = opener or open_here
        self.residency = residency

    async def get(self, model: str) -> EngineClient:
        """A client of a model's engine, which is opened if it is not yet: that takes seconds, and holds up nobody else.

        The engine stays open for as long as the client is neither closed nor dropped.

        Raises:
            NoMemory: it does not fit beside the models that are in use.
            as `open_engine`.
        """
        path = self._library.resolve(model)
        sha256 = await self._sha256(path)
        content = " ".join(filter(None, (sha256, pre_tokenizer_of(path))))
        lease = await self.residency.lease(content, path.parent.name, partial(self._open, path, sha256, content))
        return EngineClient(lease.model.front, lease.model.runner, self._settings.home / LAYERS_FOLDER, lease)

    async def _sha256(self, path: Path) -> str:
        folder = self._settings.folder("packed")
        known = await asyncio.to_thread(known_sha256, path, folder)
        if known is not None:
            return known
        read = partial(source_sha256, path, folder)
        if not self.residency.others_in_use(None):
            return await asyncio.to_thread(read)
        async with Background() as background:
            return await background.run(read)

    async def _open(self, path: Path, sha256: str, content: str, make_room: MakeRoom) -> OpenModel:
        started = time.perf_counter()
        check_backend(cast(Backend, self._settings.backend))
        to_open = ModelToOpen(path, sha256, self._settings, self.residency.others_in_use(content), make_room)
        model = await self._opener(to_open)
        publish("engine.opened", EngineOpened(model=to_open.name, seconds=time.perf_counter() - started))
        return model

    @property
    def loaded(self) -> dict[str, OpenRunner]:
        """What runs the engines that are open, by what their models are of; see `models`."""
        return {content: model.runner for content, model in self.models().items()}

    def models(self) -> dict[str, OpenModel]:
        """The models that are open, by the sha256 of their files and what their records say of tokenizers."""
        found = self.residency.open_models()
        return {str(content): model for content, model in found.items() if isinstance(model, OpenModel)}

    def clients(self) -> list[EngineClient]:
        """Clients of the engines that are open, for looking at them: these keep none open."""
        layers = self._settings.home / LAYERS_FOLDER
        return [EngineClient(opened.front, opened.runner, layers) for opened in self.models().values()]


async def open_here(model: ModelToOpen) -> OpenModel:
    """Open a model in this process."""
    settings, limits, path = model.settings, limits_from(model.settings), model.path
    backend, packed, checked = cast(Backend, settings.backend), settings.folder("packed"), None
    steps = Supervised(patient=backend == "auto")
    if backend != "reference":
        steps.prepare()
    async with AsyncExitStack() as stack:
        if model.beside_others:
            stack.enter_context(_switching_soon())
            background = await stack.enter_async_context(Background())
            head = await background.run(partial(read_head, path))
        else:
            head = await asyncio.to_thread(read_head, path)
        native = await asyncio.to_thread(computes_natively, head, backend, steps)
        await model.make_room(needed_bytes(head, limits, native=native))
        if model.beside_others and native:
            checked = await background.run(partial(prepare_packed, path, model.sha256, packed, limits.quantisation))
        parts = NativeParts(steps, packed, checked)
        engine = await _finished(asyncio.to_thread(engine_of, head, backend, limits, model.name, parts))
    runner = EngineRunner(engine, max_active=settings.max_concurrent_requests)
    return OpenModel(front_end_of(engine, path, model.name), runner)


async def _finished(work: Coroutine[Any, Any, Engine]) -> Engine:
    """What comes of work in a thread, which nothing stops: an engine that nobody waits for any more is closed."""
    opening = asyncio.create_task(work)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        (await opening).close()
        raise


_opening = 0
_usual = sys.getswitchinterval()


@contextmanager
def _switching_soon() -> Iterator[None]:
    """Threads that answer get the interpreter soon, although another one reads a model file."""
    global _opening, _usual  # noqa: PLW0603 (one a process)
    if not _opening:
        _usual = sys.getswitchinterval()
        sys.setswitchinterval(min(_usual, SWITCH_SECONDS))
    _opening += 1
    try:
        yield
    finally:
        _opening -= 1
        if not _opening:
            sys.setswitchinterval(_usual)


@asynccontextmanager
async def open_engines(context: Context) -> AsyncIterator[EngineHost]:
    """Opener of the process' engines, for `Context.get`."""
    yield EngineHost(await context.get(open_library), context.settings, await context.get(open_residency))
