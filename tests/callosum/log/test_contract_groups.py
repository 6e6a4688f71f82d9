"""What every backend of a log promises to groups and their consumers (`callosum.log.contract`), on each."""

from __future__ import annotations

import asyncio
import time

import pytest

from callosum.log.log_backends import note, said
from callosum.log.log_use import (
    EXTERNAL,
    INTERNAL,
    LONG,
    SHORT,
    buried,
    claim,
    claim_until_some,
    fields,
)
from synapse.callosum.log.contract import Log
from synapse.errors import InvalidInput, NotFound

# --- groups


async def test_a_group_gets_what_is_accepted_after_it_joined(log: Log) -> None:
    await log.append([note("before")])
    await log.join("g", "**")
    await log.append([note("after")])
    assert said(await claim(log)) == ["after"]


async def test_a_group_that_starts_at_the_first_message_gets_all_that_are_kept(log: Log) -> None:
    await log.append([note("1"), note("2", tract=EXTERNAL), note("3")])
    await log.join("g", "**", start="first")
    assert said(await claim(log)) == ["1", "3"]
    assert said(await claim(log, tract=EXTERNAL)) == ["2"]


async def test_a_group_gets_what_matches_its_pattern_in_order(log: Log) -> None:
    await log.join("g", "a.*")
    await log.append([note(str(n), "a.b" if n % 3 else "a.b.c") for n in range(30)])
    expected = [str(n) for n in range(30) if n % 3]
    found = [said(await claim(log, limit=6)) for _ in range(5)]
    assert [text for page in found for text in page] == expected
    assert max(len(page) for page in found) <= 6


async def test_a_claim_gives_no_more_than_its_limit(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note(str(n)) for n in range(10)])
    assert await claim(log, limit=0) == []
    assert said(await claim(log, limit=3)) == ["0", "1", "2"]
    await asyncio.sleep(SHORT * 1.5)
    await log.join("g", "**", lease_s=LONG)
    assert said(await claim(log, limit=2)) == ["0", "1"]
    assert said(await claim(log, limit=4)) == ["2", "3", "4", "5"], "what was delivered before goes first"


async def test_each_group_gets_every_message_and_each_message_goes_to_one_consumer_of_it(log: Log) -> None:
    for group in ("g", "h"):
        await log.join(group, "**")
    await log.append([note(str(n)) for n in range(100)])
    for group in ("g", "h"):
        shares = await asyncio.gather(*(log.claim(group, f"consumer {n}", 7, INTERNAL) for n in range(20)))
        texts = [text for share in shares for text in said(share)]
        assert sorted(texts, key=int) == [str(n) for n in range(100)]


