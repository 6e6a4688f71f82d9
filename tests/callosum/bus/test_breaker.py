"""A breaker opens on failures, waits, tries, and closes; a plain model of it agrees with it step by step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from synapse.callosum.bus.delivery.backoff import Backoff
from synapse.callosum.bus.delivery.breaker import Breaker, BreakerPolicy, State
from synapse.errors import InvalidInput

SECOND = Backoff(base_s=1.0, cap_s=4.0, least=1.0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, *, trials: int = 1) -> Breaker:
    breaker = Breaker(BreakerPolicy(in_a_row=2, trials=trials, backoff=SECOND), clock=clock)
    fail(breaker)
    fail(breaker)
    assert breaker.state is State.OPEN
    return breaker


def fail(breaker: Breaker) -> None:
    era = breaker.admit()
    assert era is not None
    breaker.failed(era)


def succeed(breaker: Breaker) -> None:
    era = breaker.admit()
    assert era is not None
    breaker.succeeded(era)


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(BreakerPolicy(in_a_row=3))
    for _ in range(3):
        assert breaker.ready()
        fail(breaker)
    assert breaker.state is State.OPEN
    assert breaker.admit() is None


def test_a_success_between_them_starts_the_row_again() -> None:
    breaker = Breaker(BreakerPolicy(in_a_row=2, failures=20))
    for _ in range(10):
        fail(breaker)
        succeed(breaker)
    assert breaker.state is State.CLOSED


def test_a_high_rate_of_failures_opens_it_though_none_follow_each_other() -> None:
    breaker = Breaker(BreakerPolicy(in_a_row=99, failures=5, window=10))
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    assert breaker.ready()
    fail(breaker)
    assert breaker.state is State.OPEN


def test_failures_that_left_the_window_no_longer_count() -> None:
    breaker = Breaker(BreakerPolicy(in_a_row=99, failures=2, window=4))
    fail(breaker)
    for _ in range(4):
        succeed(breaker)
    assert breaker.calm
    fail(breaker)
    assert breaker.state is State.CLOSED


def test_after_the_back_off_one_trial_may_go_and_its_success_closes_it() -> None:
    breaker = opened(clock := Clock())
    clock.now += 0.99
    assert breaker.admit() is None
    clock.now += 0.01
    era = breaker.admit()
    assert era is not None
    assert breaker.admit() is None, "a second trial waits for the first"
    breaker.succeeded(era)
    assert breaker.state is State.CLOSED


def test_each_trial_that_fails_doubles_the_wait_and_closing_forgets_it() -> None:
    breaker = opened(clock := Clock())
    waits = []
    for _ in range(4):
        waits.append(breaker.until - clock.now)
        clock.now = breaker.until
        fail(breaker)
    assert waits == [1.0, 2.0, 4.0, 4.0]
    clock.now = breaker.until
    succeed(breaker)
    fail(breaker)
    fail(breaker)
    assert breaker.until - clock.now == 1.0


def test_what_began_before_it_opened_changes_nothing_when_it_ends() -> None:
    clock = Clock()
    breaker = Breaker(BreakerPolicy(in_a_row=1, backoff=SECOND), clock=clock)
    slow, late, quick = breaker.admit(), breaker.admit(), breaker.admit()
    assert slow is not None and late is not None and quick is not None
    breaker.failed(quick)
    until = breaker.until
    breaker.failed(slow)
    assert breaker.until == until
    clock.now = until
    assert breaker.refresh() is State.HALF_OPEN
    breaker.succeeded(late)
    assert breaker.state is State.HALF_OPEN


def test_every_change_is_told() -> None:
    told: list[State] = []
    clock = Clock()
    breaker = Breaker(BreakerPolicy(in_a_row=1, backoff=SECOND), clock=clock, on_change=told.append)
    fail(breaker)
    clock.now += 1
    succeed(breaker)
    assert told == [State.OPEN, State.HALF_OPEN, State.CLOSED]


@pytest.mark.parametrize("wrong", [{"in_a_row": 0}, {"trials": 0}, {"failures": 21}])
def test_thresholds_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="thresholds"):
        BreakerPolicy(**wrong)


class BreakerMachine(RuleBasedStateMachine):
    """Against a model that keeps every outcome since the breaker last closed in a list."""

    @initialize(in_a_row=st.integers(1, 4), window=st.integers(1, 8), data=st.data(), trials=st.integers(1, 3))
    def begin(self, in_a_row: int, window: int, data: st.DataObject, trials: int) -> None:
        failures = data.draw(st.integers(1, window))
        self.policy = BreakerPolicy(in_a_row, failures, window, trials, SECOND)
        self.clock = Clock()
        self.breaker = Breaker(self.policy, clock=self.clock)
        self.state = "closed"
        self.outcomes: list[bool] = []
        self.trials_done = self.trials_out = 0
        self.opened = 0
        self.until = 0.0
        self.work: list[tuple[int, int]] = []  # the breaker's era, the model's
        self.era = 0

    def change(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.outcomes = []
        self.trials_done = self.trials_out = 0

    def open(self) -> None:
        self.opened += 1
        self.until = self.clock.now + min(4.0, 2.0 ** (self.opened - 1))
        self.change("open")

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def start(self) -> None:
        if self.state == "open" and self.clock.now >= self.until:
            self.change("half-open")
        may = self.state == "closed" or (
            self.state == "half-open" and self.trials_done + self.trials_out < self.policy.trials
        )
        era = self.breaker.admit()
        assert (era is not None) == may
        if era is not None:
            self.work.append((era, self.era))
            self.trials_out += 1

    @precondition(lambda self: self.work)
    @rule(which=st.integers(0, 99), good=st.booleans())
    def end(self, which: int, good: bool) -> None:
        theirs, ours = self.work.pop(which % len(self.work))
        if good:
            self.breaker.succeeded(theirs)
        else:
            self.breaker.failed(theirs)
        if ours != self.era:
            return
        self.trials_out -= 1
        if self.state == "half-open":
            self.trials_done += good
            if not good:
                self.open()
            elif self.trials_done == self.policy.trials:
                self.opened = 0
                self.change("closed")
            return
        self.outcomes.append(good)
        row = self.outcomes[-self.policy.in_a_row :]
        many = self.outcomes[-self.policy.window :].count(False) >= self.policy.failures
        if not good and (many or row == [False] * self.policy.in_a_row):
            self.open()

    @invariant()
    def same_state(self) -> None:
        assert str(self.breaker.state) == self.state
        if self.state == "open":
            assert self.breaker.until == self.until
        if self.breaker.calm:
            assert self.state == "closed" and False not in self.outcomes[-self.policy.window :]


TestAgainstModel = BreakerMachine.TestCase
TestAgainstModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
