"""Work of low priority in a process of its own, so that an engine that answers meanwhile keeps its cores.

A thread would not do: one of low priority that holds the interpreter's lock holds up the engine's, and one of normal
priority takes half a core from it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from synapse.errors import Unavailable
from synapse.log import Logger

T = TypeVar("T")

log = Logger(__name__)

NICENESS = 19
PROGRAM = f"import os; os.nice({NICENESS}); from {__name__} import serve; serve()"


async def in_background(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a process of the lowest priority; when the caller is cancelled, it is killed.

    Args:
        work: a function that pickles, and whose result does.

    Raises:
        Unavailable: the process died.
    """
    folders = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    try:
        child = await asyncio.create_subprocess_exec(
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
        return await asyncio.to_thread(work)
    assert child.stdin is not None and child.stdout is not None  # noqa: S101 (both are pipes)
    try:
        child.stdin.write(pickle.dumps(work))  # it stays open: its end tells the child that nobody waits any more
        told = await child.stdout.read()
        code = await child.wait()
    except BaseException:
        child.kill()
        await child.wait()
        raise
    finally:
        child.stdin.close()
    if not told:
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise Unavailable(
            f"the process that prepared the model ended with {why}",
            hint="try again; after SIGKILL see whether the machine is out of memory",
        )
    succeeded, result = pickle.loads(told)  # noqa: S301 (our own process)
    if not succeeded:
        raise result
    found: T = result
    return found


def serve() -> None:
    """The child: do the work that standard input brings, and tell what came of it on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    work = pickle.load(sys.stdin.buffer)  # noqa: S301 (our own process)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        told: tuple[bool, Any] = (True, work())
    except Exception as error:  # raised again in the parent
        told = (False, error)
    out.write(pickle.dumps(told))
    out.close()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
