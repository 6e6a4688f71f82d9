"""The thread that runs a process' supervisor: it starts at the first call of a hot path, or with `open_hotpaths`."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.errors import SynapseError, TimedOut
from synapse.hotpath.news import log
from synapse.hotpath.paths import PATHS
from synapse.hotpath.rollout.supervisor import Supervisor
from synapse.store import Store, open_store

INTERVAL = 5.0
"""Seconds between two looks at store and flags: what another process has decided holds here after at most this long."""
FOLDER = "hotpath"
"""Where flight recorders are, in the home."""
LAST_SECONDS = 5.0
"""Seconds that the end of the process waits for what was counted to be kept."""


class Watch:
    """A daemon thread with an event loop and a connection to the store of its own.

    Attributes:
        complaint: why the store cannot be used at present; empty when it can.
        hint: what helps then.
    """

    def __init__(self, settings: Settings, *, interval: float = INTERVAL) -> None:
        """Start watching. What stands in its way now, such as a store that is locked, is tried again every interval."""
        self.supervisor = Supervisor(settings.home / FOLDER)
        self._settings = settings
        self._interval = interval
        self._wake = threading.Event()
        self._stopping = False
        self._served = threading.Condition()
        self._asked = 0
        self._answered = 0
        self.complaint = self.hint = ""
        self._looked = False
        self._thread = threading.Thread(target=self._watch, name="synapse-hotpath", daemon=True)
        self._thread.start()

    def refresh(self, timeout: float = 30.0) -> None:
        """Look at store and flags now, and wait until that is done.

        Raises:
            TimedOut: it took longer than `timeout` seconds.
        """
        with self._served:
            self._asked += 1
            mine = self._asked
            self._wake.set()
            if not self._served.wait_for(lambda: self._answered >= mine, timeout):
                raise TimedOut(f"the hot paths were not brought up to date in {timeout:.3g} seconds")

    def stop(self) -> None:
        """Keep what was counted and end the thread; the reference answers from now on.

        Before its first look at the store no kernel has run and little was counted: then nobody waits for it.
        """
        self._stopping = True
        self._wake.set()
        self.supervisor.interrupt()
        if self._looked:
            self._thread.join(LAST_SECONDS)
        self.supervisor.close()

    def _watch(self) -> None:
        try:
            asyncio.run(self._run())
        finally:  # however it ends: a kernel that nobody watches answers nothing
            self.supervisor.close()

    async def _run(self) -> None:
        while not self._stopping:
            asked = self._asked
            try:
                self._settings.folder(FOLDER)
                async with Context(self._settings) as context:
                    await self._rounds(await context.get(open_store))
            except (SynapseError, OSError) as error:
                self.hint = (error.hint if isinstance(error, SynapseError) else None) or ""
                self._complain(str(error))
                self._answer(asked)
                self._sleep()

    async def _rounds(self, store: Store) -> None:
        while not self._stopping:
            asked = self._asked
            await self.supervisor.sync(store)
            self.complaint = self.hint = ""
            self._looked = True
            self._answer(asked)
            self._sleep()
        await self.supervisor.flush(store)

    def _sleep(self) -> None:
        """Wait in the thread, not in its loop: nothing else runs there, and an ending process can still end this."""
        if self._asked == self._answered:
            self._wake.wait(self._interval)
        self._wake.clear()

    def _answer(self, asked: int) -> None:
        with self._served:
            self._answered = max(self._answered, asked)
            self._served.notify_all()

    def _complain(self, message: str) -> None:
        """Say once that the store cannot be used. Nothing is lost: counts and decisions stay as they are meanwhile."""
        if message != self.complaint:
            self.complaint = message
            log.warning("hotpath.store_unavailable", message=message, hint=self.hint)


_lock = threading.Lock()
_watch: Watch | None = None
_complaint = ""


def ensure_watched() -> Watch | None:
    """The watch of this process, started if need be. Without settings it cannot start: that is logged once."""
    global _watch, _complaint  # noqa: PLW0603 (one a process)
    with _lock:
        if _watch is None:
            try:
                _watch = Watch(load_settings())
            except SynapseError as error:
                if str(error) != _complaint:
                    log.warning("hotpath.not_watched", message=str(error), hint=error.hint)
                _complaint = str(error)
        return _watch


def watch() -> Watch | None:
    """The watch of this process, if it has one."""
    return _watch


@asynccontextmanager
async def open_hotpaths(context: Context) -> AsyncIterator[Watch]:
    """Opener of the watch, for `Context.get`: a server has it from its start, and ends it in good order."""
    global _watch  # noqa: PLW0603 (one a process)
    if _watch is not None:
        yield _watch
        return
    with _lock:
        _watch = mine = Watch(context.settings)
    try:
        yield mine
    finally:
        _watch = None
        await asyncio.to_thread(mine.stop)


def _at_exit() -> None:
    if _watch is not None:
        _watch.stop()


def _after_fork() -> None:
    global _watch, _lock  # noqa: PLW0603 (one a process)
    _lock = threading.Lock()
    parents, _watch = _watch, None
    if parents is not None:
        parents.supervisor.abandon()
        for path in PATHS.values():
            path.after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
