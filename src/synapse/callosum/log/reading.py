"""Reading a log from a place on: the newest messages, those since a time, and what comes from now on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from synapse.callosum.log.contract import BEGINNING, Entry, Log, Position, back

PAGE = 500
FIRST_STEP, STEP_GROWTH = 256, 8
"""Messages that the first look back goes back, and how much further each next one goes."""
LONGEST_WAIT = 1.0
"""Seconds between two looks at the log: what came just before somebody began to wait for it is seen after so many."""


@dataclass(frozen=True, slots=True)
class Recent:
    """Messages of a log, oldest first, and the position behind the last one that was looked at."""

    entries: tuple[Entry, ...]
    position: Position


async def recent(log: Log, pattern: str = "**", *, limit: int | None = None, since: float | None = None) -> Recent:
    """The newest messages that match. It looks back in growing steps, so it reads little more than it gives.

    Args:
        limit: at most so many; None for all.
        since: none that was made before this time, in seconds since 1970.

    Raises:
        InvalidInput: the pattern is none.
        Unavailable: the log cannot be read.
    """
    end = await log.end()
    step = FIRST_STEP if limit is not None or since is not None else int(end)
    while True:
        start = back(end, step)
        reaches = start == BEGINNING or (since is not None and await _is_older(log, start, since))
        if reaches or since is None:
            found = await _behind(log, start, pattern, limit, since)
            if reaches or (limit is not None and len(found.entries) >= limit):
                return found
        step *= STEP_GROWTH


async def _is_older(log: Log, start: Position, time_: float) -> bool:
    """Whether the message behind a position was made before this time. Those before it were then, too, or nearly so."""
    first = await log.read(start, 1)
    return not first or first[0].message.time < time_


async def _behind(log: Log, start: Position, pattern: str, limit: int | None, since: float | None) -> Recent:
    kept: deque[Entry] = deque(maxlen=limit)
    position = start
    end = await log.end()
    while page := await log.read(position, PAGE, pattern):
        kept.extend(entry for entry in page if since is None or entry.message.time >= since)
        position = page[-1].position
    # Behind the last match there was none up to the end.
    return Recent(tuple(kept), max(position, end, key=int))


async def follow(
    log: Log,
    after: Position | None,
    pattern: str = "**",
    *,
    idle_s: float = 15.0,
    until: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[tuple[Entry, ...]]:
    """Messages behind a position as they come, a page at a time; an empty page when `idle_s` have brought none.

    It reads at the pace of whoever iterates, and keeps one page in memory. It ends at most a second after `until` has
    come true.

    Raises:
        InvalidInput: the pattern is none, or the position none of this log.
        Unavailable: the log cannot be read.
    """
    quiet_since = time.monotonic()
    while not until():
        end = await log.end()
        page = await log.read(after, PAGE, pattern)
        if page:
            after = page[-1].position
            yield tuple(page)
            quiet_since = time.monotonic()
            continue
        after = end  # all up to there was looked at, and need not be again
        left = idle_s - (time.monotonic() - quiet_since)
        if left <= 0:
            yield ()
            quiet_since = time.monotonic()
            continue
        await log.changed(min(left, LONGEST_WAIT))
