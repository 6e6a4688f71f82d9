"""Reading patterns that another program keeps in Redis or Valkey, without changing anything there.

A pattern is a hash with a field ``embedding`` or ``vector``, or a string that is a JSON object with such a member; all
its other fields are text. A vector is written as a JSON list of numbers, as numbers with commas between them, or as the
bytes of little-endian float32 numbers. The server sees only SCAN, TYPE, HLEN, STRLEN, MEMORY USAGE, HGETALL and GET,
each of which a user with ``+@read -@write`` may do,
and of keys it asks first how large they are::

    report = Report()
    index = PatternIndex(384)
    names = await fill_index(index, read_patterns("redis://old-host", dim=index.dim, report=report))
    print(report)

What is there is somebody else's data: treat what comes of it as reported (`synapse.evidence.Evidence.REPORTED`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from synapse.callosum.log.valkey.client import client, reachable
from synapse.errors import InvalidInput
from synapse.vectors.importers.patterns import Fields, NotAPattern, Vector, from_hash, from_json
from synapse.vectors.index import PatternIndex

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

VECTOR_FIELDS: Final = ("embedding", "vector")
MOST_BYTES: Final = 1 << 20
"""The largest pattern, as the server stores it."""
OVERHEAD: Final = 1 << 14
"""What the server's own bookkeeping for a pattern may take."""
MOST_FETCHED: Final = 16 << 20
"""Bytes that are fetched in one step."""
MOST_KEY: Final = 1000
COUNTS: Final = {"hash": ("HLEN", 256, "fields"), "string": ("STRLEN", MOST_BYTES, "bytes")}
"""How to ask how much is in a key of each type, and how much there may be."""
GONE: Final = "gone, or something else, before it was read"
Ask = Callable[[Sequence[tuple[bytes | str | int, ...]]], Awaitable[list[Any]]]
"""Sends commands in one step, and gives the answer to each."""
EXAMPLES: Final = 3
"""Keys that a report names for each reason."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern as it was found.

    Attributes:
        id: the whole key.
        vector: float32 [dim], finite.
        fields: everything else: text, or bytes where it is not UTF-8.
    """

    id: str
    vector: Vector
    fields: Fields


