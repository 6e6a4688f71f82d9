"""`synapse hotpath …`: status, moves by hand, and the ranking."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hotpath.conftest import World
from support.hotpath_kernels import compile_kernel, same, total, values
from synapse.commands import Context, find_command
from synapse.config import Settings
from synapse.errors import Conflict, InvalidInput, NotFound, SynapseError, Unavailable
from synapse.hotpath import PATHS, HotPath, NativeSide, hotpath
from synapse.hotpath.commands import Ranking, RankRow, StatusList
from synapse.hotpath.metrics.histogram import bucket_of
from synapse.hotpath.metrics.window import WINDOW, Tally
from synapse.hotpath.rollout.entities import HotPathEvent, HotPathState, fields_of
from synapse.hotpath.rollout.plan import BURN_IN_CALLS, Faults, begin
from synapse.hotpath.rollout.supervisor import Supervisor, utc_now
from synapse.hotpath.status import PathStatus
from synapse.hotpath.status import status_of as status_in
from synapse.store import open_store

pytestmark = pytest.mark.usefixtures("free_choice")


@pytest.fixture
async def context(tmp_path: Path, database_url: str) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home", database_url=database_url)) as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Iterator[HotPath[..., Any]]:
    """A hot path of this process."""
    hotpath("total", kernel=compile_kernel(tmp_path), agrees=same)(total)
    yield PATHS["total"]
    del PATHS["total"]


async def run(verb: str, context: Context, /, **params: Any) -> Any:
    found = find_command(f"hotpath/{verb}")
    return await found.run(found.params(**params), context)


async def status_of(context: Context, name: str = "total") -> PathStatus:
    result = await run("status", context)
    assert isinstance(result, StatusList)
    return next(item for item in result.items if item.path == name)


async def sync(context: Context, path: HotPath[..., Any], tmp_path: Path) -> Supervisor:
    """Do what the watch of a server does."""
    supervisor = Supervisor(tmp_path, paths={path.name: path})
    await supervisor.sync(await context.get(open_store))
    return supervisor


async def test_a_path_that_was_never_called_is_shown(context: Context, path: HotPath[..., Any]) -> None:
    status = await status_of(context)
    assert (status.stage, status.share, status.mode, status.answered_by) == ("validate", 0.0, "automatic", "nobody")
    assert status.reason == "not called yet"
    assert status.build == path.native.find().id


async def test_status_says_who_answered_how_fast_and_what_is_lacking(
    context: Context, path: HotPath[..., Any], tmp_path: Path
) -> None:
    path.report(Faults(burned=BURN_IN_CALLS))
    await run("promote", context, name="total", to="full")
    supervisor = await sync(context, path, tmp_path)
    for _ in range(500):
        path.call(values(*range(300)))
    await supervisor.sync(await context.get(open_store))
    status = await status_of(context)
    supervisor.close()
    assert (status.stage, status.share, status.answered_by) == ("full", 1.0, "native")
    assert status.native.answers == 500
    assert status.native_p50_ms is not None
    assert 0 < status.native_p50_ms == status.native.p50_ms
    assert status.native.p50_ms <= (status.native.p95_ms or 0) <= (status.native.p99_ms or 0)
    assert status.native.throughput > 0
    assert (status.native.error_rate, status.fallback_rate, status.wrong, status.lacking) == (0, 0, 0, [])
    await run("rollback", context, name="total", to="canary")
    await run("pause", context, name="total")
    assert any("7 days" in what for what in (await status_of(context)).lacking)
    assert "`synapse hotpath resume`" in (await status_of(context)).lacking


async def test_status_says_that_the_reference_answers_where_the_kernel_may_not_and_what_helps(
    context: Context, path: HotPath[..., Any], tmp_path: Path
) -> None:
    path.report(Faults(burned=BURN_IN_CALLS))
    await run("promote", context, name="total", to="full")
    supervisor = await sync(context, path, tmp_path)
    path.call(values(1))
    path.report(Faults(crash="it crashed"))
    await supervisor.sync(await context.get(open_store))
    supervisor.close()
    status = await status_of(context)
    assert (status.mode, status.answered_by, status.share) == ("quarantined", "reference", 0.0)
    assert "`synapse hotpath clear total`" in status.hint


async def test_moves_by_hand_are_kept_with_their_history(context: Context, path: HotPath[..., Any]) -> None:
    for verb, params, stage, mode in [
        ("promote", {}, "canary", "automatic"),
        ("promote", {"to": "full"}, "full", "automatic"),
        ("pause", {}, "full", "paused"),
        ("rollback", {}, "half", "paused"),
        ("resume", {}, "half", "automatic"),
        ("clear", {}, "validate", "automatic"),
    ]:
        shown = await run(verb, context, name="total", **params)
        assert (shown.stage, shown.mode) == (stage, mode)
    store = await context.get(open_store)
    events = await store.list(HotPathEvent)
    assert [(event.kind, event.from_stage, event.to_stage, event.by) for event in events] == [
        ("promoted", "validate", "canary", "operator"),
        ("promoted", "canary", "full", "operator"),
        ("paused", "full", "full", "operator"),
        ("rolled_back", "full", "half", "operator"),
        ("resumed", "half", "half", "operator"),
        ("cleared", "half", "validate", "operator"),
    ]


async def test_a_running_process_follows_what_is_decided_by_hand(
    context: Context, path: HotPath[..., Any], tmp_path: Path
) -> None:
    supervisor = await sync(context, path, tmp_path)
    path.report(Faults(wrong="an answer did not agree"))
    await supervisor.sync(await context.get(open_store))
    assert (await status_of(context)).mode == "held"
    with pytest.raises(Conflict):
        await run("promote", context, name="total")
    await run("clear", context, name="total")
    await supervisor.sync(await context.get(open_store))
    assert path.decision.why == "validate, burn-in"
    supervisor.close()


@pytest.mark.parametrize(
    ("verb", "params", "error"),
    [
        ("promote", {"name": "no-such-path"}, NotFound),
        ("promote", {"name": "total", "to": "everywhere"}, InvalidInput),
        ("rollback", {"name": "total"}, InvalidInput),
    ],
)
async def test_what_cannot_be_done_is_refused_with_what_can(
    context: Context, path: HotPath[..., Any], verb: str, params: dict[str, str], error: type[SynapseError]
) -> None:
    with pytest.raises(error) as refused:
        await run(verb, context, **params)
    assert refused.value.hint


async def test_a_path_without_a_build_says_so(context: Context, path: HotPath[..., Any]) -> None:
    def find() -> Any:
        raise Unavailable("the kernel total is not built", hint="synapse kernels build total")

    path.native = NativeSide(find, path.native.bind)
    status = await status_of(context)
    assert (status.mode, status.reason, status.build) == ("missing", "the kernel total is not built", "")
    with pytest.raises(Unavailable):
        await run("promote", context, name="total")


async def test_forced_python_is_shown(
    context: Context, path: HotPath[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    assert (await status_of(context)).mode == "forced"


async def test_the_ranking_says_what_is_measured(context: Context) -> None:
    ranking = await run("rank", context)
    assert isinstance(ranking, Ranking)
    assert [row.name for row in ranking.items][:2] == ["event_bus", "mtf_ranker"]
    assert {row.gain_source for row in ranking.items} == {"declared"}
    assert all(row.implemented == (row.name in PATHS) for row in ranking.items)


async def test_a_measured_gain_takes_the_place_of_the_declared_one_also_after_a_new_build(context: Context) -> None:
    """The calls of `pattern_search` that both sides ran, of a build that is not the one of now."""
    store = await context.get(open_store)

    async def pattern_search() -> RankRow:
        ranking = await run("rank", context)
        return next(row for row in ranking.items if row.name == "pattern_search")

    for build, calls, gain, source in [("first", 99, 13.1, "declared"), ("second", 100, 8.0, "measured")]:
        fast, slow = {bucket_of(1_000_000): calls}, {bucket_of(8_000_000): calls}
        tally = Tally(native=fast, reference=slow, paired_native=fast, paired_reference=slow)
        rollout = replace(begin(utc_now()), totals=tally)
        await store.create(HotPathState(name="pattern_search", build=build, **fields_of(rollout)))
        row = await pattern_search()
        assert (row.gain, row.gain_source) == (pytest.approx(gain, rel=0.04), source)
        assert (row.frequency, row.frequency_source) == (100, "declared")


async def test_the_times_of_status_are_those_of_the_window(world: World, kernel: Callable[..., NativeSide]) -> None:
    """A path that nobody has called for an hour has no throughput and no alarms."""
    path = world.add(kernel())
    await world.sync()
    path.call(values(1))
    await world.sync()
    (status,) = await status_in(world.store, [path], world.now + WINDOW)
    assert (status.reference.answers, status.answered_by) == (0, "nobody")
    (status,) = await status_in(world.store, [path], world.now)
    assert (status.reference.answers, status.answered_by) == (1, "reference")
