"""A bus with a log: groups that outlive the process, many processes on one log, and nothing accepted lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from callosum.bus.handlers import AT_ONCE, NEVER, ONCE, Gate, Payloads, Seen, fails, text, turns, until
from callosum.log.log_backends import Backend, note, said
from synapse.callosum.bus import subscription
from synapse.callosum.bus.bus import Bus
from synapse.callosum.bus.delivery.backoff import Backoff, Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy, State
from synapse.callosum.log.contract import Delivery, Entry, GroupStats, Log
from synapse.callosum.log.memory import MemoryLog
from synapse.callosum.message import Message, Tract
from synapse.errors import Conflict, Corrupt, Overloaded, TimedOut, TooLarge, Unavailable


async def group_of(log: Log, name: str = "workers") -> GroupStats:
    """What the log says of a group."""
    (found,) = [group for group in (await log.stats()).groups if group.group == name]
    return found


# groups


async def test_a_group_gets_what_is_published_and_the_log_knows_that_it_was_handled(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen, group="workers")
        sent = [str(number) for number in range(500)]
        await bus.publish_many([note(name) for name in sent[:300]])
        for name in sent[300:]:
            bus.publish_nowait(note(name))
        await until(lambda: len(seen.texts) == 500)
        assert seen.texts == sent
        assert await bus.drain(20)
    found = await group_of(log)
    assert (found.waiting, found.pending, found.handled, found.dead) == (0, 0, 500, 0)


async def test_a_group_gets_what_was_published_while_nobody_of_it_was_there(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        subscription = bus.subscribe("test.noted", seen, group="workers")
        await bus.publish(note("a"))
        await until(lambda: seen.texts == ["a"])
        await subscription.close()
        await bus.publish(note("b"))
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen, group="workers")
        await until(lambda: seen.texts == ["a", "b"])
        bus.subscribe("test.noted", (first := Seen()), group="late", start="first")
        bus.subscribe("test.noted", (new := Seen()), group="new")
        await bus.publish(note("c"))
        await until(lambda: first.texts == ["a", "b", "c"] and new.texts == ["c"])


async def test_each_message_goes_to_one_of_a_group_in_this_or_another_process(durable: Backend) -> None:
    sent = [str(number) for number in range(1000)]
    seen = [Seen(), Seen(), Seen()]
    async with Bus(log=await durable.open()) as one, Bus(log=await durable.open()) as other:
        one.subscribe("test.noted", seen[0], group="workers")
        one.subscribe("test.noted", seen[1], group="workers")
        await one.publish(note("0"))
        other.subscribe("test.noted", seen[2], group="workers")
        for start in range(1, 1000, 37):
            await one.publish_many([note(name) for name in sent[start : start + 37]])
            await asyncio.sleep(0.001)
        await until(lambda: sum(len(each.texts) for each in seen) >= 1000)
        assert sorted(seen[0].texts + seen[1].texts + seen[2].texts, key=int) == sent


async def test_a_message_that_ends_every_process_that_has_it_is_dead_at_last_and_those_beside_it_are_handled(
    log: Log,
) -> None:
    await log.join("workers", "test.noted", lease_s=0.02)
    await log.append([note("deadly", priority=6), *(note(str(number)) for number in range(4))])
    for attempt in range(1, 11):  # as ten processes that are killed would
        found: list[Delivery] = []
        while len(found) < 5:
            found += await log.claim("workers", f"process {attempt}", 5, Tract.INTERNAL)
            await asyncio.sleep(0.005)
        assert {(delivery.attempt, delivery.deliveries) for delivery in found} == {(1, attempt)}
        await asyncio.sleep(0.03)
    seen = Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen, group="workers", lease_s=5)
        await until(lambda: len(seen.texts) == 4)
        assert await bus.drain(20)
        assert sorted(seen.texts) == ["0", "1", "2", "3"]
        (letter,) = await bus.dead()
    assert (said([letter]), letter.reason, letter.attempts) == (["deadly"], "failed", 1)
    assert letter.error == "10 deliveries of it ended without an outcome"


async def test_what_waits_behind_a_slow_handler_while_consumers_come_and_go_has_all_its_attempts(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "GRACE_S", 0.05)
    sent = [str(number) for number in range(8)]
    gate = Gate()
    for _ in range(6):  # more often than a message may fail
        async with Bus(log=log) as bus:
            bus.subscribe("test.noted", gate, group="workers", lease_s=0.1)
            if not gate.begun:
                await bus.publish_many([note(name) for name in sent])
            begun = len(gate.begun)
            await until(lambda begun=begun: len(gate.begun) > begun)  # type: ignore[misc]
            await asyncio.sleep(0.15)  # the lease ends while they wait
            await bus.close(0.05)  # nobody opens the gate, however long it waits

    failed: list[str] = []
    seen = Seen()

    def fails_once(message: Message) -> None:
        if text(message) not in failed:
            failed.append(text(message))
            raise ValueError("not yet")
        seen(message)

    async with Bus(log=log) as bus:
        quick = Retry(2, Backoff(base_s=0.01, cap_s=0.01))
        bus.subscribe("test.noted", fails_once, group="workers", lease_s=5, retry=quick)
        await until(lambda: len(seen.texts) == len(sent))
        assert sorted(seen.texts) == sent
        assert await bus.dead() == []


async def test_a_bus_that_closes_gives_back_at_once_what_it_has_not_handled(log: Log) -> None:
    gate, seen = Gate(), Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", gate, group="workers", lease_s=600)
        await bus.publish_many([note(str(number)) for number in range(5)])
        await until(lambda: gate.begun)
        await bus.close(0.05)
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen, group="workers", lease_s=600)
        await until(lambda: len(seen.texts) == 5)
        assert sorted(seen.texts) == ["0", "1", "2", "3", "4"]


async def test_what_a_person_waits_for_overtakes_a_backlog_in_the_log(log: Log) -> None:
    gate = Gate()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", gate, group="workers")
        await bus.publish_many([note(str(number)) for number in range(100)])
        await until(lambda: gate.begun)
        await bus.publish(note("external", tract=Tract.EXTERNAL))
        await asyncio.sleep(0.1)
        gate.open()
        await until(lambda: len(gate.begun) == 2)
        assert gate.begun == ["0", "external"]
        assert (await group_of(log)).waiting > 50, "what was not claimed stays for the others of the group"
        gate.open(1000)


async def test_a_message_that_fails_comes_again_and_the_log_counts_its_attempts(log: Log) -> None:
    times: list[float] = []

    def third_time(message: Message) -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            raise ValueError("not yet")

    async with Bus(log=log) as bus:
        subscription = bus.subscribe(
            "test.noted", third_time, group="workers", retry=Retry(3, Backoff(base_s=0.05, cap_s=0.05, least=1))
        )
        await bus.publish(note("a"))
        await until(lambda: len(times) == 3)
        assert await bus.drain(20)
        assert times[2] - times[0] >= 0.1
        tally = subscription.stats().tally
        assert (tally.handled, tally.failed, tally.retried, tally.dead) == (1, 2, 2, 0)
    assert (await group_of(log)).handled == 1


async def test_after_the_last_attempt_the_log_has_a_dead_letter_and_replay_gives_it_back(log: Log) -> None:
    works = False
    died, seen = Payloads(), Seen()

    def handle(message: Message) -> None:
        if not works:
            raise ValueError("no")
        seen(message)

    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", handle, group="workers", retry=Retry(2, AT_ONCE))
        bus.subscribe("callosum.dead", died)
        await bus.publish(note("a"))
        await until(lambda: died.found)
        (letter,) = await bus.dead()
        assert (letter.group, letter.reason, letter.error, letter.attempts) == (
            "workers",
            "failed",
            "ValueError: no",
            2,
        )
        assert (died.found[0].group, died.found[0].attempts) == ("workers", 2)
        assert [one.id for one in await log.dead()] == [letter.id]
        works = True
        assert await bus.replay([letter.id]) == 1
        await until(lambda: seen.texts == ["a"])
        assert await bus.dead() == []


async def test_an_expired_message_is_a_dead_letter_of_the_log(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        subscription = bus.subscribe("test.noted", seen, group="workers")
        await bus.publish(note("late", deadline=time.time() - 1))
        await bus.publish(note("in time"))
        await until(lambda: seen.texts == ["in time"] and subscription.stats().tally.expired)
        assert [(one.reason, one.attempts) for one in await bus.dead()] == [("deadline", 1)]


async def test_dead_letters_of_the_log_and_of_this_process_are_one_list(log: Log) -> None:
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", fails, group="workers", retry=ONCE)
        bus.subscribe("test.noted", fails, name="alone", retry=ONCE)
        await bus.publish(note("a"))
        while len(letters := await bus.dead()) < 2:
            await asyncio.sleep(0.01)
        assert {one.group for one in letters} == {"workers", "alone"}
        assert await bus.drop([one.id for one in letters]) == 2
        assert await bus.dead() == []


async def test_an_open_breaker_leaves_the_messages_of_its_tract_in_the_log(log: Log) -> None:
    works = False
    seen: list[str] = []

    def handle(message: Message) -> None:
        if message.tract is Tract.INTERNAL and not works:
            raise ValueError("away")
        seen.append(text(message))

    async with Bus(log=log) as bus:
        subscription = bus.subscribe(
            "test.noted",
            handle,
            group="workers",
            retry=ONCE,
            breaker=BreakerPolicy(in_a_row=1, backoff=Backoff(base_s=0.3, cap_s=0.3, least=1)),
        )
        await bus.publish(note("x"))
        await until(lambda: subscription.stats().breakers[Tract.INTERNAL] is State.OPEN)
        works = True
        await bus.publish_many([note(str(number)) for number in range(40)])
        await bus.publish(note("external", tract=Tract.EXTERNAL))
        await until(lambda: seen)
        assert seen == ["external"]
        assert (await group_of(log)).waiting == 40
        await until(lambda: len(seen) == 41)
        assert seen[1:] == [str(number) for number in range(40)]


async def test_what_was_not_handled_within_its_lease_is_left_to_who_gets_it_next(log: Log) -> None:
    gate, seen = Gate(), Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", gate, group="workers", lease_s=0.4)
        await bus.publish_many([note(letter) for letter in "abc"])
        await until(lambda: gate.begun)
        bus.subscribe("test.noted", seen, group="workers", lease_s=0.4)
        await until(lambda: len(seen.texts) == 3)
        assert sorted(seen.texts) == ["a", "b", "c"]
        gate.open(10)
        assert await bus.drain(20)
        assert gate.ended == ["a"], "b and c are no longer its own; a is handled twice, as at least once allows"
    assert (await group_of(log)).pending == 0


async def test_closing_hands_nothing_to_a_handler_that_the_log_is_not_told_of(log: Log) -> None:
    gate = Gate()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", gate, group="workers")
        await bus.publish_many([note(letter) for letter in "abc"])
        await until(lambda: gate.begun)
        gate.open(2)
        await until(lambda: len(gate.ended) == 2)
        await bus.close()
    found = await group_of(log)
    assert (found.handled, found.waiting + found.pending) == (2, 1)


# publishing


async def test_a_handler_that_closes_its_own_subscription_has_handled_its_message(log: Log) -> None:
    seen: list[str] = []
    async with Bus(log=log) as bus:

        async def once(message: Message) -> None:
            seen.append(text(message))
            await subscription.close()

        subscription = bus.subscribe("test.noted", once, group="workers")
        await bus.publish(note("a"))
        await until(lambda: seen)
    found = await group_of(log)
    assert (found.pending, found.handled) == (0, 1)


async def test_a_message_whose_key_was_accepted_before_reaches_nobody(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen)
        assert await bus.publish(note("a", key="same"))
        assert not await bus.publish(note("b", key="same"))
        assert await bus.publish_many([note("c", key="same"), note("d")]) == [False, True]
        assert await bus.drain(20)
        assert seen.texts == ["a", "d"]


async def test_what_the_log_refuses_reaches_nobody(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen)
        with pytest.raises(TooLarge):
            await bus.publish_many([note("a"), note("x" * (1 << 20))])
        await turns()
        assert seen.texts == []
        bus.publish_nowait(note("x" * (1 << 20)))
        assert await bus.drain(20), "what can never be written does not stay on the way"


async def test_publishing_at_once_writes_to_the_log_before_the_bus_is_left(log: Log) -> None:
    async with Bus(log=log) as bus:
        for number in range(50):
            bus.publish_nowait(note(str(number)))
    assert [text(entry.message) for entry in await log.read(None, 100)] == [str(number) for number in range(50)]


# many processes


async def test_a_subscription_without_a_group_sees_what_others_write_and_its_own_once(durable: Backend) -> None:
    here = Seen()
    async with Bus(log=await durable.open()) as one, Bus(log=await durable.open()) as other:
        one.subscribe("test.noted", here)
        await asyncio.sleep(0.1)
        for number in range(20):
            await one.publish(note(f"own {number}"))
            await other.publish(note(f"other {number}"))
            one.publish_nowait(note(f"quick {number}"))
        await until(lambda: len(here.texts) >= 60)
        await asyncio.sleep(0.1)
        assert sorted(here.texts) == sorted(f"{who} {n}" for who in ("own", "other", "quick") for n in range(20))


async def test_a_request_is_answered_by_another_process(durable: Backend) -> None:
    async with Bus(log=await durable.open()) as asking, Bus(log=await durable.open()) as answering:

        def double(message: Message) -> None:
            answering.reply(message, note(2 * text(message)).payload)

        answering.subscribe("math.double", double, group="mathematicians")
        await answering.publish(note("the group is known from here on"))
        answers = await asyncio.gather(*(asking.request(note(str(n), "math.double"), 20) for n in range(5)))
        assert [text(answer) for answer in answers] == [2 * str(n) for n in range(5)]
        with pytest.raises(TimedOut):
            await asking.request(note("1", "math.halve"), 0.1)
        await asking.publish(note("1", "math.double", key="once"))
        with pytest.raises(Conflict, match="once"):
            await asking.request(note("1", "math.double", key="once"), 1)


# a log that is away


class Shaky(MemoryLog):
    """A log that cannot be reached while it is `away`."""

    away = False

    def _check(self) -> None:
        if self.away:
            raise Unavailable("the log is away")

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        self._check()
        return await super().append(messages)

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        self._check()
        return await super().claim(group, consumer, limit, tract)

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        self._check()
        await super().acknowledge(group, deliveries)


async def test_while_the_log_is_away_publishing_says_so_and_all_goes_on_when_it_is_back() -> None:
    log, gate = Shaky(), Gate()
    async with Bus(log=log, most_on_the_way=3) as bus:
        bus.subscribe("test.noted", gate, group="workers")
        await bus.publish(note("a"))
        await until(lambda: gate.begun)
        log.away = True
        with pytest.raises(Unavailable):
            await bus.publish(note("refused"))
        for letter in "bcd":
            bus.publish_nowait(note(letter))
        with pytest.raises(Overloaded, match="on their way"):
            bus.publish_nowait(note("refused"))
        gate.open(4)
        await until(lambda: gate.ended == ["a"])
        assert not await bus.drain(0.05), "neither the acknowledgement nor what was published has arrived"
        log.away = False
        await until(lambda: gate.ended == ["a", "b", "c", "d"])
        assert await bus.drain(20)
    assert (await group_of(log)).handled == 4


async def test_what_is_tried_again_for_long_is_on_its_way_until_it_has_arrived() -> None:
    class Damaged(MemoryLog):
        tries = 0

        async def append(self, messages: Sequence[Message]) -> list[bool]:
            self.tries += 1
            if self.tries <= 2:
                raise Corrupt("the log is damaged")
            return await super().append(messages)

    log = Damaged()
    async with Bus(log=log, most_on_the_way=1) as bus:
        bus.publish_nowait(note("a"))
        await until(lambda: log.tries == 2)
        with pytest.raises(Overloaded, match="1 messages are on their way"):
            bus.publish_nowait(note("b"))
        assert await bus.drain(20)
    assert said(await log.read(None, 10)) == ["a"]


class Late(MemoryLog):
    """A log whose answer to an `append` comes when it is let go, and is an error where one is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.go.set()
        self.accepted = asyncio.Event()
        self.error: Exception | None = None

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        found = await super().append(messages)
        self.accepted.set()
        await self.go.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
        return found


