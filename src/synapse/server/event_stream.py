"""Server-sent events as OpenAI streams them: `data: {json}` lines, `data: [DONE]` at the end.

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
from synapse.server.errors import ClientGone, openai_body
from synapse.server.generation import unless_gone

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")


class EventStream(Response):
    """A response that sends each object of a generator as one event.

    An error that comes once the stream has begun is its last event, in OpenAI's shape, and no `[DONE]` follows. When
    the client hangs up, or has not read everything after `timeout` seconds, the generator is closed at once.
    `resources` are closed when the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self, objects: AsyncGenerator[dict[str, Any], None], *, resources: AsyncExitStack, timeout: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._objects = objects
        self._resources = resources
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            try:
                async with asyncio.timeout(self._timeout):
                    await unless_gone(Request(scope, receive), self._send_all(send))
            except ClientGone:
                pass  # an everyday event; the request's log line is all there is to say
            except TimeoutError:
                log.warning("the client did not read its stream in time", path=scope["path"])

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for found in self._objects:
                await _send_part(send, _event(found))
        except SynapseError as error:
            await _send_part(send, _event(openai_body(error)), last=True)
        except Exception:
            log.exception("a stream failed")
            failure = InternalError("the server failed while it generated this answer")
            await _send_part(send, _event(openai_body(failure)), last=True)
        else:
            await _send_part(send, b"data: [DONE]\n\n", last=True)
        finally:
            await self._objects.aclose()


def _event(found: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(found, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _send_part(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})
