"""One worker process as its parent sees it: started, watched, and how it ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import forward
from synapse.daemon.calls import Caller
from synapse.daemon.worker import Beat, Start
from synapse.engines.runner import EngineStats
from synapse.errors import Unavailable
from synapse.hotpath.guard.flight_recorder import forgive
from synapse.hotpath.rollout.watch import FOLDER as FLIGHTS
from synapse.kernels.child import FAULTS
from synapse.log import Logger

PROGRAM = "import sys; from synapse.daemon.worker import main; main(int(sys.argv[1]))"
STDERR = 2
START_SECONDS = 300.0
"""How long opening a model may take: packing a large one is minutes of work."""
SILENT_SECONDS = 8.0
"""A worker that has said nothing for so long is stopped, or hangs with the interpreter's lock held."""
HUNG_SECONDS = 60.0
"""So long a step may take. The longest computes some hundred tokens of a prompt."""
WATCH_SECONDS = 1.0
LATE_SECONDS = 3.0
"""Looking so long after the look before, this process knows that it has missed what a worker said."""
STOPPING_SECONDS = 5.0
"""How long a worker that is told to end may take."""
CUT_SECONDS = 1.0
"""How long a process may outlive the connection to it."""
ENDING_SECONDS = 0.01
"""How often it is looked whether a process whose connection has ended has ended too."""

State = Literal["starting", "ready", "draining", "ended"]

log = Logger(__name__)

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Death:
    """How a worker ended.

    Attributes:
        own: whether what it computed may have caused it; a SIGKILL from outside, for one, blames no request.
        reason: for people.
        blameless: whether it is certain that no kernel has caused it.
    """

    own: bool
    reason: str
    blameless: bool = True


class WorkerProcess:
    """A worker, from its start to its end. It is never started twice.

    Attributes:
        number: what people call it.
        caller: asks it.
        loaded: sha256 of the layers it knows.
        ended: done when the process has ended, with how it did.
    """

    def __init__(self, start: Start, memory_bytes: int) -> None:
        """Nothing is started yet.

        Args:
            memory_bytes: how much memory of its own it may have.
        """
        self.number = next(_numbers)
        self.caller = Caller(self._hear)
        self.loaded: set[str] = set()
        self.ended: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self.state: State = "starting"
        self.started = time.monotonic()
        self.stats: EngineStats | None = None
        self._start = start
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._beat = Beat(0, busy=False)
        self._heard = self._progressed = self._looked = time.monotonic()
        self._killed: Death | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id, once there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process, and wait until its model is open.

        Raises:
            Disconnected, Unavailable: the process could not be started, or ended before it was ready.
            SynapseError: the model cannot be opened.
        """
        ours, theirs = socket.socketpair()
        try:
            folders = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
            self._process = process = subprocess.Popen(  # noqa: ASYNC220, S603 (our own module, and it takes a millisecond)
                [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=STDERR,  # what it logs is not what this program has to say
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": folders, "SYNAPSE_HOME": str(self._start.settings.home)},
            )
        except OSError as error:
            ours.close()
            self._end(Death(own=False, reason="it could not be started"))
            raise Unavailable(f"no process could be started for a model: {error.strerror}") from error
        finally:
            theirs.close()
        self._watching = asyncio.create_task(self._watch(process))
        await self.caller.connect(ours)
        try:
            async with asyncio.timeout(START_SECONDS):
                self.stats = await self.caller.ask("start", self._start)
        except TimeoutError as error:
            raise Unavailable(f"the model was not open after {START_SECONDS:g} seconds") from error
        if self.state == "starting":
            self.state = "ready"

    async def refresh(self) -> EngineStats | None:
        """Its statistics as of now, or the last that are known."""
        if self.state in ("ready", "draining"):
            with suppress(Unavailable):
                self.stats = await self.caller.ask("stats")
        return self.stats

    def kill(self, reason: str, *, own: bool = False, blameless: bool = True) -> None:
        """End the process at once. The reason and the rest are as in `Death`."""
        self._killed = self._killed or Death(own, reason, blameless)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    async def close(self) -> Death:
        """End it in good order, or by force if it does not come to an end."""
        self._killed = self._killed or Death(own=False, reason="it was told to end")
        self.caller.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOPPING_SECONDS):
                return await asyncio.shield(self.ended)
        self.kill("it did not end when told to")
        return await self.ended

    def memory(self) -> int:
        """Bytes of memory that are this process' alone; 0 where the system does not say."""
        try:
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            pass
        return 0

    def _hear(self, value: Any) -> None:
        self._heard = time.monotonic()
        if isinstance(value, Beat):
            if value.steps != self._beat.steps or not value.busy:
                self._progressed = self._heard
            self._beat = value
        elif isinstance(value, Message):
            forward(value)

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """See that the process lives, works and keeps within its memory; say how it ended."""
        cut: float | None = None
        while process.poll() is None:
            if not self.caller.lost.done():
                await asyncio.wait({self.caller.lost}, timeout=WATCH_SECONDS)
                self._judge()
                continue
            # The end of the connection most often is the first that is known of the end of the process.
            cut = cut or time.monotonic()
            if time.monotonic() - cut > (STOPPING_SECONDS if self._killed else CUT_SECONDS):
                self.kill("the connection to it was cut")
            await asyncio.sleep(ENDING_SECONDS)
        self._end(self._killed or _death(process.returncode))

    def _judge(self) -> None:
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > LATE_SECONDS:  # it is this process that was held up, or the machine slept
            self._heard = self._progressed = now
        if self.state == "starting":
            return
        if now - self._heard > SILENT_SECONDS:
            self.kill(f"it said nothing for {SILENT_SECONDS:g} seconds")
        elif now - self._progressed > HUNG_SECONDS:
            self.kill(f"a step took more than {HUNG_SECONDS:g} seconds", own=True, blameless=False)
        elif (used := self.memory()) > (most := self._memory_bytes):
            self.kill(f"it took {used / 2**20:,.0f} MB of memory, and may take {most / 2**20:,.0f}", own=True)

    def _end(self, death: Death) -> None:
        self.state = "ended"
        if death.blameless and self.pid is not None:
            forgive(self._start.settings.home / FLIGHTS, self.pid)
        self.caller.close()
        if not self.ended.done():
            self.ended.set_result(death)


def _death(code: int) -> Death:
    """What an exit code says."""
    if code < 0:
        number = signal.Signals(-code)
        fault = number in FAULTS
        return Death(fault, f"it was ended by {number.name}", blameless=not fault)
    if code > 0:
        return Death(own=True, reason=f"it ended with the exit code {code}", blameless=False)
    return Death(own=False, reason="it ended by itself")
