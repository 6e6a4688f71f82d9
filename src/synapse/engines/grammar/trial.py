"""Trying a grammar out where it can be stopped: nothing stops the library in our own process.

The library bounds what it makes, and not how long it takes: a kilobyte of patterns that must hold together keeps it
busy for minutes. So what could be like that is compiled in a child process first, which the system ends when it has
used up its time or its memory.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from synapse.engines.grammar.trial_program import LENGTH, read_exactly
from synapse.errors import Unavailable

PROGRAM = Path(__file__).with_name("trial_program.py")
SECONDS = 5.0
"""Of the processor, for one grammar."""
LONGEST_WAIT = 60.0
"""By the clock, on a machine that has much else to do."""


class Trial:
    """The child process, started when it is needed. It takes one grammar at a time and ends when it has been idle."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def fault(self, grammar: str) -> str:
        """What is wrong with a grammar of the library: it, or that it takes too long or too much memory; or nothing.

        Raises:
            Unavailable: the child process does not work.
        """
        message = grammar.encode()
        message = len(message).to_bytes(LENGTH, "little") + message
        with self._lock:
            for _ in range(2):  # one that was idle may have ended in this moment
                process = self._running()
                with suppress(BrokenPipeError):
                    _write(process, message)
                    found = self._answer(process)
                    if found is not None:
                        return found
                self._stop()
        raise _broken("it ends at once")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                self._process = subprocess.Popen(  # noqa: S603 (our own program)
                    [sys.executable, "-P", str(PROGRAM), str(self._seconds)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in the terminal is for its parent
                )
            except OSError as error:
                raise _broken(str(error.strerror)) from error
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> str | None:
        """What is wrong with the grammar that was sent; None when the child had ended before it came."""
        answers = cast("IO[bytes]", process.stdout).fileno()
        code = -signal.SIGXCPU
        if select.select([answers], [], [], LONGEST_WAIT)[0]:
            length = read_exactly(answers, LENGTH)
            if length:
                return read_exactly(answers, int.from_bytes(length, "little")).decode()
            code = process.wait()
        self._stop()
        if code == -signal.SIGXCPU:
            return f"it takes more than {self._seconds:g} seconds to compile"
        if code == -signal.SIGABRT:
            return "it takes too much memory to compile"
        if code:
            raise _broken(f"it ended with {code}")
        return None

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    cast("IO[bytes]", pipe).close()


def _write(process: subprocess.Popen[bytes], message: bytes) -> None:
    pipe = cast("IO[bytes]", process.stdin)
    pipe.write(message)
    pipe.flush()


def _broken(reason: str) -> Unavailable:
    return Unavailable(
        f"the process that tries grammars out does not work: {reason}", hint="try again, or use a simpler schema"
    )


TRIAL = Trial()
"""That of this process: what it tries does not depend on the model."""
