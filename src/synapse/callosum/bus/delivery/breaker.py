"""A breaker: keeps work from what fails again and again, until it answers again.

Closed, everything may go. It opens after `in_a_row` failures with no success between them, or `failures` among the
last `window` outcomes; then nothing may go until a back-off has passed. Half-open, `trials` pieces of work may go: when
all of them succeed it closes, when one fails it opens again, for longer. Source: M. Nygard, "Release It!", 2007.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from synapse.callosum.bus.delivery.backoff import Backoff, Draw
from synapse.errors import InvalidInput


class State(StrEnum):
    """What a breaker lets through: everything, nothing, or a few trials."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and what closes it.

    Attributes:
        in_a_row: failures with no success between them that open it.
        failures: failures among the last `window` outcomes that open it; what is not yet there counts as success.
        window: how many outcomes are remembered.
        trials: pieces of work that may go while it is half-open, and must succeed.
        backoff: how long it stays open.

    Raises:
        InvalidInput: a number is less than 1, or more failures than outcomes are asked for.
    """

    in_a_row: int = 5
    failures: int = 10
    window: int = 20
    trials: int = 1
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=1.0, cap_s=60.0, least=0.5))

    def __post_init__(self) -> None:
        if min(self.in_a_row, self.failures, self.trials) < 1 or self.failures > self.window:
            raise InvalidInput(f"a breaker needs thresholds of 1 or more, and failures <= window, not {self}")


class Breaker:
    """The state of one breaker. For one thread.

    Work that may go gets an era (`admit`), and gives it back with its outcome: what began before the state last changed
    says nothing about now, and is passed over.

    Attributes:
        state: as it last became; `refresh` looks at the clock first.
        era: counts the changes of state.
        calm: closed, and no failure remembered: a success would change nothing and need not be told.
        until: when an open one becomes half-open, by its clock.
    """

    __slots__ = ("_admitted", "_clock", "_draw", "_history", "_mask", "_on_change", "_opened", "_policy", "_row",
                 "_succeeded", "calm", "era", "state", "until")  # fmt: skip

    def __init__(
        self,
        policy: BreakerPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Draw = random.random,
        on_change: Callable[[State], None] | None = None,
    ) -> None:
        self._policy = policy or BreakerPolicy()
        self._clock, self._draw, self._on_change = clock, draw, on_change
        self._mask = (1 << self._policy.window) - 1
        self._history = 0  # the last outcomes as bits, the newest the lowest; 1 is a failure
        self._row = 0
        self._opened = 0  # times it has opened since it was last closed
        self._admitted = self._succeeded = 0
        self.state = State.CLOSED
        self.era = 0
        self.calm = True
        self.until = 0.0

    def refresh(self) -> State:
        """The state now: an open one whose back-off has passed is half-open from here on."""
        if self.state is State.OPEN and self._clock() >= self.until:
            self._become(State.HALF_OPEN)
        return self.state

    def ready(self) -> bool:
        """Whether `admit` would let something go."""
        state = self.refresh()
        return state is State.CLOSED or (state is State.HALF_OPEN and self._admitted < self._policy.trials)

    def admit(self) -> int | None:
        """Let one piece of work go: the era to give back with its outcome, or None when it must wait."""
        if not self.ready():
            return None
        self._admitted += self.state is State.HALF_OPEN
        return self.era

    def succeeded(self, era: int) -> None:
        """Work of this era succeeded."""
        if era != self.era or self.calm:
            return
        if self.state is State.HALF_OPEN:
            self._succeeded += 1
            if self._succeeded == self._policy.trials:
                self._opened = 0
                self._become(State.CLOSED)
            return
        self._row = 0
        self._history = self._history << 1 & self._mask
        self.calm = not self._history

    def failed(self, era: int) -> None:
        """Work of this era failed."""
        if era != self.era:
            return
        self.calm = False
        self._row += 1
        self._history = (self._history << 1 | 1) & self._mask
        bad = self._row >= self._policy.in_a_row or self._history.bit_count() >= self._policy.failures
        if bad or self.state is State.HALF_OPEN:
            self._opened += 1
            self.until = self._clock() + self._policy.backoff.wait_s(self._opened, self._draw)
            self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self.state = state
        self.era += 1
        self.calm = state is State.CLOSED
        self._row = self._history = self._admitted = self._succeeded = 0
        if self._on_change is not None:
            self._on_change(state)
