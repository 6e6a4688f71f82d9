"""A world for hot paths: a compiled kernel, a store, a supervisor, and a clock that a test turns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from openfeature import api

from support.hotpath_kernels import compile_kernel, same, total
from support.postgres import database_url
from synapse.hotpath import HotPath, NativeSide, News, Plan, listen, paths
from synapse.hotpath.rollout import watch
from synapse.hotpath.rollout.entities import HotPathState, rollout_of
from synapse.hotpath.rollout.plan import STAGES, Rollout
from synapse.hotpath.rollout.supervisor import Supervisor
from synapse.store import Store, connect

__all__ = ["database_url"]

START = datetime(2026, 1, 1, tzinfo=UTC)


class World:
    """One process' hot paths, and its clock."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.now = START
        self.paths: dict[str, HotPath[..., Any]] = {}
        self.supervisor = Supervisor(folder, paths=self.paths, clock=lambda: self.now, call_seconds=5)

    def add(self, native: NativeSide, *, name: str = "total", plan: Plan = STAGES, **options: Any) -> HotPath[..., Any]:
        """Tie `total` to a kernel."""
        self.paths[name] = HotPath(name, total, native, same, plan=plan, **options)
        return self.paths[name]

    async def sync(self, after: timedelta = timedelta()) -> None:
        """Let time pass, then let the supervisor look."""
        self.now += after
        await self.supervisor.sync(self.store)

    async def rollout(self, name: str = "total") -> Rollout:
        """Where the path stands in the store."""
        path = self.paths[name]
        state = await self.store.find(HotPathState, name=name, build=path.native.find().id)
        assert state is not None
        return rollout_of(state)

    async def stage(self) -> str:
        """The name of its stage."""
        rollout = await self.rollout()
        return self.paths["total"].plan[rollout.stage].name


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NativeSide]:
    """Compiles a kernel with some behaviour."""
    folder = tmp_path_factory.mktemp("kernels")
    return lambda **behaviour: compile_kernel(folder, **behaviour)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """A store on each kind of database."""
    opened = await connect(database_url)
    yield opened
    await opened.close()


@pytest.fixture
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the choice itself: it is free, also when the suite runs with Python forced."""
    monkeypatch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)


@pytest.fixture
def world(store: Store, tmp_path: Path, free_choice: None) -> Iterator[World]:
    made = World(store, tmp_path)
    yield made
    made.supervisor.close()


@pytest.fixture
def no_watch() -> Iterator[None]:
    """As in a process that has not called a hot path yet: what watches now is stopped, and what a test starts as well.

    Two watches in one process would each take what the other's paths have counted.
    """
    end_watch()
    yield
    end_watch()


def end_watch() -> None:
    """Stop the watch of this process, also one that is just being started by a first call."""
    if paths._starter is not None:
        paths._starter.join()
    running = watch.watch()
    if running is not None:
        running.stop()
    paths._starter, watch._watch, watch._complaint = None, None, ""


@pytest.fixture(autouse=True)
def _own_flags() -> Iterator[None]:
    """No test sees the flag provider of another."""
    yield
    api.clear_providers()


@pytest.fixture
def news() -> Iterator[list[News]]:
    """What is told while the test runs."""
    heard: list[News] = []
    stop = listen(heard.append)
    yield heard
    stop()
