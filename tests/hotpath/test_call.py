"""One call: who answers it, what happens when the kernel fails, and what is counted."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.errors import InvalidInput, Unavailable
from synapse.hotpath import HotPath, NativeSide
from synapse.hotpath.metrics.lanes import SLOTS
from synapse.hotpath.rollout.decision import BUCKETS, Decision, reference_only
from synapse.hotpath.rollout.plan import Faults, missed_at_most

SLOT_MEMORY = memoryview(mmap.mmap(-1, 8 * SLOTS)).cast("Q")


def double(number: int) -> int:
    """The reference: refuses what is below zero."""
    if number < 0:
        raise InvalidInput("a number must not be negative")
    return 2 * number


def no_build() -> Any:
    raise Unavailable("there is no build in these tests")


def path_with(
    native: Callable[[int], Any] | None,
    *,
    share: float = 1.0,
    compare: float = 0.0,
    key: Callable[[int], str] | None = None,
    draw: Callable[[], float] | None = None,
) -> HotPath[..., Any]:
    options = {"draw": draw} if draw is not None else {}
    side = NativeSide(no_build, lambda library: double)
    path = HotPath("double", double, side, lambda one, other: one == other, key=key, **options)
    path.decide(Decision(native, round(share * BUCKETS), compare, SLOT_MEMORY, 7, None, "test"))
    return path


def shifted(number: int) -> int:
    """A kernel that can be told from the reference."""
    return 2 * number + 1000


def answers_of(path: HotPath[..., Any], numbers: range) -> list[int]:
    return [path.call(number) for number in numbers]


@pytest.fixture(autouse=True)
def _nothing_is_left_in_flight() -> Iterator[None]:
    yield
    assert not any(SLOT_MEMORY)


def test_before_anything_is_decided_the_reference_answers() -> None:
    path = HotPath("double", double, NativeSide(no_build, lambda library: double), lambda one, other: one == other)
    assert path.call(4) == 8
    assert not path.native_answered
    assert path.counters.read().reference_answers == 1


def test_the_function_keeps_its_name_and_takes_keywords() -> None:
    path = path_with(shifted)
    assert (path.call.__name__, path.call.__doc__) == ("double", double.__doc__)
    assert path.call(number=1) == 1002


def test_who_answered_is_recorded_and_how_fast() -> None:
    path = path_with(shifted)
    assert path.call(1) == 1002
    assert path.native_answered
    path.decide(reference_only("forced"))
    assert path.call(1) == 2
    assert not path.native_answered
    tally = path.counters.read()
    assert (tally.native_answers, tally.reference_answers, tally.fallbacks) == (1, 1, 0)
    assert sum(tally.native.values()) == sum(tally.reference.values()) == 1


def test_the_same_key_always_falls_into_the_same_bucket() -> None:
    path = path_with(shifted, share=0.5, key=lambda number: f"user-{number}")
    first = answers_of(path, range(300))
    assert answers_of(path, range(300)) == first
    assert 100 < sum(answer >= 1000 for answer in first) < 200


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_growing_share_keeps_who_was_in(key: str, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    by_share = [path_with(shifted, share=share, key=lambda number: key).call(1) for share in (smaller, larger)]
    assert by_share != [1002, 2]


def test_buckets_are_the_same_in_every_process_and_differ_between_paths() -> None:
    path = path_with(None)
    other = HotPath("triple", double, path.native, path.agrees)
    keys = [f"user-{i}" for i in range(1000)]
    assert [path.bucket(key) for key in keys[:3]] == [7055, 5481, 9715]
    assert path.bucket("user-1") == path.bucket(b"user-1")
    assert sum(path.bucket(key) == other.bucket(key) for key in keys) < 10


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_calls_without_a_key_are_spread_evenly(share: float) -> None:
    path = path_with(shifted, share=share)
    native = [path.call(1) == 1002 for _ in range(BUCKETS)]
    assert sum(native) == share * BUCKETS
    assert all(abs(sum(native[i : i + 100]) - 100 * share) <= 3 for i in range(0, BUCKETS, 100))


def test_when_the_kernel_raises_the_reference_answers_that_same_call() -> None:
    def raises(number: int) -> int:
        raise RuntimeError("the kernel is out of sorts")

    path = path_with(raises)
    assert path.call(21) == 42
    tally = path.counters.read()
    assert (tally.errors, tally.fallbacks, tally.native_answers, tally.reference_answers) == (1, 1, 0, 1)
    assert path.last_error == "RuntimeError: the kernel is out of sorts"


@pytest.mark.parametrize("compare", [0.0, 1.0])
def test_a_call_that_both_refuse_is_no_error_of_the_kernel(compare: float) -> None:
    path = path_with(double, compare=compare)
    with pytest.raises(InvalidInput):
        path.call(-1)
    tally = path.counters.read()
    assert (tally.errors, tally.fallbacks, tally.wrong, tally.reference_errors) == (0, 0, 0, 1)


@pytest.mark.parametrize("compare", [0.0, 1.0])
def test_an_interrupt_in_the_kernel_is_not_swallowed(compare: float) -> None:
    def interrupted(number: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        path_with(interrupted, compare=compare).call(1)


def test_a_build_that_should_answer_and_cannot_counts_as_a_fallback() -> None:
    path = path_with(shifted)
    path.decide(reference_only("the build cannot be opened", below=BUCKETS))
    assert path.call(1) == 2
    assert path.counters.read().fallback_rate == 1.0


def test_where_every_answer_is_compared_no_caller_sees_a_wrong_one() -> None:
    calls = 0

    def wrong_once(number: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * number + (calls == 500)

    path = path_with(wrong_once, compare=1.0)
    assert answers_of(path, range(1000)) == [2 * number for number in range(1000)]
    assert calls == 500, "after the wrong answer the kernel is not asked again"
    assert path.take_faults().wrong
    assert path.counters.read().wrong == 1


def test_an_answer_to_a_call_that_the_reference_refuses_is_wrong() -> None:
    path = path_with(lambda number: 0, compare=1.0)
    with pytest.raises(InvalidInput):
        path.call(-1)
    assert "refuses" in path.take_faults().wrong


def test_an_answer_that_cannot_even_be_compared_is_wrong() -> None:
    path = path_with(lambda number: None, compare=1.0)
    path.agrees = lambda one, other: one + other > 0
    assert path.call(1) == 2
    assert "could not even be compared" in path.take_faults().wrong


def test_in_a_stage_that_gives_nobody_a_native_answer_some_calls_are_compared() -> None:
    path = path_with(double, share=0.0, compare=0.1)
    assert answers_of(path, range(2000)) == [2 * number for number in range(2000)]
    tally = path.counters.read()
    assert 120 < tally.compared < 280
    assert (tally.native_answers, tally.reference_answers, tally.fallbacks) == (0, 2000, 0)


def test_a_sampled_stage_compares_its_share_and_lets_no_more_pass_than_stated() -> None:
    """A kernel that is wrong every time: how many pass before the first comparison, over many threads' first calls."""
    bound, over, runs, passed_in_all = missed_at_most(0.05), 0, 400, 0
    for _ in range(runs):
        path = path_with(shifted, compare=0.05)
        passed = sum(answer >= 1000 for answer in answers_of(path, range(400)))
        passed_in_all += passed
        over += passed > bound
        assert path.take_faults().wrong or passed == 400
    assert over / runs <= 0.03
    assert passed_in_all / runs == pytest.approx(0.95 / 0.05, rel=0.25)


