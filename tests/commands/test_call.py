"""Who calls, what they may do, how long they wait, and that a call sent twice is carried out once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, get_args

import pytest
from pydantic import BaseModel

from support.heard import listening
from synapse.callosum.payloads import Untyped
from synapse.callosum.publish.publishing import publish
from synapse.commands import (
    Call,
    Command,
    Context,
    LacksPermission,
    LocalPath,
    OnlyOnThisMachine,
    all_commands,
    command,
    find_command,
    looks_like_path,
)
from synapse.config import load_settings
from synapse.errors import Conflict, InvalidInput, TimedOut


class Params(BaseModel):
    text: str = ""
    file: Annotated[Path | None, LocalPath()] = None
    model: Annotated[str | None, LocalPath(looks_like_path)] = None


class Result(BaseModel):
    text: str


@pytest.fixture
async def context() -> AsyncIterator[Context]:
    async with Context(load_settings()) as opened:
        yield opened


def echo(permission: str = "read") -> Command:
    @command("data/echo", permission=permission)  # type: ignore[arg-type]
    async def run(params: Params, context: Context, call: Call) -> Result:
        """Say it again."""
        call.progress("echoing", 1, 1)
        publish("data.echoed", Untyped({}))
        return Result(text=params.text)

    return find_command("data/echo")


@pytest.mark.parametrize(
    ("held", "needed", "may"),
    [
        ({"read"}, "read", True),
        ({"manage"}, "read", True),
        ({"manage"}, "manage", True),
        ({"read"}, "manage", False),
        ({"chat"}, "read", False),
        (set(), "read", False),
    ],
)
async def test_a_command_runs_for_who_holds_its_permission(
    context: Context, held: set[str], needed: str, may: bool
) -> None:
    found, call = echo(needed), Call("http", permissions=frozenset(held), key="laptop")
    if may:
        assert await found.run(Params(text="hi"), context, call) == Result(text="hi")
    else:
        with pytest.raises(LacksPermission, match=r"laptop.*needs"):
            await found.run(Params(text="hi"), context, call)


async def test_only_callers_on_this_machine_name_its_files(context: Context) -> None:
    found = echo()
    for params in (Params(file=Path("x")), Params(model="/etc/x.gguf"), Params(model="../x"), Params(model="x.gguf")):
        assert await found.run(params, context, Call("terminal"))
        with pytest.raises(OnlyOnThisMachine) as refused:
            await found.run(params, context, Call("http"))
        assert refused.value.details["param"] in ("file", "model")
    assert await found.run(Params(model="smollm2-135m"), context, Call("http"))


def test_every_parameter_that_is_a_path_is_marked_as_one() -> None:
    unmarked = [
        f"{each.name} {name}"
        for each in all_commands()
        for name, field in each.params.model_fields.items()
        if Path in (field.annotation, *get_args(field.annotation))
        if not any(isinstance(mark, LocalPath) for mark in field.metadata)
    ]
    assert unmarked == []


async def test_who_does_not_wait_that_long_is_told_so_and_the_work_is_cancelled(context: Context) -> None:
    ended = asyncio.Event()

    @command("data/sleep", permission="read")
    async def sleep(params: Params, context: Context) -> Result:
        """Take long."""
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return Result(text="")

    with pytest.raises(TimedOut, match="data/sleep was not done"):
        await find_command("data/sleep").run(Params(), context, Call("http", timeout=0.01))
    assert ended.is_set()


async def test_events_of_a_call_carry_its_trace_and_its_progress_reaches_the_caller(context: Context) -> None:
    reports: list[tuple[str, int, int | None]] = []
    call = Call("http", progress=lambda *report: reports.append(report))
    with listening() as heard:
        await echo().run(Params(), context, call)
        publish("data.later", Untyped({}))
    assert [(message.topic, message.trace) for message in heard] == [("data.echoed", call.trace), ("data.later", None)]
    assert reports == [("echoing", 1, 1)]


async def test_a_call_sent_twice_is_carried_out_once(context: Context) -> None:
    runs: list[str] = []
    go = asyncio.Event()

    @command("data/count", permission="manage")
    async def count(params: Params, context: Context) -> Result:
        """Count."""
        runs.append(params.text)
        await go.wait()
        if params.text == "fails" and len(runs) == 3:
            raise InvalidInput("not this time")
        return Result(text=f"run {len(runs)}")

    found = find_command("data/count")

    def send(text: str, key: str, caller: str = "laptop") -> asyncio.Task[BaseModel]:
        return asyncio.create_task(found.run(Params(text=text), context, Call("http", key=caller, idempotency_key=key)))

    first, second = send("a", "1"), send("a", "1")
    await asyncio.sleep(0)
    first.cancel()  # its caller hung up; whoever sends the call again gets the result
    go.set()
    assert await second == Result(text="run 1")
    assert await send("a", "1") == Result(text="run 1")
    with pytest.raises(Conflict, match="other parameters"):
        await send("b", "1")
    assert await send("a", "1", "phone") == Result(text="run 2")
    with pytest.raises(InvalidInput, match="not this time"):
        await send("fails", "2")
    assert await send("fails", "2") == Result(text="run 4")
    with pytest.raises(InvalidInput, match="1 to 200 characters"):
        await send("a", "x" * 201)


async def test_a_command_that_streams_gives_each_result_as_it_comes(context: Context) -> None:
    closed = asyncio.Event()

    @command("data/spell", permission="read")
    async def spell(params: Params, context: Context) -> AsyncIterator[Result]:
        """Spell it."""
        try:
            for letter in params.text:
                yield Result(text=letter)
        finally:
            closed.set()

    found = find_command("data/spell")
    assert found.streams
    assert found.result is Result
    assert [result async for result in found.stream(Params(text="abc"), context)] == [Result(text=x) for x in "abc"]
    assert await found.run(Params(text="abc"), context) == Result(text="c")
    stream = found.stream(Params(text="abc"), context)
    await anext(stream)
    closed.clear()
    await stream.aclose()
    assert closed.is_set()
    with pytest.raises(LacksPermission):
        await anext(found.stream(Params(text="a"), context, Call("http", permissions=frozenset())))
