"""The backends of a log, as tests and the programs they start open them. What is tested with `log` holds on each."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from synapse.callosum.log.contract import MOST_DEAD, DeadLetter, Delivery, Entry, Log
from synapse.callosum.log.memory import MemoryLog
from synapse.callosum.log.sqlite.log import SqliteLog
from synapse.callosum.message import Message
from synapse.callosum.payloads import Payload, event

KEEP = 100_000


@event("test.noted")
class Noted(Payload):
    """What the messages of these tests say."""

    text: str


def note(text: str, topic: str = "test.noted", **fields: Any) -> Message:
    """A message that says `text`."""
    return Message(topic, Noted(text=text), **fields)


def said(found: Sequence[Delivery | Entry | DeadLetter]) -> list[str]:
    """What the messages of these deliveries, entries or dead letters say, also those of another topic."""
    return [str(one.message.payload.model_dump()["text"]) for one in found]


async def open_log(address: str, *, keep: int = KEEP, most_dead: int = MOST_DEAD) -> Log:
    """The log at an address: ``memory:``, ``sqlite:/path/of/file`` or ``valkey:`` with its URL and ``#prefix``."""
    kind, _, rest = address.partition(":")
    if kind == "sqlite":
        return await SqliteLog.open(Path(rest), keep=keep, most_dead=most_dead)
    if kind == "valkey":
        from callosum.log.valkey_places import open_valkey

        return await open_valkey(address, keep=keep, most_dead=most_dead)
    return MemoryLog(keep=keep, most_dead=most_dead)


def _memory(folder: Path) -> Iterator[str]:
    yield "memory:"


def _sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:{folder / 'events.db'}"


def _valkey(folder: Path) -> Iterator[str]:
    from callosum.log.valkey_places import valkey_place

    yield from valkey_place(folder)


PLACES: dict[str, Callable[[Path], Iterator[str]]] = {"memory": _memory, "sqlite": _sqlite, "valkey": _valkey}
DURABLE = ["sqlite", "valkey"]


@dataclass
class Backend:
    """An empty place of one kind, and the logs a test has opened there."""

    kind: str
    address: str
    opened: list[Log]

    async def open(self, *, keep: int = KEEP, most_dead: int = MOST_DEAD) -> Log:
        """The log of the place, once more: it is the same one, except in memory."""
        log = await open_log(self.address, keep=keep, most_dead=most_dead)
        self.opened.append(log)
        return log

    def age_reading(self, group: str) -> None:
        """Make it long ago that somebody read a group."""
        kind, _, rest = self.address.partition(":")
        if kind == "valkey":
            from callosum.log.valkey_places import age_reading

            age_reading(rest, group)
        elif kind == "sqlite":
            with closing(sqlite3.connect(rest, isolation_level=None)) as db:
                db.execute("UPDATE groups SET read_at = 1 WHERE name = ?", (group,))
        else:
            for log in self.opened:
                assert isinstance(log, MemoryLog)
                log._groups[group].read_at = 1


async def _backend(kind: str, folder: Path) -> AsyncIterator[Backend]:
    for address in PLACES[kind](folder):
        backend = Backend(kind, address, [])
        yield backend
        for log in backend.opened:
            await log.close()


@pytest.fixture(params=list(PLACES))
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    """Each kind of backend in turn."""
    async for made in _backend(request.param, tmp_path):
        yield made


@pytest.fixture(params=DURABLE)
async def durable(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    """Each kind of backend whose messages outlive the process."""
    async for made in _backend(request.param, tmp_path):
        yield made


@pytest.fixture
async def log(backend: Backend) -> Log:
    """An empty log of each kind."""
    return await backend.open()
