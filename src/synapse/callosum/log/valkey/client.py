"""A connection to Valkey or Redis, and what it raises in Synapse's words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from synapse.errors import Conflict, Forbidden, InternalError, InvalidInput, Unauthorized, Unavailable

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

SCHEMES = ("valkey", "valkeys", "redis", "rediss", "unix")
_NOT_NOW = ("BUSY", "CLUSTERDOWN", "MASTERDOWN", "MISCONF", "NOREPLICAS", "TRYAGAIN", "UNBLOCKED")
"""First words of the errors of a server that cannot do it just now."""


def client(url: str, timeout_s: float) -> Valkey:
    """A client of the server; nothing is connected yet. Answers are bytes, and no command is sent twice by itself.

    Args:
        url: ``valkey://[user:password@]host[:port][/db]``, ``valkeys://`` with TLS, ``redis://``, ``rediss://``, or
            ``unix:///path/to/socket``.
        timeout_s: how long to wait for a connection; for answers, `reachable` says it.

    Raises:
        InvalidInput: not such a URL.
        Unavailable: the package `valkey` is not installed.
    """
    try:
        from valkey.asyncio import Valkey  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise Unavailable(
            "Valkey and Redis need the package valkey, which is not installed", hint="pip install 'synapse[valkey]'"
        ) from error
    try:
        # With a `socket_timeout` the client uses `asyncio.wait_for`, which can lose a cancellation before Python 3.12.
        made: Valkey = Valkey.from_url(
            url, socket_timeout=None, socket_connect_timeout=timeout_s, lib_name=None, lib_version=None
        )
        pool: Any = made.connection_pool
        place = pool.make_connection().repr_pieces()
    except (TypeError, ValueError, AttributeError) as error:
        raise _no_url() from error
    if not place[0][1]:
        raise _no_url()
    return made


def _no_url() -> InvalidInput:
    return InvalidInput(
        "the URL of the Valkey or Redis server cannot be read",
        hint=f"it is like valkey://host:6379/0; the schemes are {', '.join(SCHEMES)}",
    )


@asynccontextmanager
async def reachable(timeout_s: float) -> AsyncIterator[None]:
    """Wait for answers so long at most, and turn what the client raises into errors of Synapse.

    Raises:
        Unavailable: the server cannot be reached, does not answer in time, or cannot do it just now.
        Unauthorized: it wants another password.
        Forbidden: its user may not do this.
        Conflict: a key holds something else.
        InternalError: it does not know the command.
    """
    from valkey import exceptions as found  # noqa: PLC0415 - optional

    try:
        async with asyncio.timeout(timeout_s):
            yield
    except found.NoPermissionError as error:
        raise Forbidden(f"the user of the Valkey server may not do this: {error}", hint="see ACL SETUSER") from error
    except (found.ConnectionError, found.TimeoutError, OSError, EOFError) as error:
        if isinstance(error.__cause__ or error, found.AuthenticationError):
            raise Unauthorized(f"the Valkey server refuses the password: {error}", hint="set it in the URL") from error
        raise Unavailable(
            f"the Valkey server does not answer: {error}", hint="check its URL, and that it runs"
        ) from error
    except found.ResponseError as error:
        text = str(error)
        refused = isinstance(error, found.ReadOnlyError | found.OutOfMemoryError)
        if refused or text.partition(" ")[0] in _NOT_NOW:
            raise Unavailable(f"the Valkey server cannot do it just now: {text}", hint="try again later") from error
        if "WRONGTYPE" in text:
            raise Conflict("a key is in use for something else", hint="give the log another prefix") from error
        raise InternalError(f"the Valkey server does not understand: {text}") from error
