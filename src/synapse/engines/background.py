"""Work of low priority in a process of its own, so that an engine that answers meanwhile keeps its cores.

A thread would not do: whatever its priority, it holds the interpreter's lock while the engine wants it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from synapse.errors import Unavailable
from synapse.log import Logger

T = TypeVar("T")

log = Logger(__name__)

NICENESS = 19
LENGTH_BYTES = 8
"""Before each answer of the process: how long it is, little-endian."""
PROGRAM = f"""
import os, sys, types
os.nice({NICENESS})
import synapse
engines = sys.modules["synapse.engines"] = types.ModuleType("synapse.engines")
engines.__path__ = [os.path.join(synapse.__path__[0], "engines")]
from {__name__} import serve
serve()
"""
"""Of the room only what the work needs is imported: all of it takes longer than most of the work."""


class Background:
    """A process of the lowest priority, which does one piece of work after another::

        async with Background() as background:
            result = await background.run(work)

    It ends with the block, and with this process. Where none can be started, the work is done in a thread.
    """

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        folders = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-c",
                PROGRAM,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": folders},
            )
        except OSError as error:
            log.warning("no process could be started for work in the background", reason=error.strerror)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            if self._child.returncode is None:
                self._child.kill()
            await self._child.wait()

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises.

        Args:
            work: a function that pickles, as its result must.

        Raises:
            Unavailable: the process has died.
        """
        if self._child is None:
            return await asyncio.to_thread(work)
        child = self._child
        assert child.stdin is not None and child.stdout is not None  # noqa: S101 (both are pipes)
        try:
            child.stdin.write(pickle.dumps(work))
            length = int.from_bytes(await child.stdout.readexactly(LENGTH_BYTES), "little")
            succeeded, result = pickle.loads(await child.stdout.readexactly(length))  # noqa: S301 (our own process)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            code = await child.wait()
            why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Unavailable(
                f"the process that prepares the model ended with {why}",
                hint="try again; after SIGKILL see whether the machine is out of memory",
            ) from error
        if not succeeded:
            raise result
        found: T = result
        return found


def serve() -> None:
    """The child: do the work that standard input brings, and tell what came of it on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            work = pickle.load(sys.stdin.buffer)  # noqa: S301 (our own process)
        except EOFError:
            return
        try:
            told: tuple[bool, Any] = (True, work())
        except Exception as error:  # raised again in the parent
            told = (False, error)
        answer = pickle.dumps(told)
        out.write(len(answer).to_bytes(LENGTH_BYTES, "little") + answer)
        out.flush()


def _end_with_parent() -> None:
    parent = select.poll()
    parent.register(0, 0)  # an end of the pipe is told unasked
    parent.poll()
    os._exit(1)
