"""Running the steps of `log.lua` on the server, and reading their answers."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from synapse.callosum.log.valkey.client import reachable
from synapse.errors import Unavailable

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

Argument = bytes | str | int


@cache
def _script() -> tuple[str, str]:
    text = files("synapse.callosum.log.valkey").joinpath("log.lua").read_text("utf-8")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Steps:
    """The script's operations on the keys with one prefix. Each of them happens as a whole or not at all."""

    def __init__(self, server: Valkey, prefix: str, timeout_s: float) -> None:
        self._server, self._prefix, self._timeout_s = server, prefix, timeout_s
        self._execute: Callable[..., Awaitable[Any]] = server.execute_command
        self.closed = False

    def check_open(self) -> None:
        """Raises Unavailable where the log has been closed."""
        if self.closed:
            raise Unavailable("the log is closed", hint="open it again")

    async def run(self, operation: str, *arguments: Argument, durable: bool = False) -> Any:
        """Run one.

        Args:
            durable: return when the server has what it wrote, and all it wrote before, on its disk.

        Raises:
            Unavailable: it may have happened or not; the log is closed, or as in `reachable`.
        """
        self.check_open()
        from valkey.exceptions import NoScriptError  # noqa: PLC0415 - optional

        text, digest = _script()
        async with reachable(self._timeout_s):
            try:
                return await self._run(digest, durable, operation, *arguments)
            except NoScriptError:
                await self._server.script_load(text)
                return await self._run(digest, durable, operation, *arguments)

    async def _run(self, digest: str, durable: bool, *arguments: Argument) -> Any:
        if not durable:
            return await self._execute("EVALSHA", digest, 1, self._prefix, *arguments)
        # On one connection: WAITAOF waits for what its own connection wrote, and so for all before that.
        async with self._server.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("EVALSHA", digest, 1, self._prefix, *arguments)
            pipeline.execute_command("WAITAOF", 1, 0, max(1, int(self._timeout_s * 500)))
            answer, on_disk = await pipeline.execute()
        if on_disk[0] < 1:
            raise Unavailable("the Valkey server has not written to its disk in time", hint="try again")
        return answer


def rows(heads: bytes, bodies: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Of each message of an answer: number, deliveries (or tract), body, and how many attempts at it have failed."""
    start = 0
    for head in heads.split(b",") if heads else ():
        number, other, length, failures = map(int, head.split())
        yield number, other, bodies[start : start + length], failures
        start += length
