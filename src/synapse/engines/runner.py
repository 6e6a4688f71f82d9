"""An engine in a thread of its own, for asyncio: the event loop never waits on a step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from synapse.callosum.publish.publishing import publish
from synapse.engines.answering import Answering
from synapse.engines.counters import Counters
from synapse.engines.engine import Engine
from synapse.engines.events import EngineFailed
from synapse.engines.request import Event, Finished, Request
from synapse.engines.unread import Unread
from synapse.errors import InternalError, Overloaded, Unavailable
from synapse.log import Logger

T = TypeVar("T")

log = Logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy an engine is. Tokens are counted since it was opened, KV tokens in whole blocks.

    The KV cache has room for `kv_tokens`; sequences hold some of them, others are cached for whoever begins alike.

    Attributes:
        answering: which engine it is, and why when it is not the native one.
        max_batch: sequences that can share a step.
        weight_bytes: memory of the model's weights.
        layers: the LoRA layers in memory by sha256, and their bytes.
    """

    answering: Answering
    max_batch: int
    weight_bytes: int
    active: int
    running: int
    waiting: int
    kv_tokens: int
    kv_tokens_held: int
    kv_tokens_cached: int
    layers: dict[str, int]
    counters: Counters

    @classmethod
    def total(cls, parts: Sequence[EngineStats]) -> EngineStats:
        """Of several engines with one model, at least one; weights are mapped once for all."""
        first, layers = parts[0], {}
        for part in parts:
            layers.update(part.layers)
        counters = Counters(
            **{name: sum(getattr(part.counters, name) for part in parts) for name in Counters.__slots__}
        )
        counted = ("max_batch", "active", "running", "waiting", "kv_tokens", "kv_tokens_held", "kv_tokens_cached")
        sums = {name: sum(getattr(part, name) for part in parts) for name in counted}
        return cls(first.answering, weight_bytes=first.weight_bytes, layers=layers, counters=counters, **sums)


@dataclass(slots=True, eq=False)
class _Stream:
    """One caller of `generate`: where its events go."""

    request: Request
    wanted_id: str | None
    loop: asyncio.AbstractEventLoop
    unread: Unread = field(default_factory=Unread)
    id: str | None = None
    closed: bool = False


