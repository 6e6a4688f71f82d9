"""The application: OpenAI's API, the commands and the health checks, over one context."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import synapse
from synapse.callosum.bus.opening import open_bus, open_observer
from synapse.callosum.kept import open_kept
from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import publish
from synapse.callosum.publish.recording import recording
from synapse.commands import Context
from synapse.daemon.host import open_models
from synapse.errors import InternalError, InvalidInput, NotFound, SynapseError
from synapse.hotpath.rollout.watch import open_hotpaths
from synapse.server import event_routes, health, metrics
from synapse.server.command_routes import command_routes
from synapse.server.events import ServerStarted, ServerStopped
from synapse.server.http.errors import WrongMethod, error_response, from_validation, too_deep
from synapse.server.http.head import HeadAsGet
from synapse.server.http.limits import Slots
from synapse.server.http.request_log import RequestLog
from synapse.server.http.routing import ServerState
from synapse.server.openai import embeddings
from synapse.server.openai import routes as openai_routes

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")


def create_app(context: Context, *, body_timeout: float = 30.0) -> FastAPI:
    """The application over a context, whose life is the caller's to manage.

    When the application starts it loads the default model in the background; `/ready` says when that is done.

    Args:
        body_timeout: seconds in which a request body must arrive.
    """
    app = FastAPI(
        title="Synapse",
        version=synapse.__version__,
        description="Many AI personas on one modest machine. The routes under /v1 are OpenAI's; personas are models.",
        docs_url=None,  # these pages load scripts from other sites
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.server = ServerState(context, Slots(context.settings.max_concurrent_requests), body_timeout)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(openai_routes.router)
    app.include_router(embeddings.router)
    app.include_router(event_routes.router)
    app.include_router(command_routes())
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestLog)
    app.exception_handler(SynapseError)(_known_error)
    app.exception_handler(RequestValidationError)(_wrong_body)
    app.exception_handler(HTTPException)(_wrong_path)
    app.exception_handler(Exception)(_defect)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    started, process = time.monotonic(), os.getpid()

    async def deliver(messages: Sequence[Message]) -> None:
        await (await state.context.get(open_bus)).publish_many(messages)

    async with recording(state.context, deliver), AsyncExitStack() as listening:
        publish("server.started", ServerStarted(version=synapse.__version__, process=process))
        tasks = [asyncio.create_task(work(state)) for work in (load_default_model, observe)]
        tasks.append(asyncio.create_task(keep(state, listening)))
        try:
            yield
        finally:
            state.stop.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            publish("server.stopped", ServerStopped(process=process, seconds=time.monotonic() - started))


async def observe(state: ServerState) -> None:
    """Count the events of this process from its start. Without a log there is nothing to count, and that is logged."""
    try:
        await state.context.get(open_observer)
    except SynapseError as error:
        log.warning("events are not observed", reason=error.message, hint=error.hint)


async def keep(state: ServerState, listening: AsyncExitStack) -> None:
    """Keep what each request reads of the store. Without a log nothing tells of changes, so nothing is kept."""
    try:
        kept = await state.context.get(open_kept)
        listening.callback(await kept.listen(state.context))
    except SynapseError as error:
        log.warning("what requests read of the store is not kept", reason=error.message, hint=error.hint)


async def load_default_model(state: ServerState) -> None:
    """Load the model that new personas use, and note in the state how that went."""
    try:
        await state.context.get(open_hotpaths)
        engines = await state.context.get(open_models)
        (await engines.get(state.context.settings.default_model)).close()
    except SynapseError as error:
        state.loading = f"the default model cannot be loaded: {error.message}"
        log.error("the default model cannot be loaded", reason=error.message, hint=error.hint)  # noqa: TRY400
    else:
        state.loading = None


async def _known_error(request: Request, error: SynapseError) -> Response:
    return error_response(error, request.url.path)


async def _wrong_body(request: Request, error: RequestValidationError) -> Response:
    return error_response(from_validation(error.errors(), error.body), request.url.path)


async def _wrong_path(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors: a path or a method that does not exist."""
    path = request.url.path
    known: SynapseError
    if error.status_code == 404:
        known = NotFound(f"there is no {request.method} {path[:200]}", hint="GET /openapi.json lists the routes")
    elif error.status_code == 405:
        known = WrongMethod(f"{path[:200]} does not take {request.method}", hint="GET /openapi.json lists the routes")
    elif isinstance(error.__cause__, RecursionError):
        known = too_deep()
    else:
        known = InvalidInput(str(error.detail))
    response = error_response(known, path)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _defect(request: Request, error: Exception) -> Response:
    """Anything else is a defect: uvicorn logs its traceback, and the client learns nothing of what is inside."""
    log.error("a request failed", method=request.method, path=request.url.path, error=type(error).__name__)
    return error_response(InternalError("the server failed", hint="the log of the server says more"), request.url.path)
