"""Which path is worth a kernel next: score = gain x frequency / (complexity x risk).

Gain and frequency are measured where the path runs already, and declared until then; each row says which it is.
Complexity and risk are always declared: they are judgements about work that is still to be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from synapse.hotpath.metrics.histogram import total
from synapse.hotpath.metrics.window import ALERT_CALLS, Tally

Source = Literal["measured", "declared"]


class Level(IntEnum):
    """How much, as a factor of the score."""

    low = 1
    medium = 2
    high = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A path that has a kernel, or could have one.

    Attributes:
        gain: how many times faster the kernel is, or is hoped to be.
        frequency: calls a second, as expected of a busy installation.
    """

    name: str
    gain: float
    frequency: float
    complexity: Level
    risk: Level
    summary: str


CANDIDATES = (
    Candidate("pattern_search", 13.1, 100, Level.low, Level.low, "vector similarity, exact top-k"),
    Candidate("event_bus", 100, 1000, Level.medium, Level.low, "events between the tracts"),
    Candidate("mtf_ranker", 50, 100, Level.low, Level.low, "move-to-front ranks of the compression pipeline"),
    Candidate("embeddings", 100, 10, Level.high, Level.high, "BGE-M3 class embedding models"),
)
"""Gains and frequencies of the pilot's plan. None of them was measured here; what is takes their place in a ranking."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a path that runs: times faster, and calls a second. None where that is not enough to say."""

    gain: float | None = None
    frequency: float | None = None


NOTHING_MEASURED = Measured()


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its score, and where gain and frequency come from."""

    candidate: Candidate
    score: float
    gain: float
    gain_source: Source
    frequency: float
    frequency_source: Source


def rank(candidates: tuple[Candidate, ...], measured: Mapping[str, Measured]) -> list[Ranked]:
    """The candidates, highest score first. `measured` is by name."""
    ranked = []
    for candidate in candidates:
        found = measured.get(candidate.name, NOTHING_MEASURED)
        gain, frequency = found.gain, found.frequency
        used_gain = candidate.gain if gain is None else gain
        used_frequency = candidate.frequency if frequency is None else frequency
        ranked.append(
            Ranked(
                candidate,
                score=used_gain * used_frequency / (candidate.complexity * candidate.risk),
                gain=used_gain,
                gain_source="declared" if gain is None else "measured",
                frequency=used_frequency,
                frequency_source="declared" if frequency is None else "measured",
            )
        )
    return sorted(ranked, key=lambda one: (-one.score, one.candidate.name))


def measured_gain(tally: Tally) -> float | None:
    """Time of the reference over time of the kernel on the same calls; None with too few of them."""
    if tally.compared < ALERT_CALLS:
        return None
    return total(tally.paired_reference) / max(total(tally.paired_native), 1e-9)


def measured_frequency(tally: Tally, seconds: float) -> float | None:
    """Calls a second; None with too few of them."""
    return tally.calls / seconds if tally.calls >= ALERT_CALLS and seconds > 0 else None
