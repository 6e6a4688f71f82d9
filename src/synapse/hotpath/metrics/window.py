"""What is counted about a hot path, over a sliding window, and what of it is alarming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from synapse.hotpath.metrics.histogram import Counts, added, percentile

WINDOW = timedelta(hours=1)
SLICES = 12
"""The window is kept in this many slices, and moves by one of them at a time."""

FALLBACK_ALERT = 0.10
ERROR_ALERT = 0.01
LATENCY_ALERT = 1.20
ALERT_CALLS = 100
"""Calls (or pairs of timed calls) below which a rate says too little to alert anybody."""
TAIL_CALLS = 1000
"""Pairs below which a p95 says too little."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Calls counted over some time. Tallies add up.

    Attributes:
        native, reference: latencies of the runs that gave an answer, by runtime.
        paired_native, paired_reference: the same, of the calls that both ran, so that the two can be compared.
        errors: native runs that raised although the reference had an answer, or whose process was lost.
        reference_errors: calls that the reference refused by raising; the caller saw that.
        fallbacks: calls that belonged to the kernel and were answered by the reference.
        wrong: native answers that did not agree with the reference.
        shadowed: native answers that were computed beside the reference and not given to the caller.
        killed: processes that were killed while they ran the kernel.
    """

    native: Counts = field(default_factory=dict)
    reference: Counts = field(default_factory=dict)
    paired_native: Counts = field(default_factory=dict)
    paired_reference: Counts = field(default_factory=dict)
    errors: int = 0
    reference_errors: int = 0
    fallbacks: int = 0
    wrong: int = 0
    shadowed: int = 0
    killed: int = 0

    @property
    def native_runs(self) -> int:
        """Native runs, whether they gave an answer or raised."""
        return sum(self.native.values()) + self.errors

    @property
    def compared(self) -> int:
        """Calls that both ran."""
        return sum(self.paired_native.values())

    @property
    def native_answers(self) -> int:
        """Answers of the kernel that callers were given."""
        return sum(self.native.values()) - self.shadowed

    @property
    def reference_answers(self) -> int:
        """Answers of the reference that callers were given."""
        return sum(self.reference.values()) - (self.compared - self.shadowed)

    @property
    def calls(self) -> int:
        """Calls that were answered."""
        return self.native_answers + self.reference_answers

    @property
    def error_rate(self) -> float:
        """Of the native runs, how many raised."""
        return self.errors / self.native_runs if self.native_runs else 0.0

    @property
    def fallback_rate(self) -> float:
        """Of the calls that belonged to the kernel, how many the reference answered."""
        meant = self.native_answers + self.fallbacks
        return self.fallbacks / meant if meant else 0.0

    @property
    def latency_ratio(self) -> float | None:
        """Native latency over reference latency, on the same calls. None with too few of them.

        The p50, or the p95 where that is worse and there are `TAIL_CALLS` pairs: before, a busy machine makes tails.
        """
        if self.compared < ALERT_CALLS:
            return None
        shares = (0.50, 0.95) if self.compared >= TAIL_CALLS else (0.50,)
        pairs = ((percentile(self.paired_native, share), percentile(self.paired_reference, share)) for share in shares)
        return max((native or 0.0) / max(reference or 0.0, 1.0) for native, reference in pairs)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            native=added((self.native, other.native)),
            reference=added((self.reference, other.reference)),
            paired_native=added((self.paired_native, other.paired_native)),
            paired_reference=added((self.paired_reference, other.paired_reference)),
            errors=self.errors + other.errors,
            reference_errors=self.reference_errors + other.reference_errors,
            fallbacks=self.fallbacks + other.fallbacks,
            wrong=self.wrong + other.wrong,
            shadowed=self.shadowed + other.shadowed,
            killed=self.killed + other.killed,
        )


NOTHING = Tally()


def combined(tallies: Iterable[Tally]) -> Tally:
    """Several tallies as one."""
    return sum(tallies, NOTHING)


@dataclass(frozen=True, slots=True)
class Slice:
    """What was counted from `start` until the next slice's."""

    start: datetime
    tally: Tally


Window = tuple[Slice, ...]


def extended(window: Window, tally: Tally, now: datetime, *, fresh_from: datetime, span: timedelta = WINDOW) -> Window:
    """The window with a tally that ends now; slices older than the span are dropped.

    Args:
        fresh_from: what began before this time is not mixed with the tally (a stage was entered then).
        span: how long the window is; at most `SLICES` + 2 slices are kept.
    """
    kept = tuple(part for part in window if part.start > now - span)
    if tally == NOTHING:
        return kept
    if kept and kept[-1].start > fresh_from and now - kept[-1].start < span / SLICES:
        return (*kept[:-1], Slice(kept[-1].start, kept[-1].tally + tally))
    return (*kept, Slice(now, tally))


def since(window: Window, start: datetime) -> Tally:
    """Everything that was counted after this time."""
    return combined(part.tally for part in window if part.start > start)


@dataclass(frozen=True, slots=True)
class Alert:
    """Something about a hot path that somebody should look at."""

    name: Literal["fallback", "error", "latency"]
    message: str


def alerts(tally: Tally) -> tuple[Alert, ...]:
    """What is alarming."""
    found: list[Alert] = []
    if tally.native_answers + tally.fallbacks >= ALERT_CALLS and tally.fallback_rate > FALLBACK_ALERT:
        text = f"fallback rate {tally.fallback_rate:.1%} is above {FALLBACK_ALERT:.0%}"
        found.append(Alert("fallback", text))
    if tally.native_runs >= ALERT_CALLS and tally.error_rate > ERROR_ALERT:
        found.append(Alert("error", f"error rate {tally.error_rate:.1%} is above {ERROR_ALERT:.0%}"))
    ratio = tally.latency_ratio
    if ratio is not None and ratio > LATENCY_ALERT:
        text = f"the kernel takes {ratio:.2f} times as long as the reference, above {LATENCY_ALERT:.2f}"
        found.append(Alert("latency", text))
    return tuple(found)
