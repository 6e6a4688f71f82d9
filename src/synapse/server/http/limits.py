"""Limits on what one client may take: bytes and seconds of a request body, and answers generated at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from synapse.errors import Overloaded, TooLarge
from synapse.server.http.errors import BadField, SlowBody, WrongMediaType


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The whole body of a request.

    The size is enforced on the bytes that arrive: a client can announce nothing.

    Raises:
        TooLarge: more than `max_bytes`.
        SlowBody: not complete after so many `seconds`.
        WrongMediaType: the body is compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongMediaType("a compressed request body was sent", hint="send the body without Content-Encoding")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as error:
        raise SlowBody(
            f"the request body was not complete after {seconds:g} seconds; {len(body)} bytes had arrived"
        ) from error
    return bytes(body)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the request body is larger than {max_bytes} bytes, which is the limit",
        hint="send less, or raise SYNAPSE_MAX_REQUEST_BYTES",
    )


def require_json(request: Request) -> None:
    """Check that a body is declared as JSON.

    A form on a web page of another site can post text or form data without asking first, but not JSON.

    Raises:
        WrongMediaType: the content type is another one, or missing.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        found = f"the content type {declared[:100]!r}" if declared else "no content type"
        raise WrongMediaType(
            f"expected a JSON body, found {found}", hint="send the header Content-Type: application/json"
        )


class Slots:
    """How many answers may be generated at once, over all requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self, answers: int) -> Iterator[None]:
        """Hold room for so many answers.

        Raises:
            BadField: the request alone asks for more than there ever is.
            Overloaded: there is not that much room now.
        """
        if answers > self.limit:
            raise BadField(
                f"{answers} answers were asked for; this server generates at most {self.limit} at once",
                hint="ask for fewer, or raise SYNAPSE_MAX_CONCURRENT_REQUESTS",
                param="n",
            )
        if self.taken + answers > self.limit:
            raise Overloaded(
                f"{self.taken} answers are being generated and the limit is {self.limit}",
                hint="try again in a moment, or raise SYNAPSE_MAX_CONCURRENT_REQUESTS",
            )
        self.taken += answers
        try:
            yield
        finally:
            self.taken -= answers


async def wait_until_gone(request: Request) -> None:
    """Return when the client has hung up. The body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
