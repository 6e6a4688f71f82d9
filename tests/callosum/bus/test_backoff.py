"""Waits double up to a limit and are drawn evenly below it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.callosum.bus.delivery.backoff import Backoff, Retry
from synapse.errors import InvalidInput


def test_the_longest_wait_doubles_up_to_the_cap() -> None:
    backoff = Backoff(base_s=0.5, cap_s=3.0, least=1.0)
    assert [backoff.wait_s(failures) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_full_jitter_draws_from_nothing_up_to_the_longest_wait() -> None:
    backoff = Backoff(base_s=1.0, cap_s=8.0)
    drawn = iter((0.0, 0.25, 0.5))
    assert [backoff.wait_s(3, lambda: next(drawn)) for _ in range(3)] == [0.0, 1.0, 2.0]


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_no_wait_is_shorter_than_its_least_or_longer_than_the_cap(failures: int, drawn: float, least: float) -> None:
    backoff = Backoff(base_s=0.1, cap_s=30.0, least=least)
    longest = min(30.0, 0.1 * 2.0 ** min(failures - 1, 60))
    assert least * longest * (1 - 1e-12) <= backoff.wait_s(failures, lambda: drawn) <= longest * (1 + 1e-12)


@pytest.mark.parametrize("settings", [{"base_s": -1}, {"base_s": 2, "cap_s": 1}, {"least": 1.5}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="base_s <= cap_s"):
        Backoff(**settings)


def test_a_message_is_given_at_least_once() -> None:
    with pytest.raises(InvalidInput, match="not 0 times"):
        Retry(attempts=0)
