"""The registry of commands, and nothing else: each room registers its own in its `commands.py`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel

from synapse.commands.context import Context
from synapse.errors import NotFound
from synapse.groups import GROUPS

Permission = Literal["read", "manage"]
"""What an API key must hold to run a command: `read` changes nothing, `manage` may change anything."""

P = TypeVar("P", bound=BaseModel)
R = TypeVar("R", bound=BaseModel)

NAME = re.compile(r"[a-z][a-z0-9-]*/[a-z][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Argument:
    """Marks a field that the terminal takes by position: ``name: Annotated[str, Argument()]``."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: `name` is ``group/verb``; `run` takes one `params` and gives one `result`."""

    name: str
    summary: str
    description: str
    permission: Permission
    params: type[BaseModel]
    result: type[BaseModel]
    handler: Callable[[Any, Context], Awaitable[Any]]

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def verb(self) -> str:
        return self.name.partition("/")[2]

    async def run(self, params: BaseModel, context: Context) -> BaseModel:
        """Run it. Raises whatever `SynapseError` the command raises."""
        result: BaseModel = await self.handler(params, context)
        return result


_commands: dict[str, Command] = {}


def command(
    name: str, *, permission: Permission
) -> Callable[[Callable[[P, Context], Awaitable[R]]], Callable[[P, Context], Awaitable[R]]]:
    """Register ``async def verb(params: Params, context: Context) -> Result`` under ``group/verb``.

    The docstring's first line is the summary, the rest the description. The function itself is returned unchanged.

    Raises:
        TypeError: the name, the signature or the docstring does not have that form (found when the room is imported).
    """

    def register(handler: Callable[[P, Context], Awaitable[R]]) -> Callable[[P, Context], Awaitable[R]]:
        if not NAME.fullmatch(name) or name.partition("/")[0] not in GROUPS:
            raise TypeError(f"a command is called group/verb with a group of GROUPS, not {name!r}")
        if name in _commands:
            raise TypeError(f"the command {name} is registered twice")
        hints = get_type_hints(handler)
        names = list(inspect.signature(handler).parameters)
        if not inspect.iscoroutinefunction(handler) or len(names) != 2:
            raise TypeError(f"the command {name} must be `async def f(params, context)`")
        params, result = hints.get(names[0]), hints.get("return")
        for model in (params, result):
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                raise TypeError(f"the command {name} must take and return a pydantic model, not {model!r}")
        text = inspect.getdoc(handler)
        if not text:
            raise TypeError(f"the command {name} needs a docstring: its first line is the help")
        summary, _, description = text.partition("\n")
        _commands[name] = Command(name, summary, description.strip(), permission, params, result, handler)  # type: ignore[arg-type]
        return handler

    return register


def load_group(group: str) -> list[Command]:
    """The commands of one group, sorted by verb, importing its room if need be.

    Raises:
        NotFound: there is no such group.
    """
    if group not in GROUPS:
        raise NotFound(f"there is no command group {group!r}", hint=f"the groups are {', '.join(sorted(GROUPS))}")
    importlib.import_module(GROUPS[group].module)
    return sorted((c for c in _commands.values() if c.group == group), key=lambda c: c.verb)


def all_commands() -> list[Command]:
    """Every command of every group, sorted by name. Imports all rooms."""
    return [c for group in sorted(GROUPS) for c in load_group(group)]


def find_command(name: str) -> Command:
    """The command called ``group/verb``.

    Raises:
        NotFound: there is no such command.
    """
    group, _, verb = name.partition("/")
    found = {c.verb: c for c in load_group(group)}
    if verb not in found:
        raise NotFound(f"there is no command {name!r}", hint=f"{group} has {', '.join(sorted(found))}")
    return found[verb]
