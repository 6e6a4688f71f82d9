"""What the store keeps of hot paths: where each build stands, and its history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from synapse.hotpath.metrics.window import Slice, Tally
from synapse.hotpath.news import Kind
from synapse.hotpath.rollout.plan import Mode, Rollout
from synapse.store import Entity, Value, entity

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class TallyRecord(Value):
    """A `Tally`. Histograms are kept as pairs of bucket and calls."""

    native: tuple[tuple[Count, Count], ...] = ()
    reference: tuple[tuple[Count, Count], ...] = ()
    paired_native: tuple[tuple[Count, Count], ...] = ()
    paired_reference: tuple[tuple[Count, Count], ...] = ()
    errors: Count = 0
    reference_errors: Count = 0
    fallbacks: Count = 0
    wrong: Count = 0
    shadowed: Count = 0
    killed: Count = 0


class SliceRecord(Value):
    """A `Slice` of the window."""

    start: AwareDatetime
    tally: TallyRecord


@entity("HotPathState", unique=(("name", "build"),))
class HotPathState(Entity):
    """Where one build of one kernel stands; a new build is a new row, and begins at the first stage."""

    name: Name = Field(description="the hot path")
    build: Name = Field(description="the build of its kernel")
    stage: Count = Field(0, description="index into the plan of the rollout")
    mode: Mode = "automatic"
    entered_at: AwareDatetime = Field(description="when the stage was entered")
    began_at: AwareDatetime = Field(description="when the rollout began")
    samples: Count = Field(0, description="native runs in this stage")
    burn_in: Count = Field(0, description="answers given in a process of its own")
    reason: str = ""
    problem: str = Field("", description="why the build cannot be opened")
    window: tuple[SliceRecord, ...] = ()
    totals: TallyRecord = TallyRecord()


@entity("HotPathEvent", indexes=("name",))
class HotPathEvent(Entity):
    """Something that happened to a rollout. `created_at` is when."""

    name: Name
    build: Name
    kind: Kind
    from_stage: str
    to_stage: str
    reason: str
    by: Literal["synapse", "operator"]


def rollout_of(state: HotPathState) -> Rollout:
    """The rollout that is kept in a row."""
    return Rollout(
        entered=state.entered_at,
        began=state.began_at,
        stage=state.stage,
        mode=state.mode,
        samples=state.samples,
        burn_in=state.burn_in,
        reason=state.reason,
        problem=state.problem,
        window=tuple(Slice(part.start, _tally(part.tally)) for part in state.window),
        totals=_tally(state.totals),
    )


def fields_of(rollout: Rollout) -> dict[str, object]:
    """The fields of a `HotPathState` that keep a rollout."""
    return {
        "stage": rollout.stage,
        "mode": rollout.mode,
        "entered_at": rollout.entered,
        "began_at": rollout.began,
        "samples": rollout.samples,
        "burn_in": rollout.burn_in,
        "reason": rollout.reason,
        "problem": rollout.problem,
        "window": tuple(SliceRecord(start=part.start, tally=_record(part.tally)) for part in rollout.window),
        "totals": _record(rollout.totals),
    }


HISTOGRAMS = ("native", "reference", "paired_native", "paired_reference")
COUNTS = ("errors", "reference_errors", "fallbacks", "wrong", "shadowed", "killed")


def _record(tally: Tally) -> TallyRecord:
    histograms: dict[str, Mapping[int, int]] = {name: getattr(tally, name) for name in HISTOGRAMS}
    return TallyRecord(
        **{name: tuple(sorted(counts.items())) for name, counts in histograms.items()},
        **{name: getattr(tally, name) for name in COUNTS},
    )


def _tally(record: TallyRecord) -> Tally:
    histograms: dict[str, Any] = {name: dict(getattr(record, name)) for name in HISTOGRAMS}
    return Tally(**histograms, **{name: getattr(record, name) for name in COUNTS})
