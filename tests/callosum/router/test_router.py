"""A router, with each of its cores: order, bounds, deadlines, waiting, cancelling, closing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from support.router_kernel import CORES, core_opener
from synapse.callosum.message import Message, Tract
from synapse.callosum.router import router as router_module
from synapse.callosum.router.router import Closed, Empty, Full, Router
from synapse.errors import InvalidInput, Overloaded

External, Internal = Tract.EXTERNAL, Tract.INTERNAL
NOON = 1_000_000.0


class Number(BaseModel):
    model_config = ConfigDict(frozen=True)

    number: int = 0


def message(tract: Tract = Internal, priority: int = 4, number: int = 0, deadline: float | None = None) -> Message:
    return Message("test.number", Number(number=number), tract, priority, deadline=deadline)


def numbered(count: int, tract: Tract = Internal, priority: int = 4, first: int = 0) -> list[Message]:
    return [message(tract, priority, number) for number in range(first, first + count)]


def numbers(messages: list[Message]) -> list[Any]:
    return [found.payload.number for found in messages if isinstance(found.payload, Number)]


class Made:
    """Makes routers, and keeps what has expired in them."""

    def __init__(self) -> None:
        self.expired: list[Message] = []
        self.now = NOON

    def __call__(self, capacity: int = 1024, share: int = 8) -> Router:
        return Router(capacity, share, on_expired=self.expired.append, clock=lambda: self.now)


@pytest.fixture(params=CORES)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(router_module, "open_core", core_opener(request.param))
    return Made()


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_within_a_priority_it_is_first_in_first_out(made: Made) -> None:
    router = made()
    for one in numbered(50):
        router.put_nowait(one)
    assert [numbers([router.get_nowait()])[0] for _ in range(50)] == list(range(50))


def test_what_a_person_waits_for_goes_first_and_then_the_higher_priority(made: Made) -> None:
    router = made()
    waiting = [message(tract, priority) for priority in (3, 9, 0) for tract in (Internal, External)]
    assert router.put_many_nowait(waiting) == 6
    given = [router.get_nowait() for _ in waiting]
    assert [(one.tract, one.priority) for one in given] == [
        *((External, 9), (External, 3), (External, 0)),
        *((Internal, 9), (Internal, 3), (Internal, 0)),
    ]


@pytest.mark.parametrize("share", [1, 3, 8])
def test_the_internal_tract_gets_its_share_while_the_external_one_always_has_some(made: Made, share: int) -> None:
    router = made(share=share)
    router.put_many_nowait(numbered(200, External) + numbered(200, Internal, 9))
    given = []
    for _ in range(10 * (share + 1)):
        router.put_nowait(message(External, 9))
        given.append(router.get_nowait().tract)
    assert given == ([External] * share + [Internal]) * 10


def test_a_batch_has_the_order_that_one_by_one_has(made: Made) -> None:
    messages = [message(Tract(n % 3 == 0), n * 7 % 10, n) for n in range(300)]
    one, many = made(), made()
    one.put_many_nowait(messages)
    many.put_many_nowait(messages)
    batches = [many.get_many_nowait(size) for size in (1, 100, 1, 37, 1000)]
    assert numbers([router_given for batch in batches for router_given in batch]) == numbers(
        [one.get_nowait() for _ in messages]
    )


def test_external_messages_given_while_none_waits_inside_count_for_no_share(made: Made) -> None:
    router = made(share=2)
    router.put_many_nowait(numbered(5, External))
    router.get_many_nowait(2)
    router.put_nowait(message(Internal))
    assert [one.tract for one in router.get_many_nowait(9)] == [External, External, Internal, External]


def test_a_full_queue_says_so_and_the_others_still_take(made: Made) -> None:
    router = made(capacity=2)
    router.put_many_nowait(numbered(2))
    with pytest.raises(Full, match="2 messages of the internal tract and priority 4 wait"):
        router.put_nowait(message())
    assert issubclass(Full, Overloaded)
    router.put_nowait(message(priority=5))
    router.put_nowait(message(External))
    router.get_many_nowait(3)
    router.put_nowait(message(number=7))
    assert numbers(router.get_many_nowait(9)) == [1, 7]


def test_a_queue_keeps_its_order_when_it_is_filled_and_emptied_again_and_again(made: Made) -> None:
    router = made(capacity=3)
    given = []
    for first in range(0, 300, 2):
        router.put_many_nowait(numbered(2, first=first))
        given += router.get_many_nowait(1 + first % 4)
        if router.depth(Internal, 4) > 1:
            given.append(router.get_nowait())
    assert numbers(given + router.get_many_nowait(9)) == list(range(300))


def test_a_batch_is_queued_up_to_the_first_message_without_room(made: Made) -> None:
    router = made(capacity=2)
    batch = [message(External, 1), message(Internal, 1), *numbered(3, External, 1), message(Internal, 1)]
    assert router.put_many_nowait(tuple(batch)) == 3
    assert router.depths() == {(External, 1): 2, (Internal, 1): 1}
    assert len(router) == 3


def test_nothing_to_give_is_said_at_once(made: Made) -> None:
    router = made()
    with pytest.raises(Empty):
        router.get_nowait()
    assert router.get_many_nowait(5) == []


@pytest.mark.parametrize("wrong", [lambda made: made(capacity=0), lambda made: made(share=0)])
def test_a_router_has_room_and_a_share(made: Made, wrong: Callable[[Made], Router]) -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        wrong(made)


def test_a_batch_of_none_cannot_be_asked_for(made: Made) -> None:
    with pytest.raises(InvalidInput, match="a limit is at least 1"):
        made().get_many_nowait(0)


def test_a_message_that_was_changed_into_another_lane_is_refused(made: Made) -> None:
    router, changed = made(), message()
    changed.lane = 40
    with pytest.raises(InvalidInput, match="no lane 40"):
        router.put_nowait(changed)
    assert len(router) == 0


def test_what_has_expired_is_handed_over_and_never_given(made: Made) -> None:
    router = made()
    router.put_many_nowait(
        [
            message(External, number=1, deadline=NOON - 1),
            message(External, number=2, deadline=NOON),
            message(External, number=3, deadline=NOON + 1),
            message(Internal, number=4, deadline=NOON - 1),
            message(Internal, number=5),
        ]
    )
    assert numbers([router.get_nowait()]) == [3]
    assert numbers(made.expired) == [1, 2]
    assert numbers(router.get_many_nowait(5)) == [5]
    assert numbers(made.expired) == [1, 2, 4]
    with pytest.raises(Empty):
        router.get_nowait()


def test_a_deadline_may_pass_while_the_message_waits(made: Made) -> None:
    router = made()
    router.put_many_nowait([message(number=n, deadline=NOON + n) for n in range(5)])
    made.now = NOON + 2
    assert numbers(router.get_many_nowait(9)) == [3, 4]
    assert numbers(made.expired) == [0, 1, 2]


def test_a_batch_has_its_full_size_although_some_have_expired(made: Made) -> None:
    router = made()
    router.put_many_nowait([message(number=n, deadline=NOON - 1 if n % 2 else None) for n in range(20)])
    assert numbers(router.get_many_nowait(6)) == [0, 2, 4, 6, 8, 10]


def test_thousands_of_expired_messages_in_a_row_are_no_trouble(made: Made) -> None:
    router = made(capacity=20_000)
    router.put_many_nowait([message(deadline=NOON - 1)] * 20_000)
    with pytest.raises(Empty):
        router.get_nowait()
    assert len(made.expired) == 20_000


async def test_room_that_an_expired_message_leaves_goes_to_who_waits_for_it(made: Made) -> None:
    router = made(capacity=1)
    router.put_nowait(message(deadline=NOON - 1))
    late = asyncio.create_task(router.put(message(number=1)))
    await settle()
    with pytest.raises(Empty):
        router.get_nowait()
    await late
    assert numbers([router.get_nowait()]) == [1]


def test_who_is_handed_an_expired_message_may_put_one_in_its_place(made: Made) -> None:
    router = Router(1, on_expired=lambda old: router.put_nowait(message(number=9)), clock=lambda: NOON)
    router.put_nowait(message(deadline=NOON - 1))
    assert numbers([router.get_nowait()]) == [9]


async def test_get_waits_for_a_message(made: Made) -> None:
    router = made()
    first, second = asyncio.create_task(router.get()), asyncio.create_task(router.get_many(5))
    await settle()
    assert not first.done()
    router.put_many_nowait(numbered(3))
    assert numbers([await first]) == [0]
    assert numbers(await second) == [1, 2]


async def test_two_puts_in_a_row_wake_two_who_wait(made: Made) -> None:
    router = made()
    tasks = [asyncio.create_task(router.get()) for _ in range(2)]
    await settle()
    router.put_nowait(message(number=1))
    router.put_nowait(message(number=2))
    assert numbers(await asyncio.wait_for(asyncio.gather(*tasks), 5)) == [1, 2]


async def test_who_was_woken_for_nothing_stays_first(made: Made) -> None:
    router = made()
    tasks = [asyncio.create_task(router.get()) for _ in range(2)]
    await settle()
    router.put_nowait(message())
    router.get_nowait()  # before the task that was woken could
    await settle()
    router.put_nowait(message(number=5))
    assert numbers([await asyncio.wait_for(tasks[0], 5)]) == [5]
    tasks[1].cancel()


async def test_a_cancelled_get_takes_nothing_even_if_it_was_woken(made: Made) -> None:
    router = made()
    woken, other = asyncio.create_task(router.get()), asyncio.create_task(router.get())
    waiting = asyncio.create_task(router.get())
    await settle()
    waiting.cancel()
    router.put_nowait(message(number=1))
    woken.cancel()
    assert numbers([await asyncio.wait_for(other, 5)]) == [1]
    assert woken.cancelled()
    assert waiting.cancelled()


async def test_put_waits_for_room_and_those_who_wait_get_it_in_order(made: Made) -> None:
    router = made(capacity=1)
    router.put_nowait(message(number=0))
    tasks = [asyncio.create_task(router.put(message(number=n))) for n in (1, 2, 3)]
    await settle()
    given = []
    for _ in range(4):
        given.append(router.get_nowait())
        await settle()
        assert len(router) <= 1
    assert numbers(given) == [0, 1, 2, 3]
    await asyncio.gather(*tasks)


async def test_room_for_several_reaches_those_who_came_while_others_were_woken(made: Made) -> None:
    router = made(capacity=3)
    router.put_many_nowait(numbered(3))
    first = asyncio.create_task(router.put(message(number=3)))
    await settle()
    second = asyncio.create_task(
        router.put(message(number=4))
    )  # it begins after the first is woken, and before it runs
    router.get_many_nowait(3)
    await asyncio.wait_for(asyncio.gather(first, second), 5)
    assert numbers(router.get_many_nowait(9)) == [3, 4]


async def test_a_cancelled_put_has_queued_nothing_and_leaves_its_place_to_the_next(made: Made) -> None:
    router = made(capacity=1)
    router.put_nowait(message(number=0))
    waiting, woken, other = (asyncio.create_task(router.put(message(number=n))) for n in (1, 2, 3))
    await settle()
    waiting.cancel()
    await settle()
    router.get_nowait()
    woken.cancel()
    await asyncio.wait_for(other, 5)
    assert numbers(router.get_many_nowait(9)) == [3]


async def test_put_many_waits_where_there_is_no_room(made: Made) -> None:
    router = made(capacity=4)
    putting = asyncio.create_task(router.put_many(numbered(50)))
    given: list[Message] = []
    while len(given) < 50:
        given += await asyncio.wait_for(router.get_many(3), 5)
        assert len(router) <= 4
    await putting
    assert numbers(given) == list(range(50))


async def test_a_closed_router_takes_nothing_and_gives_what_it_has(made: Made) -> None:
    router = made(capacity=2)
    router.put_many_nowait(numbered(2))
    putting = asyncio.create_task(router.put(message()))
    await settle()
    late = asyncio.create_task(router.put(message()))  # it begins after the other is woken, and before it runs
    router.close()
    assert router.closed
    for refused in (putting, late, router.put(message()), router.put_many([message(External)])):
        with pytest.raises(Closed):
            await refused
    for put in (router.put_nowait, lambda one: router.put_many_nowait([one])):
        with pytest.raises(Closed):
            put(message(External))
    assert numbers([await router.get(), *await router.get_many(5)]) == [0, 1]
    for gone in (router.get(), router.get_many(5)):
        with pytest.raises(Closed):
            await gone
    with pytest.raises(Closed):
        router.get_nowait()


async def test_who_waits_for_a_message_is_told_that_the_router_closes(made: Made) -> None:
    router = made()
    tasks = [asyncio.create_task(router.get()), asyncio.create_task(router.get_many(3))]
    await settle()
    router.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(result) for result in results] == [Closed, Closed]


def test_it_says_how_old_the_oldest_message_is(made: Made) -> None:
    router = made()
    assert router.oldest() is None
    old, new = message(Internal), message(External)
    old.number -= 5000 << 80
    router.put_many_nowait([new, old])
    assert router.oldest() == old.time == pytest.approx(new.time - 5, abs=0.5)


def test_a_router_holds_on_to_what_is_queued_and_to_nothing_else(made: Made) -> None:
    router = made()
    messages = numbered(6)
    payloads = [weakref.ref(one.payload) for one in messages]
    router.put_many_nowait(messages[:3])
    for one in messages[3:]:
        router.put_nowait(one)
    del messages, one
    given = router.get_many_nowait(2)
    assert all(payload() is not None for payload in payloads)
    del given
    assert [payload() is not None for payload in payloads] == [False, False, True, True, True, True]
    del router
    gc.collect()
    assert [payload() for payload in payloads] == [None] * 6
