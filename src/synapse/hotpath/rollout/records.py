"""Rollouts in the store: read, move and write back in one transaction, so that all processes move the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from synapse.hotpath.metrics.window import Tally
from synapse.hotpath.news import News
from synapse.hotpath.rollout.entities import HotPathEvent, HotPathState, fields_of, rollout_of
from synapse.hotpath.rollout.plan import Change, Faults, Plan, Rollout, Step, begin, observe
from synapse.store import Store

Author = Literal["synapse", "operator"]


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose rollout: the hot path, the build of its kernel, and the plan it follows."""

    name: str
    build: str
    plan: Plan


async def advance(
    store: Store, subject: Subject, tally: Tally, faults: Faults, now: datetime
) -> tuple[Rollout, list[News]]:
    """Add what a process has counted and found, and move the rollout if that is called for."""

    def step(rollout: Rollout) -> Step:
        return observe(rollout, tally, now, faults=faults, plan=subject.plan)

    return await _apply(store, subject, step, "synapse", begin(now))


async def intervene(
    store: Store, subject: Subject, step: Callable[[Rollout], Step], now: datetime
) -> tuple[Rollout, list[News]]:
    """Move a rollout by hand; one that has not begun begins now. Raises what `step` raises, and then keeps nothing."""
    return await _apply(store, subject, step, "operator", begin(now))


async def _apply(
    store: Store, subject: Subject, step: Callable[[Rollout], Step], by: Author, new: Rollout
) -> tuple[Rollout, list[News]]:
    name, build, plan = subject.name, subject.build, subject.plan

    async def work() -> tuple[Rollout, tuple[Change, ...]]:
        state = await store.find(HotPathState, name=name, build=build)
        before = rollout_of(state) if state is not None else new
        after, changes = step(before)
        if state is None:
            await store.create(HotPathState(name=name, build=build, **fields_of(after)))
        elif after != before:
            await store.update(HotPathState, state.id, fields_of(after))
        for change in changes:
            event = HotPathEvent(
                name=name,
                build=build,
                kind=change.kind,
                from_stage=_stage(plan, change.from_stage),
                to_stage=_stage(plan, change.to_stage),
                reason=change.reason,
                by=by,
            )
            await store.create(event)
        return after, changes

    rollout, changes = await store.atomically(work)
    return rollout, [News(change.kind, name, build, _sentence(plan, change)) for change in changes]


def _stage(plan: Plan, index: int) -> str:
    return plan[min(index, len(plan) - 1)].name


def _sentence(plan: Plan, change: Change) -> str:
    if change.from_stage == change.to_stage:
        return change.reason
    return f"{_stage(plan, change.from_stage)} → {_stage(plan, change.to_stage)}: {change.reason}"
