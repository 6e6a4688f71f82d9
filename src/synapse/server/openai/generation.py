"""Answers being generated for one HTTP request: several engine requests as one stream of events, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.requests import Request as HttpRequest

from synapse.engines.client import EngineClient
from synapse.engines.request import Delta, Event, Finished, Request
from synapse.errors import TimedOut, Unavailable
from synapse.server.http.errors import ClientGone
from synapse.server.http.limits import wait_until_gone

T = TypeVar("T")

EVENTS_AHEAD = 64
"""Events held for a client that reads slowly, before its answers have to wait for it."""


@dataclass(slots=True)
class Usage:
    """Token counts of a request. A prompt counts once, however many answers it gets."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_wire(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


Named = Callable[[Exception], Awaitable[Exception]]
"""An error of the engine in words that a person uses."""


class Generation:
    """The events of several requests, each with the index of its request, in the order in which they happen.

    Use it as an async context manager: leaving it cancels in the engine whatever has not finished::

        async with Generation(client, requests, timeout=60, deadline=loop.time() + 60, named=named) as events:
            async for index, event in events: ...

    What an engine raises is put into words by `named`, which knows what engines know only by number.

    One request, which is what is asked for nearly always, is read as the engine tells it, without a task between.

    Attributes:
        ends: how the requests ended whose last event was read.
        failure: what ended the reading instead, if anything did.
    """

    def __init__(
        self, client: EngineClient, requests: Sequence[Request], *, timeout: float, deadline: float, named: Named
    ) -> None:
        self._timeout = timeout
        self._named = named
        self._deadline = deadline
        self._first: tuple[int, Event] | None = None
        self._unfinished = len(requests)
        self._events = [client.generate(replace(request, deadline=deadline)) for request in requests]
        self._queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(EVENTS_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._reading: asyncio.Task[Any] | None = None
        self._late = False
        self._timer: asyncio.TimerHandle | None = None
        self.ends: dict[int, Finished] = {}
        self.failure: Exception | None = None

    async def __aenter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_at(self._deadline, self._end_in_time)
        if len(self._events) > 1:
            self._tasks = [asyncio.create_task(self._pump(i, events)) for i, events in enumerate(self._events)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for events in self._events:
            await events.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """The next event.

        Raises:
            SynapseError: what the engine raised for any of the requests.
            TimedOut: the deadline has passed.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if not self._unfinished:
            raise StopAsyncIteration
        try:
            index, event = await self._next()
            if isinstance(event, Finished):
                self._unfinished -= 1
                self.ends[index] = _complete(event)
        except Exception as error:
            self.failure = await self._named(error)
            if self.failure is not error:
                raise self.failure from error
            raise
        return index, event

    async def _next(self) -> tuple[int, Event]:
        """Wait for the next event, until the deadline. One timer for all of them: a timeout each costs more than it."""
        task = self._reading = asyncio.current_task()
        try:
            if self._late:
                raise self._too_late()
            if not self._tasks:
                return 0, await anext(self._events[0])
            index, event = await self._queue.get()
        except asyncio.CancelledError:
            if not self._late or task is None or task.uncancel() > 0:
                raise
            raise self._too_late() from None
        finally:
            self._reading = None
        if isinstance(event, Exception):
            raise event
        return index, event

    def _end_in_time(self) -> None:
        self._late = True
        if self._reading is not None:
            self._reading.cancel()

    def _too_late(self) -> TimedOut:
        return TimedOut(
            f"the answer was not complete after {self._timeout:g} seconds",
            hint="ask for fewer tokens, or raise SYNAPSE_REQUEST_TIMEOUT",
        )

    async def wait_for_first(self) -> None:
        """Wait until there is an event, so that a refusal of the engine comes before the response has begun.

        Raises:
            As `__anext__`.
        """
        self._first = await anext(self)

    async def _pump(self, index: int, events: AsyncGenerator[Event]) -> None:
        try:
            async for event in events:
                await self._queue.put((index, event))
        except Exception as error:  # raised again where the events are read
            await self._queue.put((index, error))


def _complete(event: Finished) -> Finished:
    if event.reason == "cancelled":
        raise Unavailable("the engine gave this answer up", hint="try again in a moment")
    return event


def count_usage(finished: Sequence[Finished], choices: int) -> Usage:
    """Token counts over all answers, which come `choices` for each prompt, prompt by prompt."""
    usage = Usage(completion_tokens=sum(event.completion_tokens for event in finished))
    for start in range(0, len(finished), choices):
        same_prompt = finished[start : start + choices]
        usage.prompt_tokens += same_prompt[0].prompt_tokens
        usage.cached_tokens += min(event.cached_tokens for event in same_prompt)
    return usage


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: all of its events, the last one apart."""

    deltas: tuple[Delta, ...]
    finished: Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


async def collect(events: AsyncIterator[tuple[int, Event]], count: int) -> list[Answer]:
    """Read the events of `count` requests to their ends."""
    deltas: list[list[Delta]] = [[] for _ in range(count)]
    ends: dict[int, Finished] = {}
    async for index, event in events:
        if isinstance(event, Finished):
            ends[index] = event
        else:
            deltas[index].append(event)
    return [Answer(tuple(deltas[index]), ends[index]) for index in range(count)]


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but give it up as soon as the client hangs up.

    Raises:
        ClientGone: the client hung up; the work was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_until_gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client hung up")
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
