"""How every hot path stands, for people and programs: from the store, so that any process can say it of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, Field

from synapse.errors import SynapseError
from synapse.hotpath.call import HotPath
from synapse.hotpath.metrics.histogram import Counts, percentile
from synapse.hotpath.metrics.window import NOTHING, WINDOW, Tally, alerts, combined
from synapse.hotpath.news import stopped_hint
from synapse.hotpath.rollout.entities import HotPathState, rollout_of
from synapse.hotpath.rollout.plan import Rollout, begin, lacking
from synapse.hotpath.rollout.supervisor import NO_BUILD
from synapse.kernels.native import FoundBuild, python_forced
from synapse.store import Store


class RuntimeFigures(BaseModel):
    """What one runtime did in the window. Latencies are in milliseconds, throughput in answers a second."""

    answers: int
    throughput: float
    error_rate: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class PathStatus(BaseModel):
    """One hot path. Rates are of the window, the last hour, over all processes."""

    path: str
    stage: str = Field(description="stage of the rollout")
    share: float = Field(description="of the keys, how many are the kernel's")
    mode: str = Field(
        description="automatic, paused, held, quarantined, suspended, forced (to Python), missing or broken (build)"
    )
    answered_by: str = Field(
        description="who answers: those of the newest slice of the window, the reference where the kernel may not"
    )
    native_p50_ms: float | None
    reference_p50_ms: float | None
    reason: str
    hint: str = Field("", description="what helps when the kernel may answer nothing")
    alerts: list[str]
    build: str
    native: RuntimeFigures
    reference: RuntimeFigures
    fallback_rate: float
    latency_ratio: float | None
    wrong: int = Field(description="wrong answers since the rollout began")
    lacking: list[str] = Field(description="what it lacks before it is promoted")


async def status_of(store: Store, paths: Iterable[HotPath[..., Any]], now: datetime) -> list[PathStatus]:
    """The status of these paths, with the builds that this machine would use."""
    return [await _status(store, path, now) for path in paths]


async def current_state(
    store: Store, path: HotPath[..., Any]
) -> tuple[FoundBuild | None, SynapseError | None, HotPathState | None]:
    """The build of this machine (or None and why) and where it stands, if it has been called."""
    build, problem = None, None
    try:
        build = path.native.find()
    except SynapseError as error:
        problem = error
    return build, problem, await store.find(HotPathState, name=path.name, build=build.id if build else NO_BUILD)


async def _status(store: Store, path: HotPath[..., Any], now: datetime) -> PathStatus:
    build, problem, state = await current_state(store, path)
    rollout = rollout_of(state) if state is not None else begin(now)
    stage = path.plan[min(rollout.stage, len(path.plan) - 1)]
    # The same bounds as when something is counted, for a path that has not been called for a while.
    window = [part for part in rollout.window if part.start > now - WINDOW]
    tally = combined(part.tally for part in window)
    newest = window[-1].tally if window else NOTHING
    seconds = max(1.0, min(WINDOW, max(now - rollout.began, timedelta())).total_seconds())
    native = _figures(tally.native, tally.native_answers, tally.error_rate, seconds)
    refused = tally.reference_errors / max(1, sum(tally.reference.values()) + tally.reference_errors)
    reference = _figures(tally.reference, tally.reference_answers, refused, seconds)
    mode = _mode(rollout, build)
    return PathStatus(
        path=path.name,
        stage=stage.name,
        share=stage.share if mode in ("automatic", "paused") else 0.0,
        mode=mode,
        answered_by=_answered_by(newest) if mode in ("automatic", "paused") else "reference",
        native_p50_ms=native.p50_ms,
        reference_p50_ms=reference.p50_ms,
        reason=(problem.message if problem else "")
        or rollout.problem
        or (rollout.reason if state is not None else "not called yet"),
        hint=(problem.hint if problem else "") or (stopped_hint(path.name) if rollout.stopped else ""),
        alerts=[alert.message for alert in alerts(tally)],
        build=build.id if build else "",
        native=native,
        reference=reference,
        fallback_rate=tally.fallback_rate,
        latency_ratio=tally.latency_ratio,
        wrong=rollout.totals.wrong,
        lacking=_lacking(path, rollout, build, now),
    )


def _mode(rollout: Rollout, build: FoundBuild | None) -> str:
    if python_forced():
        return "forced"
    if build is None:
        return "missing"
    return "broken" if rollout.problem and not rollout.stopped else rollout.mode


def _lacking(path: HotPath[..., Any], rollout: Rollout, build: FoundBuild | None, now: datetime) -> list[str]:
    last = rollout.stage >= len(path.plan) - 1
    if build is None or rollout.stopped or last:
        return []
    return [*(["`synapse hotpath resume`"] if rollout.mode == "paused" else []), *lacking(rollout, now, plan=path.plan)]


def _answered_by(tally: Tally) -> str:
    if not tally.calls:
        return "nobody"
    native = tally.native_answers / tally.calls
    return {0.0: "reference", 1.0: "native"}.get(native, f"native {native:.0%}, reference {1 - native:.0%}")


def _figures(latencies: Counts, answers: int, error_rate: float, seconds: float) -> RuntimeFigures:
    p50, p95, p99 = (percentile(latencies, share) for share in (0.50, 0.95, 0.99))
    return RuntimeFigures(
        answers=answers,
        throughput=answers / seconds,
        error_rate=error_rate,
        p50_ms=None if p50 is None else p50 / 1e6,
        p95_ms=None if p95 is None else p95 / 1e6,
        p99_ms=None if p99 is None else p99 / 1e6,
    )
