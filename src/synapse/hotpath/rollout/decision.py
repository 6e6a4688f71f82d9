"""What the next calls of a hot path are to do, worked out off the hot path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from synapse.kernels.child import TrialProcess

BUCKETS = 10_000
"""Keys are spread over this many buckets; a share of 10 % is the first 1,000 of them, so growing keeps who was in."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a call is to do, worked out beforehand and replaced as a whole.

    Attributes:
        native: the kernel, or None when the reference answers everything.
        below: buckets below this one are the kernel's.
        compare: of the kernel's runs, the share that is compared with the reference, 0 to 1.
        slots, number: where the flight recorder notes a run, and the number of the build.
        child: the process that runs the kernel instead of this one, during the burn-in.
        why: the reason, for people.
        hint: what somebody can do who wants the kernel to answer; empty where nothing.
    """

    native: Callable[..., Any] | None
    below: int
    compare: float
    slots: Any = field(compare=False)  # a memoryview of integers, which the type checker does not know
    number: int
    child: TrialProcess | None
    why: str
    hint: str = ""


def reference_only(why: str, *, below: int = 0, hint: str = "") -> Decision:
    """The reference answers. `below` counts what the kernel would have answered as fallbacks."""
    return Decision(None, below, 0.0, None, 0, None, why, hint)


UNDECIDED = reference_only("the state of the rollout has not been read yet")
