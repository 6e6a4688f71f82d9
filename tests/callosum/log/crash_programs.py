"""Programs that use a log and are killed: each writes down what it was promised and what it did.

A line of a journal is ``number accepted`` or ``number attempt``. Every life of a program has a journal of its own: the
last line of one that was killed may be torn, and does not count.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

from callosum.log.log_backends import note, open_log
from synapse.callosum.log.contract import Log
from synapse.callosum.message import Message, Tract

GROUP = "workers"
LEASE_S = 1.0
AT_ONCE = 4
MOST_PER_APPEND = 100
LINE = "{:09d} {:04d}\n"
LINE_BYTES = len(LINE.format(0, 0))


def lines(journal: Path) -> Iterator[tuple[int, int]]:
    """What a journal says, without a torn end."""
    body = journal.read_bytes() if journal.exists() else b""
    for line in body[: len(body) // LINE_BYTES * LINE_BYTES].splitlines():
        number, _, value = line.partition(b" ")
        yield int(number), int(value)


class _Journal:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, found: list[tuple[int, int]]) -> None:
        os.write(self._file, "".join(LINE.format(*one) for one in found).encode())


def message_of(number: int) -> Message:
    """The message of this number: whoever makes it again makes one with the same key."""
    return note(str(number), tract=Tract(number % 4 > 0), key=f"message {number}")


def produce(address: str, journal: Path, first: int, last: int) -> None:
    """Append the messages of these numbers, several calls at a time, and write down which were accepted."""
    asyncio.run(_produce(address, _Journal(journal), first, last))


async def _produce(address: str, journal: _Journal, first: int, last: int) -> None:
    log = await open_log(address)
    while first < last:
        step = random.randint(1, MOST_PER_APPEND)  # noqa: S311
        parts = [range(n, min(n + step, last)) for n in range(first, min(first + AT_ONCE * step, last), step)]
        accepted = await asyncio.gather(*(log.append([message_of(number) for number in part]) for part in parts))
        journal.write(
            [(n, a) for part, flags in zip(parts, accepted, strict=True) for n, a in zip(part, flags, strict=True)]
        )
        first = parts[-1].stop
    await log.close()


def consume(address: str, journal: Path) -> None:
    """Handle messages until killed: write each down, then acknowledge it."""
    asyncio.run(_consume(address, _Journal(journal)))


async def _consume(address: str, journal: _Journal) -> None:
    log = await open_log(address)
    await asyncio.gather(*(_handle(log, journal, tract) for tract in Tract))


async def _handle(log: Log, journal: _Journal, tract: Tract) -> None:
    while True:
        deliveries = await log.claim(GROUP, f"process {os.getpid()}", 200, tract)
        if not deliveries:
            await log.changed(1.0)
            continue
        if random.random() < 0.1:  # noqa: S311
            await log.retry(GROUP, deliveries.pop(), 0.01)
        journal.write([(int(one.message.payload.model_dump()["text"]), one.attempt) for one in deliveries])
        await log.acknowledge(GROUP, deliveries)