@pytest.mark.parametrize("read_before", [False, True])
async def test_what_was_accepted_although_publishing_failed_comes_once(read_before: bool) -> None:
    log, seen = Late(), Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen)
        await bus.publish(note("first"))
        await asyncio.sleep(0.05)
        log.error = Unavailable("the server has not answered in time")
        if read_before:
            log.go.clear()
        message = note("a")
        publishing = asyncio.create_task(bus.publish(message))
        await asyncio.sleep(0.05)
        log.go.set()
        with pytest.raises(Unavailable):
            await publishing
        assert not await bus.publish(message), "it was accepted the first time"
        await until(lambda: len(seen.texts) == 2)
        await bus.publish(note("last"))
        await until(lambda: "last" in seen.texts)
        await asyncio.sleep(0.05)
        assert seen.texts == ["first", "a", "last"]


async def test_a_publisher_that_is_cancelled_keeps_nothing_that_was_accepted_from_anybody() -> None:
    log, seen = MemoryLog(), Seen()

    def cancels(message: Message) -> None:
        seen(message)
        publishing.cancel()

    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", cancels)
        messages = [note(str(number)) for number in range(3000)]
        publishing = asyncio.create_task(bus.publish_many(messages))
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert not any(await bus.publish_many(messages))
        await until(lambda: len(seen.texts) >= 3000)
        await asyncio.sleep(0.05)
        assert sorted(map(int, seen.texts)) == list(range(3000))