@dataclass(slots=True)
class Report:
    """How an import went: how many patterns were read, and how many keys were passed over, by reason."""

    read: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Some of the keys for each reason, the first ones that were found."""

    def pass_over(self, key: bytes | str, reason: str) -> None:
        """Count a key that is no pattern."""
        self.passed_over[reason] += 1
        known = self.examples.setdefault(reason, [])
        if len(known) < EXAMPLES:
            known.append(key[:100].decode(errors="backslashreplace") if isinstance(key, bytes) else key[:100])

    def __str__(self) -> str:
        """One line for what was read, one for each reason."""
        lines = [f"{self.read:,} patterns read, {self.passed_over.total():,} keys passed over"]
        for reason, count in self.passed_over.most_common():
            lines.append(f"{count:,}: {reason}, such as {', '.join(map(repr, self.examples[reason]))}")
        return "\n".join(lines)


async def read_patterns(
    url: str,
    match: str = "pattern:*",
    *,
    dim: int | None = None,
    vector_fields: Sequence[str] = VECTOR_FIELDS,
    batch: int = 500,
    timeout_s: float = 10.0,
    report: Report | None = None,
) -> AsyncGenerator[Pattern, None]:
    """The patterns under the keys that match, in no order, each once. Nothing is written.

    What is changed while this reads may be missing, or be read as it was before or after. Whoever stops early closes
    it (`contextlib.aclosing`).

    Args:
        url: as in `synapse.callosum.log.valkey.client.client`.
        match: which keys, with ``*``, ``?`` and ``[…]`` as in SCAN.
        dim: how many numbers a vector has; those with another number of them are passed over. None: any.
        vector_fields: where the vector may be; the first of them that a pattern has is it.
        batch: about how many keys are looked at in one step of the server.
        timeout_s: how long to wait for the answers to each step.
        report: counts what was read and passed over.

    Raises:
        InvalidInput: the URL cannot be read, or `batch` is no positive number.
        Unavailable: the server cannot be reached, or the package `valkey` is missing.
        Unauthorized, Forbidden: it wants another password, or its user may not read.
    """
    if batch < 1:
        raise InvalidInput(f"a batch is 1 key or more, not {batch}")
    report = report or Report()
    async with aclosing(client(url, timeout_s)) as server:
        ask = partial(_ask, server, timeout_s)
        cursor, seen = 0, set[bytes]()
        while True:
            async with reachable(timeout_s):
                cursor, found = await server.scan(cursor, match=match, count=batch)
            keys = [key for key in dict.fromkeys(found) if key not in seen]  # SCAN may give a key more than once
            seen.update(keys)
            async for key, kind, value in _values(ask, keys, report):
                try:
                    pattern = _pattern(key, kind, value, vector_fields, dim)
                except NotAPattern as reason:
                    report.pass_over(key, str(reason))
                else:
                    report.read += 1
                    yield pattern
            if not cursor:
                return


async def fill_index(
    index: PatternIndex, patterns: AsyncIterable[Pattern], *, first: int = 0, batch: int = 1000
) -> dict[int, str]:
    """Put patterns into an index, under the integer ids from `first` on.

    Returns:
        Which pattern each integer id is.

    Raises:
        InvalidInput: a vector has not as many components as the index; give `read_patterns` its `dim`. What came before
            is in the index.
    """
    names: dict[int, str] = {}
    waiting: list[Pattern] = []

    async def add() -> None:
        ids = range(first + len(names), first + len(names) + len(waiting))
        vectors = [pattern.vector for pattern in waiting]
        if any(len(vector) != index.dim for vector in vectors):
            raise InvalidInput(f"the index has vectors of {index.dim} components", hint=f"read with dim={index.dim}")
        await asyncio.to_thread(index.add, np.array(ids), np.stack(vectors))
        names.update(zip(ids, (pattern.id for pattern in waiting), strict=True))
        waiting.clear()

    async for pattern in patterns:
        waiting.append(pattern)
        if len(waiting) >= batch:
            await add()
    if waiting:
        await add()
    return names


def _pattern(key: bytes, kind: str, value: Any, vector_fields: Sequence[str], dim: int | None) -> Pattern:
    if len(key) > MOST_KEY:
        raise NotAPattern(f"a key of more than {MOST_KEY:,} bytes")
    try:
        name = key.decode()
    except UnicodeDecodeError as error:
        raise NotAPattern("the key is not UTF-8 text") from error
    if kind == "hash":
        return Pattern(name, *from_hash(value, vector_fields, dim))
    return Pattern(name, *from_json(value, vector_fields, dim))


async def _ask(server: Valkey, timeout_s: float, commands: Sequence[tuple[bytes | str | int, ...]]) -> list[Any]:
    """What the server answers to each command; a `ResponseError` where the key is something else by now."""
    from valkey.exceptions import NoPermissionError  # noqa: PLC0415 - optional

    if not commands:
        return []
    async with reachable(timeout_s):
        async with server.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, NoPermissionError):
                raise answer
    return answers


async def _values(ask: Ask, keys: Sequence[bytes], report: Report) -> AsyncIterator[tuple[bytes, str, Any]]:
    """Key, type and value of those that can be patterns; only what is small enough is fetched, and little at a time."""
    kinds = dict(zip(keys, map(_name, await ask([("TYPE", key) for key in keys])), strict=True))
    for key, kind in kinds.items():
        if kind not in COUNTS:
            report.pass_over(key, GONE if kind == "none" else f"a {kind}, not a hash or a string")
    right = [key for key in keys if kinds[key] in COUNTS]
    counts = await ask([(COUNTS[kinds[key]][0], key) for key in right])
    few: list[bytes] = []
    for key, count in zip(right, counts, strict=True):
        most, what = COUNTS[kinds[key]][1:]
        if isinstance(count, int) and 0 < count <= most:
            few.append(key)
        else:
            report.pass_over(key, f"more than {most:,} {what}" if isinstance(count, int) and count else GONE)
    sizes = await ask([("MEMORY", "USAGE", key, "SAMPLES", 0) for key in few])
    together: list[bytes] = []
    room = MOST_FETCHED
    for key, size in zip(few, sizes, strict=True):
        if not isinstance(size, int) or size > MOST_BYTES + OVERHEAD:
            report.pass_over(key, f"more than {MOST_BYTES:,} bytes" if isinstance(size, int) else GONE)
            continue
        if size > room:
            async for one in _fetched(ask, together, kinds, report):
                yield one
            together, room = [], MOST_FETCHED
        together.append(key)
        room -= size
    async for one in _fetched(ask, together, kinds, report):
        yield one


async def _fetched(
    ask: Ask, keys: Sequence[bytes], kinds: dict[bytes, str], report: Report
) -> AsyncIterator[tuple[bytes, str, Any]]:
    answers = await ask([("HGETALL" if kinds[key] == "hash" else "GET", key) for key in keys])
    for key, answer in zip(keys, answers, strict=True):
        if answer is None or isinstance(answer, Exception):
            report.pass_over(key, GONE)
        else:
            yield key, kinds[key], answer


def _name(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)
