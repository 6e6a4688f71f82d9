"""The process in which a new build is tested and answers its first calls: a crash or endless loop costs nothing else.

The child is a new interpreter (no fork: that would copy the locks of other threads) with two inherited descriptors: a
socket for messages and the block of memory for arrays. It ends when the socket does, and an alarm ends one whose kernel
does not come back, so it never outlives its parent for long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from synapse.kernels.shared_arguments import SharedBlock

LARGEST_CALL = 256 * 2**20
"""Bytes of arguments that are copied to the child; larger calls are left to the reference while the burn-in lasts."""
CALL_SECONDS = 30.0
START_SECONDS = 120.0
GRACE_SECONDS = 10.0
"""So long after its parent should have ended it, the child ends itself."""
PROGRAM = f"import sys; from {__name__} import serve; serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
FAULTS = frozenset(
    getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")
)
"""Signals that a process brings upon itself. Another, such as the SIGKILL of a machine out of memory, blames nobody."""


class NotSent(Exception):
    """The call did not reach the kernel: the child is starting or busy, or the arguments cannot be sent."""


class Crashed(Exception):
    """The kernel brought its process down, or did not come back in time."""


class Lost(Exception):
    """The child is gone for a reason that is not the kernel's."""


class Raised(Exception):
    """The kernel raised; the message has the name of the error and its text."""


class Unusable(Exception):
    """The build could not be opened in the child; the message says why."""


class TrialProcess:
    """A child process that has one build open. Calls come one at a time; a second thread is told `NotSent`."""

    def __init__(
        self, bind: Callable[[Path], Callable[..., Any]], library: Path, *, call_seconds: float = CALL_SECONDS
    ) -> None:
        """Nothing is started yet. `bind` must be importable by its module and name."""
        self._bind = bind
        self._library = library
        self._call_seconds = call_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._block: SharedBlock | None = None
        self._interrupted = False

    def start(self) -> None:
        """Start the child and wait until it has opened the build; does nothing when it runs.

        Raises:
            NotSent: it was interrupted.
            Crashed: opening the build brought the child down, or took too long.
            Unusable: the build could not be opened.
            Lost: the child could not be started or was killed.
        """
        with self._lock:
            if self._process is not None or self._interrupted:
                return
            ours, theirs = Pipe()
            self._pipe, self._block = ours, SharedBlock()
            try:
                files = (theirs.fileno(), self._block.descriptor)
                self._process = subprocess.Popen(  # noqa: S603 (our own module)
                    [sys.executable, "-P", "-c", PROGRAM, *map(str, files), str(self._call_seconds + GRACE_SECONDS)],
                    pass_fds=files,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)},
                )
            except OSError as error:
                self._close()
                raise Lost(f"no process could be started for it: {error.strerror}") from error
            finally:
                theirs.close()
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # found by the read that follows
                    ours.send((self._bind, self._library))
            except Exception as error:  # pickling, as in `call`
                self._close()
                raise Unusable(f"what opens it cannot be sent to another process: {error}") from error
            kind, text = self._receive(START_SECONDS)
            if kind != "ready":
                self._close()
                raise Unusable(text)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Call the kernel in the child. Returns its answer and how many nanoseconds it took there.

        Raises:
            NotSent: the child is not ready or busy, or the arguments cannot be sent.
            Raised: the kernel raised.
            Crashed: it crashed, or took longer than `call_seconds`; the child is gone.
            Lost: the child was killed by something else; `start` starts another.
        """
        if not self._lock.acquire(blocking=False):
            raise NotSent("another thread's call is in the child")
        try:
            if self._process is None or self._pipe is None or self._block is None:
                raise NotSent("the child is not running")
            try:
                packed = self._block.pack((args, kwargs), LARGEST_CALL)
            except Exception as error:  # pickling runs code of the arguments, which may raise anything
                raise NotSent(f"the arguments cannot be sent to the child: {error}") from error
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # found by the read that follows
                self._pipe.send(packed)
            kind, value = self._receive(self._call_seconds)
            if kind == "raised":
                raise Raised(value)
            answer, nanoseconds = value
            return answer, nanoseconds
        finally:
            self._lock.release()

    def interrupt(self) -> None:
        """End the child without waiting for the call that is in it; that call is told `NotSent`."""
        self._interrupted = True
        process = self._process
        if process is not None:
            process.kill()

    @property
    def running(self) -> bool:
        """Whether there is a child that can be called."""
        return self._process is not None

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._close()

    def _receive(self, seconds: float) -> tuple[str, Any]:
        """The child's next message. When there is none, the child is gone afterwards."""
        pipe, process = self._pipe, self._process
        assert pipe is not None and process is not None  # noqa: S101 (both callers have just looked)
        try:
            if pipe.poll(seconds):
                message: tuple[str, Any] = pipe.recv()
                return message
        except (EOFError, ConnectionResetError, BrokenPipeError):
            code = process.wait()
            self._close()
            if self._interrupted:
                raise NotSent("the child was ended with its parent") from None
            if -code in FAULTS:
                raise Crashed(f"it crashed with {signal.Signals(-code).name}") from None
            raise Lost(f"its process ended with {code}") from None
        self._close()
        raise Crashed(f"it did not answer in {seconds:.3g} seconds")

    def _close(self) -> None:
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._block is not None:
            self._block.close()
            self._block = None
        if process is not None:
            process.kill()
            process.wait()


def serve(socket: int, block: int, longest_call: float) -> None:
    """The child: open the build, then answer calls until the parent closes the socket."""
    import resource  # noqa: PLC0415 (POSIX only, as the whole child)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is expected: no core files
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    pipe = Connection(socket)
    shared = SharedBlock(block)
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS + GRACE_SECONDS)
    try:
        bind, library = pipe.recv()
        native = bind(library)
    except Exception as error:
        pipe.send(("unusable", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", ""))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)  # between two calls it waits as long as its parent lives
            args, kwargs = shared.unpack(pipe.recv())
            signal.setitimer(signal.ITIMER_REAL, longest_call)
            start = time.perf_counter_ns()
            try:
                answer = native(*args, **kwargs)
                pipe.send(("answered", (answer, time.perf_counter_ns() - start)))
            except Exception as error:  # an answer that cannot be pickled is one too: nothing of it was sent then
                pipe.send(("raised", f"{type(error).__name__}: {error}"))
            del args, kwargs
