"""Other programs on the machine: how much of the CPU they take, and waiting until they rest.

Threads that wait for one another by spinning suffer far more from a busy neighbour than its share of the CPU, so a
measurement beside one says little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STAT = Path("/proc/stat")
IDLE, IOWAIT, GUEST = 3, 4, 8
"""Fields of the first line of /proc/stat (see proc(5)); guest time is counted in user time already."""
QUIET = 0.1
"""The largest share of the CPU that others may take while something is measured."""


@dataclass
class Neighbours:
    """Everything but this process and `ours`, which are process ids.

    Attributes:
        patience: seconds that may still be spent on waiting and on measuring again.
        worst: the largest share of the CPU that others took in a measurement that counted; 0 where the system does
            not say.
    """

    ours: Sequence[int] = ()
    patience: float = 0.0
    worst: float = field(default=0.0, init=False)

    def measure(self, work: Callable[[], float], pause: float) -> float:
        """The result of `work`, done after a pause of so many seconds, and again while others disturb it."""
        results: list[float] = []
        while True:
            self._wait(pause)
            start = time.monotonic()
            share = self._share(lambda: results.append(work()))
            if share <= QUIET or self.patience <= 0:
                self.worst = max(self.worst, share)
                return results[-1]
            self.patience -= time.monotonic() - start

    def _wait(self, pause: float) -> None:
        """Sleep at least so many seconds, and until others rest."""
        while self._share(lambda: time.sleep(pause)) > QUIET and self.patience > 0:
            self.patience -= pause

    def _share(self, work: Callable[[], object]) -> float:
        """The share of the CPU that others took while `work` ran."""
        start, busy = time.monotonic(), self._others_seconds()
        work()
        cores = os.cpu_count() or 1
        return max(0.0, self._others_seconds() - busy) / (cores * (time.monotonic() - start))

    def _others_seconds(self) -> float:
        if not STAT.exists():
            return 0.0
        ticks = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:]]
        busy = sum(ticks[:GUEST]) - ticks[IDLE] - ticks[IOWAIT]
        return busy / os.sysconf("SC_CLK_TCK") - time.process_time() - sum(map(cpu_seconds, self.ours))


def cpu_seconds(process: int) -> float:
    """CPU time of a running process, of the children it has waited for, and of those that still run."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    running = [
        int(child) for tasks in Path(f"/proc/{process}/task").glob("*/children") for child in tasks.read_text().split()
    ]
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, running))