def test_a_kernel_that_is_wrong_every_hundredth_time_cannot_hide_between_the_samples() -> None:
    calls = 0

    def wrong_every_hundredth(number: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * number + (calls % 100 == 1)

    path = path_with(wrong_every_hundredth, compare=0.1)
    answers_of(path, range(100_000))
    assert path.take_faults().wrong


def test_a_new_decision_holds_from_the_next_call_on() -> None:
    path = path_with(shifted, compare=0.0)
    assert path.call(1) == 1002
    path.decide(Decision(shifted, BUCKETS, 1.0, SLOT_MEMORY, 7, None, "everything is compared"))
    assert path.call(1) == 2


def test_a_fault_that_nobody_has_looked_at_yet_keeps_the_kernel_stopped() -> None:
    path = path_with(shifted)
    path.report(Faults(crash="SIGSEGV"))
    path.decide(Decision(shifted, BUCKETS, 0.0, SLOT_MEMORY, 7, None, "decided just before"))
    assert path.call(1) == 2
    assert path.take_faults().crash == "SIGSEGV"


def test_what_runs_is_noted_while_it_runs() -> None:
    seen = []

    def looks(number: int) -> int:
        seen.append([value for value in SLOT_MEMORY if value])
        return 2 * number

    path_with(looks).call(1)
    path_with(looks, compare=1.0).call(1)
    assert seen == [[7], [7]]


def test_threads_count_in_lanes_of_their_own_and_nothing_is_lost() -> None:
    path = path_with(double, share=0.5)

    def work() -> None:
        answers_of(path, range(5000))

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        path.counters.take()
        for thread in threads:
            thread.join()
    assert path.counters.read().calls == 3 * 8 * 5000
    assert path.counters.read().native_answers == pytest.approx(3 * 8 * 2500, rel=0.02)


def test_what_was_taken_is_not_taken_twice_and_can_be_put_back() -> None:
    path = path_with(double)
    answers_of(path, range(10))
    taken = path.counters.take()
    assert taken.calls == 10
    assert path.counters.take().calls == 0
    path.counters.put_back(taken)
    answers_of(path, range(5))
    assert path.counters.take().calls == 15