async def test_who_subscribes_while_a_message_is_being_accepted_gets_it_once_at_most() -> None:
    log, seen = Late(), Seen()
    log.go.clear()
    async with Bus(log=log) as bus:
        end = log.end

        async def end_before() -> str:  # as of a reader whose turn comes before that of the writer
            log.end = end  # type: ignore[method-assign]
            return "0"

        log.end = end_before  # type: ignore[method-assign]
        publishing = asyncio.create_task(bus.publish(note("a")))
        await log.accepted.wait()
        bus.subscribe("test.noted", seen)
        await asyncio.sleep(0.05)
        log.go.set()
        assert await publishing
        await bus.publish(note("b"))
        await until(lambda: "b" in seen.texts)
        await asyncio.sleep(0.05)
        assert seen.texts == ["a", "b"]


class Defective(MemoryLog):
    """A log with a defect, which shows once: where it is put."""

    defect = ""

    def _check(self, where: str) -> None:
        if self.defect == where:
            self.defect = ""
            raise ValueError("a defect")

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        self._check("claim")
        return await super().claim(group, consumer, limit, tract)

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        self._check("acknowledge")
        await super().acknowledge(group, deliveries)

    async def read(self, after: str | None, limit: int, pattern: str = "**") -> list[Entry]:
        self._check("read")
        return await super().read(after, limit, pattern)

    async def changed(self, timeout_s: float) -> None:
        self._check("changed")
        await super().changed(timeout_s)


