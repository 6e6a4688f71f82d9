"""`GET /v1/events`: what happens here and in every other process of the home, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from synapse.callosum.log.contract import Log, Position
from synapse.callosum.log.opening import open_log
from synapse.callosum.log.reading import follow
from synapse.callosum.topics import matcher
from synapse.callosum.views import view_of
from synapse.errors import InvalidInput, Overloaded
from synapse.server.http.event_stream import KEEP_ALIVE, EventStream, named_event
from synapse.server.http.routing import ServerState, guarded

MOST_LISTENERS = 100
"""Streams open at once. Each reads the log by itself, at the pace of its own client."""
KEEP_ALIVE_S = 15.0

router = APIRouter(tags=["events"], route_class=guarded("read"))


@router.get("/v1/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def events(
    request: Request,
    pattern: Annotated[
        str, Query(description="topics: words joined by dots, * for any word, a last ** for the rest")
    ] = "**",
    after: Annotated[
        str | None, Query(description="the id of the last event that was read; empty for all that are kept")
    ] = None,
    last_event_id: Annotated[str | None, Header(description="as `after`, which it goes before")] = None,
) -> Response:
    """Stream events as they happen, from now on or behind one that was read before.

    Each has its place in the log as `id`, its topic as `event` and the whole message as `data`. A comment comes every
    15 seconds when there is nothing else. A client that reads slowly delays nobody but itself.
    """
    state: ServerState = request.app.state.server
    matcher(pattern)  # what is wrong with it is said before the stream begins
    log = await state.context.get(open_log)
    place = last_event_id if last_event_id is not None else after
    start: Position | None = await log.end() if place is None else place or None
    if start is not None:
        await _check_place(log, start)
    if state.listeners >= MOST_LISTENERS:
        raise Overloaded(
            f"{state.listeners} streams of events are open, which is the limit", hint="close one, or try again later"
        )
    resources = AsyncExitStack()
    state.listeners += 1
    resources.callback(_leave, state)
    return EventStream(_stream(log, start, pattern, state), resources=resources, timeout=None, stop=state.stop)


async def _check_place(log: Log, place: Position) -> None:
    try:
        await log.read(place, 1)
    except InvalidInput as error:
        raise InvalidInput(
            error.message,
            hint="it is the id of an event; a stream without one begins now, with `?after=` at the oldest kept",
        ) from error


def _leave(state: ServerState) -> None:
    state.listeners -= 1


async def _stream(log: Log, start: Position | None, pattern: str, state: ServerState) -> AsyncGenerator[bytes, None]:
    yield KEEP_ALIVE  # the client hears at once that it is listening
    async with aclosing(follow(log, start, pattern, idle_s=KEEP_ALIVE_S, until=state.stop.is_set)) as pages:
        async for page in pages:
            for entry in page:
                body = view_of(entry.message).model_dump_json(exclude_none=True)
                yield named_event(entry.position, entry.message.topic, body)
            if not page:
                yield KEEP_ALIVE
