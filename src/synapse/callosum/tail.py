"""The newest events of a home, whichever process they come from, and what comes from now on."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

from pydantic import BaseModel, Field

from synapse.callosum.log.contract import Entry
from synapse.callosum.log.opening import open_log
from synapse.callosum.log.reading import follow, recent
from synapse.callosum.topics import matcher
from synapse.callosum.views import EventView, view_of
from synapse.commands import Context
from synapse.errors import InvalidInput

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
AGE = re.compile(r"(\d{1,9})([smhd])")
LINES = 20


class TailEvents(BaseModel):
    """Which events."""

    pattern: str = Field("**", description="topics: words joined by dots, * for any word, ** for the rest")
    since: str | None = Field(None, description="from so long ago (10m, 2h, 1d) or from a time on")
    lines: int | None = Field(None, ge=0, description=f"at most so many; by default {LINES}, or all with `since`")
    follow: bool = Field(False, description="go on with what comes")


class TailedEvent(EventView):
    """An event and its place in the log, behind which a reader can go on."""

    position: str


async def tail_events(params: TailEvents, context: Context) -> AsyncGenerator[TailedEvent]:
    """The events, oldest first; with `follow` it ends when its reader does.

    Raises:
        InvalidInput: the pattern or the time is none, or each process keeps its events to itself.
        Unavailable: the log cannot be read.
    """
    if context.settings.events == "memory":
        raise InvalidInput(
            "with the setting `events = memory` each process keeps its events to itself",
            hint="GET /v1/events of a server streams its own; `embedded` keeps them in the home folder",
        )
    matcher(params.pattern)
    since = None if params.since is None else time_of(params.since, time.time())
    limit = LINES if params.lines is None and since is None else params.lines
    log = await context.get(open_log)
    found = await recent(log, params.pattern, limit=limit, since=since)
    for entry in found.entries:
        yield _tailed(entry)
    if params.follow:
        async with aclosing(follow(log, found.position, params.pattern)) as pages:
            async for page in pages:
                for entry in page:
                    yield _tailed(entry)


def _tailed(entry: Entry) -> TailedEvent:
    return TailedEvent(position=entry.position, **dict(view_of(entry.message)))


def time_of(text: str, now: float) -> float:
    """The time that `10m` (so long ago; s, m, h or d) or an ISO 8601 date or time means, in seconds since 1970.

    Raises:
        InvalidInput: it is neither.
    """
    if age := AGE.fullmatch(text):
        return now - int(age[1]) * UNITS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"--since takes an age like 10m, or a time like 2026-11-21T16:00, not {text[:60]!r}"
        ) from error
