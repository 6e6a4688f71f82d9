"""The thread that watches: it starts by itself, hears of decisions, and does not survive into a forked child."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from hotpath.conftest import end_watch
from support.hotpath_kernels import compile_kernel, same, total, values
from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.hotpath import PATHS, HotPath, hotpath
from synapse.hotpath.rollout import watch
from synapse.hotpath.rollout.entities import HotPathState
from synapse.hotpath.rollout.plan import promote
from synapse.hotpath.rollout.records import Subject, intervene
from synapse.hotpath.rollout.supervisor import utc_now
from synapse.hotpath.rollout.watch import Watch, ensure_watched, open_hotpaths
from synapse.store import open_store

pytestmark = pytest.mark.usefixtures("free_choice", "no_watch")


def started() -> Watch:
    """The watch that a first call has started, a moment later."""
    deadline = time.monotonic() + 20
    while (running := watch.watch()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running is not None
    return running


@pytest.fixture
def path(tmp_path: Path) -> Iterator[HotPath[..., Any]]:
    hotpath("total", kernel=compile_kernel(tmp_path), agrees=same)(total)
    yield PATHS["total"]
    del PATHS["total"]


@pytest.fixture
async def context(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Context]:
    """With the settings that a first call finds."""
    monkeypatch.setenv("SYNAPSE_DATABASE_URL", database_url)
    async with Context(load_settings()) as opened:
        yield opened
    await asyncio.to_thread(end_watch)  # before the database goes


async def test_the_first_call_starts_the_watch_and_what_is_counted_reaches_the_store(
    path: HotPath[..., Any], context: Context
) -> None:
    assert watch.watch() is None
    assert path.call(values(1, 2)) == 3
    running = started()
    await asyncio.to_thread(running.refresh)
    (state,) = [s for s in await (await context.get(open_store)).list(HotPathState) if s.name == "total"]
    assert sum(calls for _, calls in state.totals.reference) == 1


async def test_a_server_opens_the_watch_and_ends_it_in_good_order(path: HotPath[..., Any], context: Context) -> None:
    async with Context(context.settings) as server:
        running = await server.get(open_hotpaths)
        path.call(values(1))
        assert watch.watch() is running, "the first call starts no second one"
        await asyncio.to_thread(running.refresh)
        for _ in range(5):
            path.call(values(1))
    assert watch.watch() is None
    assert path.decision.native is None
    (state,) = [s for s in await (await context.get(open_store)).list(HotPathState) if s.name == "total"]
    assert sum(calls for _, calls in state.totals.reference) == 6
    assert list((context.settings.home / "hotpath").iterdir()) == []


async def test_what_another_process_decides_is_heard(path: HotPath[..., Any], context: Context) -> None:
    running = await context.get(open_hotpaths)
    await asyncio.to_thread(running.refresh)
    store = await context.get(open_store)
    subject = Subject("total", path.native.find().id, path.plan)
    await intervene(store, subject, lambda rollout: promote(rollout, utc_now()), utc_now())
    await asyncio.to_thread(running.refresh)
    assert path.decision.why == "canary, burn-in"


async def test_without_a_store_the_reference_answers_and_it_is_said_once(
    path: HotPath[..., Any], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path / "home", database_url="postgresql://nobody@127.0.0.1:1/nothing")
    with capture_logs() as logs:
        running = Watch(settings, interval=0.05)
        await asyncio.to_thread(running.refresh)
        await asyncio.to_thread(running.refresh)
        assert path.call(values(1, 2)) == 3
        running.stop()
    assert [entry["event"] for entry in logs] == ["hotpath.store_unavailable"]


async def test_what_stands_in_the_way_at_the_start_decides_nothing_for_later(
    path: HotPath[..., Any], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path / "home", database_url=f"sqlite:///{tmp_path / 'store.db'}")
    (tmp_path / "home").mkdir()
    in_the_way = tmp_path / "home" / "hotpath"
    in_the_way.touch()
    running = Watch(settings, interval=0.05)
    await asyncio.to_thread(running.refresh)
    assert running.complaint
    assert path.call(values(1, 2)) == 3
    in_the_way.unlink()
    await asyncio.to_thread(running.refresh)
    await asyncio.to_thread(running.refresh)
    assert (running.complaint, running.hint) == ("", "")
    assert path.decision.why.startswith("validate")
    running.stop()


def test_settings_that_cannot_be_read_stop_no_call(path: HotPath[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_PORT", "no number")
    with capture_logs() as logs:
        assert path.call(values(1, 2)) == 3
        ensure_watched()
        ensure_watched()
    assert [entry["event"] for entry in logs] == ["hotpath.not_watched"]


def test_a_forked_child_begins_anew(path: HotPath[..., Any]) -> None:
    path.call(values(1))
    running = started()
    running.refresh()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            anew = watch.watch() is None and path.counters.take().calls == 0 and path.call(values(4)) == 4
            own = started()
            own.refresh()
            own.stop()
            os.write(write, b"well" if anew and own is not running else b"ill")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"well"
    os.close(read)
    os.waitpid(child, 0)
    path.call(values(1))
    running.refresh()
    assert watch.watch() is running
