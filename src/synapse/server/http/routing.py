"""Routes that let a request in: permission first, then content type, then the bytes, all before any of it is parsed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from synapse.commands import Context
from synapse.server.access import Needs, authorize
from synapse.server.http.limits import Slots, read_body, require_json
from synapse.server.keys import open_keys


@dataclass(slots=True)
class ServerState:
    """What the routes of one application share.

    Attributes:
        body_timeout: seconds in which a request body must arrive.
        loading: what keeps the default model from answering; None once it is loaded.
        stop: set when the server has been told to stop.
        listeners: streams of events that are open.
    """

    context: Context
    slots: Slots
    body_timeout: float = 30.0
    loading: str | None = "the default model is being loaded"
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0


class CheckedRequest(Request):
    """A request whose body was read within the limits. Its JSON is stricter than Python's own.

    NaN, infinities, lone surrogates and absurd nesting are refused here, because they cannot be written back as JSON.
    """

    checked_body: bytes = b""

    async def body(self) -> bytes:
        return self.checked_body

    async def json(self) -> Any:
        try:
            return from_json(self.checked_body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


def guarded(needs: Needs) -> type[APIRoute]:
    """A route class whose routes need this permission."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def checked(request: Request) -> Response:
                state: ServerState = request.app.state.server
                request.state.caller = await authorize(request, await state.context.get(open_keys), needs)
                inner = CheckedRequest(request.scope, request.receive)
                if request.method == "POST":
                    require_json(request)
                    limit = state.context.settings.max_request_bytes
                    inner.checked_body = await read_body(request, max_bytes=limit, seconds=state.body_timeout)
                return await answer(inner)

            return checked

    return GuardedRoute
