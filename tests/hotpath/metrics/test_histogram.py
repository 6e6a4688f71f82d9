"""Latencies in logarithmic buckets."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from synapse.hotpath.metrics.histogram import (
    BUCKETS,
    LONGEST,
    RELATIVE_ERROR,
    added,
    bucket_of,
    lowest,
    middle,
    percentile,
    total,
)

LATENCIES = st.integers(0, LONGEST)


def counted(latencies: list[int]) -> dict[int, int]:
    return added({bucket_of(latency): 1} for latency in latencies)


@given(LATENCIES)
def test_a_latency_lies_in_its_bucket_and_is_reported_within_the_stated_error(latency: int) -> None:
    bucket = bucket_of(latency)
    assert lowest(bucket) <= latency < lowest(bucket + 1)
    assert abs(middle(bucket) - latency) <= RELATIVE_ERROR * latency
    assert RELATIVE_ERROR <= 0.03


@given(LATENCIES, LATENCIES)
def test_a_longer_latency_never_falls_into_an_earlier_bucket(one: int, other: int) -> None:
    assert (one <= other) <= (bucket_of(one) <= bucket_of(other))


@given(st.integers(LONGEST, 2**80))
def test_whatever_is_longer_than_the_longest_is_counted_as_that(latency: int) -> None:
    assert bucket_of(latency) == bucket_of(LONGEST) == BUCKETS - 1


def test_the_buckets_are_few_and_have_no_gaps() -> None:
    assert BUCKETS < 1300
    assert [bucket_of(lowest(bucket)) for bucket in range(BUCKETS)] == list(range(BUCKETS))


@given(st.lists(LATENCIES, min_size=1, max_size=300), st.floats(0.01, 1))
def test_a_percentile_is_the_nearest_rank_within_the_stated_error(latencies: list[int], share: float) -> None:
    exact = sorted(latencies)[max(1, math.ceil(share * len(latencies))) - 1]
    found = percentile(counted(latencies), share)
    assert found is not None
    assert abs(found - exact) <= RELATIVE_ERROR * exact


@given(st.lists(LATENCIES, max_size=100), st.lists(LATENCIES, max_size=100))
def test_histograms_add_up(one: list[int], other: list[int]) -> None:
    assert added((counted(one), counted(other))) == counted(one + other)


@given(st.lists(LATENCIES, max_size=100))
def test_a_sum_is_within_the_stated_error(latencies: list[int]) -> None:
    exact = sum(latencies) / 1e9
    assert abs(total(counted(latencies)) - exact) <= RELATIVE_ERROR * exact + 1e-12


def test_nothing_has_no_percentile() -> None:
    assert percentile({}, 0.5) is None
