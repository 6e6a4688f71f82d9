"""Commands for the hot paths. They act on the store, so they reach every process within its interval."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from synapse.commands import Argument, Context, command
from synapse.errors import InvalidInput, NotFound
from synapse.hotpath.call import HotPath
from synapse.hotpath.news import tell
from synapse.hotpath.paths import PATHS
from synapse.hotpath.ranking import CANDIDATES, Measured, Source, measured_frequency, measured_gain, rank
from synapse.hotpath.rollout import plan as rollouts
from synapse.hotpath.rollout.entities import HotPathState, rollout_of
from synapse.hotpath.rollout.plan import Plan, Rollout, Step
from synapse.hotpath.rollout.records import Subject, intervene
from synapse.hotpath.rollout.supervisor import utc_now
from synapse.hotpath.status import PathStatus, current_state, status_of
from synapse.store import Store, open_store

MODULES = (
    "synapse.vectors.index",
    "synapse.engines.native.steps",
    "synapse.engines.native.linear",
    "synapse.callosum.router.native",
)
"""The modules that have hot paths. Rooms above this one are named, not imported, until a command asks."""


class Nothing(BaseModel):
    """Nothing to choose."""


class OnePath(BaseModel):
    """Which hot path."""

    name: Annotated[str, Argument()] = Field(description="name of the hot path")


class MovePath(OnePath):
    """Which hot path, and where to."""

    to: str | None = Field(None, description="name of the stage; by default the next one")


class StatusList(BaseModel):
    """Every hot path."""

    items: list[PathStatus]


class RankRow(BaseModel):
    """A candidate for a kernel. Frequency is calls a second; gain is how many times faster."""

    name: str
    score: float
    gain: float
    gain_source: Source
    frequency: float
    frequency_source: Source
    complexity: str
    risk: str
    implemented: bool
    summary: str


class Ranking(BaseModel):
    """The candidates, highest score first."""

    items: list[RankRow]


@command("hotpath/status", permission="read")
async def status(params: Nothing, context: Context) -> StatusList:
    """Show each hot path: its stage, who answered the last calls, and how fast."""
    store = await context.get(open_store)
    return StatusList(items=await status_of(store, _paths().values(), utc_now()))


@command("hotpath/promote", permission="manage")
async def promote(params: MovePath, context: Context) -> PathStatus:
    """Move a kernel to its next stage, or to one further up, whatever it still lacks."""

    def step(path: HotPath[..., Any], rollout: Rollout, now: datetime) -> Step:
        return rollouts.promote(rollout, now, to=_stage(path.plan, params.to), plan=path.plan)

    return await _move(params, context, step)


@command("hotpath/rollback", permission="manage")
async def rollback(params: MovePath, context: Context) -> PathStatus:
    """Move a kernel to the stage before, or to one further down. Pause it as well to keep it there."""

    def step(path: HotPath[..., Any], rollout: Rollout, now: datetime) -> Step:
        return rollouts.roll_back(rollout, now, to=_stage(path.plan, params.to), plan=path.plan)

    return await _move(params, context, step)


@command("hotpath/pause", permission="manage")
async def pause(params: OnePath, context: Context) -> PathStatus:
    """Keep a kernel from being promoted by itself. Errors still send it back."""
    return await _move(params, context, lambda path, rollout, now: rollouts.pause(rollout))


@command("hotpath/resume", permission="manage")
async def resume(params: OnePath, context: Context) -> PathStatus:
    """Let a paused kernel be promoted by itself again."""
    return await _move(params, context, lambda path, rollout, now: rollouts.resume(rollout))


@command("hotpath/clear", permission="manage")
async def clear(params: OnePath, context: Context) -> PathStatus:
    """Lift a hold or a quarantine: the build begins anew, in the first stage and in a process of its own."""
    return await _move(params, context, lambda path, rollout, now: rollouts.clear(rollout, now))


@command("hotpath/rank", permission="read")
async def show_ranking(params: Nothing, context: Context) -> Ranking:
    """Rank what to make a kernel of next: gain x frequency / (complexity x risk)."""
    store = await context.get(open_store)
    paths = _paths()
    measured = {name: await _measured(store, path) for name, path in paths.items()}
    rows = [
        RankRow(
            name=one.candidate.name,
            score=one.score,
            gain=one.gain,
            gain_source=one.gain_source,
            frequency=one.frequency,
            frequency_source=one.frequency_source,
            complexity=one.candidate.complexity.name,
            risk=one.candidate.risk.name,
            implemented=one.candidate.name in paths,
            summary=one.candidate.summary,
        )
        for one in rank(CANDIDATES, measured)
    ]
    return Ranking(items=rows)


async def _measured(store: Store, path: HotPath[..., Any]) -> Measured:
    """The gain of this machine's build, or of the newest one that was compared often enough; and calls a second."""
    _, _, state = await current_state(store, path)
    frequency = None
    if state is not None:
        frequency = measured_frequency(rollout_of(state).totals, (utc_now() - state.began_at).total_seconds())
    builds = [state, *await store.list(HotPathState, {"name": path.name}, order_by="-created_at")]
    gains = [measured_gain(rollout_of(build).totals) for build in builds if build is not None]
    return Measured(next((gain for gain in gains if gain is not None), None), frequency)


async def _move(
    params: OnePath, context: Context, step: Callable[[HotPath[..., Any], Rollout, datetime], Step]
) -> PathStatus:
    paths = _paths()
    if params.name not in paths:
        raise NotFound(f"there is no hot path {params.name!r:.60}", hint=f"there are {', '.join(sorted(paths))}")
    path = paths[params.name]
    build, now = path.native.find(), utc_now()
    store = await context.get(open_store)
    subject = Subject(path.name, build.id, path.plan)
    _, news = await intervene(store, subject, lambda rollout: step(path, rollout, now), now)
    for item in news:
        tell(item)
    return (await status_of(store, [path], utc_now()))[0]


def _paths() -> dict[str, HotPath[..., Any]]:
    for module in MODULES:
        importlib.import_module(module)
    return PATHS


def _stage(plan: Plan, name: str | None) -> int | None:
    if name is None:
        return None
    names = [stage.name for stage in plan]
    if name not in names:
        raise InvalidInput(f"there is no stage {name!r:.60}", hint=f"the stages are {', '.join(names)}")
    return names.index(name)
