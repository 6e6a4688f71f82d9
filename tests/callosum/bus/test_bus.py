"""A bus within one process: who gets what, in which order, and what happens to what fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from callosum.bus.handlers import AT_ONCE, NEVER, ONCE, STUBBORN, Gate, Payloads, Seen, fails, text, turns, until
from callosum.log.log_backends import note
from synapse.callosum.bus.bus import Bus
from synapse.callosum.bus.delivery.backoff import Backoff, Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy, State
from synapse.callosum.bus.events import BreakerClosed, BreakerOpened, Died
from synapse.callosum.message import Message, Tract
from synapse.callosum.router.router import Full
from synapse.errors import Conflict, InvalidInput, NotFound, TimedOut, Unavailable
from synapse.evidence import Evidence


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    """An open bus without a log."""
    async with Bus() as bus:
        yield bus


# who gets what


async def test_everybody_whose_pattern_matches_gets_a_message_and_nobody_else(bus: Bus) -> None:
    exact, any_word, everything, other = Seen(), Seen(), Seen(), Seen()
    bus.subscribe("chat.turn.finished", exact)
    bus.subscribe("chat.*.finished", any_word)
    bus.subscribe("**", everything)
    bus.subscribe("chat.turn", other)
    await bus.publish(note("a", "chat.turn.finished"))
    await bus.publish(note("b", "chat.tool.finished"))
    assert await bus.drain(5)
    assert (exact.texts, any_word.texts, everything.texts, other.texts) == (["a"], ["a", "b"], ["a", "b"], [])


async def test_publishing_at_once_one_by_one_and_many_all_keep_the_order(bus: Bus) -> None:
    seen = Seen()
    bus.subscribe("test.noted", seen)
    bus.publish_nowait(note("0"))
    await bus.publish(note("1"))
    assert await bus.publish_many([note(str(number)) for number in range(2, 3000)]) == [True] * 2998
    assert await bus.drain(5)
    assert seen.texts == [str(number) for number in range(3000)]


async def test_handlers_may_be_asynchronous_and_several_messages_go_at_a_time_where_asked_for(bus: Bus) -> None:
    one, three = Gate(), Gate()
    bus.subscribe("test.noted", one)
    bus.subscribe("test.noted", three, concurrency=3)
    await bus.publish_many([note(letter) for letter in "abcd"])
    await turns()
    assert (one.begun, three.begun) == (["a"], ["a", "b", "c"])
    one.open(4)
    three.open(4)
    assert await bus.drain(5)
    assert one.ended == three.ended == ["a", "b", "c", "d"]


async def test_what_a_person_waits_for_goes_first_then_what_is_urgent(bus: Bus) -> None:
    gate = Gate()
    bus.subscribe("test.noted", gate)
    await bus.publish(note("first"))
    await turns()
    for name, tract, priority in [
        ("internal", Tract.INTERNAL, 4),
        ("internal urgent", Tract.INTERNAL, 9),
        ("external", Tract.EXTERNAL, 4),
        ("external urgent", Tract.EXTERNAL, 9),
    ]:
        await bus.publish(note(name, tract=tract, priority=priority))
    gate.open(5)
    assert await bus.drain(5)
    assert gate.ended == ["first", "external urgent", "external", "internal urgent", "internal"]


async def test_each_message_goes_to_one_of_a_group_and_to_every_subscription_outside_it(bus: Bus) -> None:
    one, two, outside = Seen(), Seen(), Seen()
    bus.subscribe("test.noted", one, group="workers")
    bus.subscribe("test.noted", two, group="workers")
    bus.subscribe("test.noted", outside)
    sent = [str(number) for number in range(100)]
    await bus.publish_many([note(name) for name in sent])
    assert await bus.drain(5)
    assert sorted(one.texts + two.texts, key=int) == outside.texts == sent
    assert len(one.texts) == len(two.texts) == 50


async def test_a_group_gives_to_those_who_have_less_to_do(bus: Bus) -> None:
    stuck, free = Gate(), Seen()
    bus.subscribe("test.noted", stuck, group="workers")
    bus.subscribe("test.noted", free, group="workers")
    for number in range(100):
        await bus.publish(note(str(number)))
        await turns(3)
    assert len(stuck.begun) == 1 and len(free.texts) >= 97
    stuck.open(100)


async def test_who_closes_gets_nothing_more(bus: Bus) -> None:
    seen = Seen()
    subscription = bus.subscribe("test.noted", seen)
    await bus.publish(note("before"))
    assert await subscription.close(5) == 0
    await bus.publish(note("after"))
    assert await bus.drain(5)
    assert seen.texts == ["before"]


async def test_what_one_of_a_group_did_not_handle_goes_to_the_others_when_it_closes(bus: Bus) -> None:
    gate, other = Gate(), Seen()
    leaving = bus.subscribe("test.noted", gate, group="workers", retry=ONCE)
    await bus.publish_many([note(letter) for letter in "abc"])
    await turns()
    bus.subscribe("test.noted", other, group="workers")
    gate.open()
    assert await leaving.close() == 0
    assert await bus.drain(5)
    assert (gate.ended, other.texts) == (["a"], ["b", "c"])


async def test_closing_says_how_many_messages_are_forgotten_and_cancels_a_handler_that_takes_too_long(bus: Bus) -> None:
    gate = Gate()
    subscription = bus.subscribe("test.noted", gate)
    await bus.publish_many([note(letter) for letter in "abc"])
    await turns()
    assert await subscription.close() == 3
    assert gate.ended == []


async def test_a_handler_may_close_its_own_subscription(bus: Bus) -> None:
    seen: list[str] = []

    async def once(message: Message) -> None:
        seen.append(text(message))
        await subscription.close()

    subscription = bus.subscribe("test.noted", once)
    await bus.publish_many([note("a"), note("b")])
    assert await bus.drain(5)
    assert seen == ["a"]


async def test_what_fails_after_its_handler_has_closed_the_subscription_is_a_dead_letter(bus: Bus) -> None:
    async def once(message: Message) -> None:
        await subscription.close()
        raise ValueError("too late")

    subscription = bus.subscribe("test.noted", once)
    await bus.publish(note("a"))
    async with asyncio.timeout(20):
        while not (letters := await bus.dead()):
            await asyncio.sleep(0.005)
    assert [letter.error for letter in letters] == ["ValueError: too late"]


async def test_leaving_the_bus_handles_what_is_on_its_way() -> None:
    seen = Seen()
    async with Bus() as bus:
        bus.subscribe("test.noted", seen, retry=Retry(3, AT_ONCE))
        await bus.publish_many([note(letter) for letter in "abc"])
    assert seen.texts == ["a", "b", "c"]


# no loss, no delay


async def test_a_slow_subscriber_delays_nobody_else(bus: Bus) -> None:
    slow, quick = Gate(), Seen()
    bus.subscribe("test.noted", slow, capacity=10_000)
    bus.subscribe("test.noted", quick)
    await bus.publish_many([note(str(number)) for number in range(2000)])
    await turns(100)
    assert len(quick.texts) == 2000
    assert len(slow.begun) == 1
    slow.open(2000)


async def test_a_slow_plain_handler_lets_the_others_go_on_after_each_message(bus: Bus) -> None:
    order: list[str] = []

    def slow(message: Message) -> None:
        time.sleep(0.003)
        order.append("slow")

    bus.subscribe("test.noted", slow)
    bus.subscribe("test.noted", lambda message: order.append("quick"))
    for number in range(40):
        bus.publish_nowait(note(str(number)))
    assert await bus.drain(5)
    for number in range(3):
        bus.publish_nowait(note(str(number)))
    assert await bus.drain(5)
    assert order[-6:].index("quick") <= 2, "a burst of slow messages is one message long by now"


async def test_what_finds_no_room_becomes_a_dead_letter_of_that_subscription_alone(bus: Bus) -> None:
    full, roomy, dead = Gate(), Seen(), Payloads()
    bus.subscribe("test.noted", full, capacity=2, name="full")
    bus.subscribe("test.noted", roomy)
    bus.subscribe("callosum.dead", dead)
    await bus.publish(note("taken"))
    await turns()
    for letter in "abcd":
        bus.publish_nowait(note(letter))
    await turns()
    assert roomy.texts == ["taken", "a", "b", "c", "d"]
    letters = await bus.dead()
    assert [(one.group, one.reason, one.attempts, text(one.message)) for one in letters] == [
        ("full", "overflow", 0, "d"),
        ("full", "overflow", 0, "c"),
    ]
    assert [(died.group, died.reason, died.topic) for died in dead.found] == [("full", "overflow", "test.noted")] * 2
    full.open(3)
    assert await bus.drain(5)
    assert await bus.replay() == 2
    full.open(2)
    assert await bus.drain(5)
    assert full.ended[:3] == ["taken", "a", "b"] and sorted(full.ended[3:]) == ["c", "d"]


async def test_where_it_is_asked_for_publishing_waits_for_room(bus: Bus) -> None:
    gate = Gate()
    bus.subscribe("test.noted", gate, capacity=2, overflow="wait")
    everybody = Seen()
    bus.subscribe("**", everybody)
    await bus.publish_many([note("taken")])
    await turns()
    bus.publish_nowait(note("a"))
    bus.publish_nowait(note("b"))
    with pytest.raises(Full):
        bus.publish_nowait(note("refused"))
    waiting = [asyncio.create_task(bus.publish(note(letter))) for letter in "cde"]
    await turns()
    assert not any(task.done() for task in waiting)
    waiting[1].cancel()
    gate.open(10)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await bus.drain(5)
    assert gate.ended == ["taken", "a", "b", "c", "e"]
    assert "refused" not in everybody.texts
    assert await bus.dead() == []


async def test_who_waits_for_room_need_not_wait_for_what_has_expired(bus: Bus) -> None:
    gate = Gate()
    bus.subscribe("test.noted", gate, capacity=1, overflow="wait")
    await bus.publish(note("taken"))
    await turns()
    await bus.publish(note("late", deadline=time.time() + 0.02))
    waiting = asyncio.create_task(bus.publish(note("next")))
    await asyncio.sleep(0.03)
    gate.open(2)
    await asyncio.wait_for(waiting, 5)
    assert await bus.drain(5)
    assert gate.ended == ["taken", "next"]


async def test_publishers_that_wait_are_let_go_when_the_subscription_closes(bus: Bus) -> None:
    subscription = bus.subscribe("test.noted", Gate(), capacity=1, overflow="wait")
    await bus.publish_many([note("a")])
    await turns()
    waiting = asyncio.create_task(bus.publish_many([note("b"), note("c")]))
    await turns()
    assert not waiting.done()
    await subscription.close()
    assert await asyncio.wait_for(waiting, 5) == [True, True]


async def test_a_publisher_that_never_waits_does_not_overrun_a_handler_that_keeps_up(bus: Bus) -> None:
    seen = Seen()
    bus.subscribe("test.noted", seen, capacity=128)
    for number in range(5000):
        await bus.publish(note(str(number)))
    assert await bus.drain(5)
    assert len(seen.texts) == 5000 and await bus.dead() == []


# what fails


async def test_a_message_that_fails_comes_again_behind_those_that_wait(bus: Bus) -> None:
    seen: list[str] = []

    async def first_fails(message: Message) -> None:
        seen.append(text(message))
        if seen == ["a"]:
            raise ValueError("not yet")

    bus.subscribe("test.noted", first_fails, retry=Retry(2, AT_ONCE))
    await bus.publish_many([note(letter) for letter in "abc"])
    assert await bus.drain(5)
    assert seen == ["a", "b", "c", "a"]
    tally = bus.stats().tally
    assert (tally.handled, tally.failed, tally.retried, tally.dead) == (3, 1, 1, 0)


async def test_a_message_that_comes_again_waits_for_room_and_is_not_lost(bus: Bus) -> None:
    gate = Gate()
    failed: list[str] = []

    async def first_fails(message: Message) -> None:
        await gate(message)
        if not failed:
            failed.append(text(message))
            raise ValueError("not yet")

    subscription = bus.subscribe("test.noted", first_fails, capacity=1, retry=Retry(2, AT_ONCE))
    bus.publish_nowait(note("a"))
    await turns()
    bus.publish_nowait(note("urgent", priority=9))
    bus.publish_nowait(note("b"))
    gate.open()
    await until(lambda: gate.begun == ["a", "urgent"])
    await turns()
    assert subscription.stats().retrying == 1, "b has its room"
    gate.open(3)
    assert await bus.drain(20)
    assert gate.ended == ["a", "urgent", "b", "a"]


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError("no"), TimeoutError("no")])
async def test_after_the_last_attempt_it_is_a_dead_letter_that_can_be_replayed(bus: Bus, error: BaseException) -> None:
    attempts, works = 0, False
    died = Payloads()

    async def handle(message: Message) -> None:
        nonlocal attempts
        attempts += 1
        if not works:
            raise error

    bus.subscribe("test.noted", handle, name="picky", retry=Retry(3, AT_ONCE))
    bus.subscribe("callosum.dead", died)
    message = note("a", evidence=Evidence.REPORTED)
    await bus.publish(message)
    assert await bus.drain(5)
    assert attempts == 3
    (letter,) = await bus.dead()
    assert (letter.group, letter.reason, letter.attempts, letter.message) == ("picky", "failed", 3, message)
    assert letter.error == f"{type(error).__name__}: no"
    assert died.found == [
        Died(group="picky", reason="failed", error=letter.error, attempts=3, topic="test.noted", message=message.id)
    ]
    works = True
    assert await bus.replay([letter.id]) == 1
    assert await bus.drain(5)
    assert (attempts, await bus.dead()) == (4, [])


class Unspeakable(Exception):
    """An error that fails to say what it is."""

    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (asyncio.CancelledError("no"), "CancelledError: no"),
        (Unspeakable(), "Unspeakable, which cannot be shown: ValueError"),
        (ValueError("half \ud83d"), "ValueError: half \\ud83d"),
    ],
)
@pytest.mark.parametrize("waits", [False, True], ids=["plain", "async"])
async def test_whatever_a_handler_raises_the_next_message_is_handled(
    bus: Bus, error: BaseException, said: str, waits: bool
) -> None:
    seen = Seen()

    def plain(message: Message) -> None:
        if text(message) == "bad":
            raise error
        seen(message)

    async def handle(message: Message) -> None:
        plain(message)

    bus.subscribe("test.noted", handle if waits else plain, retry=ONCE)
    await bus.publish_many([note("bad"), note("good")])
    assert await bus.drain(5)
    assert seen.texts == ["good"]
    (letter,) = await bus.dead()
    assert letter.error == said


async def test_a_message_past_its_deadline_is_a_dead_letter_and_not_handled(bus: Bus) -> None:
    seen = Seen()
    bus.subscribe("test.noted", seen)
    bus.publish_nowait(note("late", deadline=time.time() - 1))
    bus.publish_nowait(note("in time", deadline=time.time() + 60))
    assert await bus.drain(5)
    await turns()
    assert seen.texts == ["in time"]
    assert [(one.reason, one.attempts) for one in await bus.dead()] == [("deadline", 0)]
    assert bus.stats().tally.expired == 1


async def test_a_dead_letter_about_the_bus_itself_is_kept_and_not_published(bus: Bus) -> None:
    bus.subscribe("callosum.dead", fails, retry=ONCE, breaker=STUBBORN)
    bus.subscribe("test.noted", fails, retry=ONCE)
    await bus.publish(note("a"))
    assert await bus.drain(5)
    assert sorted(one.message.topic for one in await bus.dead()) == ["callosum.dead", "test.noted"]


async def test_only_the_newest_dead_letters_of_the_process_are_kept_and_the_others_counted() -> None:
    async with Bus(most_dead=3) as bus:
        bus.subscribe("test.noted", fails, retry=ONCE, breaker=STUBBORN)
        await bus.publish_many([note(letter) for letter in "abcde"])
        assert await bus.drain(5)
        assert [text(one.message) for one in await bus.dead()] == ["e", "d", "c"]
        assert [text(one.message) for one in await bus.dead(1)] == ["e"]
        assert bus.stats().lost_letters == 2


async def test_replaying_and_dropping_what_does_not_exist_changes_nothing(bus: Bus) -> None:
    bus.subscribe("test.noted", fails, retry=ONCE)
    await bus.publish(note("a"))
    assert await bus.drain(5)
    (letter,) = await bus.dead()
    with pytest.raises(NotFound):
        await bus.replay([letter.id, "another"])
    with pytest.raises(NotFound):
        await bus.drop([letter.id, "another"])
    assert await bus.dead() == [letter]
    assert await bus.drop() == 1
    assert await bus.dead() == []


async def test_a_dead_letter_whose_subscription_is_gone_stays(bus: Bus) -> None:
    subscription = bus.subscribe("test.noted", fails, retry=ONCE)
    await bus.publish(note("a"))
    assert await bus.drain(5)
    await subscription.close()
    assert await bus.replay() == 0
    assert len(await bus.dead()) == 1


# breakers


async def test_an_open_breaker_holds_a_tract_lets_the_other_go_on_and_releases_in_order(bus: Bus) -> None:
    works = False
    seen: list[str] = []

    def handle(message: Message) -> None:
        if message.tract is Tract.INTERNAL and not works:
            raise ValueError("away")
        seen.append(text(message))

    policy = BreakerPolicy(in_a_row=2, backoff=Backoff(base_s=0.05, cap_s=0.05, least=1))
    subscription = bus.subscribe("test.noted", handle, breaker=policy, retry=ONCE)
    changes: list[object] = []
    bus.subscribe("callosum.breaker.*", lambda message: changes.append(message.payload))
    await bus.publish_many([note("x"), note("y")])
    await turns()
    assert subscription.stats().breakers == {Tract.EXTERNAL: State.CLOSED, Tract.INTERNAL: State.OPEN}
    await bus.publish_many([note(str(number), priority=number % 3) for number in range(9)])
    await bus.publish_many([note(letter, tract=Tract.EXTERNAL) for letter in "abc"])
    await turns()
    assert seen == ["a", "b", "c"]
    assert subscription.stats().waiting == 9
    works = True
    assert await bus.drain(5)
    assert seen[3:] == ["2", "5", "8", "1", "4", "7", "0", "3", "6"]
    assert changes == [
        BreakerOpened(subscription="test.noted", tract="internal", error="ValueError: away"),
        BreakerClosed(subscription="test.noted", tract="internal"),
    ]


async def test_a_breaker_that_tries_and_fails_stays_open_and_spends_one_message_a_try(bus: Bus) -> None:
    tries: list[str] = []

    async def handle(message: Message) -> None:
        tries.append(text(message))
        await asyncio.sleep(0)
        raise ValueError("away")

    policy = BreakerPolicy(in_a_row=1, backoff=Backoff(base_s=0.02, cap_s=1000, least=1))
    subscription = bus.subscribe("test.noted", handle, breaker=policy, retry=ONCE, concurrency=4)
    bus.publish_nowait(note("a"))
    await turns()
    await bus.publish_many([note(letter) for letter in "bcdefgh"])
    await asyncio.sleep(0.04)
    assert tries == ["a", "b"], "four workers, one trial"
    assert await subscription.close() == 6


async def test_one_subscription_whose_breaker_is_open_is_passed_over_by_its_group(bus: Bus) -> None:
    good = Seen()
    policy = BreakerPolicy(in_a_row=1, backoff=NEVER)
    bus.subscribe("test.noted", fails, group="workers", breaker=policy, retry=ONCE)
    bus.subscribe("test.noted", good, group="workers")
    await bus.publish_many([note("a"), note("b")])
    await turns()
    await bus.publish_many([note(str(number)) for number in range(10)])
    await turns()
    assert len(good.texts) == 11


# request and reply


async def test_a_request_gets_the_answer_of_a_handler(bus: Bus) -> None:
    requests: list[Message] = []

    def double(message: Message) -> None:
        requests.append(message)
        assert bus.reply(message, note(2 * text(message)).payload, evidence=Evidence.REPORTED)
        assert bus.reply(message, note("a second answer").payload)

    bus.subscribe("math.double", double)
    answers = await asyncio.gather(
        *(bus.request(note(str(number), "math.double", tract=Tract.EXTERNAL, priority=8), 5) for number in range(20))
    )
    assert [text(answer) for answer in answers] == [2 * str(number) for number in range(20)]
    assert {(one.tract, one.priority, one.evidence) for one in answers} == {(Tract.EXTERNAL, 8, Evidence.REPORTED)}
    assert all(message.deadline is not None and message.deadline <= time.time() + 5 for message in requests)


async def test_a_request_that_nobody_answers_times_out(bus: Bus) -> None:
    late: list[Message] = []
    bus.subscribe("math.double", late.append)
    with pytest.raises(TimedOut, match=r"nobody answered math.double within 0.05 s"):
        await bus.request(note("1", "math.double"), 0.05)
    assert bus.reply(late[0], note("2").payload), "it is too late, and no error"


async def test_a_message_that_asks_for_no_answer_gets_none(bus: Bus) -> None:
    assert not bus.reply(note("1"), note("2").payload)


async def test_a_request_ends_when_the_bus_closes() -> None:
    async with Bus() as bus:
        asked = asyncio.create_task(bus.request(note("1", "math.double"), 60))
        await turns()
    with pytest.raises(Unavailable, match="closed before"):
        await asked


# what makes no sense


async def test_what_makes_no_sense_is_refused(bus: Bus) -> None:
    bus.subscribe("a.b", Seen(), name="mine", group="workers")
    with pytest.raises(InvalidInput):
        bus.subscribe("A b", Seen())
    with pytest.raises(InvalidInput):
        bus.subscribe("a.b", Seen(), group="")
    for wrong in ({"capacity": 0}, {"concurrency": 0}, {"lease_s": 0.0}):
        with pytest.raises(InvalidInput):
            bus.subscribe("a.b", Seen(), **wrong)
    with pytest.raises(Conflict, match="mine"):
        bus.subscribe("a.b", Seen(), name="mine")
    with pytest.raises(Conflict, match=r"the pattern a\.b already"):
        bus.subscribe("a.c", Seen(), group="workers")
    assert bus.subscribe("a.b", Seen(), group="workers").name == "workers"
    assert bus.subscribe("a.b", Seen(), group="workers").name == "workers 2"


async def test_a_bus_that_is_not_open_takes_nothing() -> None:
    bus = Bus()
    for _ in range(2):
        with pytest.raises(Unavailable, match="not open"):
            bus.publish_nowait(note("a"))
        with pytest.raises(Unavailable, match="not open"):
            await bus.publish(note("a"))
        with pytest.raises(Unavailable, match="not open"):
            await bus.publish_many([note("a")])
        with pytest.raises(Unavailable, match="not open"):
            bus.subscribe("**", Seen())
        async with bus:
            await bus.publish(note("a"))


async def test_statistics_say_what_waits_and_what_was_done(bus: Bus) -> None:
    gate = Gate()
    subscription = bus.subscribe("test.noted", gate, name="gate")
    await bus.publish_many([note(letter) for letter in "abc"])
    await asyncio.sleep(0.01)
    (stats,) = bus.stats().subscriptions
    assert (stats.name, stats.pattern, stats.group, stats.waiting, stats.running) == ("gate", "test.noted", None, 2, 1)
    assert stats.oldest_s is not None and 0.005 < stats.oldest_s < 60
    gate.open(3)
    await subscription.close(5)
    after = bus.stats()
    assert (after.published, after.tally.handled, after.subscriptions) == (3, 3, ())
