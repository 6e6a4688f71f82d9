"""`synapse events tail`: the newest events, and with --follow what comes from now on, a line for each."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime

from pydantic import JsonValue

from synapse.callosum.log.contract import Entry
from synapse.callosum.log.opening import open_log
from synapse.callosum.log.reading import follow, recent
from synapse.callosum.topics import matcher
from synapse.callosum.views import EventView, view_of
from synapse.cli.logs import log_to_stderr
from synapse.cli.text import printable, style_of, tell
from synapse.commands import Context
from synapse.config import load_settings
from synapse.errors import InvalidInput

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
AGE = re.compile(r"(\d{1,9})([smhd])")


@dataclass(frozen=True, slots=True)
class TailRequest:
    """What `synapse events tail` was asked for. `since` is an age or a time; `lines` limits what there is already."""

    pattern: str
    lines: int | None
    since: str | None
    follow: bool
    as_json: bool


def run_tail(request: TailRequest) -> None:
    """Print events until there are no more, or with `follow` until interrupted.

    Raises:
        InvalidInput: the pattern or the time is none, or each process keeps its events to itself.
        Unavailable: the log cannot be read.
    """
    log_to_stderr()
    asyncio.run(_tail(request))


async def _tail(request: TailRequest) -> None:
    settings = load_settings()
    if settings.events == "memory":
        raise InvalidInput(
            "with the setting `events = memory` each process keeps its events to itself",
            hint="GET /v1/events of a server streams its own; `embedded` keeps them in the home folder",
        )
    matcher(request.pattern)
    since = None if request.since is None else time_of(request.since, time.time())
    async with Context(settings) as context:
        log = await context.get(open_log)
        found = await recent(log, request.pattern, limit=request.lines, since=since)
        _show(found.entries, as_json=request.as_json)
        if not found.entries and not request.as_json and request.lines != 0:
            tell("nothing here yet" if since is None and request.pattern == "**" else "nothing like that here yet")
        if request.follow:
            async with aclosing(follow(log, found.position, request.pattern)) as pages:
                async for page in pages:
                    _show(page, as_json=request.as_json)


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


def _show(entries: tuple[Entry, ...], *, as_json: bool) -> None:
    for entry in entries:
        view = view_of(entry.message)
        if as_json:
            body = view.model_dump(mode="json", exclude_none=True)
            print(json.dumps({"position": entry.position, **body}, ensure_ascii=False))
        else:
            print(_line(view))
    sys.stdout.flush()


def _line(view: EventView) -> str:
    """When, on which tract, about what, and what it says. Nothing in it can move the cursor or begin a new line."""
    style = style_of(sys.stdout)
    when = view.time.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    facts = view.payload if isinstance(view.payload, dict) else {"": view.payload}
    said = " ".join(f"{name}={_fact(value)}" for name, value in facts.items() if value not in (None, []))
    said = " ".join(printable(said).split())
    return f"{style.dim(when)}  {view.tract:<8}  {style.cyan(view.topic)}  {said}".rstrip()


def _fact(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value and not re.search(r"[\s\"']", value):
        return value
    return json.dumps(value, ensure_ascii=False)
