"""`synapse events tail`: the newest events, and with --follow what comes from now on, a line for each."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from contextlib import aclosing
from typing import cast

from pydantic import JsonValue

from synapse.callosum.tail import TailedEvent, TailEvents
from synapse.callosum.views import EventView
from synapse.cli.logs import log_to_stderr
from synapse.cli.options import read_params
from synapse.cli.text import printable, style_of, tell
from synapse.commands import Call, Context, find_command
from synapse.config import load_settings


def run_tail(values: dict[str, object], *, as_json: bool) -> None:
    """Print events until there are no more, or with `follow` until interrupted.

    Args:
        values: the parameters of the command `events/tail`.

    Raises:
        InvalidInput: the pattern or the time is none, or each process keeps its events to itself.
        Unavailable: the log cannot be read.
    """
    log_to_stderr()
    params = cast(TailEvents, read_params(TailEvents, values))
    asyncio.run(_tail(params, as_json))


async def _tail(params: TailEvents, as_json: bool) -> None:
    seen = False
    async with Context(load_settings()) as context:
        events = find_command("events/tail").stream(params, context, Call("terminal"))
        async with aclosing(events):
            async for event in events:
                seen = True
                _show(cast(TailedEvent, event), as_json=as_json)
    if not (seen or as_json or params.lines == 0):
        tell("nothing here yet" if params.since is None and params.pattern == "**" else "nothing like that here yet")


def _show(event: TailedEvent, *, as_json: bool) -> None:
    if as_json:
        body = event.model_dump(mode="json", exclude_none=True)
        print(json.dumps({"position": body.pop("position"), **body}, ensure_ascii=False))
    else:
        print(_line(event))
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