@pytest.mark.parametrize("where", ["claim", "acknowledge", "read", "changed"])
async def test_a_defect_of_the_log_stops_nothing(where: str) -> None:
    log, seen, worked = Defective(), Seen(), Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen)
        bus.subscribe("test.noted", worked, group="workers", lease_s=0.3)
        await bus.publish(note("before"))
        await until(lambda: worked.texts)
        await asyncio.sleep(0.05)
        log.defect = where
        await log.append([note("a")])
        await until(lambda: not log.defect)
        await log.append([note("b")])
        await until(lambda: "b" in seen.texts and "b" in worked.texts)
        async with asyncio.timeout(20):
            while (await group_of(log)).handled < 3:
                await asyncio.sleep(0.01)
        assert seen.texts == ["before", "a", "b"]


async def test_a_group_that_somebody_removed_is_joined_again() -> None:
    log, seen = MemoryLog(), Seen()
    async with Bus(log=log) as bus:
        bus.subscribe("test.noted", seen, group="workers")
        await bus.publish(note("a"))
        await until(lambda: seen.texts == ["a"])
        await log.leave("workers")
        async with asyncio.timeout(20):
            while "b" not in seen.texts:
                await bus.publish(note("b"))
                await asyncio.sleep(0.05)


async def test_a_breaker_that_never_tries_again_keeps_nothing_from_the_rest_of_the_group(log: Log) -> None:
    seen = Seen()
    async with Bus(log=log) as bus:
        broken = bus.subscribe(
            "test.noted",
            fails,
            group="workers",
            retry=Retry(9, AT_ONCE),
            breaker=BreakerPolicy(in_a_row=1, backoff=NEVER),
            lease_s=0.5,
        )
        await bus.publish_many([note(letter) for letter in "abc"])
        await until(lambda: broken.stats().breakers[Tract.INTERNAL] is State.OPEN)
        bus.subscribe("test.noted", seen, group="workers", lease_s=0.5)
        await until(lambda: len(seen.texts) == 3)
        assert sorted(seen.texts) == ["a", "b", "c"]
        await broken.close()
