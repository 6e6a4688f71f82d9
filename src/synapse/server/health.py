"""`/health`: the process answers. `/ready`: it can do its work, or says why it cannot."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from synapse.daemon.host import open_models
from synapse.errors import SynapseError
from synapse.server.http.routing import ServerState
from synapse.server.keys import any_key_exists
from synapse.store import open_store

STORE_TIMEOUT = 2.0


class Health(BaseModel):
    """The process is up."""

    status: str = "ok"


class AnsweringEngine(BaseModel):
    """Which engine answers for a model."""

    model: str
    backend: str = Field(description="native or reference")
    reason: str = Field(description="why it is not the native one; empty when it is")
    hint: str = Field(description="what to do about that")


class Readiness(BaseModel):
    """Whether requests would be answered now."""

    ready: bool
    reasons: list[str] = Field(description="what stands in the way; empty when ready")
    engines: list[AnsweringEngine] = Field(description="the engines that are open, and which of them is native")


router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Health:
    """Say that the process is up."""
    return Health()


@router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness, "description": "not ready"}})
async def ready(request: Request) -> JSONResponse:
    """Say whether the model is loaded, the store answers and the server is not stopping."""
    state: ServerState = request.app.state.server
    reasons = [reason for reason in (state.loading, await _store_trouble(state)) if reason]
    if state.stop.is_set():
        reasons.append("the server is stopping")
    readiness = Readiness(ready=not reasons, reasons=reasons, engines=await _engines(state))
    return JSONResponse(readiness.model_dump(), 503 if reasons else 200)


async def _engines(state: ServerState) -> list[AnsweringEngine]:
    host = await state.context.get(open_models)
    found = []
    for client in host.clients():
        who = (await client.stats()).answering
        found.append(AnsweringEngine(model=client.front.name, backend=who.backend, reason=who.reason, hint=who.hint))
    return found


async def _store_trouble(state: ServerState) -> str | None:
    """Why the store does not answer, without its URL, which can hold a password."""
    try:
        async with asyncio.timeout(STORE_TIMEOUT):
            await any_key_exists(await state.context.get(open_store))
    except (SynapseError, TimeoutError, OSError):
        return "the store does not answer"
    return None
