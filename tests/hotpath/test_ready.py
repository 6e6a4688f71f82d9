"""Waiting at the start of a process until it is decided who answers, with a plan of one stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hotpath.conftest import World, end_watch
from support.hotpath_kernels import CRASH, bind_dies, bind_refuses, bind_total, compile_kernel, same, total, values
from synapse.errors import NotFound, Unavailable
from synapse.hotpath import PATHS, FoundBuild, HotPath, NativeSide, Readiness, Stage, hotpath, ready
from synapse.hotpath.rollout.plan import BURN_IN_CALLS

ONE_STAGE = (Stage("full", share=1.0, compare=0.01, dwell=timedelta(days=30), min_samples=0),)

PROGRAM = """
import json, sys
from pathlib import Path
from hotpath.test_ready import ONE_STAGE
from support.hotpath_kernels import bind_noting, same, total, values
from synapse.hotpath import PATHS, FoundBuild, NativeSide, hotpath, ready

build = FoundBuild(sys.argv[1], Path(sys.argv[2]))
kernel = NativeSide(lambda: build, bind_noting)
call = hotpath("total", kernel=kernel, agrees=same, plan=ONE_STAGE, burn_in=lambda: [(values(1, 2),)])(total)
state = ready("total", 60)
answers = [call(values(number)) for number in range(500)]
tally = PATHS["total"].counters.read()
print(json.dumps([state.native, state.why, sum(answers), tally.native_answers, tally.calls]))
"""

Tie = Callable[..., HotPath[..., Any]]

pytestmark = pytest.mark.usefixtures("free_choice")


@pytest.fixture
def tie(no_watch: None) -> Iterator[Tie]:
    """Ties `total` to a kernel, in a process that has not called a hot path yet."""

    def tied(native: NativeSide, **options: Any) -> HotPath[..., Any]:
        options = {"plan": ONE_STAGE, "burn_in": lambda: [(values(1, 2),)], **options}
        hotpath("total", kernel=native, agrees=same, **options)(total)
        return PATHS["total"]

    yield tied
    end_watch()
    del PATHS["total"]


def run_program(library: Path, build: str) -> list[Any]:
    """What a new process says of who is ready, the sum of its answers, how many were native, and of how many."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, build, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_new_build_is_burned_in_and_a_known_one_answers_everything_at_once(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_DATABASE_URL", database_url)
    library = compile_kernel(tmp_path).find().library
    opened = library.with_suffix(".opened")
    expected = [True, "full", sum(range(500)), 500, 500]
    assert run_program(library, "build-1") == expected
    child, first = opened.read_text().split()
    assert child != first
    opened.unlink()
    assert run_program(library, "build-1") == expected
    assert len(opened.read_text().split()) == 1, "only the process itself has opened it"
    opened.unlink()
    assert run_program(library, "build-2") == expected
    assert len(opened.read_text().split()) == 2


def test_what_keeps_a_kernel_from_answering_is_said(tie: Tie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = compile_kernel(tmp_path)

    def find() -> FoundBuild:
        raise Unavailable("the kernel total is not built")

    path = tie(NativeSide(find, bind_total))
    assert ready("total") == Readiness(False, "the kernel total is not built")
    path.native = NativeSide(good.find, bind_refuses)
    assert ready("total") == Readiness(False, "OSError: undefined symbol: total")
    assert path.call(values(1, 2)) == 3
    assert not path.native_answered
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    assert ready("total") == Readiness(False, "Python is forced")


@pytest.mark.parametrize(("bind", "call"), [(bind_dies, values(1)), (bind_total, values(CRASH))])
def test_a_build_that_crashes_before_anybody_calls_it_is_quarantined(
    tie: Tie, tmp_path: Path, bind: Any, call: Any
) -> None:
    path = tie(NativeSide(compile_kernel(tmp_path).find, bind), burn_in=lambda: [(call,)])
    assert ready("total") == Readiness(False, "quarantined: it crashed with SIGSEGV")
    assert path.call(values(CRASH)) == CRASH


def test_until_the_calls_of_users_have_burned_it_in_it_is_not_ready(tie: Tie, tmp_path: Path) -> None:
    path = tie(compile_kernel(tmp_path), burn_in=None)
    assert ready("total") == Readiness(False, "full, burn-in", final=False)
    for _ in range(BURN_IN_CALLS):
        path.call(values(1, 2))
    assert ready("total") == Readiness(True, "full")
    path.call(values(1, 2))
    assert path.native_answered


def test_it_waits_no_longer_than_it_is_told_and_goes_on_meanwhile(tie: Tie, tmp_path: Path) -> None:
    path = tie(compile_kernel(tmp_path))
    assert ready("total", 0) == Readiness(False, "it was not decided in 0 seconds", final=False)
    deadline = time.monotonic() + 60
    while path.decision.why != "full" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ready("total") == Readiness(True, "full")


def test_without_settings_or_a_store_it_says_what_is_wrong(
    tie: Tie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tie(compile_kernel(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("SYNAPSE_PORT", "no number")
        assert ready("total") == Readiness(
            False, "nothing watches the hot paths of this process; its log says why", final=False
        )
    end_watch()
    monkeypatch.setenv("SYNAPSE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    state = ready("total")
    assert (state.native, state.final) == (False, False)
    assert "127.0.0.1" in state.why


def test_a_path_that_is_not_there_cannot_be_ready() -> None:
    with pytest.raises(NotFound, match="no hot path 'nothing'"):
        ready("nothing")


async def test_a_wrong_kernel_of_one_stage_is_held_before_anybody_calls_it(
    world: World, kernel: Callable[..., NativeSide]
) -> None:
    path = world.add(kernel(WRONG_EVERY=3), plan=ONE_STAGE, burn_in=lambda: [(values(1, 2),)])
    await world.sync()
    assert path.decision.why == "held: an answer did not agree with the reference's"
    assert path.call(values(1, 2)) == 3


async def test_a_kernel_of_one_stage_that_raises_falls_back_call_by_call_and_an_alert_says_so(
    world: World, kernel: Callable[..., NativeSide]
) -> None:
    path = world.add(kernel(RAISES_OF_100=6), plan=ONE_STAGE)
    for _ in range(3):
        await world.sync()
        for number in range(1000):
            assert path.call(values(number)) == number
    await world.sync()
    assert ((await world.rollout()).mode, path.decision.why) == ("automatic", "full")
    assert "error" in [alert.name for alert in world.supervisor.standings["total"].alerts]
