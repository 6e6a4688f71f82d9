"""Tallies, the sliding window, and what is alarming."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.hotpath.metrics.histogram import bucket_of
from synapse.hotpath.metrics.lanes import subtract
from synapse.hotpath.metrics.window import NOTHING, SLICES, WINDOW, Tally, alerts, combined, extended, since

START = datetime(2026, 1, 1, tzinfo=UTC)
COUNTS = st.dictionaries(st.integers(0, 1200), st.integers(1, 9), max_size=5)
TALLIES = st.builds(
    Tally,
    native=COUNTS,
    reference=COUNTS,
    paired_native=COUNTS,
    paired_reference=COUNTS,
    errors=st.integers(0, 9),
    reference_errors=st.integers(0, 9),
    fallbacks=st.integers(0, 9),
    wrong=st.integers(0, 9),
    shadowed=st.integers(0, 9),
)


def latencies(microseconds: float, calls: int) -> dict[int, int]:
    return {bucket_of(round(microseconds * 1000)): calls}


def names(tally: Tally) -> list[str]:
    return [alert.name for alert in alerts(tally)]


@given(TALLIES, TALLIES)
def test_what_is_added_can_be_subtracted_again(one: Tally, other: Tally) -> None:
    assert subtract(one + other, other) == one


def test_who_answered_follows_from_who_ran() -> None:
    given_native = Tally(native={1: 70}, reference={1: 50}, paired_native={1: 20}, paired_reference={1: 20})
    assert (given_native.native_answers, given_native.reference_answers, given_native.calls) == (70, 30, 100)
    shadow = Tally(native={1: 10}, reference={1: 100}, paired_native={1: 10}, paired_reference={1: 10}, shadowed=10)
    assert (shadow.native_answers, shadow.reference_answers, shadow.calls) == (0, 100, 100)


@given(st.lists(st.tuples(st.integers(0, 2000), TALLIES), max_size=60))
def test_the_window_is_bounded_and_holds_what_is_recent(steps: list[tuple[int, Tally]]) -> None:
    window, now = (), START
    counted: list[tuple[datetime, Tally]] = []
    for seconds, tally in steps:
        now += timedelta(seconds=seconds)
        window = extended(window, tally, now, fresh_from=START - WINDOW)
        counted.append((now, tally))
        assert len(window) <= SLICES + 2
        recent = combined(tally for time, tally in counted if time > now - WINDOW)
        older = combined(tally for time, tally in counted if time > now - WINDOW - WINDOW / SLICES)
        held = combined(part.tally for part in window)
        assert recent.errors - combined(_slice_at_the_edge(counted, now)).errors <= held.errors <= older.errors


def _slice_at_the_edge(counted: list[tuple[datetime, Tally]], now: datetime) -> list[Tally]:
    """A slice is dropped as a whole when its beginning is too old: up to a slice's length of it is dropped early."""
    return [t for time, t in counted if now - WINDOW < time <= now - WINDOW + WINDOW / SLICES]


def test_what_was_counted_before_a_stage_is_not_mixed_with_what_comes_after() -> None:
    window = extended((), Tally(errors=5), START, fresh_from=START - WINDOW)
    entered = START
    window = extended(window, Tally(errors=1), START + timedelta(seconds=5), fresh_from=entered)
    window = extended(window, Tally(errors=1), START + timedelta(seconds=10), fresh_from=entered)
    assert since(window, entered).errors == 2
    assert len(window) == 2


def test_counting_nothing_changes_nothing() -> None:
    window = extended((), Tally(errors=5), START, fresh_from=START)
    assert extended(window, NOTHING, START + timedelta(minutes=1), fresh_from=START) == window


@pytest.mark.parametrize(
    ("tally", "expected"),
    [
        (Tally(native=latencies(1, 895), fallbacks=105), ["fallback"]),
        (Tally(native=latencies(1, 900), fallbacks=100), []),
        (Tally(native=latencies(1, 980), errors=20), ["error"]),
        (Tally(native=latencies(1, 990), errors=10), []),
        (Tally(native=latencies(1, 10), errors=5, fallbacks=5), []),
        (Tally(paired_native=latencies(130, 100), paired_reference=latencies(100, 100)), ["latency"]),
        (Tally(paired_native=latencies(110, 100), paired_reference=latencies(100, 100)), []),
        (Tally(paired_native=latencies(900, 99), paired_reference=latencies(100, 99)), []),
    ],
)
def test_an_alert_is_raised_above_its_threshold_and_not_for_a_handful_of_calls(
    tally: Tally, expected: list[str]
) -> None:
    assert names(tally) == expected


def test_a_slow_tail_is_slow_once_there_are_calls_enough_to_tell() -> None:
    few, many = (
        Tally(
            paired_native=latencies(50, 90 * times) | latencies(500, 10 * times),
            paired_reference=latencies(100, 100 * times),
        )
        for times in (1, 10)
    )
    assert (names(few), names(many)) == ([], ["latency"])