class EngineRunner:
    """Steps an engine for as long as there is work.

    Other threads never touch the engine: they post jobs, which run between two steps. So a new request joins, and a
    cancelled one leaves, within one step.
    """

    def __init__(self, engine: Engine, *, max_active: int = 64) -> None:
        self.engine = engine
        self._max_active = max_active
        self._active = 0
        self._streams: dict[str, _Stream] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        engine.layers.on_fetched = self._layer_is_there
        # One at a time, beside everything else that waits for a thread: schemas of strangers take seconds.
        self._compiler = ThreadPoolExecutor(4, "synapse-grammar")
        self._thread = threading.Thread(target=self._run, name="synapse-engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Stop stepping. Whoever still waits for an answer gets `Unavailable`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join)

    async def generate(self, request: Request, request_id: str | None = None) -> AsyncGenerator[Event]:
        """Queue a request and yield its events, the last of which is `Finished`.

        Closing the generator (or cancelling the task that reads it) cancels the request. `request_id` is as in
        `Engine.add`.

        Raises:
            Overloaded: as many requests as allowed are active already.
            InvalidInput: the request makes no sense (`ContextOverflow`, `BadGrammar`, … ; see `Engine.add`).
            InternalError: the engine failed; only the requests that were active are lost.
            SlowReader: too much of the answer waits to be read; the engine has given it up.
        """
        if self._active >= self._max_active:
            raise Overloaded(
                f"{self._active} requests are being answered, which is the limit",
                hint="try again in a moment, or raise SYNAPSE_MAX_CONCURRENT_REQUESTS",
            )
        self._active += 1
        stream = _Stream(request, request_id, asyncio.get_running_loop())
        try:
            if request.grammar is not None:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._compiler, self.engine.compile_grammar, request.grammar)
            if not self._post(lambda: self._start(stream)):
                raise _stopped()
            while True:
                event = await stream.unread.get()
                if isinstance(event, Finished) and event.error is not None:
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._active -= 1
            self._post(lambda: self._stop(stream))

    async def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`, between two steps; the `Finished` event goes to whoever reads the request's events."""
        await self.call(lambda: self.engine.cancel(request_id))

    async def load_layer(self, path: Path) -> str:
        """As `Engine.load_layer`, reading outside the engine's thread."""
        known = self.engine.layers.known(path)
        if known is not None:
            return known
        # Others may wait for the same folder: whoever gives up leaves the reading alone.
        loaded = await asyncio.shield(asyncio.wrap_future(self.engine.layers.load(path)))
        return await self.call(lambda: self.engine.put_layer(loaded))

    async def call(self, job: Callable[[], T]) -> T:
        """Run a function between two steps, in the engine's thread, and return (or raise) what it does."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = job()
            except Exception as error:  # handed to whoever waits for it
                failure = error
                _tell(loop, lambda: None if done.done() else done.set_exception(failure))
            else:
                _tell(loop, lambda: None if done.done() else done.set_result(result))

        if not self._post(run):
            raise _stopped()
        return await done

    async def stats(self) -> EngineStats:
        """As `snapshot`; a runner of another process has to ask for it."""
        return self.snapshot()

    def snapshot(self) -> EngineStats:
        """How busy the engine is; taken while it steps, the numbers may be one step apart."""
        engine = self.engine
        return EngineStats(
            answering=engine.answering(),
            max_batch=engine.limits.max_batch,
            weight_bytes=engine.weight_bytes,
            active=self._active,
            running=engine.running,
            waiting=engine.waiting,
            kv_tokens=engine.kv_tokens,
            kv_tokens_held=engine.kv_tokens_held,
            kv_tokens_cached=engine.kv_tokens_cached,
            layers=engine.layers.sizes(),
            counters=replace(engine.counters),
        )

    def _post(self, job: Callable[[], None]) -> bool:
        """Have the engine's thread run something between two steps; False when that thread is ending."""
        with self._wake:
            if self._closing:
                return False
            self._jobs.append(job)
            self._wake.notify()
            return True

    def _hand_over(self, found: list[tuple[_Stream, Event]]) -> None:
        """Give each reader its event, in the readers' loop."""
        for stream, event in found:
            if not stream.unread.put(event) and not stream.closed:
                self._post(partial(self._give_up, stream))

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._closing or self.engine.ready):
                    if not self._wake.wait(self._patience()):
                        break
                jobs, self._jobs = self._jobs, deque()
                closing = self._closing
            for job in jobs:
                job()
            if closing:
                break
            if self.engine.busy:
                self._step()
        self._fail_all(_stopped())
        self.engine.close()

    def _patience(self) -> float | None:
        """Seconds until somebody who waits has waited too long."""
        deadline = self.engine.next_deadline
        return None if deadline is None else max(deadline - time.monotonic(), 0.0)

    def _layer_is_there(self) -> None:
        with self._wake:
            self._wake.notify()

    def _step(self) -> None:
        try:
            events = self.engine.step(block=False)
        except Exception as error:
            log.exception("engine step failed", active=len(self._streams))
            failed = EngineFailed(error=type(error).__name__, answers=len(self._streams))
            publish("engine.failed", failed, priority=8)
            self.engine.reset()
            failure = InternalError(
                f"the engine failed: {error}", hint="the details are in the log; other requests go on"
            )
            failure.__cause__ = error
            self._fail_all(failure)
            return
        # All events of a step cross over together: each crossing wakes a loop, which then wants the interpreter lock.
        crossing: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Event]]] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                crossing.setdefault(stream.loop, []).append((stream, event))
                if isinstance(event, Finished):
                    del self._streams[event.request_id]
        for loop, found in crossing.items():
            _tell(loop, partial(self._hand_over, found))

    def _start(self, stream: _Stream) -> None:
        if stream.closed:
            return
        try:
            stream.id = self.engine.add(stream.request, stream.wanted_id)
        except Exception as error:  # the caller's to handle: an InvalidInput, most of the time
            _deliver(stream, error)
        else:
            self._streams[stream.id] = stream

    def _give_up(self, stream: _Stream) -> None:
        """Stop an answer that nobody reads; its reader is told by `Unread`, if it ever reads on."""
        if not stream.closed:
            self.engine.counters.slow_readers += 1
            log.warning("engine.slow_reader", request=stream.id, hint="its client reads too slowly, or hangs")
        self._stop(stream)

    def _stop(self, stream: _Stream) -> None:
        stream.closed = True
        if stream.id is not None and self._streams.pop(stream.id, None) is not None:
            self.engine.cancel(stream.id)

    def _fail_all(self, error: Exception) -> None:
        for stream in self._streams.values():
            _deliver(stream, error)
        self._streams.clear()


def _stopped() -> Unavailable:
    return Unavailable("the engine was stopped before the answer was finished")


def _deliver(stream: _Stream, event: Event | Exception) -> None:
    _tell(stream.loop, lambda: stream.unread.put(event))


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[[], object]) -> None:
    """Run something in an event loop, from another thread; a loop that has closed has nobody left to tell."""
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(tell)
        except RuntimeError:  # closed since the line above
            log.debug("an event loop closed before its answer came")
