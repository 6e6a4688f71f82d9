"""Server-sent events: OpenAI's (`data: {json}` lines, `data: [DONE]` at the end), and Synapse's own, which have ids.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html and OpenAI's streaming guide.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from synapse.errors import InternalError, SynapseError
from synapse.server.http.errors import ClientGone, openai_body
from synapse.server.openai.generation import unless_gone

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")

KEEP_ALIVE = b":\n\n"
"""A comment: nothing for the client, but a sign of life for what stands between."""
DONE = b"data: [DONE]\n\n"
"""The end of OpenAI's streams."""
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
STOPPING_TIME = 2.0
"""Seconds that an endless stream gets for its end once the server was told to stop."""


class EventStream(Response):
    """A response that sends the events of a generator, each as it comes.

    An error that comes once the stream has begun is its last event, in OpenAI's shape. When the client hangs up, or has
    not read everything after `timeout` seconds (None: it may take any time), or two seconds after `stop` was set, the
    generator is closed at once. `resources` are closed when the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        resources: AsyncExitStack,
        timeout: float | None,
        stop: asyncio.Event | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._resources = resources
        self._timeout = timeout
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            try:
                async with asyncio.timeout(self._timeout) as limit:
                    stopping = asyncio.create_task(_limit_when(self._stop, limit)) if self._stop is not None else None
                    try:
                        await unless_gone(Request(scope, receive), self._send_all(send))
                    finally:
                        if stopping is not None:
                            stopping.cancel()
            except ClientGone:
                pass  # an everyday event; the request's log line is all there is to say
            except TimeoutError:
                log.warning("the client did not read its stream in time", path=scope["path"])

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        try:
            async for event in self._events:
                await _send_part(send, event)
        except SynapseError as error:
            last = data_event(openai_body(error))
        except Exception:
            log.exception("a stream failed")
            last = data_event(openai_body(InternalError("the server failed while it generated this answer")))
        finally:
            await self._events.aclose()
        await _send_part(send, last, last=True)


async def _limit_when(stop: asyncio.Event, limit: asyncio.Timeout) -> None:
    await stop.wait()
    limit.reschedule(asyncio.get_running_loop().time() + STOPPING_TIME)


def data_event(found: dict[str, Any]) -> bytes:
    """An event without a name."""
    return f"data: {JSON.encode(found)}\n\n".encode()


def named_event(id_: str, name: str, body: str) -> bytes:
    """An event with an id to go on from. None of the three has a line break."""
    return f"id: {id_}\nevent: {name}\ndata: {body}\n\n".encode()


def plain_event(name: str, body: str) -> bytes:
    """An event without an id. Neither has a line break."""
    return f"event: {name}\ndata: {body}\n\n".encode()


async def _send_part(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})
