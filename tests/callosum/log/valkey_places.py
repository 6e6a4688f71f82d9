"""Where a test keeps a log in Valkey. Its address is ``valkey:`` and a URL, and ``#`` with the prefix of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import valkey.asyncio  # noqa: F401 - so that programs that are killed need not import it again and again

from support.valkey import new_prefix, shared_server
from synapse.callosum.log.valkey.log import ValkeyLog


def valkey_address(url: str, prefix: str) -> str:
    """The address of the log with this prefix in the server."""
    return f"valkey:{url}#{prefix}"


async def open_valkey(address: str, *, keep: int, most_dead: int) -> ValkeyLog:
    """The log at an address."""
    url, _, prefix = address.removeprefix("valkey:").partition("#")
    return await ValkeyLog.connect(url, prefix=prefix, keep=keep, most_dead=most_dead)


def age_reading(place: str, group: str) -> None:
    """Make it long ago that somebody read a group."""
    prefix = place.partition("#")[2]
    with shared_server().client() as client:
        uid = client.hget(f"{prefix}groups", group)
        client.hset(f"{prefix}group:{uid.decode() if isinstance(uid, bytes) else uid}", "read", "1000")


def valkey_place(folder: Path) -> Iterator[str]:
    """An empty log in the server of this test run."""
    prefix = new_prefix()
    yield valkey_address(shared_server().url, prefix)
    with shared_server().client() as client:
        for key in client.scan_iter(f"{prefix}*", count=1000):
            client.delete(key)
