"""Observers count what passes: how much, how often, how late, how long it took, and how the tracts work together."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from synapse.callosum.message import Message, Tract
from synapse.callosum.observe import tract_measures
from synapse.callosum.payloads import Untyped
from synapse.hotpath.metrics.histogram import added, bucket_of, percentile

BINS = 300
"""Bins of one second: five minutes."""
MINUTE = 60
LONGEST_S = 1e9
"""A duration that is longer, negative or no number is none."""
MOST_TOPICS = 500
OTHERS = "(others)"
"""Under what the messages are counted whose topic came when there were `MOST_TOPICS` already."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds that a half, 95 and 99 of 100 did not exceed, to 1.6 %."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class TopicReport:
    """What was seen of one topic.

    Attributes:
        count: messages since the observer began.
        recent: those that were made in the last five minutes.
        per_minute, per_minute_5m: messages a minute over the last minute and the last five.
        latency: from the moment a message was made, which its id says to the millisecond, until it was seen.
        duration: of what the messages tell of, where their payload has a number `seconds`.
    """

    topic: str
    count: int
    recent: int
    per_minute: float
    per_minute_5m: float
    latency: Percentiles | None
    duration: Percentiles | None


@dataclass(frozen=True, slots=True)
class TractReport:
    """Messages of the last five minutes by tract, and what `tract_measures` says of them, each from 0 to 1."""

    external: int
    internal: int
    balance: float
    coupling: float
    integration: float


@dataclass(frozen=True, slots=True)
class Report:
    """What an observer has seen, topics by name. Latencies and durations are those of the last 5 to 10 minutes."""

    count: int
    topics: tuple[TopicReport, ...]
    tracts: TractReport


class _Recent:
    """Counts of the last `BINS` seconds."""

    __slots__ = ("_bins", "_newest")

    def __init__(self) -> None:
        self._bins = array("L", bytes(array("L").itemsize * BINS))
        self._newest = 0

    def add(self, second: int) -> None:
        """Count one in the bin of a second. One that is too old for any bin is not counted."""
        self._advance(second)
        if second > self._newest - BINS:
            self._bins[second % BINS] += 1

    def until(self, now: int) -> list[int]:
        """The counts of the bins that end with this second, oldest first."""
        self._advance(now)
        start = (self._newest + 1) % BINS
        return [*self._bins[start:], *self._bins[:start]]

    def _advance(self, second: int) -> None:
        for passed in range(max(self._newest, second - BINS) + 1, second + 1):
            self._bins[passed % BINS] = 0
        self._newest = max(self._newest, second)


class _Histogram:
    """Times of the last one to two spans of `BINS` seconds."""

    __slots__ = ("_before", "_counts", "_turn")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._turn = 0

    def add(self, seconds: float, now: float) -> None:
        self._advance(now)
        bucket = bucket_of(max(0, round(seconds * 1e9)))
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def percentiles(self, now: float) -> Percentiles | None:
        self._advance(now)
        counts = added((self._before, self._counts))
        found = [percentile(counts, share) for share in (0.50, 0.95, 0.99)]
        return Percentiles(*(value / 1e9 for value in found if value is not None)) if counts else None

    def _advance(self, now: float) -> None:
        turn = int(now // BINS)
        if turn > self._turn:
            self._before = self._counts if turn == self._turn + 1 else {}
            self._counts = {}
            self._turn = turn


@dataclass(slots=True)
class _Topic:
    count: int = 0
    recent: _Recent = field(default_factory=_Recent)
    latency: _Histogram = field(default_factory=_Histogram)
    duration: _Histogram = field(default_factory=_Histogram)


class Observer:
    """Counts messages. `see` is a handler for `Bus.subscribe`; it takes some microseconds and never fails.

    A message counts in the second it was made, so what comes late counts where it belongs. Of one event loop.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time, since: float | None = None) -> None:
        """An observer that has seen nothing.

        Args:
            clock: seconds since 1970.
            since: from when on it is given every message, for the rates; by default from now on.
        """
        self._clock = clock
        self._began = clock() if since is None else since
        self._count = 0
        self._topics: dict[str, _Topic] = {}
        self._tracts: Mapping[Tract, _Recent] = {tract: _Recent() for tract in Tract}

    def see(self, message: Message) -> None:
        """Count a message that has come just now."""
        now = self._clock()
        topic = self._counted(message, now)
        topic.latency.add(now - message.time, now)

    def count(self, message: Message) -> None:
        """Count a message of the past, read from a log: when it was handled is not known."""
        self._counted(message, self._clock())

    @property
    def knows_all_bins(self) -> bool:
        """Whether it has watched for five minutes."""
        return self._clock() - self._began >= BINS

    def report(self) -> Report:
        """What was seen until now."""
        now = self._clock()
        bins = {tract: recent.until(int(now)) for tract, recent in self._tracts.items()}
        external, internal = bins[Tract.EXTERNAL], bins[Tract.INTERNAL]
        return Report(
            count=self._count,
            topics=tuple(self._topic_report(name, now) for name in sorted(self._topics)),
            tracts=TractReport(
                external=sum(external),
                internal=sum(internal),
                balance=tract_measures.balance(external, internal),
                coupling=tract_measures.coupling(external, internal),
                integration=tract_measures.integration(external, internal),
            ),
        )

    def _counted(self, message: Message, now: float) -> _Topic:
        name = message.topic
        if name not in self._topics and len(self._topics) >= MOST_TOPICS:
            name = OTHERS
        topic = self._topics.setdefault(name, _Topic())
        second = int(min(message.time, now))  # the clock of another machine may be ahead
        topic.count += 1
        topic.recent.add(second)
        seconds = _seconds_of(message.payload)
        if seconds is not None:
            topic.duration.add(seconds, now)
        self._tracts[message.tract].add(second)
        self._count += 1
        return topic

    def _topic_report(self, name: str, now: float) -> TopicReport:
        topic = self._topics[name]
        bins = topic.recent.until(int(now))
        watched = max(1.0, now - self._began)
        return TopicReport(
            topic=name,
            count=topic.count,
            recent=sum(bins),
            per_minute=sum(bins[-MINUTE:]) / min(watched, MINUTE) * MINUTE,
            per_minute_5m=sum(bins) / min(watched, BINS) * MINUTE,
            latency=topic.latency.percentiles(now),
            duration=topic.duration.percentiles(now),
        )


def _seconds_of(payload: BaseModel) -> float | None:
    found = payload.root.get("seconds") if isinstance(payload, Untyped) else getattr(payload, "seconds", None)
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 <= found < LONGEST_S:
        return None
    return float(found)
