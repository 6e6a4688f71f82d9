"""How long to wait before trying again: exponential back-off with jitter.

The waits double, so that what is away gets time to come back, and are drawn at random, so that those who failed
together do not come back together. Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from synapse.errors import InvalidInput

Draw = Callable[[], float]
"""Gives a number of [0, 1)."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """The wait before try n + 1 is drawn evenly from [least · d, d), where d = min(cap_s, base_s · 2ⁿ⁻¹).

    Attributes:
        base_s: the longest first wait, in seconds.
        cap_s: the longest wait of all, in seconds.
        least: the share of d that is waited in any case: 0 is full jitter, 1 none.

    Raises:
        InvalidInput: a length is negative, or the share not from 0 to 1.
    """

    base_s: float = 0.1
    cap_s: float = 30.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.base_s <= self.cap_s and 0 <= self.least <= 1):
            raise InvalidInput(f"a back-off needs 0 <= base_s <= cap_s and least from 0 to 1, not {self}")

    def wait_s(self, failures: int, draw: Draw = random.random) -> float:
        """Seconds to wait after so many failures in a row, 1 or more."""
        longest = min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 60))
        return longest * (self.least + (1 - self.least) * draw())


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a message is given to a handler that raises: `attempts` times in all, then it is a dead letter.

    Raises:
        InvalidInput: fewer than one attempt.
    """

    attempts: int = 5
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidInput(f"a message is given to its handler once at least, not {self.attempts} times")
