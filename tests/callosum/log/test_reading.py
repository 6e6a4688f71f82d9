"""Reading a log: the newest messages, those since a time, and what comes from now on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from synapse.callosum.log import reading
from synapse.callosum.log.contract import Entry, Log
from synapse.callosum.log.memory import MemoryLog
from synapse.callosum.log.reading import follow, recent
from synapse.callosum.message import LATEST, Message, Tract, from_wire, to_wire
from synapse.callosum.payloads import Payload, Untyped
from synapse.callosum.views import view_of
from synapse.errors import InvalidInput
from synapse.evidence import Evidence


@pytest.fixture
async def log() -> AsyncIterator[Log]:
    log = MemoryLog()
    yield log
    await log.close()


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 3)


def number(n: int, topic: str = "a.b", *, at: float | None = None) -> Message:
    made = 0 if at is None else (round(at * 1000) << 80) | (7 << 76) | (2 << 62) | n
    return Message(topic, Untyped({"n": n}), number=made)


def numbers(entries: tuple[Entry, ...] | list[Entry]) -> list[int]:
    return [entry.message.payload.root["n"] for entry in entries]  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
async def test_the_newest_are_the_last_ones_over_any_number_of_pages(log: Log, count: int) -> None:
    await log.append([number(n) for n in range(count)])
    assert numbers((await recent(log)).entries) == list(range(count))
    assert numbers((await recent(log, limit=2)).entries) == list(range(count))[-2:]


async def test_those_since_a_time_were_made_then_or_later(log: Log) -> None:
    await log.append([number(n, at=1000.0 + n) for n in range(1, 8)])
    assert numbers((await recent(log, since=1005.0)).entries) == [5, 6, 7]


async def test_the_newest_of_a_long_log_are_found_without_reading_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    class Counting(MemoryLog):
        async def read(self, after: str | None, limit: int, pattern: str = "**") -> list[Entry]:
            nonlocal read
            found = await super().read(after, limit, pattern)
            read += len(found)
            return found

    log = Counting()
    monkeypatch.setattr(reading, "PAGE", 100)
    await log.append([number(n, "rare.one" if n % 1000 == 0 else "a.b", at=1000.0 + n) for n in range(1, 5001)])
    for options, expected in (
        ({"limit": 3}, [4998, 4999, 5000]),
        ({"since": 5995.0}, [4995, 4996, 4997, 4998, 4999, 5000]),
        ({"since": 5000.0, "limit": 2}, [4999, 5000]),
        ({"since": 9000.0}, []),
        ({"limit": 2, "pattern": "rare.*"}, [4000, 5000]),
        ({"limit": 9, "pattern": "rare.*"}, [1000, 2000, 3000, 4000, 5000]),
    ):
        read = 0
        assert numbers((await recent(log, **options)).entries) == expected
        assert read < 3000
    assert len((await recent(log)).entries) == 5000


async def test_following_behind_the_newest_misses_nothing_and_repeats_nothing(log: Log) -> None:
    await log.append([number(n, "a.b" if n % 2 else "c.d") for n in range(7)])
    for pattern, before in (("a.b", [1, 3, 5]), ("x.y", []), ("**", list(range(7)))):
        found = await recent(log, pattern)
        assert numbers(found.entries) == before
        async with aclosing(follow(log, found.position, pattern, idle_s=0.05)) as pages:
            assert await anext(pages) == ()
    await log.append([number(7)])
    async with aclosing(follow(log, found.position)) as pages:
        assert numbers(await anext(pages)) == [7]


async def test_what_comes_while_somebody_follows_comes_at_once_and_in_order(log: Log) -> None:
    seen: list[int] = []

    async def read() -> None:
        async with aclosing(follow(log, await log.end(), "a.*")) as pages:
            async for page in pages:
                seen.extend(numbers(page))
                if len(seen) >= 20:
                    return

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    for n in range(20):
        await log.append([number(n), number(100 + n, "x.y")])
        await asyncio.sleep(0)
    await asyncio.wait_for(task, 10)
    assert seen == list(range(20))


async def test_messages_of_other_topics_do_not_keep_a_listener_from_hearing_that_it_is_quiet(log: Log) -> None:
    async def talk() -> None:
        while True:
            await log.append([number(1, "x.y")])
            await asyncio.sleep(0.01)

    talking = asyncio.create_task(talk())
    async with aclosing(follow(log, None, "a.*", idle_s=0.1)) as pages, asyncio.timeout(10):
        assert await anext(pages) == ()
        assert await anext(pages) == ()
    talking.cancel()


async def test_following_ends_when_it_is_told_to(log: Log) -> None:
    stop = asyncio.Event()
    pages = follow(log, None, until=stop.is_set)
    asyncio.get_running_loop().call_later(0.05, stop.set)
    async with asyncio.timeout(10):
        assert [page async for page in pages] == []


async def test_a_pattern_that_is_none_is_refused(log: Log) -> None:
    with pytest.raises(InvalidInput):
        await recent(log, "a..b")
    with pytest.raises(InvalidInput):
        await anext(follow(log, None, "a..b"))


class Sent(Payload):
    at: datetime
    to: tuple[str, ...]


def test_the_last_moment_that_a_message_may_name_can_be_shown() -> None:
    last = math.nextafter(LATEST, 0)
    message = from_wire(to_wire(Message("a.b", Untyped({}), deadline=last, number=int(last * 1000) << 80 | 1)))
    assert (view_of(message).time.year, view_of(message).deadline) == (9999, datetime.fromtimestamp(last, UTC))


def test_a_view_has_names_for_grades_and_tracts_and_leaves_nothing_out() -> None:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    message = Message(
        *("mail.sent", Sent(at=when, to=("a", "b")), Tract.EXTERNAL, 9, Evidence.REPORTED, when.timestamp()),
        trace="00-1-2-01",
        reply_to="mail.answers",
        key="k",
    )
    view = view_of(message).model_dump(mode="json")
    assert view.pop("time").startswith("20")
    assert view == {
        "id": message.id,
        "topic": "mail.sent",
        "tract": "external",
        "priority": 9,
        "evidence": "reported",
        "payload": {"at": "2026-01-02T00:00:00Z", "to": ["a", "b"]},
        "deadline": "2026-01-02T00:00:00Z",
        "trace": "00-1-2-01",
        "reply_to": "mail.answers",
        "key": "k",
    }
