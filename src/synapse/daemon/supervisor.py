"""The workers of one model: requests go to one that is ready, and on with another when that one ends.

A draw depends on nothing but the seed and its place, so a request whose worker has ended goes on behind the tokens that
were told already, and its reader sees one answer. A request that ends its worker by itself is found: after a death that
may be the fault of what was computed, those that were being answered are tried again one at a time, with no other
beside them; whoever is alone in a worker that ends so is refused, now and for some time.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakSet

from synapse.callosum.publish.publishing import publish
from synapse.daemon.events import WorkerEnded, WorkerReady
from synapse.daemon.process import Death, WorkerProcess
from synapse.daemon.protocol import Disconnected
from synapse.daemon.turns import Turns
from synapse.daemon.worker import Start
from synapse.engines.request import Delta, Event, Request
from synapse.engines.runner import EngineStats
from synapse.engines.unread import SlowReader
from synapse.errors import InternalError, Overloaded, SynapseError, TimedOut, Unavailable
from synapse.log import Logger

LONGEST_BACKOFF = 10.0
FIRST_BACKOFF = 0.1
SETTLED_SECONDS = 30.0
"""A worker that has lived for so long starts the back-off anew."""
MOST_FAILED_STARTS = 3
"""So many starts in a row that fail, and requests are told so instead of waiting."""
MOST_DEATHS_WITHOUT_PROGRESS = 20
"""After so many ends of its workers during which a request got no token, it is given up, whatever ended them."""
POISON_SECONDS = 600.0
MOST_POISONS = 256

log = Logger(__name__)


class EndsWorkers(InternalError):
    """A request that, alone in a worker, ended it."""

    code = "request_ends_workers"


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Answer:
    """A request on its way through one or more workers."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    suspected: Death | None = None
    """A death that may be its fault; from then on it is alone."""
    deaths: int = 0
    """Ends of workers that it was in."""
    fruitless: int = 0
    """The latest of them, as long as no token came between."""

    def take(self, event: Event) -> Event:
        if isinstance(event, Delta):
            self.tokens += event.tokens
            self.fruitless = 0
        elif self.deaths:
            event = replace(event, resumed=self.deaths)
        return event


