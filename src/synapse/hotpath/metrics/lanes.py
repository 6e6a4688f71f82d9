"""Counting without locks: each thread counts in a lane of its own, and a reader adds the lanes up.

Only its thread writes to a lane. A reader takes copies, and subtracts what it has read before.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict

from synapse.hotpath.metrics.histogram import Counts
from synapse.hotpath.metrics.window import NOTHING, Tally, combined

SLOTS = 4096
"""Threads, times hot paths, that can each say what they are running. Later ones share the last slot."""

_slots = threading.Lock()
_free: list[int] = []
_used = 0


class Lane:
    """What one thread counts for one hot path.

    Attributes:
        slot: where the flight recorder notes what this thread runs.
        turn: where the next call without a key falls among the buckets.
        decision: the decision that the next number belongs to.
        until_compared: native calls left before one is compared with the reference.
        native_answered: whether the last call was answered by the kernel.
        The others are as in `Tally`.
    """

    __slots__ = (
        "decision",
        "errors",
        "fallbacks",
        "native",
        "native_answered",
        "paired_native",
        "paired_reference",
        "reference",
        "reference_errors",
        "shadowed",
        "slot",
        "turn",
        "until_compared",
        "wrong",
    )

    def __init__(self, slot: int, turn: int) -> None:
        self.slot = slot
        self.turn = turn
        self.decision: object = None
        self.until_compared = 0
        self.native_answered = False
        self.native: defaultdict[int, int] = defaultdict(int)
        self.reference: defaultdict[int, int] = defaultdict(int)
        self.paired_native: defaultdict[int, int] = defaultdict(int)
        self.paired_reference: defaultdict[int, int] = defaultdict(int)
        self.errors = 0
        self.reference_errors = 0
        self.fallbacks = 0
        self.wrong = 0
        self.shadowed = 0

    def read(self) -> Tally:
        """Everything counted so far. A dict of integers is copied as one step, so no lock is needed."""
        return Tally(
            native=dict(self.native),
            reference=dict(self.reference),
            paired_native=dict(self.paired_native),
            paired_reference=dict(self.paired_reference),
            errors=self.errors,
            reference_errors=self.reference_errors,
            fallbacks=self.fallbacks,
            wrong=self.wrong,
            shadowed=self.shadowed,
        )


class Lanes(threading.local):
    """The lane of the calling thread is the attribute `lane`, missing before the thread's first call."""

    lane: Lane


class Counters:
    """All lanes of one hot path."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: list[tuple[weakref.ref[threading.Thread], Lane]] = []
        self._ended = NOTHING
        self._taken = NOTHING

    def open(self, turn: int) -> Lane:
        """A lane for the calling thread; `turn` is where its calls without a key begin."""
        lane = Lane(_take_slot(), turn)
        with self._lock:
            self._lanes.append((weakref.ref(threading.current_thread()), lane))
        return lane

    def read(self) -> Tally:
        """Everything counted since the process began. Lanes of threads that have ended are folded into one sum."""
        with self._lock:
            kept = []
            for thread, lane in self._lanes:
                running = thread()
                if running is not None and running.is_alive():
                    kept.append((thread, lane))
                else:
                    self._ended += lane.read()
                    _give_back(lane.slot)
            self._lanes = kept
            return combined((self._ended, *(lane.read() for _, lane in kept)))

    def take(self) -> Tally:
        """What was counted since the last `take`."""
        everything = self.read()
        news, self._taken = subtract(everything, self._taken), everything
        return news

    def after_fork(self) -> None:
        """In a forked child: nobody holds the lock, and what was counted so far is the parent's."""
        self._lock = threading.Lock()
        self._taken = self.read()

    def put_back(self, tally: Tally) -> None:
        """Count a tally again that was taken and could not be kept."""
        self._taken = subtract(self._taken, tally)


def subtract(more: Tally, less: Tally) -> Tally:
    """What of `more` is not in `less`."""
    return Tally(
        native=_rest(more.native, less.native),
        reference=_rest(more.reference, less.reference),
        paired_native=_rest(more.paired_native, less.paired_native),
        paired_reference=_rest(more.paired_reference, less.paired_reference),
        errors=more.errors - less.errors,
        reference_errors=more.reference_errors - less.reference_errors,
        fallbacks=more.fallbacks - less.fallbacks,
        wrong=more.wrong - less.wrong,
        shadowed=more.shadowed - less.shadowed,
    )


def _rest(more: Counts, less: Counts) -> dict[int, int]:
    return {bucket: count - less.get(bucket, 0) for bucket, count in more.items() if count != less.get(bucket, 0)}


def _take_slot() -> int:
    global _used  # noqa: PLW0603 (slots are numbered over the whole process)
    with _slots:
        if _free:
            return _free.pop()
        _used = min(_used + 1, SLOTS)
        return _used - 1


def _give_back(slot: int) -> None:
    with _slots:
        if slot < SLOTS - 1:  # the last one may be shared
            _free.append(slot)
