"""A command is defined once, checked when it is defined, and found by name."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from synapse.commands import Context, all_commands, command, find_command, load_group
from synapse.config import load_settings
from synapse.errors import NotFound


class Params(BaseModel):
    times: int = 1


class Result(BaseModel):
    text: str


async def test_a_command_carries_its_types_its_help_and_its_permission() -> None:
    @command("data/shout", permission="read")
    async def shout(params: Params, context: Context) -> Result:
        """Say it loudly.

        As often as wanted.
        """
        return Result(text="HO" * params.times)

    found = find_command("data/shout")
    assert (found.group, found.verb, found.permission) == ("data", "shout", "read")
    assert (found.summary, found.description) == ("Say it loudly.", "As often as wanted.")
    assert (found.params, found.result) == (Params, Result)
    async with Context(load_settings()) as context:
        assert await found.run(Params(times=2), context) == Result(text="HOHO")


def test_every_command_of_every_room_is_registered_with_help() -> None:
    commands = all_commands()
    assert {"model/pull", "layer/add", "persona/create", "data/create", "key/create"} <= {c.name for c in commands}
    assert all(c.summary.endswith(".") for c in commands)


def test_an_unknown_group_or_verb_names_what_there_is() -> None:
    with pytest.raises(NotFound) as group:
        load_group("nonsense")
    assert "persona" in (group.value.hint or "")
    with pytest.raises(NotFound) as verb:
        find_command("model/steal")
    assert "pull" in (verb.value.hint or "")


def test_a_definition_of_the_wrong_form_is_refused_at_once() -> None:
    async def no_docstring(params: Params, context: Context) -> Result:
        return Result(text="")

    async def no_model(params: int, context: Context) -> Result:
        """Help."""
        return Result(text="")

    def not_async(params: Params, context: Context) -> Result:
        """Help."""
        return Result(text="")

    async def good(params: Params, context: Context) -> Result:
        """Help."""
        return Result(text="")

    for name, handler in [
        ("data/one", no_docstring),
        ("data/two", no_model),
        ("data/three", not_async),
        ("nowhere/four", good),
        ("data", good),
        ("model/pull", good),
    ]:
        with pytest.raises(TypeError):
            command(name, permission="read")(handler)  # type: ignore[arg-type]
