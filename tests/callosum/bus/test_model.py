"""A bus against a plain model, step by step: order, priority, bounds, nothing lost and nothing twice."""

from __future__ import annotations

import asyncio
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from callosum.log.log_backends import note
from synapse.callosum.bus.bus import Bus
from synapse.callosum.bus.delivery.backoff import Backoff, Retry
from synapse.callosum.bus.delivery.breaker import BreakerPolicy
from synapse.callosum.message import PRIORITIES, Message, Tract

CAPACITY = 2
ATTEMPTS = 2
SHARE = 8
AT_ONCE = Backoff(base_s=0, cap_s=0)
NO_BREAKER = BreakerPolicy(in_a_row=10**6, failures=10**6, window=10**6)

TRACTS = st.sampled_from(Tract)
PRIORITY = st.sampled_from([0, 4, 9])


class Line:
    """The model of a queue: a list for each tract and priority."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[Tract, int], list[Message]] = {
            (tract, priority): [] for tract in Tract for priority in range(PRIORITIES)
        }
        self.streak = 0

    def put(self, message: Message) -> bool:
        if self.full(message):
            return False
        self.lanes[message.tract, message.priority].append(message)
        return True

    def full(self, message: Message) -> bool:
        return len(self.lanes[message.tract, message.priority]) == CAPACITY

    def waiting(self, tract: Tract) -> list[Message]:
        """What waits of a tract, in its order."""
        return [one for priority in reversed(range(PRIORITIES)) for one in self.lanes[tract, priority]]

    def take(self) -> Message | None:
        """The next message: external first, but one internal after every `SHARE` that it had to let pass."""
        external, internal = self.waiting(Tract.EXTERNAL), self.waiting(Tract.INTERNAL)
        if external and not (internal and self.streak == SHARE):
            self.streak = self.streak + 1 if internal else self.streak
            return self.remove(external[0])
        self.streak = 0
        return self.remove(internal[0]) if internal else None

    def remove(self, message: Message) -> Message:
        self.lanes[message.tract, message.priority].remove(message)
        return message


class BusMachine(RuleBasedStateMachine):
    """One subscription whose handler ends, well or badly, when a rule says so; another that is always quick."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.bus = Bus()
        self.numbers = count()
        self.published: list[Message] = []
        self.handled: list[Message] = []
        self.quick: list[Message] = []
        self.begun: list[Message] = []
        self.ending: asyncio.Future[bool] | None = None
        self.over = False

    async def handle(self, message: Message) -> None:
        if self.over:
            return
        self.begun.append(message)
        self.ending = self.loop.create_future()
        if not await self.ending:
            raise ValueError("told to")
        self.handled.append(message)

    def begin(self, breaker: BreakerPolicy) -> None:
        self.line = Line()
        self.hand: Message | None = None
        self.failures: dict[Message, int] = {}
        self.dead: list[tuple[str, Message]] = []
        self.run_loop(self.bus.__aenter__())
        self.loop.run_until_complete(self.subscribe(breaker))

    async def subscribe(self, breaker: BreakerPolicy) -> None:
        retry = Retry(ATTEMPTS, AT_ONCE)
        self.subscription = self.bus.subscribe(
            "test.*", self.handle, capacity=CAPACITY, retry=retry, breaker=breaker, name="gated"
        )
        self.bus.subscribe("test.*", self.quick.append)

    def run_loop(self, what: object = None) -> None:
        async def go() -> None:
            if asyncio.iscoroutine(what):
                await what
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(go())

    def publish_message(self, tract: Tract, priority: int) -> Message:
        message = note(str(next(self.numbers)), tract=tract, priority=priority)
        self.published.append(message)

        async def publish() -> None:
            self.bus.publish_nowait(message)

        self.run_loop(publish())
        return message

    def end_message(self, good: bool) -> Message:
        assert self.ending is not None
        message = self.begun[-1]
        self.ending.set_result(good)
        self.ending = None
        self.run_loop()
        return message

    def settle_failure(self, message: Message) -> bool:
        """In the model, whether a message that failed comes again."""
        failures = self.failures[message] = self.failures.get(message, 0) + 1
        if failures == ATTEMPTS:
            self.dead.append(("failed", message))
        return failures < ATTEMPTS

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "line"):
            return
        letters = self.loop.run_until_complete(self.bus.dead(1000))
        assert sorted((one.reason, one.message.number) for one in letters) == sorted(
            (reason, message.number) for reason, message in self.dead
        )
        stats = self.subscription.stats()
        held = stats.waiting + stats.running + stats.retrying
        assert len(self.published) == len(self.handled) + len(self.dead) + held
        assert len(set(self.handled)) == len(self.handled)
        assert sorted(one.number for one in self.quick) == sorted(one.number for one in self.published)

    def teardown(self) -> None:
        self.over = True
        if self.ending is not None:
            self.ending.set_result(True)
        self.loop.run_until_complete(self.bus.close())
        self.loop.close()


