"""Publishing from anywhere, and the outbox that carries what is published to where it can be kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from synapse.callosum.message import Message, Tract
from synapse.callosum.payloads import Payload
from synapse.callosum.publish import publishing
from synapse.callosum.publish.hotpath_news import HotPathNews, publish_news
from synapse.callosum.publish.outbox import BATCH, Outbox
from synapse.callosum.publish.publishing import connect, publish
from synapse.errors import Corrupt, TooLarge, Unavailable
from synapse.evidence import Evidence
from synapse.hotpath.news import News


class Said(Payload):
    number: int


@pytest.fixture(autouse=True)
def _nobody_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that other tests share may record in this process."""
    monkeypatch.setattr(publishing, "_outlets", ())


@pytest.fixture
def heard() -> Iterator[list[Message]]:
    """What is published while the test runs."""
    messages: list[Message] = []
    disconnect = connect(messages.append)
    yield messages
    disconnect()


def numbers(messages: Sequence[Message]) -> list[int]:
    return [message.payload.number for message in messages]  # type: ignore[attr-defined]


def test_every_outlet_gets_a_message_until_it_is_disconnected(heard: list[Message]) -> None:
    second: list[Message] = []
    disconnect = connect(second.append)
    publish("a.b", Said(number=1), tract=Tract.EXTERNAL, priority=9, evidence=Evidence.REPORTED)
    disconnect()
    publish("a.b", Said(number=2))
    assert numbers(heard) == [1, 2]
    assert second == heard[:1]
    first, last = heard
    assert (first.topic, first.tract, first.priority, first.evidence) == ("a.b", Tract.EXTERNAL, 9, Evidence.REPORTED)
    assert (last.tract, last.priority, last.evidence) == (Tract.INTERNAL, 4, Evidence.KNOWN)


def test_without_an_outlet_nothing_happens_not_even_a_check() -> None:
    with capture_logs() as logs:
        publish("no topic", Said(number=1))
    assert logs == []


@pytest.mark.usefixtures("heard")
def test_what_goes_wrong_is_logged_and_does_not_fail_the_work() -> None:
    def fails(message: Message) -> None:
        raise RuntimeError("the log is away")

    disconnect = connect(fails)
    with capture_logs() as logs:
        publish("a.b", Said(number=1))
    disconnect()
    with capture_logs() as others:
        publish("no topic", Said(number=1))
    assert [entry["event"] for entry in logs + others] == ["events.not_published"] * 2


def test_news_of_the_hot_paths_become_messages_and_warnings_more_urgent_ones(heard: list[Message]) -> None:
    publish_news(News("held", "total", "b1", "an answer did not agree"))
    publish_news(News("promoted", "total", "b1", "canary"))
    assert [(message.topic, message.priority) for message in heard] == [("hotpath.held", 7), ("hotpath.promoted", 4)]
    assert heard[0].payload == HotPathNews(path="total", build="b1", message="an answer did not agree")


