"""What to make a kernel of next."""

from __future__ import annotations

import pytest

from synapse.hotpath.metrics.histogram import bucket_of
from synapse.hotpath.metrics.window import Tally
from synapse.hotpath.ranking import (
    CANDIDATES,
    Candidate,
    Level,
    Measured,
    measured_frequency,
    measured_gain,
    rank,
)

ONE = Candidate("one", gain=10, frequency=100, complexity=Level.medium, risk=Level.high, summary="")


def paired(native: int, reference: int, calls: int) -> Tally:
    fast, slow = {bucket_of(native): calls}, {bucket_of(reference): calls}
    return Tally(native=fast, reference=slow, paired_native=fast, paired_reference=slow)


def test_the_score_is_gain_times_frequency_over_complexity_times_risk() -> None:
    (ranked,) = rank((ONE,), {})
    assert ranked.score == pytest.approx(10 * 100 / (2 * 3))
    assert (ranked.gain_source, ranked.frequency_source) == ("declared", "declared")


def test_measured_figures_take_the_place_of_declared_ones() -> None:
    tally = paired(1_000_000, 20_000_000, 1000)
    (ranked,) = rank((ONE,), {"one": Measured(measured_gain(tally), measured_frequency(tally, 50.0))})
    assert ranked.gain == pytest.approx(20, rel=0.04)
    assert ranked.frequency == pytest.approx(1000 / 50)
    assert (ranked.gain_source, ranked.frequency_source) == ("measured", "measured")
    (ranked,) = rank((ONE,), {"one": Measured(frequency=7.0)})
    assert (ranked.gain, ranked.gain_source) == (10, "declared")
    assert (ranked.frequency, ranked.frequency_source) == (7, "measured")


def test_a_handful_of_calls_measures_nothing() -> None:
    assert measured_gain(paired(10, 20, 5)) is None
    assert measured_frequency(paired(10, 20, 5), 50.0) is None


def test_the_declared_order_is_that_of_the_pilot_plan() -> None:
    order = [ranked.candidate.name for ranked in rank(CANDIDATES, {})]
    assert [name for name in order if name != "pattern_search"] == ["event_bus", "mtf_ranker", "embeddings"]
