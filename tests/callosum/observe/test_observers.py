"""Observers count messages by topic and tract, with rates, latencies and durations."""

from __future__ import annotations

import pytest

from synapse.callosum.message import Message, Tract
from synapse.callosum.observe.observers import BINS, MOST_TOPICS, OTHERS, Observer, TopicReport
from synapse.callosum.payloads import Payload, Untyped

START = 1_700_000_000.0


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Took(Payload):
    seconds: float


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(clock: Clock) -> Observer:
    return Observer(clock=clock)


def made_at(
    time: float, topic: str = "a.b", *, tract: Tract = Tract.INTERNAL, payload: Payload | Untyped | None = None
) -> Message:
    """A message whose id says that it was made at this time, to the millisecond."""
    number = (round(time * 1000) << 80) | (7 << 76) | (2 << 62) | 1
    return Message(topic, payload or Untyped({}), tract, number=number)


def topic_of(observer: Observer, topic: str = "a.b") -> TopicReport:
    return next(found for found in observer.report().topics if found.topic == topic)


def test_messages_are_counted_by_topic(observer: Observer) -> None:
    for topic in ("a.b", "a.c", "a.b"):
        observer.see(made_at(START, topic))
    report = observer.report()
    assert report.count == 3
    assert [(found.topic, found.count, found.recent) for found in report.topics] == [("a.b", 2, 2), ("a.c", 1, 1)]


def test_rates_are_those_of_the_last_minute_and_the_last_five(observer: Observer, clock: Clock) -> None:
    for second in range(600):
        clock.now = START + second
        for _ in range(1 if second < 540 else 3):
            observer.see(made_at(clock.now))
    found = topic_of(observer)
    assert found.per_minute == pytest.approx(180)
    assert found.per_minute_5m == pytest.approx((240 + 180) / 5)
    clock.now += 60
    assert topic_of(observer).per_minute == 0
    clock.now += BINS
    assert topic_of(observer).per_minute_5m == 0
    assert topic_of(observer).count == 540 + 180


def test_a_young_observer_does_not_divide_by_time_that_it_did_not_see(observer: Observer, clock: Clock) -> None:
    clock.now = START + 10
    for _ in range(5):
        observer.see(made_at(clock.now))
    assert topic_of(observer).per_minute == pytest.approx(30)
    assert topic_of(observer).per_minute_5m == pytest.approx(30)


def test_a_message_counts_in_the_second_it_was_made(observer: Observer, clock: Clock) -> None:
    clock.now = START + 200
    for age in (100.0, 100.0, 30.0, BINS + 1.0, -500.0):  # the last is from a machine whose clock is ahead
        observer.see(made_at(clock.now - age))
    found = topic_of(observer)
    assert found.per_minute * 60 / 60 == 2, "30 seconds ago, and the one that claims to come from the future"
    assert found.per_minute_5m == pytest.approx(4 * 60 / 200)
    assert found.count == 5


def test_latency_runs_from_the_id_to_the_handling(observer: Observer, clock: Clock) -> None:
    clock.now = START + 10
    for milliseconds in range(1, 101):
        observer.see(made_at(clock.now - milliseconds / 1000))
    latency = topic_of(observer).latency
    assert latency is not None
    assert latency.p50 == pytest.approx(0.050, rel=0.03)
    assert latency.p95 == pytest.approx(0.095, rel=0.03)
    assert latency.p99 == pytest.approx(0.099, rel=0.03)


def test_messages_that_were_read_from_a_log_have_no_latency_but_count(clock: Clock) -> None:
    observer = Observer(clock=clock, since=START - BINS)
    for age in (30, 40, 70):
        observer.count(made_at(START - age))
    assert topic_of(observer).per_minute_5m == pytest.approx(3 / 5)
    assert topic_of(observer).latency is None
    assert topic_of(observer).per_minute == pytest.approx(2)


def test_the_clock_of_a_sender_that_is_ahead_makes_no_negative_latency(observer: Observer) -> None:
    observer.see(made_at(START + 5))
    latency = topic_of(observer).latency
    assert latency is not None
    assert latency.p50 == 0


def test_durations_are_what_payloads_call_seconds_typed_or_not(observer: Observer) -> None:
    for payload in (Took(seconds=2.0), Untyped({"seconds": 4}), Untyped({"seconds": "long"}), Untyped({})):
        observer.see(made_at(START, payload=payload))
    duration = topic_of(observer).duration
    assert duration is not None
    assert duration.p50 == pytest.approx(2.0, rel=0.02)
    assert duration.p99 == pytest.approx(4.0, rel=0.02)
    observer.see(made_at(START, "x.y", payload=Untyped({"seconds": True})))
    assert topic_of(observer, "x.y").duration is None


@pytest.mark.parametrize("odd", [-1.0, float("inf"), float("nan"), 1e300])
def test_a_duration_that_makes_no_sense_harms_nothing(observer: Observer, odd: float) -> None:
    observer.see(made_at(START, payload=Took(seconds=odd)))
    assert topic_of(observer).count == 1
    assert topic_of(observer).duration is None


def test_times_older_than_two_spans_are_forgotten(observer: Observer, clock: Clock) -> None:
    observer.see(made_at(clock.now, payload=Took(seconds=1.0)))
    clock.now += 2 * BINS
    found = topic_of(observer)
    assert found.duration is None
    assert found.latency is None
    assert (found.count, found.recent) == (1, 0)


def test_the_tracts_are_measured_over_five_minutes(observer: Observer, clock: Clock) -> None:
    for second in range(BINS):
        clock.now = START + second
        if second % 2:
            observer.see(made_at(clock.now, tract=Tract.EXTERNAL))
            observer.see(made_at(clock.now, tract=Tract.INTERNAL))
    tracts = observer.report().tracts
    assert (tracts.external, tracts.internal) == (BINS // 2, BINS // 2)
    assert (tracts.balance, tracts.coupling, tracts.integration) == pytest.approx((1.0, 1.0, 1.0))
    clock.now += BINS
    tracts = observer.report().tracts
    assert (tracts.external, tracts.balance, tracts.coupling, tracts.integration) == (0, 0.0, 0.0, 0.0)


def test_more_topics_than_fit_are_counted_together(observer: Observer) -> None:
    for number in range(MOST_TOPICS + 3):
        observer.see(made_at(START, f"topic.n{number}"))
    assert topic_of(observer, OTHERS).count == 3
    assert len(observer.report().topics) == MOST_TOPICS + 1


def test_it_says_when_it_has_watched_for_all_of_its_bins(observer: Observer, clock: Clock) -> None:
    clock.now += BINS - 1
    assert not observer.knows_all_bins
    clock.now += 1
    assert observer.knows_all_bins