class Supervisor:
    """Workers with one model, kept alive. It is asked as an `EngineRunner` is."""

    def __init__(self, start: Start, *, workers: int, max_active: int, memory_bytes: int) -> None:
        """Nothing is started yet.

        Args:
            workers: how many there are.
            max_active: requests at once, over all of them.
            memory_bytes: see `WorkerProcess`.
        """
        self._start = start
        self._wanted = workers
        self._max_active = max_active
        self._memory_bytes = memory_bytes
        self._keepers: dict[asyncio.Task[None], None] = {}
        self._workers: list[WorkerProcess] = []
        self._turns: dict[WorkerProcess, Turns] = {}
        self._running: dict[WorkerProcess, set[_Answer]] = {}
        self._changed = asyncio.Event()
        self._failed_starts = 0
        self._failure: SynapseError | None = None
        self._active = 0
        self._paths: dict[str, Path] = {}
        self._suspects: WeakSet[_Answer] = WeakSet()
        self._poisons: OrderedDict[bytes, float] = OrderedDict()
        self._known: EngineStats | None = None
        self._closing = False
        self._slow_readers = 0
        self.resumed = 0
        """How often an answer has gone on in another worker."""

    def active(self, worker: WorkerProcess) -> int:
        """How many answers a worker is at."""
        return len(self._running.get(worker, ()))

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that are starting, ready or on their way out."""
        return list(self._workers)

    async def start(self) -> None:
        """Start the workers, and wait for the first.

        Raises:
            SynapseError: the model cannot be opened.
        """
        for _ in range(self._wanted):
            self.spawn()
        while not any(worker.state == "ready" for worker in self._workers):
            if self._failure is not None:
                failure = self._failure
                await self.close()
                raise failure
            await self._change()

    def spawn(self) -> None:
        """Have one more worker."""
        task = asyncio.create_task(self._keep())
        self._keepers[task] = None
        task.add_done_callback(lambda done: self._keepers.pop(done, None))

    async def drain(self, worker: WorkerProcess) -> None:
        """Give a worker no more requests, wait for those that it has, and end it. Another takes its place."""
        worker.state = "draining"
        self._tell_change()
        while self._running.get(worker):
            await self._change()
        await worker.close()

    async def close(self) -> None:
        """End all workers. Whoever waits for an answer gets `Unavailable`."""
        self._closing = True
        self._tell_change()
        keepers = list(self._keepers)
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    # What an `EngineRunner` offers

    async def generate(self, request: Request, request_id: str | None = None) -> AsyncGenerator[Event]:
        """As `EngineRunner.generate`.

        Raises:
            EndsWorkers: it has ended every worker that it was in.
        """
        if self._active >= self._max_active:
            raise Overloaded(
                f"{self._active} requests are being answered, which is the limit",
                hint="try again in a moment, or raise SYNAPSE_MAX_CONCURRENT_REQUESTS",
            )
        if request.sampling.seed is None and request.sampling.temperature:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        self._refuse_poison(request)
        answer = _Answer(request)
        self._active += 1
        try:
            while True:
                worker = await self._choose(request)
                turns, running = self._turns[worker], self._running[worker]
                running.add(answer)
                try:
                    async with turns.alone() if answer.suspected else turns.shared():
                        if worker.caller.lost.done():
                            continue  # it ended while this one waited for its turn
                        async with aclosing(self._ask(worker, answer, request_id)) as events:
                            async for event in events:
                                yield answer.take(event)
                        return
                except SlowReader:
                    self._slow_readers += 1
                    log.warning("engine.slow_reader", request=request_id, hint="its client reads too slowly, or hangs")
                    raise
                except Disconnected:
                    self._blame(answer, await worker.ended)
                finally:
                    running.discard(answer)
                    self._tell_change()
        finally:
            self._active -= 1

    async def cancel(self, request_id: str) -> None:
        """As `EngineRunner.cancel`."""
        for worker in self._ready():
            with suppress(Disconnected):
                await worker.caller.ask("cancel", request_id)

    async def load_layer(self, path: Path) -> str:
        """As `EngineRunner.load_layer`, in one of the workers; the others load it when they need it.

        The folder of a layer is called by its sha256 and never changes, so it is looked at once.
        """
        if self._paths.get(path.name) == path and path.is_dir():  # noqa: ASYNC240 (one look)
            return path.name
        while True:
            worker = await self._choose(None)
            try:
                sha256: str = await worker.caller.ask("load_layer", path)
            except Disconnected:
                await worker.ended
                continue
            worker.loaded.add(sha256)
            self._paths[sha256] = path
            return sha256

    async def stats(self) -> EngineStats:
        """As `EngineRunner.stats`, over all workers. While none is ready, what was last known, with nothing running."""
        found = [stats for worker in self._ready() if (stats := await worker.refresh()) is not None]
        if found:
            self._known = found[0] if len(found) == 1 else EngineStats.total(found)
            counters = replace(self._known.counters, slow_readers=self._slow_readers)
            return replace(self._known, active=self._active, counters=counters)
        if self._known is None:
            raise Unavailable("the model has not been opened yet", hint="try again in a moment")
        return replace(self._known, active=self._active, running=0, waiting=0, kv_tokens_held=0, layers={})

    # What keeps the workers

    async def _keep(self) -> None:
        """One worker after another, each started when the one before has ended."""
        backoff = FIRST_BACKOFF
        while not self._closing:
            worker = WorkerProcess(self._start, self._memory_bytes)
            self._workers.append(worker)
            self._turns[worker], self._running[worker] = Turns(), set()
            try:
                death = await self._live(worker)
            finally:
                if not worker.ended.done():
                    await worker.close()
                self._workers.remove(worker)
                del self._turns[worker], self._running[worker]
                self._tell_change()
            settled = worker.stats is not None and not death.own
            settled = settled or time.monotonic() - worker.started > SETTLED_SECONDS
            backoff = FIRST_BACKOFF if settled else backoff * 2
            await asyncio.sleep(min(backoff, LONGEST_BACKOFF))

    async def _live(self, worker: WorkerProcess) -> Death:
        """A worker from its start to its end, and how that was."""
        name = self._start.name
        try:
            await worker.start()
        except SynapseError as error:
            death = await worker.close()
            self._failed_starts += 1
            reason = death.reason if isinstance(error, Disconnected) else error.message
            log.warning("a worker did not start", model=name, worker=worker.number, reason=reason)
            if not isinstance(error, Disconnected):
                self._failure = error
            elif self._failed_starts >= MOST_FAILED_STARTS:
                self._failure = Unavailable(
                    f"the model {name} cannot be opened: {self._failed_starts} workers ended at once, the last because "
                    f"{reason}",
                    hint="the log of the server says more; it is tried again",
                )
            return death
        self._failed_starts, self._failure = 0, None
        publish("worker.ready", WorkerReady(model=name, worker=worker.number, process=worker.pid or 0))
        self._tell_change()
        await asyncio.wait({worker.caller.lost})
        answers = len(self._running[worker])
        death = await asyncio.shield(worker.ended)
        log.warning("a worker has ended", model=name, worker=worker.number, reason=death.reason, answers=answers)
        publish("worker.ended", WorkerEnded(model=name, worker=worker.number, reason=death.reason, answers=answers))
        return death

    def _ready(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.state == "ready" and not worker.caller.lost.done()]

    async def _choose(self, request: Request | None) -> WorkerProcess:
        """A worker that is ready: the one with the most of the request's layers, then the one with the least to do.

        Raises:
            Unavailable: there is none and will be none soon.
            TimedOut: the deadline of the request passed before there was one.
        """
        needed = {layer for layer, _ in request.layers} if request else set()
        deadline = request.deadline if request else None
        while True:
            if self._closing:
                raise Unavailable("the engine was stopped before the answer was finished")
            ready = self._ready()
            if ready:
                return min(ready, key=lambda worker: (len(needed - worker.loaded), len(self._running[worker])))
            if self._failure is not None:
                raise self._failure
            try:
                async with asyncio.timeout_at(deadline):
                    await self._change()
            except TimeoutError:
                raise TimedOut(
                    "the deadline passed while the request waited for a worker to start", hint="try again in a moment"
                ) from None

    async def _ask(self, worker: WorkerProcess, answer: _Answer, request_id: str | None) -> AsyncGenerator[Event]:
        """Have a worker go on with an answer."""
        for layer_id, _ in answer.request.layers:
            path = self._paths.get(layer_id)
            if path is not None and layer_id not in worker.loaded:
                worker.loaded.add(await worker.caller.ask("load_layer", path))
        request = replace(answer.request, answered=tuple(answer.tokens))
        async with aclosing(worker.caller.stream("generate", request, request_id)) as events:
            async for event in events:
                yield event

    def _blame(self, answer: _Answer, death: Death) -> None:
        """What the end of its worker says of a request.

        Raises:
            EndsWorkers: that it was the cause.
            Unavailable: that it is to be given up.
        """
        self.resumed += 1
        answer.deaths += 1
        answer.fruitless += 1
        if answer.fruitless >= MOST_DEATHS_WITHOUT_PROGRESS:
            raise Unavailable(
                f"{answer.fruitless} processes that were to compute the answer have ended, the last: {death.reason}",
                hint="the log of the server says why",
            )
        if not death.own:
            return
        if answer.suspected is None:
            answer.suspected = death
            self._suspects.add(answer)
            return
        for other in self._suspects:
            if other.suspected is answer.suspected:
                other.suspected = None  # the culprit is found
        self._poisons[_fingerprint(answer.request)] = time.monotonic()
        while len(self._poisons) > MOST_POISONS:
            self._poisons.popitem(last=False)
        log.error("a request ends workers", model=self._start.name, reason=death.reason, deaths=answer.deaths)
        raise _poison(death.reason)

    def _refuse_poison(self, request: Request) -> None:
        if self._poisons:
            found = self._poisons.get(_fingerprint(request))
            if found is not None and time.monotonic() - found < POISON_SECONDS:
                raise _poison("it has ended a worker before")

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()


def _fingerprint(request: Request) -> bytes:
    """The same for two requests that ask for the same, whatever their seeds and deadlines."""
    asked = replace(request, sampling=replace(request.sampling, seed=None), deadline=None, answered=())
    return hashlib.sha256(pickle.dumps(asked)).digest()


def _poison(reason: str) -> EndsWorkers:
    return EndsWorkers(
        f"this request ended the process that computed it: {reason}",
        hint="send it without its layers, schema or last message to find which; the log of the server says more",
    )