class Taker:
    """Takes batches, as far as the test lets it."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.batches: list[int] = []
        self.problem: Callable[[Sequence[Message]], Exception | None] = lambda batch: None

    async def deliver(self, batch: Sequence[Message]) -> None:
        await asyncio.sleep(0)
        if (problem := self.problem(batch)) is not None:
            raise problem
        self.batches.append(len(batch))
        self.taken += batch


@pytest.fixture
def taker() -> Taker:
    return Taker()


@asynccontextmanager
async def opened(taker: Taker, capacity: int = 10_000) -> AsyncIterator[Outbox]:
    outbox = Outbox(taker.deliver, capacity=capacity, first_pause=0.01)
    outbox.start()
    try:
        yield outbox
    finally:
        await outbox.close(5)


def said(number: int) -> Message:
    return Message("a.b", Said(number=number))


async def test_messages_are_handed_on_in_order_and_in_batches(taker: Taker) -> None:
    async with opened(taker) as outbox:
        for number in range(2 * BATCH + 1):
            outbox.put(said(number))
        assert await outbox.settled()
        assert numbers(taker.taken) == list(range(2 * BATCH + 1))
    assert taker.batches == [BATCH, BATCH, 1]


async def test_threads_may_put_messages_and_none_is_lost(taker: Taker) -> None:
    async with opened(taker) as outbox:

        def work(first: int) -> None:
            for number in range(first, first + 500):
                outbox.put(said(number))

        threads = [threading.Thread(target=work, args=(500 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    assert sorted(numbers(taker.taken)) == list(range(2000))
    for first in range(0, 2000, 500):
        mine = [number for number in numbers(taker.taken) if first <= number < first + 500]
        assert mine == sorted(mine)


@pytest.mark.parametrize("problem", [Unavailable("the disk is full"), Corrupt("the file is damaged")])
async def test_what_cannot_be_delivered_now_is_delivered_when_it_can(taker: Taker, problem: Exception) -> None:
    taker.problem = lambda batch: problem
    with capture_logs() as logs:
        async with opened(taker) as outbox:
            outbox.put(said(1))
            assert not await outbox.settled(0.05)
            outbox.put(said(2))
            assert taker.taken == []
            taker.problem = lambda batch: None
            assert await outbox.settled()
    assert numbers(taker.taken) == [1, 2]
    assert [entry["event"] for entry in logs] == ["events.delayed"], "said once, not with every try"


async def test_what_cannot_be_delivered_at_the_end_is_lost_and_the_log_says_why(taker: Taker) -> None:
    taker.problem = lambda batch: Unavailable("the disk is full", hint="make room")
    with capture_logs() as logs:
        async with opened(taker) as outbox:
            outbox.put(said(1))
    assert [entry["event"] for entry in logs] == ["events.delayed", "events.lost"]
    assert (logs[0]["message"], logs[0]["hint"], logs[1]["count"]) == ("the disk is full", "make room", 1)


async def test_the_oldest_give_way_when_too_many_wait_and_the_loss_is_logged(taker: Taker) -> None:
    with capture_logs() as logs:
        async with opened(taker, capacity=3) as outbox:
            for number in range(10):
                outbox.put(said(number))
    assert numbers(taker.taken) == [7, 8, 9]
    assert [(entry["event"], entry["count"]) for entry in logs] == [("events.lost", 7)]


@pytest.mark.parametrize("refusal", [TooLarge("too many bytes"), TypeError("not JSON")])
async def test_a_message_that_is_refused_harms_no_other(taker: Taker, refusal: Exception) -> None:
    taker.problem = lambda batch: refusal if 2 in numbers(batch) else None
    with capture_logs() as logs:
        async with opened(taker) as outbox:
            for number in range(5):
                outbox.put(said(number))
            assert await outbox.settled()
    assert numbers(taker.taken) == [0, 1, 3, 4]
    assert [entry["event"] for entry in logs] == ["events.refused"]


async def test_closing_hands_on_what_is_left(taker: Taker) -> None:
    async with opened(taker) as outbox:
        outbox.put(said(1))
    assert numbers(taker.taken) == [1]


async def test_closing_waits_no_longer_than_it_is_told_and_counts_what_it_loses(taker: Taker) -> None:
    async def never(batch: Sequence[Message]) -> None:
        await asyncio.sleep(3600)

    outbox = Outbox(never)
    outbox.start()
    outbox.put(said(1))
    outbox.put(said(2))
    with capture_logs() as logs:
        async with asyncio.timeout(10):
            await outbox.close(0.05)
    assert [(entry["event"], entry["count"]) for entry in logs] == [("events.lost", 2)]


async def test_a_message_that_comes_after_the_loop_has_ended_is_no_error(taker: Taker) -> None:
    outboxes: list[Outbox] = []

    async def main() -> None:
        outboxes.append(Outbox(taker.deliver))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    await asyncio.to_thread(thread.join)
    outboxes[0].put(said(1))
