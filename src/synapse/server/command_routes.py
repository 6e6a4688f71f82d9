"""Every registered command as a route: `POST /v1/commands/{group}/{verb}`, with its own schema in `/openapi.json`."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import structlog
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from synapse.commands import GROUPS, Call, Command, Permission, Progress, all_commands, no_progress
from synapse.commands.call import new_trace
from synapse.errors import InternalError, InvalidInput, SynapseError
from synapse.server.access import Caller
from synapse.server.http.errors import problem_body
from synapse.server.http.event_stream import EventStream, plain_event
from synapse.server.http.routing import ServerState, guarded

TRACE = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""A W3C ``traceparent``."""
EVENT_STREAM = "text/event-stream"
EVENTS_KEPT = 64
"""Events that wait for a slow client. Then progress is left out, and the command waits with its next result."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="a URN that names the error")
    title: str = Field(description="its kind")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="what was expected and what was found")
    instance: str = Field(description="the path that was asked for")
    code: str = Field(description="the error's name within Synapse")
    hint: str | None = Field(None, description="what to do about it")
    details: dict[str, Any] | None = Field(None, description="facts for a program")


class CommandRow(BaseModel):
    """A command and where to post its parameters."""

    name: str
    summary: str
    permission: Permission
    path: str
    streams: bool = Field(description="whether it answers with events, each a result, rather than with one result")


class CommandList(BaseModel):
    """All commands."""

    items: list[CommandRow]


def command_routes() -> APIRouter:
    """The routes of all commands. Imports every room."""
    router = APIRouter()
    commands = all_commands()
    listing = CommandList(
        items=[
            CommandRow(name=c.name, summary=c.summary, permission=c.permission, path=path_of(c), streams=c.streams)
            for c in commands
        ]
    )

    async def list_commands() -> CommandList:
        """List the commands that the server runs."""
        return listing

    router.add_api_route(
        "/v1/commands", list_commands, methods=["GET"], tags=["commands"], route_class_override=guarded("any")
    )
    for command in commands:
        router.add_api_route(
            path_of(command),
            _endpoint(command),
            methods=["POST"],
            summary=command.summary,
            description=command.description,
            operation_id=command.name.replace("/", "_").replace("-", "_"),
            response_model=command.result,
            responses={"default": {"model": Problem, "description": "the command was refused or failed"}},
            tags=[GROUPS[command.group].summary],
            route_class_override=guarded(command.permission),
        )
    return router


def path_of(command: Command) -> str:
    """Where the command's parameters are posted."""
    return f"/v1/commands/{command.name}"


def _endpoint(command: Command) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, params: BaseModel) -> Response:
        state: ServerState = request.app.state.server
        if command.streams or EVENT_STREAM in request.headers.get("accept", ""):
            command.check(params, call_of(request))  # what is refused is refused before the stream begins
            events = _events(command, params, state, request)
            return EventStream(events, resources=AsyncExitStack(), timeout=None, stop=state.stop)
        result = await command.run(params, state.context, call_of(request))
        return Response(result.model_dump_json(by_alias=True), media_type="application/json")

    endpoint.__annotations__ = {"request": Request, "params": command.params, "return": Response}
    return endpoint


def call_of(request: Request, progress: Progress = no_progress) -> Call:
    """The call that a checked request makes. Its headers `traceparent`, `Idempotency-Key` and `X-Timeout` are heeded.

    Raises:
        InvalidInput: the timeout is no number of seconds.
    """
    caller: Caller = request.state.caller
    trace = request.headers.get("traceparent", "")
    return Call(
        "http",
        permissions=frozenset(caller.permissions),
        key=caller.key,
        trace=trace if TRACE.fullmatch(trace) else new_trace(),
        timeout=_seconds(request.headers.get("x-timeout")),
        idempotency_key=request.headers.get("idempotency-key"),
        progress=progress,
    )


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"the header X-Timeout takes a number of seconds above 0, not {text[:60]!r}")
    return seconds


class _Progress(BaseModel):
    label: str
    done: int
    total: int | None


async def _events(command: Command, params: BaseModel, state: ServerState, request: Request) -> AsyncGenerator[bytes]:
    """`progress` events, a `result` event for each result, and an `error` event if it fails after all."""
    events: asyncio.Queue[bytes | None] = asyncio.Queue(EVENTS_KEPT)
    loop = asyncio.get_running_loop()

    def put(event: bytes) -> None:
        if not events.full():
            events.put_nowait(event)

    def report(label: str, done: int, total: int | None) -> None:
        body = _Progress(label=label, done=done, total=total).model_dump_json()
        loop.call_soon_threadsafe(put, plain_event("progress", body))

    async def carry_out() -> None:
        try:
            async with aclosing(command.stream(params, state.context, call_of(request, report))) as results:
                async for result in results:
                    await events.put(plain_event("result", result.model_dump_json(by_alias=True)))
        except SynapseError as error:
            await events.put(plain_event("error", json.dumps(problem_body(error, request.url.path))))
        except Exception:
            log.exception("a command failed", command=command.name)
            failed = InternalError("the server failed", hint="the log of the server says more")
            await events.put(plain_event("error", json.dumps(problem_body(failed, request.url.path))))
        await events.put(None)

    carried = asyncio.create_task(carry_out())
    try:
        while (event := await events.get()) is not None:
            yield event
    finally:
        carried.cancel()
        await asyncio.gather(carried, return_exceptions=True)
