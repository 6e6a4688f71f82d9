"""All that the rooms above know of an engine: its front end, and the four things they can ask of it.

What goes in and comes out are plain values that pickle, errors among them, so the engine may as well be in another
process: nothing here gives away an object of the engine.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Protocol

import structlog

from synapse.engines.front_end import FrontEnd
from synapse.engines.request import Event, Request
from synapse.engines.residency import Lease
from synapse.engines.runner import EngineStats
from synapse.errors import Corrupt, InternalError, SynapseError

log = structlog.get_logger(__name__)

_numbers = itertools.count(1)


class Runner(Protocol):
    """What steps an engine, wherever that is; see `EngineRunner`."""

    def generate(self, request: Request, request_id: str | None = None) -> AsyncGenerator[Event]: ...
    async def cancel(self, request_id: str) -> None: ...
    async def load_layer(self, path: Path) -> str: ...
    async def stats(self) -> EngineStats: ...


class EngineClient:
    """One model's engine, as whoever asks it sees it.

    Attributes:
        front: makes prompts for it.
    """

    def __init__(self, front: FrontEnd, runner: Runner, layers: Path, lease: Lease[Any] | None = None) -> None:
        """A client of an engine.

        Args:
            layers: the folder in which each LoRA layer has a folder named by its sha256.
            lease: what keeps the engine open until the client is closed or dropped.
        """
        self.front = front
        self._runner = runner
        self._layers = layers
        self._lease = lease

    def close(self) -> None:
        """Let the engine go, when this client needs it no more: it is closed when nobody uses it for a while."""
        if self._lease is not None:
            self._lease.release()

    async def generate(self, request: Request, request_id: str | None = None) -> AsyncGenerator[Event]:
        """Queue a request and yield its events, the last of which is `Finished`.

        Closing the generator (or cancelling the task that reads it) cancels the request, as `cancel` does.

        Args:
            request_id: what the events and `cancel` call the request; made up when left out.

        Raises:
            Overloaded: as many requests as allowed are active already.
            InvalidInput: the request makes no sense (`ContextOverflow`, `BadGrammar`, … ; see `Engine.add`).
            LayerNotLoaded: a layer of its stack was not loaded.
            InternalError: the engine failed; only the requests that were active are lost.
        """
        events = self._runner.generate(request, request_id or new_request_id())
        try:
            async for event in events:
                yield event
        except SynapseError:
            raise
        except Exception as error:  # a defect: another process could not tell what a foreign exception is
            log.exception("a request failed", model=self.front.name)
            raise InternalError(f"the engine failed: {error}", hint="the details are in the log") from error
        finally:
            await events.aclose()

    async def cancel(self, request_id: str) -> None:
        """End a request within a step; its events end with `Finished`, for the reason `cancelled`.

        Nothing happens when it has ended already.
        """
        await self._runner.cancel(request_id)

    async def load_layer(self, sha256: str) -> None:
        """Have a LoRA layer ready, so that requests may name it by its sha256. An unchanged one is not read again.

        Raises:
            LayerRefused, LayerCorrupt: its files are not those of an adapter that fits this model.
            Corrupt: they are not those that the sha256 is of.
        """
        found = await self._runner.load_layer(self._layers / sha256)
        if found != sha256:
            raise Corrupt(
                f"the files of the layer {sha256} have the sha256 {found}", hint="remove the layer and add it again"
            )

    async def stats(self) -> EngineStats:
        """How busy the engine is, as of now."""
        return await self._runner.stats()


def new_request_id() -> str:
    """An id that no other request of this machine has."""
    return f"r{os.getpid()}-{next(_numbers)}"
