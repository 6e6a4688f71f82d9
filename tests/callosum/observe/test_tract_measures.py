"""Balance, coupling and integration: their formulas on known values, and what holds for any traffic."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.callosum.observe.tract_measures import balance, coupling, integration
from synapse.errors import InvalidInput

counts = st.integers(0, 50)
bins = st.lists(st.tuples(counts, counts), max_size=60)
tract = st.lists(counts, min_size=1, max_size=12)
MEASURES = (balance, coupling, integration)


@pytest.mark.parametrize(
    ("external", "internal", "expected"),
    [([], [], 0.0), ([0, 0], [0, 0], 0.0), ([4], [0], 0.0), ([1, 1], [0, 2], 1.0), ([3, 0], [0, 1], 0.5)],
)
def test_balance_is_1_less_the_difference_over_the_sum(
    external: list[int], internal: list[int], expected: float
) -> None:
    assert balance(external, internal) == pytest.approx(expected)


def test_coupling_of_a_worked_example_is_its_mutual_information_over_the_mean_entropy() -> None:
    # Silent or active, four bins: together silent once, together active twice, once only the internal one.
    external, internal = [0, 0, 5, 5], [0, 3, 3, 3]
    h_x, h_y = math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    h_xy = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert coupling(external, internal) == pytest.approx((h_x + h_y - h_xy) / math.sqrt(h_x * h_y))


def test_the_levels_are_silent_up_to_the_median_and_above_it() -> None:
    # The levels of both are 0 1 1 2, although the counts have nothing else in common.
    assert coupling([0, 1, 2, 3], [0, 7, 7, 9000]) == pytest.approx(1.0)
    # 0 1 1 1 2 and 0 1 1 2 2: the median of 1 1 5 9 is the lower one of the two in the middle.
    assert coupling([0, 1, 1, 1, 9], [0, 1, 1, 5, 9]) < 1.0


def test_a_tract_that_never_changes_says_nothing_about_the_other() -> None:
    assert coupling([5, 5, 5, 5], [1, 0, 3, 9]) == 0.0
    assert coupling([5, 5, 5, 5], [5, 5, 5, 5]) == 0.0


def test_activity_that_excludes_the_other_is_coupled_too() -> None:
    assert coupling([4, 0, 4, 0], [0, 4, 0, 4]) == pytest.approx(1.0)


def test_integration_is_the_product_and_needs_both() -> None:
    together = ([4, 0, 4, 0], [4, 0, 4, 0])
    assert integration(*together) == pytest.approx(1.0)
    assert integration([8, 0, 8, 0], [4, 0, 4, 0]) == pytest.approx(2 / 3)
    assert integration([4, 4, 4, 4], [4, 4, 4, 4]) == 0.0, "even, but not coupled"


@given(bins)
def test_all_are_from_0_to_1_and_the_same_either_way_round(pairs: list[tuple[int, int]]) -> None:
    external, internal = [e for e, _ in pairs], [i for _, i in pairs]
    for measure in MEASURES:
        assert 0.0 <= measure(external, internal) <= 1.0
        assert measure(external, internal) == pytest.approx(measure(internal, external))


@given(bins, st.randoms(use_true_random=False))
def test_the_order_of_the_bins_does_not_matter(pairs: list[tuple[int, int]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for measure in MEASURES:
        one = measure([e for e, _ in pairs], [i for _, i in pairs])
        assert one == pytest.approx(measure([e for e, _ in shuffled], [i for _, i in shuffled]))


@given(tract)
def test_tracts_that_are_identical_and_change_have_balance_and_coupling_1(more: list[int]) -> None:
    activity = [0, 1, *more]
    assert balance(activity, activity) == 1.0
    assert coupling(activity, activity) == pytest.approx(1.0)
    assert integration(activity, activity) == pytest.approx(1.0)


@given(tract, tract)
def test_tracts_that_are_independent_have_coupling_0(external: list[int], internal: list[int]) -> None:
    pairs = list(product(external, internal))  # each count of one with each of the other, equally often
    assert coupling([e for e, _ in pairs], [i for _, i in pairs]) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
def test_counts_that_cannot_be_are_refused(measure: object) -> None:
    with pytest.raises(InvalidInput, match="same bins"):
        measure([1, 2], [1])  # type: ignore[operator]
    with pytest.raises(InvalidInput, match="below 0"):
        measure([1, -1], [1, 2])  # type: ignore[operator]
