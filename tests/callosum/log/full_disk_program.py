"""A program that fills the disk below an embedded log, and then makes room: ``tmpfs`` or ``limit``, and a folder.

``tmpfs`` mounts a small disk, which the program may do in a mount namespace of its own; ``limit`` lets no file of the
process grow beyond a size.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from callosum.log.log_backends import note, open_log, said
from synapse.callosum.log.contract import Log
from synapse.callosum.message import Message, Tract
from synapse.errors import Unavailable

SMALL = 3 << 20
LARGE = 100 << 20


def batch(number: int) -> list[Message]:
    """Twenty messages of 2 kB; the same ones, by their keys, for the same number."""
    return [note(f"{number} {n} {'x' * 2000}", key=f"{number} {n}") for n in range(20)]


async def refused(log: Log, messages: list[Message]) -> bool:
    """Whether the log cannot take these messages, all of which are new to it."""
    try:
        assert all(await log.append(messages))
    except Unavailable as error:
        assert error.hint
        return True
    return False


async def read_back(log: Log) -> list[str]:
    return [text[: text.rindex(" ")] for text in said(await log.read(None, 100_000))]


def texts(batches: int) -> list[str]:
    return [f"{number} {n}" for number in range(batches) for n in range(20)]


async def fill_and_make_room(address: str, make_room: Callable[[], object]) -> None:
    log, other = await open_log(address), await open_log(address)
    await log.join("g", "**", lease_s=60)
    full = 0
    while not await refused(log, batch(full)):
        full += 1
    assert full > 10, "the first ones fit"

    for _ in range(3):
        assert await refused(log, batch(full)), "it stays full"
        assert await refused(other, batch(full)), "for everybody"
        concurrent = await asyncio.gather(*(refused(log, batch(full + n)) for n in range(10)))
        assert all(concurrent)
    for reader in (log, other):
        assert await read_back(reader) == texts(full), "what was accepted is there, and nothing of what was refused"
        assert (await reader.stats()).accepted == 20 * full

    make_room()
    for _ in range(2):
        assert not await refused(log, batch(full)), "there is room again"
        full += 1
    deliveries = []
    while found := await other.claim("g", "a", 100, Tract.INTERNAL):
        deliveries += found
        await other.acknowledge("g", found)
    assert [text[: text.rindex(" ")] for text in said(deliveries)] == texts(full)
    await log.close()
    await other.close()

    again = await open_log(address)
    assert await read_back(again) == texts(full)
    assert (await again.stats()).groups[0].handled == 20 * full
    await again.close()
    with closing(sqlite3.connect(address.removeprefix("sqlite:"))) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    print(f"full after {full - 2} batches")


async def open_without_room(folder: Path) -> None:
    """A log cannot even be read without room for its shared memory; the error says so."""
    address, filler = f"sqlite:{folder / 'first.db'}", folder / "filler"
    log = await open_log(address)
    await log.append(batch(0))
    await log.close()
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        await open_log(address)
    except Unavailable as error:
        assert "is full" in error.message
    else:
        raise AssertionError("there was room")
    filler.unlink()
    log = await open_log(address)
    assert await read_back(log) == texts(1)
    await log.close()


def main(kind: str, folder: Path) -> None:
    """Run it in a folder."""
    address = f"sqlite:{folder / 'events.db'}"
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)], check=True)
        asyncio.run(open_without_room(folder))
        larger = ["mount", "-o", f"remount,size={LARGE}", str(folder)]
        asyncio.run(fill_and_make_room(address, lambda: subprocess.run(larger, check=True)))
    else:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, most))
        asyncio.run(fill_and_make_room(address, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
