"""Latencies in logarithmic buckets: bounded memory, bounded relative error, and histograms that add up.

The idea of HdrHistogram (Gil Tene, hdrhistogram.org): every octave is cut into `STEPS` buckets of equal width. A value
is reported as the middle of its bucket, so it is off by at most 1 / (2 · STEPS) of itself: 1.6 %. Values below
2 · STEPS nanoseconds are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

STEP_BITS = 5
STEPS = 2**STEP_BITS
LONGEST = 2**42 - 1
"""Nanoseconds (73 minutes); anything longer is counted as that."""
RELATIVE_ERROR = 1 / (2 * STEPS)

Counts = Mapping[int, int]
"""Calls by bucket; buckets without any are left out."""


def bucket_of(nanoseconds: int) -> int:
    """The bucket of a latency (0 or more)."""
    nanoseconds = min(nanoseconds, LONGEST)
    shift = nanoseconds.bit_length() - STEP_BITS - 1
    return (shift << STEP_BITS) + (nanoseconds >> shift) if shift > 0 else nanoseconds


BUCKETS = bucket_of(LONGEST) + 1


def lowest(bucket: int) -> int:
    """The smallest latency of a bucket, in nanoseconds."""
    shift = max(0, (bucket >> STEP_BITS) - 1)
    return (bucket - (shift << STEP_BITS)) << shift


def middle(bucket: int) -> float:
    """What a latency of this bucket is reported as, in nanoseconds."""
    return (lowest(bucket) + lowest(bucket + 1) - 1) / 2


def percentile(counts: Counts, share: float) -> float | None:
    """The latency that this share of calls did not exceed, in nanoseconds; None when there were no calls.

    The nearest-rank definition: the smallest value with at least `share` of all values at or below it.
    """
    left = max(1, math.ceil(share * sum(counts.values())))
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            return middle(bucket)
    return None


def total(counts: Counts) -> float:
    """The sum of all latencies, in seconds."""
    return sum(middle(bucket) * count for bucket, count in counts.items()) / 1e9


def added(parts: Iterable[Counts]) -> dict[int, int]:
    """Several histograms as one."""
    together: dict[int, int] = {}
    for part in parts:
        for bucket, count in part.items():
            together[bucket] = together.get(bucket, 0) + count
    return together
