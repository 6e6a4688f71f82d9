"""One call site, two implementations: a reference function and its kernel, of which every call picks one.

The reference is the specification. A hot path is a function of its arguments: it changes none of them and keeps
nothing, so that both sides can be run on one call, and the reference can answer a call that the kernel failed at.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import threading
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Generic, ParamSpec, TypeVar, cast
from zlib import crc32

from synapse.hotpath.metrics.histogram import bucket_of
from synapse.hotpath.metrics.lanes import Counters, Lane, Lanes
from synapse.hotpath.rollout.decision import BUCKETS, UNDECIDED, Decision, reference_only
from synapse.hotpath.rollout.plan import BURN_IN_CALLS, NO_FAULTS, STAGES, Faults, Plan
from synapse.kernels.child import Crashed, Lost, NotSent, Raised, TrialProcess
from synapse.kernels.native import NativeSide

P = ParamSpec("P")
R = TypeVar("R")

TURN = 6_181
"""Calls without a key take every 6,181st bucket: prime to 10,000 and near the golden section, so any run is even."""
NEVER = 2**62


class HotPath(Generic[P, R]):
    """A reference with its kernel. `call` is what callers call; `decision` is what a supervisor sets.

    Attributes:
        on_first_call: called at the first call of each thread.
        last_error: the latest error of the kernel, for people.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        native: NativeSide,
        agrees: Callable[[R, R], bool],
        *,
        key: Callable[P, str | bytes] | None = None,
        plan: Plan = STAGES,
        burn_in: Callable[[], list[tuple[Any, ...]]] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self.reference = reference
        self.native = native
        self.agrees = agrees
        self.key = key
        self.plan = plan
        self.burn_in = burn_in
        self.counters = Counters()
        self.decision = UNDECIDED
        self._faults = NO_FAULTS
        self._lock = threading.Lock()
        self.last_error = ""
        self.on_first_call: Callable[[], object] | None = None
        self.lanes = Lanes()
        self._salt = crc32(name.encode())
        self._draw = draw
        self.call = self._make_call()

    def bucket(self, key: str | bytes) -> int:
        """The bucket of a key: the same in every process, and of its own for every hot path."""
        return crc32(key.encode() if isinstance(key, str) else key, self._salt) % BUCKETS

    @property
    def native_answered(self) -> bool:
        """Whether this thread's last call was answered by the kernel."""
        lane = getattr(self.lanes, "lane", None)
        return lane is not None and lane.native_answered

    def _make_call(self) -> Callable[P, R]:
        """The function that callers call. A closure: it reads locals, and is the one thing here that must be fast."""
        path, lanes, reference, key, bucket = self, self.lanes, self.reference, self.key, self.bucket

        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            decision = path.decision
            try:
                lane = lanes.lane
            except AttributeError:
                lane = path.open_lane()
            if lane.decision is not decision:
                path.adopt(lane, decision)
            native = decision.native
            below = decision.below
            if below != BUCKETS:
                if key is None:
                    lane.turn = turn = (lane.turn + TURN) % BUCKETS
                else:
                    turn = bucket(key(*args, **kwargs))
                if turn >= below:
                    if native is not None and not below:
                        return path.shadow(decision, lane, args, kwargs)
                    return path.answer_by_reference(lane, args, kwargs)
            if native is None:
                lane.fallbacks += 1
                return path.answer_by_reference(lane, args, kwargs)
            lane.until_compared -= 1
            if lane.until_compared < 0 or decision.child is not None:
                return path.compare(decision, lane, args, kwargs, give=True)
            slots = decision.slots
            slot = lane.slot
            slots[slot] = decision.number
            start = perf_counter_ns()
            try:
                answer = native(*args, **kwargs)
            except BaseException as error:
                slots[slot] = 0
                return path.recover(lane, error, args, kwargs)
            taken = perf_counter_ns() - start
            slots[slot] = 0
            lane.native[bucket_of(taken)] += 1
            lane.native_answered = True
            return cast(R, answer)

        return call

    def open_lane(self) -> Lane:
        """A lane for this thread, at its first call."""
        if self.on_first_call is not None:
            self.on_first_call()
        lane = self.counters.open(turn=int(self._draw() * BUCKETS))
        self.lanes.lane = lane
        return lane

    def adopt(self, lane: Lane, decision: Decision) -> None:
        """A thread sees a decision for the first time: its share of comparisons holds from this call on."""
        lane.decision = decision
        lane.until_compared = self._gap(decision.compare)

    def decide(self, decision: Decision) -> None:
        """Set what calls do from now on, unless one has found a fault that nobody has taken yet."""
        with self._lock:
            if not self._faults.crash and not self._faults.wrong and decision != self.decision:
                self.decision = decision

    @property
    def has_faults(self) -> bool:
        """Whether calls have found something that nobody has taken yet."""
        return self._faults != NO_FAULTS

    def take_faults(self) -> Faults:
        """What calls have found since this was last asked."""
        with self._lock:
            faults, self._faults = self._faults, NO_FAULTS
        return faults

    def after_fork(self) -> None:
        """A forked child begins anew: nothing supervises it yet, and what the parent counted is the parent's."""
        self._lock = threading.Lock()
        self._faults = NO_FAULTS
        self.decision = UNDECIDED
        self.counters.after_fork()
        self.lanes.__dict__.clear()  # so that the next call is this thread's first, and starts a supervisor

    def report(self, found: Faults) -> None:
        """Note what a call has found. After a crash or a wrong answer no call uses the kernel, until `decide`."""
        with self._lock:
            self._faults += found
            if found.crash or found.wrong:
                self.decision = reference_only(found.crash or found.wrong)

    def rehearse(self, child: TrialProcess) -> None:
        """Give the declared calls of the burn-in to the child. They are compared, and counted for the burn-in only."""
        calls = self.burn_in() if self.burn_in is not None else []
        for args in itertools.islice(itertools.cycle(calls), BURN_IN_CALLS):
            try:
                answer, _ = child.call(args, {})
            except NotSent:
                continue
            except Crashed as error:
                self.report(Faults(crash=str(error)))
                return
            except (Raised, Lost) as error:  # the calls of users go on with the burn-in, and count such errors
                self.last_error = str(error)
                return
            disagreement = self._disagreement(answer, cast(Any, self.reference)(*args))
            self.report(Faults(wrong=disagreement) if disagreement else Faults(burned=1))
            if disagreement:
                return

    def answer_by_reference(self, lane: Lane, args: Any, kwargs: Any) -> R:
        """Run the reference. What it raises is the answer to a bad call, and is raised."""
        lane.native_answered = False
        start = perf_counter_ns()
        try:
            answer = self.reference(*args, **kwargs)
        except Exception:
            lane.reference_errors += 1
            raise
        lane.reference[bucket_of(perf_counter_ns() - start)] += 1
        return answer

    def recover(self, lane: Lane, error: BaseException, args: Any, kwargs: Any, *, meant: bool = True) -> R:
        """The kernel raised: the reference answers the same call. When that raises too, the call itself was bad."""
        if not isinstance(error, Exception):
            raise error
        answer = self.answer_by_reference(lane, args, kwargs)
        lane.errors += 1
        lane.fallbacks += meant
        self.last_error = f"{type(error).__name__}: {error}"
        return answer

    def shadow(self, decision: Decision, lane: Lane, args: Any, kwargs: Any) -> R:
        """A stage that gives the kernel's answers to nobody: some calls run it besides, all get the reference's."""
        lane.until_compared -= 1
        if lane.until_compared < 0:
            return self.compare(decision, lane, args, kwargs, give=False)
        return self.answer_by_reference(lane, args, kwargs)

    def compare(self, decision: Decision, lane: Lane, args: Any, kwargs: Any, *, give: bool) -> R:
        """Run both. The kernel's answer is given, if at all, only when it agrees with the reference's."""
        lane.until_compared = self._gap(decision.compare)
        try:
            answer, taken = self._run(decision, lane, args, kwargs)
        except NotSent:  # no native run: nothing is known about it
            lane.fallbacks += give
            return self.answer_by_reference(lane, args, kwargs)
        except Crashed as error:
            self.report(Faults(crash=str(error)))
            lane.errors += 1
            lane.fallbacks += give
            return self.answer_by_reference(lane, args, kwargs)
        except BaseException as error:
            return self.recover(lane, error, args, kwargs, meant=give)
        try:
            start = perf_counter_ns()
            expected = self.reference(*args, **kwargs)
            expected_taken = perf_counter_ns() - start
        except Exception as error:
            lane.wrong += 1
            lane.reference_errors += 1
            lane.native_answered = False
            self.report(Faults(wrong=f"the kernel answered a call that the reference refuses: {error}"))
            raise
        lane.native[bucket_of(taken)] += 1
        lane.paired_native[bucket_of(taken)] += 1
        lane.reference[bucket_of(expected_taken)] += 1
        lane.paired_reference[bucket_of(expected_taken)] += 1
        disagreement = self._disagreement(cast(R, answer), expected)
        if disagreement:
            lane.wrong += 1
            lane.fallbacks += give
            self.report(Faults(wrong=disagreement))
        elif decision.child is not None:
            self.report(Faults(burned=1))
        lane.native_answered = give and not disagreement
        if not lane.native_answered:
            lane.shadowed += 1
            return expected
        return cast(R, answer)

    def _run(self, decision: Decision, lane: Lane, args: Any, kwargs: Any) -> tuple[Any, int]:
        """The kernel's answer and its nanoseconds, from the child during the burn-in and from this process after it."""
        if decision.child is not None:
            return decision.child.call(args, kwargs)
        assert decision.native is not None  # noqa: S101 (the callers have just looked)
        decision.slots[lane.slot] = decision.number
        try:
            start = perf_counter_ns()
            answer = decision.native(*args, **kwargs)
            return answer, perf_counter_ns() - start
        finally:
            decision.slots[lane.slot] = 0

    def _disagreement(self, answer: R, expected: R) -> str:
        """In what way the answers differ; empty when they agree. Comparing garbage may raise, which is a difference."""
        try:
            return "" if self.agrees(answer, expected) else "an answer did not agree with the reference's"
        except Exception as error:
            return f"an answer could not even be compared with the reference's: {type(error).__name__}: {error}"

    def _gap(self, compare: float) -> int:
        """How many native calls go by before one is compared: every call is, independently, with this probability.

        Not every n-th call: a kernel that is wrong every n-th time could hide behind that.
        """
        if compare >= 1:
            return 0
        if compare <= 0:
            return NEVER
        return int(math.log(1 - self._draw()) / math.log(1 - compare))