class OrderMachine(BusMachine):
    """Without a breaker: exactly the order of the model."""

    @initialize()
    def open(self) -> None:
        self.begin(NO_BREAKER)

    def advance(self) -> None:
        """The handler is idle: it takes the next message."""
        if self.hand is None:
            self.hand = self.line.take()

    @rule(tract=TRACTS, priority=PRIORITY)
    def publish(self, tract: Tract, priority: int) -> None:
        message = self.publish_message(tract, priority)
        if not self.line.put(message):
            self.dead.append(("overflow", message))
        self.advance()

    @precondition(lambda self: self.ending is not None)
    @rule(good=st.booleans())
    def end(self, good: bool) -> None:
        assert self.hand is not None
        good = good or self.line.full(self.hand)  # it would come back when there is room, at a time of its own
        message = self.end_message(good)
        again = not good and self.settle_failure(message)
        self.hand = None
        self.advance()  # what failed comes behind those that wait
        if again:
            self.line.put(message)
            self.advance()

    @invariant()
    def same_order(self) -> None:
        if hasattr(self, "line"):
            assert (self.begun[-1] if self.ending is not None else None) is self.hand


class HoldingMachine(BusMachine):
    """With a breaker that opens at once and tries at once: one tract fails, the other does not notice."""

    @initialize()
    def open(self) -> None:
        self.begin(BreakerPolicy(in_a_row=1, backoff=AT_ONCE))
        self.failing: set[Tract] = set()

    @rule(tract=TRACTS)
    def fail_or_mend(self, tract: Tract) -> None:
        self.failing ^= {tract}

    @rule(tract=TRACTS, priority=PRIORITY)
    def publish(self, tract: Tract, priority: int) -> None:
        message = self.publish_message(tract, priority)
        if not self.line.put(message):
            self.dead.append(("overflow", message))
        self.began()

    @precondition(lambda self: self.ending is not None)
    @rule()
    def end(self) -> None:
        good = self.begun[-1].tract not in self.failing or self.line.full(self.begun[-1])
        message = self.end_message(good)
        self.hand = None
        self.began(message if not good and self.settle_failure(message) else None)

    def began(self, back: Message | None = None) -> None:
        """What the handler has now is the first of its tract in the model's order, or what has just come back."""
        if self.ending is not None and self.hand is None:
            message = self.begun[-1]
            if message is back:
                back = None
            else:
                assert message is self.line.waiting(message.tract)[0]
                self.line.remove(message)
            self.hand = message
        if back is not None:
            assert self.line.put(back)

    @invariant()
    def never_idle_while_something_waits(self) -> None:
        if hasattr(self, "line") and self.ending is None:
            assert not self.line.waiting(Tract.EXTERNAL) and not self.line.waiting(Tract.INTERNAL)


TestOrder = OrderMachine.TestCase
TestOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHolding = HoldingMachine.TestCase
TestHolding.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
