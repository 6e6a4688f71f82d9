"""How a build of a kernel comes to answer calls: stages, what each asks for, and what sends it back. Pure functions.

`observe` is the automaton: it takes what was counted since it was last asked and the time, and returns the rollout as
it now is, with what changed. Time comes in as an argument and nothing else is looked at, so twelve weeks take no time
to test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from synapse.errors import Conflict, InvalidInput
from synapse.hotpath.metrics.window import NOTHING, Tally, Window, combined, extended, since
from synapse.hotpath.news import Kind

ROLLBACK_ERROR_RATE = 0.05
ROLLBACK_SAMPLES = 50
"""Native runs in the window below which its error rate sends nothing back: the calls fall back one by one anyway."""

BURN_IN_CALLS = 200
"""Answers that a build gives in a process of its own before it may run in ours."""


KILLED_TO_SUSPEND = 3
"""Processes killed while they ran the kernel, within the window, that suspend it: it may be what fills the memory."""
SUSPENSION = timedelta(hours=1)
"""So long a suspended kernel answers nothing; then it goes on where it was."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a rollout, and what it takes to leave it upwards.

    Attributes:
        share: of the keys, how many are answered by the kernel, 0 to 1.
        compare: of the calls that the kernel runs in, how many are compared with the reference *before* the answer is
            given, 0 to 1. Where `share` is 0 it is of all calls, and the reference's answer is the one given.
        dwell: how long the stage lasts at least.
        min_samples: native runs that it takes at least.
        max_error_rate: highest error rate in the window, 0 to 1.
        max_latency_ratio: highest native latency, as a multiple of the reference's on the same calls.
    """

    name: str
    share: float
    compare: float
    dwell: timedelta
    min_samples: int
    max_error_rate: float = 0.01
    max_latency_ratio: float = 1.20


Plan = tuple[Stage, ...]

STAGES: Plan = (
    Stage("validate", share=0.0, compare=0.10, dwell=timedelta(days=7), min_samples=1_000),
    Stage("canary", share=0.10, compare=1.0, dwell=timedelta(days=7), min_samples=5_000),
    Stage("half", share=0.50, compare=0.05, dwell=timedelta(days=7), min_samples=5_000),
    Stage("full", share=1.0, compare=0.01, dwell=timedelta(days=30), min_samples=0),
)
"""The default plan. The last stage has nowhere to go: its dwell time and samples are not looked at."""

Mode = Literal["automatic", "paused", "held", "quarantined", "suspended"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Where one build of one kernel stands.

    Attributes:
        stage: index into the plan.
        mode: `automatic` moves by itself; `paused` only goes back; `held` (it answered wrongly) and `quarantined` (it
            crashed or hung) answer nothing until somebody clears them; `suspended` (processes that ran it were killed)
            answers nothing for a while.
        entered: when the stage was entered.
        samples: native runs since then.
        burn_in: answers it has given in a process of its own, up to `BURN_IN_CALLS`.
        reason: why it is in this stage and mode.
        problem: why the build cannot be opened, empty when it can.
        window: what was counted lately, by all processes.
        totals: what was counted since the rollout began.
    """

    entered: datetime
    began: datetime
    stage: int = 0
    mode: Mode = "automatic"
    samples: int = 0
    burn_in: int = 0
    reason: str = "new build"
    problem: str = ""
    window: Window = ()
    totals: Tally = NOTHING

    @property
    def burned_in(self) -> bool:
        """Whether the build may run in this process."""
        return self.burn_in >= BURN_IN_CALLS

    @property
    def stopped(self) -> bool:
        """Whether the kernel may answer nothing at all."""
        return self.mode in ("held", "quarantined", "suspended")


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a rollout."""

    kind: Kind
    from_stage: int
    to_stage: int
    reason: str


Step = tuple[Rollout, tuple[Change, ...]]


@dataclass(frozen=True, slots=True)
class Faults:
    """What a process saw that counting does not tell.

    Attributes:
        crash, wrong: how the kernel crashed or hung, and how an answer was wrong; empty when neither happened.
        burned: answers given in the burn-in.
        problem: why the build cannot be opened, empty when it can, None when nothing new is known about that.
        killed: how a process was killed while it ran the kernel; empty when none was.
    """

    crash: str = ""
    wrong: str = ""
    burned: int = 0
    problem: str | None = None
    killed: str = ""

    def __add__(self, other: Faults) -> Faults:
        return Faults(
            self.crash or other.crash,
            self.wrong or other.wrong,
            self.burned + other.burned,
            self.problem if other.problem is None else other.problem,
            self.killed or other.killed,
        )


NO_FAULTS = Faults()


def begin(now: datetime) -> Rollout:
    """A build that has not been called yet."""
    return Rollout(entered=now, began=now)


def observe(rollout: Rollout, tally: Tally, now: datetime, *, faults: Faults = NO_FAULTS, plan: Plan = STAGES) -> Step:
    """Count what happened until now, and move if that is called for.

    A crash quarantines at once; `KILLED_TO_SUSPEND` processes killed in the window suspend for a while. A wrong answer
    sends to the first stage and holds. An error rate above `ROLLBACK_ERROR_RATE` in the window sends one stage back.
    Otherwise the build moves on when everything that its stage asks for is there. At most one of these happens at a
    time.
    """
    stage = min(rollout.stage, len(plan) - 1)  # the plan of a newer version may be shorter
    counted = replace(
        rollout,
        stage=stage,
        samples=rollout.samples + tally.native_runs,
        window=extended(rollout.window, tally, now, fresh_from=rollout.entered),
        totals=rollout.totals + tally,
        problem=rollout.problem if faults.problem is None else faults.problem,
    )
    counted, changes = _burn(counted, faults.burned)
    if stopped := _stop(counted, tally, faults, now):
        return stopped
    if counted.stopped:
        return counted, changes
    lately = since(counted.window, counted.entered)
    if stage > 0 and lately.native_runs >= ROLLBACK_SAMPLES and lately.error_rate > ROLLBACK_ERROR_RATE:
        reason = f"error rate {lately.error_rate:.1%} in the window is above {ROLLBACK_ERROR_RATE:.0%}"
        moved = _moved(counted, stage - 1, reason, now)
        return moved, (*changes, Change("rolled_back", stage, stage - 1, reason))
    if counted.mode == "automatic" and stage + 1 < len(plan) and not lacking(counted, now, plan=plan):
        reason = f"{plan[stage].name} passed: {counted.samples} native calls, error rate {lately.error_rate:.2%}"
        moved = _moved(counted, stage + 1, reason, now)
        return moved, (*changes, Change("promoted", stage, stage + 1, reason))
    return counted, changes


def _stop(rollout: Rollout, tally: Tally, faults: Faults, now: datetime) -> Step | None:
    """What stops the kernel from answering, or lets a suspended one answer again; None where nothing of it happened."""
    if faults.crash and rollout.mode != "quarantined":
        return _stopped(rollout, "quarantined", faults.crash, now)
    if (tally.wrong or faults.wrong) and not (rollout.stopped and rollout.mode != "suspended"):
        reason = faults.wrong or f"{tally.wrong} answers did not agree with the reference"
        return _stopped(rollout, "held", reason, now)
    if rollout.mode == "suspended" and now - rollout.entered >= SUSPENSION:
        resumed = replace(rollout, mode="automatic", entered=now, window=(), reason="the suspension is over")
        return resumed, (Change("resumed", rollout.stage, rollout.stage, resumed.reason),)
    if faults.killed and not rollout.stopped:
        return _killed(rollout, faults.killed, now)
    return None


def lacking(rollout: Rollout, now: datetime, *, plan: Plan = STAGES) -> tuple[str, ...]:
    """What the build still lacks before it leaves its stage upwards by itself; empty when nothing."""
    stage = plan[rollout.stage]
    lately = since(rollout.window, rollout.entered)
    ratio = lately.latency_ratio
    missing: list[str] = []
    if now - rollout.entered < stage.dwell:
        missing.append(f"{stage.dwell - (now - rollout.entered)} of {stage.dwell} to stay")
    if rollout.samples < stage.min_samples:
        missing.append(f"{stage.min_samples - rollout.samples} of {stage.min_samples} native calls")
    if not rollout.burned_in:
        missing.append(f"{BURN_IN_CALLS - rollout.burn_in} of {BURN_IN_CALLS} answers in a process of its own")
    if lately.error_rate > stage.max_error_rate:
        missing.append(f"error rate {lately.error_rate:.2%} must come down to {stage.max_error_rate:.2%}")
    if ratio is not None and ratio > stage.max_latency_ratio:
        missing.append(f"latency {ratio:.2f} of the reference's must come down to {stage.max_latency_ratio:.2f}")
    return tuple(missing)


def promote(rollout: Rollout, now: datetime, *, to: int | None = None, plan: Plan = STAGES) -> Step:
    """Move to the next stage, or to one further up, whatever it lacks.

    Raises:
        Conflict: the build is held or quarantined.
        InvalidInput: there is no such stage further up.
    """
    _not_stopped(rollout)
    target = rollout.stage + 1 if to is None else to
    if not rollout.stage < target < len(plan):
        raise InvalidInput(f"a promotion from {plan[rollout.stage].name} goes to a later stage", hint=_stages(plan))
    moved = _moved(rollout, target, "promoted by hand", now)
    return moved, (Change("promoted", rollout.stage, target, moved.reason),)


def roll_back(rollout: Rollout, now: datetime, *, to: int | None = None, plan: Plan = STAGES) -> Step:
    """Move to the stage before, or to one further down. It goes up again by itself unless it is paused.

    Raises:
        Conflict: the build is held or quarantined, which is further back than any stage.
        InvalidInput: there is no such stage further down.
    """
    _not_stopped(rollout)
    target = rollout.stage - 1 if to is None else to
    if not 0 <= target < rollout.stage:
        raise InvalidInput(f"a rollback from {plan[rollout.stage].name} goes to an earlier stage", hint=_stages(plan))
    moved = _moved(rollout, target, "rolled back by hand", now)
    return moved, (Change("rolled_back", rollout.stage, target, moved.reason),)


def pause(rollout: Rollout) -> Step:
    """Stop promoting by itself. Errors still send it back.

    Raises:
        Conflict: the build is held or quarantined.
    """
    _not_stopped(rollout)
    if rollout.mode == "paused":
        return rollout, ()
    paused = replace(rollout, mode="paused", reason="paused by hand")
    return paused, (Change("paused", rollout.stage, rollout.stage, paused.reason),)


def resume(rollout: Rollout) -> Step:
    """Promote by itself again. The time in the stage goes on from when it was entered.

    Raises:
        Conflict: the build is held or quarantined: that takes `clear`.
    """
    _not_stopped(rollout)
    if rollout.mode == "automatic":
        return rollout, ()
    resumed = replace(rollout, mode="automatic", reason="resumed by hand")
    return resumed, (Change("resumed", rollout.stage, rollout.stage, resumed.reason),)


def clear(rollout: Rollout, now: datetime) -> Step:
    """Forget a hold or a quarantine: the build begins anew, in the first stage and in a process of its own."""
    anew = replace(begin(now), began=rollout.began, totals=rollout.totals, reason="cleared by hand")
    return anew, (Change("cleared", rollout.stage, 0, f"{anew.reason}; it was {rollout.mode}: {rollout.reason}"),)


def missed_at_most(compare: float, confidence: float = 0.99) -> int:
    """How many wrong answers of a sampled stage pass, with this confidence, before one is compared.

    Each wrong answer is compared with probability s, independently of all others, so the number that pass before the
    first one is found has the geometric distribution P(at least n pass) = (1 - s)^n, whatever share of answers is
    wrong.
    Its mean is (1 - s) / s; this is the smallest n with P(more than n pass) ≤ 1 - confidence.
    """
    if compare >= 1:
        return 0
    return max(0, math.ceil(math.log(1 - confidence) / math.log(1 - compare)) - 1)


def _burn(rollout: Rollout, answers: int) -> Step:
    burned = replace(rollout, burn_in=min(BURN_IN_CALLS, rollout.burn_in + answers))
    if burned.burned_in and not rollout.burned_in:
        reason = f"{BURN_IN_CALLS} answers in a process of its own, none of which crashed it"
        return burned, (Change("burned_in", rollout.stage, rollout.stage, reason),)
    return burned, ()


def _moved(rollout: Rollout, stage: int, reason: str, now: datetime) -> Rollout:
    return replace(rollout, stage=stage, entered=now, samples=0, reason=reason)


def _stopped(rollout: Rollout, mode: Literal["held", "quarantined"], reason: str, now: datetime) -> Step:
    stopped = replace(_moved(rollout, 0, reason, now), mode=mode)
    return stopped, (Change(mode, rollout.stage, 0, reason),)


def _killed(rollout: Rollout, how: str, now: datetime) -> Step:
    """A process was killed while it ran the kernel: that may be chance, and is not when it happens again and again."""
    times = combined(part.tally for part in rollout.window).killed
    reason = f"{how}, {times} of {KILLED_TO_SUSPEND} times in an hour that suspend it"
    if times < KILLED_TO_SUSPEND:
        return rollout, (Change("killed", rollout.stage, rollout.stage, reason),)
    suspended = replace(rollout, mode="suspended", entered=now, reason=f"{reason} until {now + SUSPENSION:%H:%M} UTC")
    return suspended, (Change("suspended", rollout.stage, rollout.stage, suspended.reason),)


def _not_stopped(rollout: Rollout) -> None:
    if rollout.stopped:
        raise Conflict(
            f"the kernel is {rollout.mode}: {rollout.reason}",
            hint="when the cause is mended, `synapse hotpath clear` lets this build begin anew",
        )


def _stages(plan: Plan) -> str:
    return f"the stages are {', '.join(stage.name for stage in plan)}"
