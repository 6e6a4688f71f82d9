"""OpenAI's API: `/v1/models`, `/v1/chat/completions` and `/v1/completions`. Personas are its models."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from synapse.engines import BadGrammar, ContextOverflow
from synapse.errors import TimedOut
from synapse.personas.events import TurnNews
from synapse.personas.layers import named
from synapse.server.catalogue import list_as_wire, show_as_wire
from synapse.server.http.event_stream import EventStream
from synapse.server.http.routing import ServerState, guarded
from synapse.server.openai.generation import Generation, collect, count_usage, unless_gone
from synapse.server.openai.prompts import Prepared, prepare_chat, prepare_completions
from synapse.server.openai.shapes import (
    ChatShape,
    CompletionShape,
    Frame,
    Shape,
    chat_frame,
    chunks,
    completion_frame,
    whole_answer,
)
from synapse.server.openai.wire import ChatBody, CompletionBody, GenerationBody

READING_TIME = 30.0
"""Seconds a client has, after the last token, to read what is left of its stream."""

router = APIRouter(route_class=guarded("chat"), tags=["openai"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the personas, and the base models and encoders that are pulled."""
    state: ServerState = request.app.state.server
    return {"object": "list", "data": await list_as_wire(state.context)}


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """Describe one persona, base model or encoder."""
    state: ServerState = request.app.state.server
    return await show_as_wire(state.context, model)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation as a persona; with `stream`, as server-sent events."""
    state: ServerState = request.app.state.server
    deadline = _deadline(state)
    async with AsyncExitStack() as resources:
        resources.enter_context(state.slots.take(body.choices))
        prepared = await _prepared(request, prepare_chat(state.context, body), deadline)
        resources.callback(prepared.client.close)
        shape = ChatShape(prepared.client.front.tokenizer, logprobs=body.alternatives is not None)
        frame = chat_frame(body.model)
        return await _answer(request, body, prepared, shape=shape, frame=frame, deadline=deadline, resources=resources)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Go on from one prompt or several, as they are; with `stream`, as server-sent events."""
    state: ServerState = request.app.state.server
    count = body.choices * len(body.prompts)
    deadline = _deadline(state)
    async with AsyncExitStack() as resources:
        resources.enter_context(state.slots.take(count))
        prepared = await _prepared(request, prepare_completions(state.context, body), deadline)
        resources.callback(prepared.client.close)
        shape = CompletionShape(prepared.client.front.tokenizer, logprobs=body.logprobs is not None, count=count)
        frame = completion_frame(body.model)
        return await _answer(request, body, prepared, shape=shape, frame=frame, deadline=deadline, resources=resources)


def _deadline(state: ServerState) -> float:
    """When a request that begins now must be answered, by the clock of the event loop."""
    return asyncio.get_running_loop().time() + state.context.settings.request_timeout


async def _prepared(http: Request, work: Coroutine[Any, Any, Prepared], deadline: float) -> Prepared:
    """Prepare what the engine is asked, within the request's time and for as long as its client is there.

    Raises:
        TimedOut: preparing alone took all the time.
        ClientGone: the client hung up.
    """
    try:
        async with asyncio.timeout_at(deadline):
            return await unless_gone(http, work)
    except TimeoutError as error:
        raise TimedOut(
            "the answer had not begun when the time for it was over",
            hint="its model was being loaded, or its prompt prepared: try again, or raise SYNAPSE_REQUEST_TIMEOUT",
        ) from error


async def _answer(
    http: Request,
    body: GenerationBody,
    prepared: Prepared,
    *,
    shape: Shape,
    frame: Frame,
    deadline: float,
    resources: AsyncExitStack,
) -> Response:
    """Generate and respond. A stream takes the resources over; they are closed when it ends."""
    state: ServerState = http.app.state.server
    timeout = state.context.settings.request_timeout
    left = deadline - asyncio.get_running_loop().time()
    count = len(prepared.requests)
    try:
        events = await resources.enter_async_context(
            Generation(
                prepared.client,
                prepared.requests,
                timeout=timeout,
                deadline=deadline,
                named=partial(named, state.context),
            )
        )
        if prepared.news is not None:
            resources.callback(_tell_end, prepared.news, events, count)
        if not body.stream:
            answers = await unless_gone(http, collect(events, count))
            return JSONResponse(whole_answer(frame, shape, answers, body.choices))
        await unless_gone(http, events.wait_for_first())
    except BadGrammar as error:
        error.details["param"] = "response_format"
        raise
    except ContextOverflow as error:
        if isinstance(body, CompletionBody) and error.details.get("param") == "messages":
            error.details["param"] = "prompt"
        raise
    stream = chunks(frame, shape, events, count=count, choices=body.choices, include_usage=body.include_usage)
    return EventStream(stream, resources=resources.pop_all(), timeout=left + READING_TIME)


def _tell_end(news: TurnNews, events: Generation, count: int) -> None:
    """Publish how a turn ended: its answers are complete, something failed, or the client hung up."""
    if events.failure is not None:
        news.failed(events.failure)
    elif len(events.ends) < count:
        news.cancelled()
    else:
        usage = count_usage([events.ends[index] for index in range(count)], count)
        news.finished(
            events.ends[0].reason,
            prompt_tokens=usage.prompt_tokens,
            tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
