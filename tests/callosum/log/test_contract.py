"""What every backend of a log promises (`callosum.log.contract`), on each: accepting, keeping, reading, waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from callosum.bus.handlers import turns
from callosum.log.log_backends import Backend, note, said
from callosum.log.log_use import (
    EXTERNAL,
    LONG,
    SHORT,
    buried,
    claim,
    claim_after_change,
    fields,
    read_all,
)
from support.heard import listening
from synapse.callosum.log.contract import Log
from synapse.callosum.message import MOST_BYTES, Message, Tract
from synapse.callosum.payloads import Untyped
from synapse.errors import InvalidInput, TooLarge, Unavailable
from synapse.evidence import Evidence

# --- accepting and reading


async def test_what_is_appended_is_read_back_as_it_was(log: Log) -> None:
    plain = note("ä\n\0'\"")
    full = Message(
        "persona.turn.asked",
        Untyped({"nested": [1, 2.5, None, {"deep": "é"}]}),
        EXTERNAL,
        9,
        Evidence.REPORTED,
        time.time() + 5,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "reply.here",
        "a key",
    )
    assert await log.append([plain, full]) == [True, True]
    found = {entry.message.number: fields(entry.message) for entry in await log.read(None, 10)}
    assert found == {plain.number: fields(plain), full.number: fields(full)}


async def test_reading_goes_on_behind_a_position_and_gives_each_message_once(log: Log) -> None:
    for start in range(0, 30, 5):
        await log.append([note(str(n), tract=Tract(n % 2)) for n in range(start, start + 5)])
    for page in (1, 7, 30, 100):
        entries = await read_all(log, page=page)
        assert sorted(int(text) for text in said(entries)) == list(range(30))
        for tract in Tract:
            mine = [int(text) for text in said([e for e in entries if e.message.tract == tract])]
            assert mine == sorted(mine), "in the order of acceptance within a tract"


async def test_a_page_is_never_longer_than_its_limit(log: Log) -> None:
    await log.append([note(str(n), tract=Tract(n % 2)) for n in range(20)])
    assert [len(await log.read(None, limit)) for limit in (0, 1, 3, 20, 21)] == [0, 1, 3, 20, 20]


async def test_reading_with_a_pattern_gives_the_messages_that_match(log: Log) -> None:
    topics = ["a.b", "a.b.c", "a.x.c", "a.x.y.c", "b.a", "a-b"]
    await log.append([note(topic, topic) for topic in topics])
    for pattern, expected in {
        "a.*.c": {"a.b.c", "a.x.c"},
        "a.**": {"a.b", "a.b.c", "a.x.c", "a.x.y.c"},
        "*.b.**": {"a.b.c"},
        "*.x.**": {"a.x.c", "a.x.y.c"},
        "*": {"a-b"},
        "b.a": {"b.a"},
        "**": set(topics),
    }.items():
        assert set(said(await read_all(log, pattern, page=2))) == expected, pattern
    with pytest.raises(InvalidInput, match="pattern"):
        await log.read(None, 10, "a..b")


@pytest.mark.parametrize("position", ["", "x", "-1", "1.5", "٣", "9" * 40, "1' OR '1'='1", "a" * 5000])
async def test_a_position_of_something_else_is_refused(log: Log, position: str) -> None:
    await log.append([note("1")])
    with pytest.raises(InvalidInput, match="position"):
        await log.read(position, 10)


async def test_the_end_is_behind_the_newest_message(log: Log) -> None:
    first = await log.end()
    await log.append([note("1"), note("2", tract=EXTERNAL)])
    end = await log.end()
    assert await log.read(end, 10) == []
    assert sorted(said(await log.read(first, 10))) == ["1", "2"]
    await log.append([note("3")])
    assert said(await log.read(end, 10)) == ["3"]


async def test_nothing_appended_is_nothing_accepted(log: Log) -> None:
    assert await log.append([]) == []
    assert (await log.stats()).accepted == 0


async def test_a_key_is_accepted_once(log: Log) -> None:
    assert await log.append([note("1", key="a"), note("2", key="b"), note("3", key="a")]) == [True, True, False]
    assert await log.append([note("4", key="b"), note("5", key="c")]) == [False, True]
    assert await log.append([note("6", key="c", tract=EXTERNAL)]) == [False], "also in the other tract"
    assert said(await read_all(log)) == ["1", "2", "5"]
    stats = await log.stats()
    assert (stats.accepted, stats.duplicates, stats.kept) == (3, 3, 3)


async def test_a_message_without_a_key_is_known_by_its_id(log: Log) -> None:
    message = note("1")
    assert await log.append([message]) == [True]
    assert await log.append([message, note("2", key=message.id), note("3")]) == [False, False, True]


async def test_of_many_who_append_the_same_key_at_once_one_is_accepted(log: Log) -> None:
    accepted = await asyncio.gather(*(log.append([note(str(n), key=f"key {n % 10}")]) for n in range(200)))
    assert sum(one for (one,) in accepted) == 10
    assert len(await read_all(log)) == 10


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (note("x" * MOST_BYTES), TooLarge),
        (note("x", deadline=float("inf")), InvalidInput),
        (note("x", key="k" * 201), InvalidInput),
        (note("x", key="a\0b"), InvalidInput),
        (note("\ud800"), InvalidInput),
    ],
)
async def test_messages_are_accepted_all_or_none(log: Log, wrong: Message, error: type[Exception]) -> None:
    right = note("right")
    with pytest.raises(error):
        await log.append([right, wrong])
    assert await read_all(log) == []
    assert await log.append([right]) == [True], "its key was not accepted either"


async def test_the_largest_message_comes_back(log: Log) -> None:
    large = note("x" * (MOST_BYTES - 500))
    await log.append([large])
    (entry,) = await log.read(None, 10)
    assert fields(entry.message) == fields(large)


# --- how much there is


async def test_stats_count_what_happened(log: Log) -> None:
    await log.join("g", "a.**", lease_s=LONG)
    await log.append([note(str(n), "a.b", key=str(n)) for n in range(10)] + [note("x", "b.a"), note("3", key="3")])
    await log.append([note("y", "a.x", tract=EXTERNAL)])
    deliveries = await claim(log, limit=6)
    await log.acknowledge("g", deliveries[:2])
    await log.bury("g", deliveries[2], "failed", "no")
    await log.retry("g", deliveries[3], 0)
    await claim(log, limit=1)
    stats = await log.stats()
    assert (stats.kept, stats.accepted, stats.duplicates) == (12, 12, 1)
    (group,) = stats.groups
    assert (group.group, group.pattern) == ("g", "a.**")
    assert (group.waiting, group.pending, group.handled, group.redelivered, group.dead) == (5, 3, 2, 1, 1)


async def test_what_all_groups_have_handled_is_trimmed_but_for_the_newest(backend: Backend) -> None:
    log = await backend.open(keep=20)
    await log.join("g", "**")
    for start in range(0, 1000, 100):
        await log.append([note(str(n)) for n in range(start, start + 100)])
        await log.acknowledge("g", await claim(log, limit=100))
    await log.append([note("last")])
    texts = said(await read_all(log))
    assert texts[-20:] == [*(str(n) for n in range(981, 1000)), "last"]
    assert len(texts) == (await log.stats()).kept < 500
    assert (await log.stats()).accepted == 1001


async def test_a_reader_that_was_away_goes_on_with_what_is_kept(backend: Backend) -> None:
    log = await backend.open(keep=20)
    await log.append([note("0")])
    (entry,) = await log.read(None, 1)
    for start in range(0, 1000, 100):
        await log.append([note(str(n)) for n in range(start, start + 100)])
    assert said(await log.read(entry.position, 2000)) == said(await read_all(log))


async def test_nothing_that_a_group_has_not_handled_is_trimmed(backend: Backend) -> None:
    log = await backend.open(keep=20)
    await log.join("idle", "test.*", lease_s=LONG)
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("pending"), note("dead"), note("again")])
    pending, dead, again = await claim(log)
    assert said([pending]) == ["pending"]
    await log.bury("g", dead, "failed", "no")
    await log.retry("g", again, 0)
    for start in range(0, 500, 100):
        await log.append([note(str(n)) for n in range(start, start + 100)])
        await log.acknowledge("g", [d for d in await claim(log, limit=200) if said([d])[0].isdecimal()])
    everything = ["pending", "dead", "again", *(str(n) for n in range(500))]
    assert said(await claim(log, "idle", limit=1000)) == everything
    await log.leave("idle")
    await log.append([note("501")])
    assert await log.replay() == 1
    await asyncio.sleep(SHORT * 1.5)
    assert sorted(said(await claim(log, limit=1000))[:3]) == ["again", "dead", "pending"]


async def test_a_group_that_nobody_reads_is_waited_for_no_longer_and_that_is_said_once(backend: Backend) -> None:
    log = await backend.open(keep=20)
    await log.join("idle", "test.*", lease_s=LONG)
    await log.append([note("pending"), *(note(str(n)) for n in range(99))])
    (pending,) = await claim(log, "idle", limit=1)
    backend.age_reading("idle")
    with listening() as heard:
        for start in range(0, 3000, 100):
            await log.append([note(str(n)) for n in range(start, start + 100)])
        await turns()
        assert heard.about("callosum.group.unread") == [{"group": "idle", "days": 7}]
    assert (await log.stats()).kept < 1500
    left = said(await claim(log, "idle", limit=5000))
    assert left == [str(n) for n in range(int(left[0]), 3000)], "it goes on with what is left"
    await log.acknowledge("idle", [pending])
    (group,) = (await log.stats()).groups
    assert group.read_at > time.time() - 7200


async def test_of_too_many_dead_letters_the_oldest_are_dropped_and_counted(backend: Backend) -> None:
    log = await backend.open(most_dead=3)
    await log.join("g", "**")
    await log.append([note(str(n)) for n in range(8)])
    for delivery in await claim(log):
        await log.bury("g", delivery, "failed", "no")
    assert said(await log.dead()) == ["7", "6", "5"]
    stats = await log.stats()
    assert (stats.dead_dropped, stats.groups[0].dead) == (5, 3)


async def test_a_dead_letter_outlives_its_message_in_the_log(backend: Backend) -> None:
    log = await backend.open(keep=20)
    await buried(log, "1")
    for start in range(0, 500, 100):
        await log.append([note(str(n)) for n in range(start, start + 100)])
        await log.acknowledge("g", await claim(log, limit=200))
    await log.append([note("last")])
    assert said(await log.read(None, 1)) != ["1"]
    assert await log.replay() == 1
    assert said(await claim(log, limit=1)) == ["1"]


# --- waiting


async def test_whoever_waits_hears_of_a_new_message(log: Log) -> None:
    waiting = asyncio.create_task(log.changed(LONG))
    await asyncio.sleep(0.05)
    await log.append([note("1")])
    async with asyncio.timeout(20):
        await waiting


async def test_whoever_waits_hears_of_what_is_given_back(log: Log) -> None:
    await buried(log, "1")
    await log.append([note("2")])
    (delivery,) = await claim(log)
    for give_back in (lambda: log.retry("g", delivery, 0), log.replay):
        assert await claim(log) == []
        waiting = asyncio.create_task(claim_after_change(log))
        await asyncio.sleep(0.05)
        await give_back()
        async with asyncio.timeout(20):
            assert len(await waiting) == 1


async def test_whoever_waits_hears_of_a_retry_that_is_due_and_a_lease_that_has_ended(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1")])
    (delivery,) = await claim(log)
    await log.retry("g", delivery, SHORT)
    async with asyncio.timeout(20):
        assert [d.deliveries for d in await claim_after_change(log)] == [2]
        assert [d.deliveries for d in await claim_after_change(log)] == [3]


async def test_a_change_between_a_claim_and_the_wait_for_it_is_not_missed(log: Log) -> None:
    await log.join("g", "**")
    for n in range(20):
        assert await claim(log) == []
        await asyncio.create_task(log.append([note(str(n))]))
        async with asyncio.timeout(20):
            await log.changed(LONG)
        await log.acknowledge("g", await claim(log))


async def test_a_wait_ends_at_its_timeout(log: Log) -> None:
    async with asyncio.timeout(20):
        await log.changed(0)
        await log.changed(0.05)


async def test_a_cancelled_claim_loses_nothing(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note(str(n)) for n in range(40)])
    for pause in (0, 0, 0.0002, 0.001, 0.003):
        claiming = asyncio.create_task(claim(log, limit=3))
        await asyncio.sleep(pause)
        claiming.cancel()
        await asyncio.gather(claiming, return_exceptions=True)
    await asyncio.sleep(SHORT * 1.5)
    seen: set[str] = set()
    async with asyncio.timeout(20):
        while len(seen) < 40:
            found = await claim(log)
            seen.update(said(found))
            await log.acknowledge("g", found)
    assert (await log.stats()).groups[0].waiting == 0


async def test_a_closed_log_says_so(log: Log) -> None:
    waiting = asyncio.create_task(log.changed(LONG))
    await asyncio.sleep(0.05)
    await log.close()
    await log.close()
    await asyncio.wait_for(waiting, 20)
    with pytest.raises(Unavailable, match="closed"):
        await log.append([note("1")])
    with pytest.raises(Unavailable, match="closed"):
        await log.stats()


# --- what outlives the process


async def test_what_was_accepted_is_there_when_the_log_is_opened_again(durable: Backend) -> None:
    log = await durable.open()
    await log.join("g", "a.**", lease_s=LONG)
    await log.append([note(str(n), "a.b", key=str(n)) for n in range(6)])
    end = await log.end()
    first, second, third = await claim(log, limit=3)
    await log.acknowledge("g", [first])
    await log.bury("g", second, "failed", "no")
    await log.retry("g", third, 0)
    before = await log.stats()
    await log.close()

    log = await durable.open()
    assert await log.stats() == before
    assert await log.append([note("again", "a.b", key="3"), note("6", "a.b")]) == [False, True]
    assert said(await log.read(end, 10)) == ["6"]
    found = await claim(log)
    assert said(found) == ["2", "3", "4", "5", "6"]
    assert [delivery.attempt for delivery in found] == [2, 1, 1, 1, 1]
    (letter,) = await log.dead()
    assert (said([letter]), letter.error) == (["1"], "no")


async def test_all_who_open_a_log_share_it(durable: Backend) -> None:
    mine, other = await durable.open(), await durable.open()
    await mine.join("g", "**", lease_s=LONG)
    waiting = asyncio.create_task(claim_after_change(other))
    await asyncio.sleep(0.05)
    assert await mine.append([note("1", key="a")]) == [True]
    async with asyncio.timeout(20):
        (delivery,) = await waiting
    assert await claim(mine) == []
    assert await other.append([note("2", key="a")]) == [False]
    await mine.acknowledge("g", [delivery])
    logs = [mine, other]
    await asyncio.gather(*(logs[n % 2].append([note(str(n))]) for n in range(100)))
    shares = await asyncio.gather(*(claim(logs[n % 2], limit=10) for n in range(20)))
    assert sorted((text for share in shares for text in said(share)), key=int) == [str(n) for n in range(100)]
    assert await mine.stats() == await other.stats()
