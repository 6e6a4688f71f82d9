"""Whole rollouts, with real kernels and a real store, on a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from hotpath.conftest import World
from support.hotpath_kernels import CRASH, HANG, RAISE, bind_dies, bind_refuses, bind_total, values
from synapse.errors import SynapseError, Unavailable
from synapse.hotpath import FoundBuild, HotPath, NativeSide, News
from synapse.hotpath.metrics.window import Tally
from synapse.hotpath.rollout.entities import HotPathEvent, HotPathState
from synapse.hotpath.rollout.plan import BURN_IN_CALLS, NO_FAULTS, Faults
from synapse.hotpath.rollout.records import Subject, advance
from synapse.hotpath.rollout.supervisor import NO_BUILD
from synapse.hotpath.status import status_of
from synapse.store import Store, connect

HOUR = timedelta(hours=1)
SOME = [values(*range(i, i + 300)) for i in range(100)]
"""Long enough for the kernel to be faster than the reference, as a kernel should be."""
Kernels = Callable[..., NativeSide]


def call_all(path: HotPath[..., int], times: int = 1) -> int:
    """Call with many arguments. Returns how many answers were wrong."""
    wrong = 0
    for _ in range(times):
        wrong += sum(path.call(numbers) != 300 * i + 44_850 for i, numbers in enumerate(SOME))
    return wrong


async def lead_to(world: World, path: HotPath[..., int], stage: str, *, hours: int = 12) -> int:
    """Let time pass and calls come in until the stage is reached. Returns how many answers were wrong."""
    wrong = 0
    await world.sync()
    for _ in range(200):
        if await world.stage() == stage:
            return wrong
        wrong += call_all(path, 20)
        await world.sync(after=hours * HOUR)
    raise AssertionError(f"the rollout stays at {await world.stage()}: {(await world.rollout()).reason}")


async def kinds(store: Store) -> list[str]:
    return [event.kind for event in await store.list(HotPathEvent)]


async def test_a_good_kernel_reaches_everybody_by_itself(world: World, kernel: Kernels, news: list[News]) -> None:
    path = world.add(kernel())
    assert await lead_to(world, path, "full") == 0
    assert world.now - (await world.rollout()).began >= timedelta(days=21)
    call_all(path)
    assert path.native_answered
    assert await kinds(world.store) == ["burned_in", "promoted", "promoted", "promoted"]
    told = [item for item in news if not item.kind.startswith("alert")]  # it is about as fast as the reference
    assert [item.kind for item in told] == ["burned_in", "promoted", "promoted", "promoted"]
    assert "validate → canary" in told[1].message


async def test_a_kernel_that_is_wrong_once_in_a_thousand_is_held_in_its_first_stage_and_nobody_saw_it(
    world: World, kernel: Kernels, news: list[News]
) -> None:
    path = world.add(kernel(WRONG_EVERY=1000))
    wrong = 0
    await world.sync()
    for _ in range(60):
        wrong += call_all(path, 20)
        await world.sync(after=6 * HOUR)
    rollout = await world.rollout()
    assert wrong == 0
    assert (rollout.mode, rollout.stage) == ("held", 0)
    assert rollout.totals.wrong == 1
    assert "held" in [item.kind for item in news]


async def test_a_wrong_answer_in_the_first_stage_that_gives_any_is_seen_by_nobody(
    world: World, kernel: Kernels
) -> None:
    path = world.add(kernel(WRONG_EVERY=1000))
    path.report(Faults(burned=BURN_IN_CALLS))
    await world.sync()
    state = await world.store.find(HotPathState, name="total")
    assert state is not None
    await world.store.update(HotPathState, state.id, {"stage": 1})
    await world.sync()
    assert path.decision.why == "canary"
    assert call_all(path, 110) == 0, "some 1,100 of these 11,000 calls were the kernel's"
    await world.sync()
    assert (await world.rollout()).mode == "held"


async def test_a_kernel_that_raises_on_six_percent_goes_back_a_stage(world: World, kernel: Kernels) -> None:
    path = world.add(kernel(RAISES_OF_100=6))
    path.report(Faults(burned=BURN_IN_CALLS))
    await world.sync()
    state = await world.store.find(HotPathState, name="total")
    assert state is not None
    await world.store.update(HotPathState, state.id, {"stage": 2})
    await world.sync()
    assert path.decision.why == "half"
    assert call_all(path, 20) == 0, "the reference answered what the kernel failed at"
    await world.sync(after=HOUR / 60)
    rollout = await world.rollout()
    assert (await world.stage(), rollout.mode) == ("canary", "automatic")
    assert rollout.reason.startswith("error rate")
    assert [alert.name for alert in world.supervisor.standings["total"].alerts] == ["error"]


async def test_a_kernel_that_always_raises_on_six_percent_never_leaves_the_stage_that_gives_nothing(
    world: World, kernel: Kernels
) -> None:
    path = world.add(kernel(RAISES_OF_100=6))
    await world.sync()
    for _ in range(30):
        assert call_all(path, 20) == 0
        await world.sync(after=12 * HOUR)
    assert await world.stage() == "validate"


async def test_a_crash_in_the_burn_in_kills_only_the_child(world: World, kernel: Kernels, news: list[News]) -> None:
    path = world.add(kernel(), draw=lambda: 0.0)  # every call of the stage is compared
    await world.sync()
    assert path.call(values(1, 2)) == 3
    assert path.call(values(CRASH, 2)) == CRASH + 2
    assert path.decision.native is None, "from the crash on, before anybody has looked"
    assert call_all(path) == 0
    await world.sync()
    rollout = await world.rollout()
    assert rollout.mode == "quarantined"
    assert "SIGSEGV" in rollout.reason
    assert [item.kind for item in news] == ["quarantined"]


async def test_a_hang_in_the_burn_in_is_ended_and_quarantined(world: World, kernel: Kernels) -> None:
    world.supervisor._call_seconds = 0.5
    path = world.add(kernel(), draw=lambda: 0.0)
    await world.sync()
    assert path.call(values(HANG)) == HANG
    await world.sync()
    assert "did not answer" in (await world.rollout()).reason


async def test_a_build_that_crashes_when_opened_is_quarantined(world: World, kernel: Kernels) -> None:
    good = kernel()
    path = world.add(NativeSide(good.find, bind_dies))
    await world.sync()
    assert (await world.rollout()).mode == "quarantined"
    assert call_all(path) == 0


@pytest.mark.parametrize("burned", [0, BURN_IN_CALLS])
async def test_a_build_that_cannot_be_opened_is_no_crash_and_says_why(
    world: World, kernel: Kernels, burned: int
) -> None:
    path = world.add(NativeSide(kernel().find, bind_refuses))
    path.report(Faults(burned=burned))
    await world.sync()
    assert "undefined symbol: total" in path.decision.why
    assert (await world.rollout()).mode == "automatic"
    assert call_all(path) == 0
    (status,) = await status_of(world.store, [path], world.now)
    assert (status.mode, status.share) == ("broken", 0.0)
    assert "undefined symbol: total" in status.reason
    world.supervisor.close()
    again = World(world.store, world.folder)
    mended = again.add(kernel())
    await again.sync()
    (status,) = await status_of(world.store, [mended], again.now)
    assert (status.mode, status.reason) == ("automatic", (await again.rollout()).reason)
    again.supervisor.close()


async def test_a_missing_build_is_answered_by_the_reference_and_found_when_it_comes(
    world: World, kernel: Kernels
) -> None:
    built: list[FoundBuild] = []

    def find() -> FoundBuild:
        if not built:
            raise Unavailable("the kernel total is not built", hint="synapse kernels build")
        return built[0]

    path = world.add(NativeSide(find, bind_total))
    await world.sync()
    assert call_all(path) == 0
    assert path.decision.why == "the kernel total is not built"
    await world.sync()
    counted = await world.store.find(HotPathState, name="total", build=NO_BUILD)
    assert counted is not None
    assert sum(calls for _, calls in counted.totals.reference) == 100
    built.append(kernel().find())
    await world.sync()
    assert path.decision.child is not None


async def test_declared_calls_burn_a_build_in_before_any_user_calls(world: World, kernel: Kernels) -> None:
    path = world.add(kernel(), burn_in=lambda: [(values(1, 2),), (values(3),)])
    await world.sync()
    assert (await world.rollout()).burned_in
    assert path.decision.child is None
    assert path.counters.read().calls == 0


@pytest.mark.parametrize(("call", "mode"), [(values(CRASH), "quarantined"), (values(1), "held")])
async def test_what_declared_calls_find_counts(world: World, kernel: Kernels, call: object, mode: str) -> None:
    native = kernel() if mode == "quarantined" else kernel(WRONG_EVERY=3)
    path = world.add(native, burn_in=lambda: [(call,)])
    await world.sync()
    assert (await world.rollout()).mode == mode
    assert path.decision.native is None


async def test_declared_calls_that_fail_leave_the_burn_in_to_the_calls_of_users(world: World, kernel: Kernels) -> None:
    path = world.add(kernel(), burn_in=lambda: [(values(RAISE),)])
    await world.sync()
    assert path.last_error == "RuntimeError: the kernel failed"
    assert (await world.rollout()).burn_in == 0
    assert path.decision.child is not None


async def test_while_the_child_cannot_take_a_call_the_reference_answers(world: World, kernel: Kernels) -> None:
    path = world.add(kernel(), draw=lambda: 0.0)
    await world.sync()
    child = path.decision.child
    assert child is not None
    child.close()
    assert call_all(path) == 0
    tally = path.counters.read()
    assert (tally.native_runs, tally.reference_answers) == (0, 100)
    await world.sync()
    assert path.decision.child is child
    assert child.running


async def test_python_can_be_forced_and_given_free_again(
    world: World, kernel: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.add(kernel())
    path.report(Faults(burned=BURN_IN_CALLS))
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    await world.sync()
    assert path.decision.why == "Python is forced"
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "0")
    await world.sync()
    assert path.decision.native is not None


async def test_state_and_history_survive_a_restart(world: World, kernel: Kernels, tmp_path: Path) -> None:
    path = world.add(kernel())
    await lead_to(world, path, "half")
    entered = (await world.rollout()).entered
    world.supervisor.close()
    again = World(world.store, tmp_path)
    again.now = world.now
    path = again.add(kernel())
    await again.sync()
    assert path.decision.why == "half"
    assert path.decision.child is None, "it has been burned in"
    assert (await again.rollout()).entered == entered
    again.supervisor.close()


async def test_a_new_build_begins_anew_and_the_old_one_stays_quarantined(world: World, kernel: Kernels) -> None:
    old, new = kernel(), kernel(SLOW_LOOPS=1)
    world.add(old).report(Faults(crash="SIGSEGV"))
    await world.sync()
    await world.supervisor.flush(world.store)
    world.supervisor.close()
    again = World(world.store, world.folder)
    path = again.add(new)
    await again.sync()
    assert path.decision.why == "validate, burn-in"
    assert {state.mode for state in await world.store.list(HotPathState)} == {"quarantined", "automatic"}
    again.supervisor.close()


async def test_two_processes_move_one_rollout(world: World, kernel: Kernels, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(world.store, tmp_path / "other")
    paths = [one.add(kernel()) for one in (world, other)]
    paths[0].report(Faults(burned=BURN_IN_CALLS))
    for one in (world, other):
        await one.sync()
    for path in paths:
        call_all(path, 3)
    for one in (world, other):
        await one.sync(after=HOUR / 60)
    assert (await world.rollout()).totals.calls == 600
    paths[1].report(Faults(wrong="seen by the second"))
    await other.sync()
    await world.sync()
    assert paths[0].decision.why == "held: seen by the second"
    other.supervisor.close()


async def test_processes_that_count_at_once_lose_nothing(world: World, kernel: Kernels, database_url: str) -> None:
    path = world.add(kernel())
    await world.sync()
    subject = Subject(path.name, path.native.find().id, path.plan)
    stores = [await connect(database_url) for _ in range(3)]

    async def count(store: Store) -> None:
        for bucket in range(5):
            await advance(store, subject, Tally(reference={bucket: 1}), NO_FAULTS, world.now)

    await asyncio.gather(*map(count, stores))
    assert (await world.rollout()).totals.reference == dict.fromkeys(range(5), 3)
    for store in stores:
        await store.close()


async def test_what_was_counted_is_kept_when_the_store_fails(
    world: World, kernel: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.add(kernel())
    await world.sync()
    call_all(path)

    async def fails(*args: object) -> None:
        raise Unavailable("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "atomically", fails)
        path.report(Faults(wrong="found while the store was away"))
        with pytest.raises(SynapseError):
            await world.sync()
        assert path.decision.native is None
    await world.sync()
    rollout = await world.rollout()
    assert rollout.totals.calls == 100
    assert rollout.mode == "held"


async def test_an_alert_is_told_when_it_begins_and_when_it_ends(
    world: World, kernel: Kernels, news: list[News]
) -> None:
    path = world.add(kernel(SLOW_LOOPS=200_000), draw=lambda: 0.0)
    path.report(Faults(burned=BURN_IN_CALLS))
    await world.sync()
    call_all(path, 2)
    for _ in range(3):
        await world.sync(after=HOUR / 60)
    assert [item.kind for item in news] == ["burned_in", "alert"]
    assert "times as long as the reference" in news[1].message
    await world.sync(after=2 * HOUR)
    assert [item.kind for item in news][2:] == ["alert_over"]


async def test_nothing_native_runs_when_nobody_watches(world: World, kernel: Kernels) -> None:
    path = world.add(kernel())
    path.report(Faults(burned=BURN_IN_CALLS))
    await world.sync()
    world.supervisor.close()
    assert path.decision.native is None
    assert call_all(path) == 0
    assert not path.native_answered
