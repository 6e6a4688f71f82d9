"""The automaton of a rollout: what promotes, what sends back, what stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from synapse.errors import Conflict, InvalidInput
from synapse.hotpath.metrics.histogram import bucket_of
from synapse.hotpath.metrics.window import Tally
from synapse.hotpath.rollout.plan import (
    BURN_IN_CALLS,
    ROLLBACK_SAMPLES,
    STAGES,
    Faults,
    Rollout,
    begin,
    clear,
    lacking,
    missed_at_most,
    observe,
    pause,
    promote,
    resume,
    roll_back,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
GOOD = Tally(native={10: 2000})


def at_stage(name: str, **changes: object) -> Rollout:
    stage = [stage.name for stage in STAGES].index(name)
    return replace(begin(START), stage=stage, burn_in=BURN_IN_CALLS, **changes)


def raising(share: float, calls: int = 1000) -> Tally:
    errors = round(share * calls)
    return Tally(native={10: calls - errors}, errors=errors, fallbacks=errors)


def test_the_stages_are_those_of_the_plan() -> None:
    assert [(stage.name, stage.share) for stage in STAGES] == [
        ("validate", 0.0),
        ("canary", 0.10),
        ("half", 0.50),
        ("full", 1.0),
    ]
    assert STAGES[1].compare == 1.0, "every answer of the first stage that gives any is compared before it is given"


def test_a_good_kernel_reaches_everybody_by_itself_in_twelve_simulated_weeks() -> None:
    rollout, now, reached = begin(START), START, {"validate": START}
    for _ in range(12 * 7 * 24):
        now += timedelta(hours=1)
        rollout, changes = observe(rollout, Tally(native={10: 100}), now, faults=Faults(burned=20))
        reached |= {STAGES[change.to_stage].name: now for change in changes if change.kind == "promoted"}
    assert list(reached) == ["validate", "canary", "half", "full"]
    for stage, later in zip(STAGES, list(reached)[1:], strict=False):
        assert reached[later] - reached[stage.name] >= stage.dwell
    assert rollout.mode == "automatic"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"samples": 1}, "native calls"),
        ({"entered": START + 6 * DAY}, "to stay"),
        ({"burn_in": BURN_IN_CALLS - 1}, "in a process of its own"),
    ],
)
def test_a_kernel_stays_until_everything_its_stage_asks_for_is_there(change: dict[str, object], missing: str) -> None:
    ready = at_stage("canary", samples=5000)
    assert observe(ready, Tally(), START + 7 * DAY)[0].stage == 2
    lacks = replace(ready, **change)
    assert observe(lacks, Tally(), START + 7 * DAY)[0].stage == 1
    assert any(missing in what for what in lacking(lacks, START + 7 * DAY))


def test_a_kernel_that_fails_too_often_or_is_slower_is_not_promoted() -> None:
    slow = Tally(native={10: 300}, paired_native={bucket_of(1300): 200}, paired_reference={bucket_of(1000): 200})
    for tally in (raising(0.03), slow):
        rollout, changes = observe(at_stage("canary", samples=9000), tally, START + 8 * DAY)
        assert (rollout.stage, changes) == (1, ())


def test_six_percent_of_errors_send_it_to_the_stage_before() -> None:
    rollout, changes = observe(at_stage("half"), raising(0.06), START + DAY)
    assert (rollout.stage, rollout.mode, rollout.samples) == (1, "automatic", 0)
    assert [change.kind for change in changes] == ["rolled_back"]
    assert "6.0%" in rollout.reason


def test_errors_before_the_stage_was_entered_do_not_count_against_it() -> None:
    rollout, _ = observe(at_stage("half"), raising(0.06), START + DAY)
    rollout, changes = observe(rollout, GOOD, START + DAY + timedelta(seconds=5))
    assert (rollout.stage, changes) == (1, ())


def test_a_handful_of_errors_sends_nothing_back() -> None:
    rollout, changes = observe(at_stage("half"), raising(0.5, ROLLBACK_SAMPLES - 10), START + DAY)
    assert (rollout.stage, changes) == (2, ())


@pytest.mark.parametrize(
    ("tally", "faults"), [(Tally(native={1: 9}, wrong=1), Faults()), (Tally(), Faults(wrong="2 is not 3"))]
)
def test_one_wrong_answer_sends_it_to_nobody_and_holds_it(tally: Tally, faults: Faults) -> None:
    rollout, changes = observe(at_stage("full"), tally, START + DAY, faults=faults)
    assert (rollout.stage, rollout.mode) == (0, "held")
    assert [change.kind for change in changes] == ["held"]
    later, changes = observe(rollout, GOOD, START + 300 * DAY, faults=Faults(burned=BURN_IN_CALLS))
    assert (later.stage, later.mode) == (0, "held")
    assert "promoted" not in [change.kind for change in changes]


def test_a_crash_quarantines_whatever_else_happened() -> None:
    rollout, changes = observe(at_stage("full"), Tally(wrong=1), START, faults=Faults(crash="SIGSEGV"))
    assert (rollout.stage, rollout.mode, rollout.reason) == (0, "quarantined", "SIGSEGV")
    assert [change.kind for change in changes] == ["quarantined"]


def test_a_held_kernel_that_crashes_elsewhere_is_quarantined() -> None:
    held, _ = observe(at_stage("full"), Tally(wrong=1), START)
    assert observe(held, Tally(), START, faults=Faults(crash="SIGSEGV"))[0].mode == "quarantined"


def test_promotion_and_rollback_by_hand_skip_what_is_lacking_and_can_name_a_stage() -> None:
    rollout, _ = promote(begin(START), START)
    assert rollout.stage == 1
    rollout, _ = promote(rollout, START, to=3)
    assert rollout.stage == 3
    rollout, changes = roll_back(rollout, START)
    assert (rollout.stage, changes[0].kind) == (2, "rolled_back")
    assert roll_back(rollout, START, to=0)[0].stage == 0


@pytest.mark.parametrize(("move", "to"), [(promote, 2), (promote, 1), (promote, 4), (roll_back, 2), (roll_back, 3)])
def test_a_move_to_a_stage_that_is_not_in_that_direction_is_refused(move: Callable[..., object], to: int) -> None:
    with pytest.raises(InvalidInput) as refused:
        move(at_stage("half"), START, to=to)
    assert "validate, canary, half, full" in (refused.value.hint or "")


def test_a_paused_kernel_is_not_promoted_but_errors_still_send_it_back() -> None:
    paused, _ = pause(at_stage("half", samples=99_999))
    assert observe(paused, GOOD, START + 99 * DAY)[0].stage == 2
    assert observe(paused, raising(0.06), START + DAY)[0].stage == 1
    assert observe(resume(paused)[0], GOOD, START + 99 * DAY)[0].stage == 3
    assert pause(paused) == (paused, ())
    assert resume(begin(START)) == (begin(START), ())


@pytest.mark.parametrize("faults", [Faults(crash="SIGSEGV"), Faults(wrong="no")])
def test_a_stopped_kernel_moves_only_by_clear_and_then_begins_anew(faults: Faults) -> None:
    stopped, _ = observe(at_stage("full", totals=GOOD), Tally(), START, faults=faults)
    for move in (lambda: promote(stopped, START), lambda: roll_back(stopped, START), lambda: resume(stopped)):
        with pytest.raises(Conflict) as refused:
            move()
        assert "synapse hotpath clear" in (refused.value.hint or "")
    cleared, changes = clear(stopped, START + DAY)
    assert (cleared.stage, cleared.mode, cleared.burn_in, cleared.entered) == (0, "automatic", 0, START + DAY)
    assert cleared.totals == GOOD
    assert stopped.reason in changes[0].reason


def test_burning_in_is_told_once() -> None:
    kinds = []
    rollout = begin(START)
    for _ in range(5):
        rollout, changes = observe(rollout, Tally(), START, faults=Faults(burned=BURN_IN_CALLS // 2))
        kinds += [change.kind for change in changes]
    assert kinds == ["burned_in"]
    assert rollout.burned_in


@pytest.mark.parametrize("compare", [0.05, 0.01, 0.5])
def test_a_sampled_stage_lets_as_many_wrong_answers_pass_as_stated(compare: float) -> None:
    """The number that pass before the first comparison: mean (1 - s) / s, and the bound holds in 99 of 100 cases."""
    generator = np.random.default_rng(1)
    runs = 4000
    passed = []
    for _ in range(runs):
        count = 0
        while generator.random() >= compare:
            count += 1
        passed.append(count)
    mean = (1 - compare) / compare
    assert sum(passed) / runs == pytest.approx(mean, rel=0.08)
    over = sum(count > missed_at_most(compare) for count in passed) / runs
    assert over <= 0.016


def test_the_bounds_that_the_guide_states() -> None:
    assert [missed_at_most(stage.compare) for stage in STAGES[1:]] == [0, 89, 458]


def test_processes_that_are_killed_suspend_a_kernel_for_a_while_when_there_are_many_of_them() -> None:
    def killed(rollout: Rollout, minutes: int) -> tuple[Rollout, list[str]]:
        now = START + timedelta(minutes=minutes)
        rollout, changes = observe(rollout, Tally(killed=1), now, faults=Faults(killed="it was killed"))
        return rollout, [change.kind for change in changes]

    rollout, kinds = killed(at_stage("full"), 1)
    assert (rollout.mode, kinds) == ("automatic", ["killed"])
    for minutes in range(80, 80 * 20, 80):
        rollout, kinds = killed(rollout, minutes)
        assert (rollout.mode, kinds) == ("automatic", ["killed"]), "what was an hour ago has faded"
    for minutes in (1600, 1610, 1620):
        rollout, kinds = killed(rollout, minutes)
    assert (rollout.mode, kinds, rollout.stage) == ("suspended", ["suspended"], 3)
    with pytest.raises(Conflict):
        promote(rollout, START)
    rollout, changes = observe(rollout, Tally(), START + timedelta(minutes=1679))
    assert (rollout.mode, changes) == ("suspended", ())
    rollout, changes = observe(rollout, Tally(), START + timedelta(minutes=1680))
    assert (rollout.mode, rollout.stage, rollout.burned_in) == ("automatic", 3, True), "it goes on where it was"
    assert [change.kind for change in changes] == ["resumed"]
    assert killed(rollout, 1681)[1] == ["killed"], "and from nothing"


@dataclass
class Model:
    """The same rules, written down as plainly as possible."""

    stage: int = 0
    mode: str = "automatic"
    entered: datetime = START
    samples: int = 0
    burned: int = 0
    recent: tuple[tuple[datetime, int, int], ...] = ()

    def errors_too_many(self, now: datetime, limit: float, least: int) -> bool:
        calls = sum(calls for time, calls, _ in self.recent if time > self.entered and time > now - timedelta(hours=1))
        errors = sum(bad for time, _, bad in self.recent if time > self.entered and time > now - timedelta(hours=1))
        return calls >= least and errors > limit * calls


class RolloutMachine(RuleBasedStateMachine):
    """Any order of events: the automaton and the model are always in the same place.

    Time moves by more than an hour, so that the window holds one step and the model need not know about slices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.rollout = begin(START)
        self.model = Model()

    def enter(self, stage: int, mode: str | None = None) -> None:
        self.model.stage, self.model.entered, self.model.samples = stage, self.now, 0
        self.model.mode = mode or self.model.mode

    @rule(
        hours=st.integers(2, 24 * 8),
        calls=st.integers(0, 6000),
        bad=st.sampled_from([0.0, 0.0, 0.005, 0.03, 0.06, 0.5]),
        burned=st.sampled_from([0, 150]),
        wrong=st.sampled_from([0] * 20 + [1]),
        crash=st.sampled_from([""] * 20 + ["SIGSEGV"]),
    )
    def time_passes(self, hours: int, calls: int, bad: float, burned: int, wrong: int, crash: str) -> None:
        self.now += timedelta(hours=hours)
        errors = round(calls * bad)
        tally = Tally(native={3: calls - errors} if calls > errors else {}, errors=errors, wrong=wrong)
        self.rollout, _ = observe(self.rollout, tally, self.now, faults=Faults(crash, "", burned))
        model = self.model
        model.samples += calls
        model.burned = min(BURN_IN_CALLS, model.burned + burned)
        model.recent = ((self.now, calls, errors),)
        if crash:
            if model.mode != "quarantined":
                self.enter(0, "quarantined")
        elif model.mode in ("held", "quarantined"):
            pass
        elif wrong:
            self.enter(0, "held")
        elif model.stage > 0 and model.errors_too_many(self.now, 0.05, ROLLBACK_SAMPLES):
            self.enter(model.stage - 1)
        elif (
            model.mode == "automatic"
            and model.stage < 3
            and self.now - model.entered >= STAGES[model.stage].dwell
            and model.samples >= STAGES[model.stage].min_samples
            and model.burned == BURN_IN_CALLS
            and not model.errors_too_many(self.now, 0.01, 1)
        ):
            self.enter(model.stage + 1)

    @precondition(lambda self: self.model.mode in ("automatic", "paused") and self.model.stage < 3)
    @rule()
    def promoted(self) -> None:
        self.rollout, _ = promote(self.rollout, self.now)
        self.enter(self.model.stage + 1)

    @precondition(lambda self: self.model.mode in ("automatic", "paused") and self.model.stage > 0)
    @rule()
    def rolled_back(self) -> None:
        self.rollout, _ = roll_back(self.rollout, self.now)
        self.enter(self.model.stage - 1)

    @precondition(lambda self: self.model.mode in ("automatic", "paused"))
    @rule(mode=st.sampled_from(["automatic", "paused"]))
    def paused_or_resumed(self, mode: str) -> None:
        self.rollout, _ = (resume if mode == "automatic" else pause)(self.rollout)
        self.model.mode = mode

    @rule()
    def cleared(self) -> None:
        self.rollout, _ = clear(self.rollout, self.now)
        self.model = Model(entered=self.now)

    @invariant()
    def agree(self) -> None:
        model, rollout = self.model, self.rollout
        assert (rollout.stage, rollout.mode, rollout.entered, rollout.samples, rollout.burn_in) == (
            model.stage,
            model.mode,
            model.entered,
            model.samples,
            model.burned,
        )
        assert rollout.stage == 0 or not rollout.stopped


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.floats(0.001, 0.999))
def test_the_bound_is_the_smallest_that_holds(compare: float) -> None:
    bound = missed_at_most(compare)
    assert (1 - compare) ** (bound + 1) <= 0.01 * (1 + 1e-9)
    assert bound == 0 or (1 - compare) ** bound > 0.01 * (1 - 1e-9)
