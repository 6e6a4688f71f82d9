"""After the burn-in a crash costs one process, and the next one knows who did it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.hotpath_kernels import CRASH, HANG
from synapse.commands import Context
from synapse.config import Settings
from synapse.hotpath import NativeSide
from synapse.hotpath.guard.flight_recorder import FIRST_SLOT
from synapse.hotpath.rollout.entities import HotPathState
from synapse.hotpath.rollout.plan import KILLED_TO_SUSPEND
from synapse.hotpath.rollout.watch import INTERVAL
from synapse.store import open_store

PROGRAM = """
import sys
from pathlib import Path
from support.hotpath_kernels import bind_total, same, total, values
from synapse.hotpath import FoundBuild, NativeSide, Stage, hotpath
from datetime import timedelta
from synapse.hotpath.rollout.watch import ensure_watched, watch

build = FoundBuild("build-1", Path(sys.argv[1]))
at_once = timedelta()
plan = (Stage("validate", 0.0, 1.0, at_once, 0), Stage("full", 1.0, 0.0, at_once, 0))
call = hotpath(
    "total",
    kernel=NativeSide(lambda: build, bind_total),
    agrees=same,
    plan=plan,
    burn_in=lambda: [(values(1, 2),)],
)(total)

ensure_watched()
watch().refresh()
watch().refresh()
print("decided", flush=True)
for line in sys.stdin:
    print(call(values(int(line))), flush=True)
"""

pytestmark = pytest.mark.usefixtures("free_choice")


class Program:
    """A process with one hot path, fed with numbers."""

    def __init__(self, settings: Settings, library: Path) -> None:
        environment = {
            **os.environ,
            "SYNAPSE_HOME": str(settings.home),
            "SYNAPSE_DATABASE_URL": settings.database_url,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(library)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        while not self.log or self.log[-1] != "decided":
            self.log.append(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended: {self.log}"
        return line.strip()

    def call(self, number: int) -> int:
        self.send(number)
        return int(self._line())

    def send(self, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def end(self) -> str:
        rest, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, rest
        return rest


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(home=tmp_path, database_url=database_url)


async def state_in(settings: Settings) -> HotPathState:
    async with Context(settings) as context:
        store = await context.get(open_store)
        (state,) = await store.list(HotPathState)
        return state


@pytest.mark.slow
async def test_a_crash_after_the_burn_in_costs_one_process_and_the_build_is_quarantined_at_the_next_start(
    settings: Settings, kernel: Callable[..., NativeSide]
) -> None:
    library = kernel().find().library
    first, second = Program(settings, library), Program(settings, library)
    assert (first.call(5), second.call(6)) == (5, 6)
    state = await state_in(settings)
    assert (state.stage, state.burn_in) == (1, 200), "it answers everything, in the process itself"

    first.send(CRASH)
    assert first.process.wait(30) == -signal.SIGSEGV
    assert second.call(7) == 7, "another process goes on"

    third = Program(settings, library)
    said = "\n".join([*third.log, *second.log])  # whichever looked first
    assert "hotpath.quarantined" in said
    assert f"process {first.process.pid} died of SIGSEGV while it was running" in said
    assert third.call(CRASH) == CRASH, "the reference answers"
    state = await state_in(settings)
    assert (state.mode, state.stage) == ("quarantined", 0)

    await asyncio.sleep(INTERVAL + 1)
    assert second.call(CRASH) == CRASH, "the other process has heard of it"
    for program in (second, third):
        program.end()
    assert not list((settings.home / "hotpath").glob("*.flight"))


def kill_while_it_runs(program: Program, settings: Settings) -> None:
    """As the system does when the memory is full: with the kernel running."""
    program.send(HANG)
    (file,) = (settings.home / "hotpath").glob(f"{program.process.pid}-*")
    with file.open("rb") as opened:
        while not any(opened.read()[FIRST_SLOT:]):
            opened.seek(0)
    program.process.kill()
    assert program.process.wait(30) == -signal.SIGKILL


@pytest.mark.slow
async def test_processes_that_are_killed_while_the_kernel_runs_suspend_it_only_when_there_are_many(
    settings: Settings, kernel: Callable[..., NativeSide]
) -> None:
    library = kernel().find().library
    for killed in range(KILLED_TO_SUSPEND):
        program = Program(settings, library)
        said = "\n".join(program.log)
        assert ("hotpath.killed" in said) is (killed > 0), said
        state = await state_in(settings)
        assert (state.mode, state.burn_in) == ("automatic", 200), "once or twice is chance: it answers"
        kill_while_it_runs(program, settings)

    last = Program(settings, library)
    said = "\n".join(last.log)
    assert "warning" in said
    assert "hotpath.suspended" in said
    assert "`synapse hotpath clear total`" in said
    assert last.call(HANG) == HANG, "the reference answers"
    assert (await state_in(settings)).mode == "suspended"
    last.end()


async def test_what_was_counted_is_kept_when_a_process_ends(
    settings: Settings, kernel: Callable[..., NativeSide]
) -> None:
    program = Program(settings, kernel().find().library)
    for number in range(10):
        program.call(number)
    program.end()
    state = await state_in(settings)
    assert sum(calls for _, calls in state.totals.native) == 10
