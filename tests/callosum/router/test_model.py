"""Routers against plain models: exact order, and what must hold however tasks wait and are cancelled."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from callosum.router.test_router import message as made_message
from callosum.router.test_router import numbers
from support.router_kernel import CORES, core_opener
from synapse.callosum.message import Message, Tract
from synapse.callosum.router import router as router_module
from synapse.callosum.router.router import Closed, Empty, Full, Router

NOON = 1_000_000.0
TRACTS = st.sampled_from(Tract)
PRIORITIES = st.sampled_from((0, 4, 5, 9))
LIVES = st.one_of(st.none(), st.integers(-1, 3))
"""Seconds that a message has left when it is put, if it has a deadline."""


class Plain:
    """A router as its promise says it: a list of what waits, searched anew every time."""

    def __init__(self, capacity: int, share: int) -> None:
        self.capacity, self.share = capacity, share
        self.waiting: list[Message] = []
        self.streak = 0

    def put(self, message: Message) -> bool:
        same = [one for one in self.waiting if (one.tract, one.priority) == (message.tract, message.priority)]
        if len(same) < self.capacity:
            self.waiting.append(message)
        return len(same) < self.capacity

    def next(self) -> Message:
        tracts = {one.tract for one in self.waiting}
        internal = tracts == {Tract.INTERNAL} or (len(tracts) == 2 and self.streak >= self.share)
        self.streak = self.streak + 1 if len(tracts) == 2 and not internal else 0
        candidates = [one for one in self.waiting if one.tract == Tract(internal)]
        found = max(candidates, key=lambda one: one.priority)  # the first of those that are equal
        self.waiting.remove(found)
        return found


class OrderMachine(RuleBasedStateMachine):
    """Every put, get and batch does what the plain model does."""

    core = ""

    @initialize(capacity=st.integers(1, 4), share=st.integers(1, 4))
    def begin(self, capacity: int, share: int) -> None:
        self.now = NOON
        self.expired: list[Message] = []
        self.expected_expired: list[Message] = []
        self.count = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(router_module, "open_core", core_opener(self.core))
            self.router = Router(capacity, share, on_expired=self.expired.append, clock=lambda: self.now)
        self.plain = Plain(capacity, share)

    def new(self, tract: Tract, priority: int, life: int | None) -> Message:
        self.count += 1
        return made_message(tract, priority, self.count, None if life is None else self.now + life)

    def expected(self, limit: int) -> list[Message]:
        given: list[Message] = []
        while self.plain.waiting and len(given) < limit:
            found = self.plain.next()
            (self.expected_expired if found.expired(self.now) else given).append(found)
        return given

    @rule(tract=TRACTS, priority=PRIORITIES, life=LIVES)
    def put(self, tract: Tract, priority: int, life: int | None) -> None:
        new = self.new(tract, priority, life)
        if self.plain.put(new):
            self.router.put_nowait(new)
        else:
            with pytest.raises(Full):
                self.router.put_nowait(new)

    @rule(kinds=st.lists(st.tuples(TRACTS, PRIORITIES, LIVES), max_size=12))
    def put_many(self, kinds: list[tuple[Tract, int, int | None]]) -> None:
        batch = [self.new(*kind) for kind in kinds]
        expected = 0
        while expected < len(batch) and self.plain.put(batch[expected]):
            expected += 1
        assert self.router.put_many_nowait(batch) == expected

    @rule()
    def get(self) -> None:
        expected = self.expected(1)
        if expected:
            assert numbers([self.router.get_nowait()]) == numbers(expected)
        else:
            with pytest.raises(Empty):
                self.router.get_nowait()

    @rule(limit=st.integers(1, 15))
    def get_many(self, limit: int) -> None:
        assert numbers(self.router.get_many_nowait(limit)) == numbers(self.expected(limit))

    @rule(seconds=st.integers(1, 2))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def it_has_what_the_model_has(self) -> None:
        assert len(self.router) == len(self.plain.waiting)
        assert numbers(self.expired) == numbers(self.expected_expired)
        depths: dict[tuple[Tract, int], int] = defaultdict(int)
        for one in self.plain.waiting:
            depths[one.tract, one.priority] += 1
        assert self.router.depths() == depths


class WaitingMachine(RuleBasedStateMachine):
    """Tasks that put and get, and are cancelled at any moment: nothing is lost or given twice, and nobody is forgotten.

    Time passes for the tasks in `settle` only, so that much can happen between two of their steps.
    """

    core = ""

    @initialize(capacity=st.integers(1, 3))
    def begin(self, capacity: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.capacity = capacity
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(router_module, "open_core", core_opener(self.core))
            self.router = Router(capacity, on_expired=lambda message: None)
        self.count = 0
        self.accepted: list[int] = []
        self.given: list[Message] = []
        self.getting: list[asyncio.Task[None]] = []
        self.putting: list[asyncio.Task[None]] = []
        self.tract_of: dict[asyncio.Task[None], Tract] = {}

    def new(self, tract: Tract) -> Message:
        self.count += 1
        return made_message(tract, 4, self.count)

    async def put_one(self, message: Message) -> None:
        await self.router.put(message)
        self.accepted += numbers([message])

    async def get_some(self, limit: int) -> None:
        self.given += [await self.router.get()] if limit == 1 else await self.router.get_many(limit)

    @rule(tract=TRACTS)
    def put(self, tract: Tract) -> None:
        self.putting.append(self.loop.create_task(self.put_one(self.new(tract))))
        self.tract_of[self.putting[-1]] = tract

    @rule(limit=st.integers(1, 3))
    def get(self, limit: int) -> None:
        self.getting.append(self.loop.create_task(self.get_some(limit)))

    @rule(tract=TRACTS)
    def put_at_once(self, tract: Tract) -> None:
        new = self.new(tract)
        try:
            self.router.put_nowait(new)
        except (Full, Closed):
            return
        self.accepted += numbers([new])

    @rule(tract=TRACTS, count=st.integers(1, 4))
    def put_batch_at_once(self, tract: Tract, count: int) -> None:
        batch = [self.new(tract) for _ in range(count)]
        try:
            self.accepted += numbers(batch[: self.router.put_many_nowait(batch)])
        except Closed:
            return

    @rule(limit=st.integers(1, 3))
    def get_at_once(self, limit: int) -> None:
        self.given += self.router.get_many_nowait(limit)

    @rule(data=st.data(), rounds=st.integers(0, 2))
    def cancel(self, data: st.DataObject, rounds: int) -> None:
        running = [task for task in self.getting + self.putting if not task.done()]
        if running:
            data.draw(st.sampled_from(running)).cancel()
        self.run(rounds)

    @rule(rounds=st.integers(1, 3))
    def step(self, rounds: int) -> None:
        self.run(rounds)

    @rule()
    def settle(self) -> None:
        self.run(30)
        if any(not task.done() for task in self.getting):
            assert not len(self.router), "somebody waits for a message, and there is one"
            assert not self.router.closed
        for task in self.putting:
            if not task.done():
                assert self.router.depth(self.tract_of[task], 4) == self.capacity, "somebody waits, and there is room"
                assert not self.router.closed

    @precondition(lambda self: self.count > 10)
    @rule()
    def close(self) -> None:
        self.router.close()

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.loop.run_until_complete(asyncio.sleep(0))

    @invariant()
    def every_queue_keeps_its_bound(self) -> None:
        assert all(depth <= self.capacity for depth in self.router.depths().values())

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.run(30)
        self.router.close()
        self.run(30)
        self.given += self.router.get_many_nowait(10**6)
        self.run(5)
        self.loop.close()
        for task in self.getting + self.putting:
            if not task.cancelled():
                assert isinstance(task.exception(), Closed | None)
        given = numbers(self.given)
        assert sorted(given) == sorted(self.accepted), "what was accepted, and nothing else, was given once"
        for tract in Tract:
            of_tract = numbers([one for one in self.given if one.tract == tract])
            assert of_tract == [number for number in self.accepted if number in set(of_tract)], "in order"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("machine", [OrderMachine, WaitingMachine])
def test_a_router_does_what_its_model_does(machine: type[RuleBasedStateMachine], core: str) -> None:
    with_core = cast("type[RuleBasedStateMachine]", type(f"{machine.__name__}_{core}", (machine,), {"core": core}))
    run_state_machine_as_test(with_core, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
