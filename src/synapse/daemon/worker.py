"""The process of one worker: an engine, asked over a socket by the process that started it.

It ends when that process does: its end of the socket closes, and the kernel of the system sends it SIGKILL besides,
which reaches also a process that is stopped.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from synapse.callosum.message import Message
from synapse.callosum.publish.hotpath_news import follow_news
from synapse.callosum.publish.publishing import connect as connect_outlet
from synapse.commands import Context
from synapse.config import Settings
from synapse.daemon.calls import Answerer
from synapse.engines.limits import Backend, limits_from
from synapse.engines.opening import open_engine_file
from synapse.engines.request import Event, Request
from synapse.engines.runner import EngineRunner, EngineStats
from synapse.errors import SynapseError, Unavailable
from synapse.hotpath.rollout.watch import open_hotpaths
from synapse.log import Logger

BEAT_SECONDS = 1.0
"""How often a worker says that it lives."""
CLOSING_SECONDS = 5.0
"""How long a worker whose parent is gone may take to leave: a step that hangs does not keep the process."""
_PR_SET_PDEATHSIG = 1

log = Logger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker opens.

    Attributes:
        path: the model's GGUF file.
        name: what the model is called here.
    """

    path: Path
    name: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker lives.

    Attributes:
        steps: how many its engine has computed.
        busy: whether there is any more to compute.
    """

    steps: int
    busy: bool


class Worker:
    """What the parent may ask for."""

    def __init__(self, resources: AsyncExitStack) -> None:
        self.answerer = Answerer(
            {
                "start": self.start,
                "cancel": self.cancel,
                "load_layer": self.load_layer,
                "stats": self.stats,
            },
            {"generate": self.generate},
        )
        self._resources = resources
        self._opened: EngineRunner | None = None

    @property
    def _runner(self) -> EngineRunner:
        if self._opened is None:
            raise Unavailable("the worker has not opened its model yet")
        return self._opened

    async def start(self, what: Start) -> EngineStats:
        """Open the engine."""
        context = await self._resources.enter_async_context(Context(what.settings))
        with suppress(SynapseError):  # without a store, a hot path goes by the settings alone
            await context.get(open_hotpaths)
        settings = what.settings
        limits, backend = limits_from(settings), cast(Backend, settings.backend)
        engine = await asyncio.to_thread(open_engine_file, what.path, backend, limits, what.name, settings=settings)
        self._opened = EngineRunner(engine, max_active=what.settings.max_concurrent_requests)
        self._resources.push_async_callback(self._opened.close)
        return await self._opened.stats()

    def generate(self, request: Request, request_id: str | None) -> AsyncGenerator[Event]:
        return self._runner.generate(request, request_id)

    async def cancel(self, request_id: str) -> None:
        await self._runner.cancel(request_id)

    async def load_layer(self, path: Path) -> str:
        return await self._runner.load_layer(path)

    async def stats(self) -> EngineStats:
        return await self._runner.stats()

    def beat(self) -> Beat:
        if self._opened is None:
            return Beat(0, busy=False)
        engine = self._opened.engine
        return Beat(engine.counters.steps, engine.running > 0)


async def work(end: socket.socket) -> None:
    """Serve the parent at the other end of a socket until it hangs up."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as resources:
        worker = Worker(resources)
        await worker.answerer.connect(end)

        def tell(message: Message) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(worker.answerer.note, message)

        resources.callback(connect_outlet(tell))
        resources.callback(follow_news())
        loop.add_signal_handler(signal.SIGTERM, worker.answerer.close)
        while not worker.answerer.lost.done():
            worker.answerer.note(worker.beat())
            await asyncio.wait({worker.answerer.lost}, timeout=BEAT_SECONDS)
        threading.Timer(CLOSING_SECONDS, os._exit, (1,)).start()
    os._exit(0)  # no thread of a library keeps a process that nobody speaks to


def main(descriptor: int) -> None:
    """The program of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(0)
    asyncio.run(work(socket.socket(fileno=descriptor)))