async def test_a_message_is_pending_until_it_is_acknowledged(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1"), note("2")])
    deliveries = await claim(log)
    assert [delivery.attempt for delivery in deliveries] == [1, 1]
    await log.acknowledge("g", deliveries[:1])
    await asyncio.sleep(SHORT * 1.5)
    (again,) = await claim_until_some(log)
    assert (said([again]), again.attempt, again.deliveries) == (["2"], 1, 2)
    await log.acknowledge("g", [again])
    await asyncio.sleep(SHORT * 1.5)
    assert await claim(log) == []
    (group,) = (await log.stats()).groups
    assert (group.handled, group.redelivered, group.pending) == (2, 1, 0)


async def test_a_lease_that_has_not_ended_is_kept(log: Log) -> None:
    await log.join("g", "**", lease_s=LONG)
    await log.append([note("1")])
    await claim(log)
    await asyncio.sleep(SHORT)
    assert await claim(log) == []


async def test_acknowledging_again_or_late_is_no_error_and_counts_once(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1")])
    late = await claim(log)
    await asyncio.sleep(SHORT * 1.5)
    again = await claim_until_some(log)
    await log.acknowledge("g", late)
    await log.acknowledge("g", again)
    await log.acknowledge("g", [*again, *again])
    await log.acknowledge("g", [])
    await asyncio.sleep(SHORT * 1.5)
    assert await claim(log) == []
    (group,) = (await log.stats()).groups
    assert (group.handled, group.pending) == (1, 0)


async def test_a_retry_is_delivered_when_it_is_due_before_what_is_new(log: Log) -> None:
    await log.join("g", "**", lease_s=LONG)
    await log.append([note("1"), note("2"), note("3")])
    first, second = await claim(log, limit=2)
    await log.retry("g", second, 1.0)
    await log.retry("g", first, 0)
    found = await claim(log)
    assert said(found) == ["1", "3"]
    assert [delivery.attempt for delivery in found] == [2, 1]
    (third,) = await claim_until_some(log)
    assert (said([third]), third.attempt) == (["2"], 2)
    await log.retry("g", third, 0)
    (fourth,) = await claim(log)
    assert fourth.attempt == 3


async def test_what_nobody_has_begun_is_given_back_at_once_and_counts_for_nothing(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1"), note("2"), note("3")])
    for _ in range(3):
        found = await claim(log)
        assert said(found) == ["1", "2", "3"], "at once, and in their order"
        assert {(one.attempt, one.deliveries) for one in found} == {(1, 1)}
        await log.release("g", found)
    await log.release("g", found)
    (group,) = (await log.stats()).groups
    assert (group.redelivered, group.pending, group.waiting) == (0, 3, 0)

    late = await claim(log)
    await asyncio.sleep(SHORT * 1.5)
    await log.join("g", "**", lease_s=LONG)
    now = await claim_until_some(log)
    await log.release("g", late)
    assert await claim(log) == [], "who comes late takes nothing away"
    await log.retry("g", now[0], 0)
    (again,) = await claim(log)
    assert (said([again]), again.attempt, again.deliveries) == (["1"], 2, 3)


async def test_a_retry_does_not_come_early(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1")])
    (delivery,) = await claim(log)
    await log.retry("g", delivery, LONG)
    await asyncio.sleep(SHORT * 1.5)
    assert await claim(log) == [], "the lease has nothing to do with it any more"


async def test_a_late_retry_or_burial_takes_nothing_from_who_has_the_message_now(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    await log.append([note("1")])
    (late,) = await claim(log)
    await asyncio.sleep(SHORT * 1.5)
    await log.join("g", "**", lease_s=LONG)
    (now,) = await claim_until_some(log)
    await log.retry("g", late, 0)
    await log.bury("g", late, "failed", "too late")
    assert await claim(log) == []
    assert await log.dead() == []
    await log.acknowledge("g", [now])
    await log.retry("g", now, 0)
    await log.bury("g", now, "failed", "handled already")
    assert (await claim(log), await log.dead()) == ([], [])


async def test_joining_again_changes_the_pattern_and_the_lease_and_keeps_the_place(log: Log) -> None:
    await log.join("g", "a.**", lease_s=LONG)
    await log.append([note("1", "a.b"), note("2", "a.c")])
    assert said(await claim(log, limit=1)) == ["1"]
    await log.join("g", "*.c", lease_s=SHORT)
    await log.append([note("3", "a.b"), note("4", "b.c")])
    assert said(await claim(log)) == ["2", "4"]
    await asyncio.sleep(SHORT * 1.5)
    assert said(await claim_until_some(log)) == ["2", "4"], "with the new lease"


async def test_a_group_that_left_is_forgotten(log: Log) -> None:
    await log.join("g", "**")
    await log.append([note("1"), note("2")])
    (delivery,) = await claim(log, limit=1)
    await log.leave("g")
    with pytest.raises(NotFound, match="'g'"):
        await claim(log)
    await log.acknowledge("g", [delivery])
    await log.retry("g", delivery, 0)
    await log.bury("g", delivery, "failed", "too late")
    await log.leave("g")
    assert (await log.stats()).groups == ()
    assert await log.dead() == []
    await log.join("g", "**")
    assert await claim(log) == []
    await log.leave("g")
    await log.join("g", "**", start="first")
    assert said(await claim(log)) == ["1", "2"]


@pytest.mark.parametrize(
    ("group", "pattern", "lease_s"),
    [
        ("", "**", 1),
        ("g" * 201, "**", 1),
        ("g\n", "**", 1),
        ("g", "a..b", 1),
        ("g", "**", 0),
        ("g", "**", float("nan")),
    ],
)
async def test_a_group_without_a_name_a_pattern_or_a_lease_is_refused(
    log: Log, group: str, pattern: str, lease_s: float
) -> None:
    with pytest.raises(InvalidInput):
        await log.join(group, pattern, lease_s=lease_s)
    assert (await log.stats()).groups == ()


async def test_a_group_that_never_joined_has_nothing_to_claim(log: Log) -> None:
    with pytest.raises(NotFound, match="nobody"):
        await claim(log, "nobody")


# --- dead letters


async def test_what_is_buried_is_a_dead_letter_and_not_delivered_again(log: Log) -> None:
    await log.join("g", "**", lease_s=SHORT)
    before = time.time()
    await log.append([message := note("1", tract=EXTERNAL)])
    (delivery,) = await claim(log, tract=EXTERNAL)
    await log.retry("g", delivery, 0)
    (delivery,) = await claim(log, tract=EXTERNAL)
    await log.bury("g", delivery, "deadline", "too slow \ud800 \0 ü")
    (letter,) = await log.dead()
    assert (letter.group, letter.reason, letter.attempts) == ("g", "deadline", 2)
    assert letter.error.startswith("too slow ")
    assert letter.error.endswith(" ü")
    assert before - 1 <= letter.at <= time.time() + 1
    assert fields(letter.message) == fields(message)
    await asyncio.sleep(SHORT * 1.5)
    assert await claim(log, tract=EXTERNAL) == []
    (group,) = (await log.stats()).groups
    assert (group.dead, group.pending, group.handled) == (1, 0, 0)


async def test_dead_letters_come_newest_first(log: Log) -> None:
    ids = await buried(log, "1", "2", "3")
    assert [letter.id for letter in await log.dead()] == ids[::-1]
    assert [letter.id for letter in await log.dead(limit=2)] == ids[:0:-1]


async def test_a_replayed_dead_letter_is_delivered_as_if_for_the_first_time(log: Log) -> None:
    ids = await buried(log, "1", "2", "3")
    await log.append([note("4")])
    assert await log.replay([ids[1], ids[0]]) == 2
    found = await claim(log)
    assert said(found) == ["1", "2", "4"]
    assert [delivery.attempt for delivery in found] == [1, 1, 1]
    assert [letter.id for letter in await log.dead()] == [ids[2]]
    assert await log.replay() == 1
    assert await log.replay() == 0
    assert said(await claim(log)) == ["3"]


async def test_a_dead_letter_goes_back_only_to_its_own_group(log: Log) -> None:
    await log.join("other", "**")
    await buried(log, "1")
    assert said(await claim(log, "other")) == ["1"]
    assert await log.replay() == 1
    assert await claim(log, "other") == []
    assert said(await claim(log)) == ["1"]


@pytest.mark.parametrize("unknown", ["", "x", "999999", "9" * 40])
async def test_of_dead_letters_one_of_which_does_not_exist_none_is_replayed_or_dropped(log: Log, unknown: str) -> None:
    (known,) = await buried(log, "1")
    with pytest.raises(NotFound, match="dead letter"):
        await log.replay([known, unknown])
    with pytest.raises(NotFound, match="dead letter"):
        await log.drop([known, unknown])
    assert [letter.id for letter in await log.dead()] == [known]
    assert await claim(log) == []


async def test_a_dead_letter_named_twice_is_replayed_once(log: Log) -> None:
    (known,) = await buried(log, "1")
    assert await log.replay([known, known]) == 1
    assert said(await claim(log)) == ["1"]


async def test_dropped_dead_letters_are_gone(log: Log) -> None:
    ids = await buried(log, "1", "2", "3")
    assert await log.drop([ids[0]]) == 1
    with pytest.raises(NotFound):
        await log.replay([ids[0]])
    assert await log.drop() == 2
    assert (await log.dead(), await log.drop(), await log.replay()) == ([], 0, 0)


async def test_the_dead_letters_of_a_group_that_left_stay_until_it_joins_again(log: Log) -> None:
    (gone,) = await buried(log, "1", group="gone")
    (known,) = await buried(log, "2")
    await log.leave("gone")
    assert {letter.group for letter in await log.dead()} == {"gone", "g"}
    with pytest.raises(NotFound, match="gone"):
        await log.replay([known, gone])
    assert await log.replay() == 1, "of all, those whose group is there"
    assert [letter.id for letter in await log.dead()] == [gone]
    await log.join("gone", "**")
    assert await log.replay([gone]) == 1
    assert said(await claim(log, "gone")) == ["1"]
