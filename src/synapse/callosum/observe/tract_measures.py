"""How the two tracts work together: balance, coupling, and their product, the integration score.

Each is a function of the messages of both tracts counted in the same bins of time (`Observer` counts in bins of one
second over five minutes), and a number from 0 to 1. They describe traffic; they judge nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from synapse.errors import InvalidInput

Counts = Sequence[int]
"""Messages of one tract in each bin, oldest bin first; none below 0."""


def balance(external: Counts, internal: Counts) -> float:
    """How evenly the messages are spread over the tracts.

    With E external and I internal messages in all it is 1 - |E - I| / (E + I), from 0 (one tract has all, or there are
    none) to 1 (both have as many).

    Raises:
        InvalidInput: the bins of the tracts are not the same, or a count is below 0.
    """
    _check(external, internal)
    e, i = sum(external), sum(internal)
    return 1 - abs(e - i) / (e + i) if e + i else 0.0


def coupling(external: Counts, internal: Counts) -> float:
    """How much the activity of one tract says about that of the other, in the same bin.

    Each bin of a tract is at one of three levels: silent, at most the median of the tract's bins that are not silent,
    or above that. With X and Y the levels of the tracts, their mutual information I(X;Y) = H(X) + H(Y) - H(X,Y), and H
    the entropy of the observed frequencies, coupling is the normalised mutual information I(X;Y) / sqrt(H(X) H(Y)).
    It is from 0 (independent; or a tract that is always at one level, which says nothing) to 1 (the level of either
    tract gives that of the other). It knows no direction, and no delay longer than a bin. Tracts that are independent
    read a little above 0 because the bins are finite: by about 4 / (2 n) nats over n bins, at most 0.01 of 1 at
    n = 300 with all levels in use.

    Source: A. Strehl, J. Ghosh, Cluster ensembles, JMLR 3 (2002), equation 2.

    Raises:
        InvalidInput: as `balance`.
    """
    _check(external, internal)
    x, y = _levels(external), _levels(internal)
    h_x, h_y = _entropy(x), _entropy(y)
    if not h_x or not h_y:
        return 0.0
    shared = h_x + h_y - _entropy(zip(x, y, strict=True))
    return min(1.0, max(0.0, shared / math.sqrt(h_x * h_y)))


def integration(external: Counts, internal: Counts) -> float:
    """The integration score: balance times coupling, from 0 to 1. It is high only where both are.

    Raises:
        InvalidInput: as `balance`.
    """
    return balance(external, internal) * coupling(external, internal)


def _check(external: Counts, internal: Counts) -> None:
    if len(external) != len(internal):
        raise InvalidInput(f"both tracts are counted in the same bins, not in {len(external)} and {len(internal)}")
    if min(external, default=0) < 0 or min(internal, default=0) < 0:
        raise InvalidInput("a count of messages is not below 0")


def _levels(counts: Counts) -> list[int]:
    """0, 1 or 2 for each bin: silent, at most the (lower) median of what is not silent, above it."""
    active = sorted(count for count in counts if count)
    if not active:
        return [0] * len(counts)
    median = active[(len(active) - 1) // 2]
    return [0 if count == 0 else 1 if count <= median else 2 for count in counts]


def _entropy(values: Iterable[object]) -> float:
    """The entropy of the observed frequencies, in nats; exactly 0 where there is only one value."""
    counts = Counter(values)
    total = sum(counts.values())
    if len(counts) < 2:
        return 0.0
    return -sum(count / total * math.log(count / total) for count in counts.values())
