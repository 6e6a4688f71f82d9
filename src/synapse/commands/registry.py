"""The registry of commands, and nothing else: each room registers its own in its `commands.py`."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from synapse.commands.call import IN_PROCESS, ON_THIS_MACHINE, Call, Permission, carrying_out, require
from synapse.commands.context import Context
from synapse.commands.idempotency import open_carried_out
from synapse.errors import Forbidden, InvalidInput, NotFound, TimedOut
from synapse.groups import GROUPS

H = TypeVar("H", bound=Callable[..., Any])

NAME = re.compile(r"[a-z][a-z0-9-]*/[a-z][a-z0-9-]*")


class OnlyOnThisMachine(Forbidden):
    """A caller from elsewhere names a path of this machine."""

    code = "only_on_this_machine"


@dataclass(frozen=True, slots=True)
class Argument:
    """Marks a field that the terminal takes by position: ``name: Annotated[str, Argument()]``."""


@dataclass(frozen=True, slots=True)
class LocalPath:
    """Marks a field whose value names a path of this machine: only callers on this machine may give one.

    Attributes:
        names_path: tells whether a value is a path, where a field takes other things too; None means that each is.
    """

    names_path: Callable[[str], bool] | None = None


def looks_like_path(value: str) -> bool:
    """Whether what should be a name is a path: it has a separator, or begins or ends as only a path does."""
    return any(mark in value for mark in "/\\") or value.startswith((".", "~")) or value.lower().endswith(".gguf")


@dataclass(frozen=True, slots=True)
class Command:
    """One command: `name` is ``group/verb``; it takes one `params` and gives one `result`, or many when it streams."""

    name: str
    summary: str
    description: str
    permission: Permission
    params: type[BaseModel]
    result: type[BaseModel]
    handler: Callable[..., Any]
    streams: bool
    takes_call: bool
    of_server: bool
    """It is about the server of the home: at the terminal, it is carried out there while one runs."""

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def verb(self) -> str:
        return self.name.partition("/")[2]

    def check(self, params: BaseModel, call: Call) -> None:
        """Whether the caller may do this: the one place where it is decided, whatever the surface.

        Raises:
            LacksPermission: the caller does not hold the permission.
            OnlyOnThisMachine: a parameter names a path of this machine, and the caller is elsewhere.
        """
        require(call.permissions, self.permission, call.key)
        if call.surface in ON_THIS_MACHINE:
            return
        for name, field in self.params.model_fields.items():
            for mark in field.metadata:
                value = getattr(params, name)
                if isinstance(mark, LocalPath) and value is not None and _is_path(mark, str(value)):
                    raise OnlyOnThisMachine(
                        f"the field {name} names a path of the machine that Synapse runs on",
                        hint=f"run `synapse {self.group} {self.verb}` there",
                        param=name,
                    )

    async def run(self, params: BaseModel, context: Context, call: Call = IN_PROCESS) -> BaseModel:
        """Run it. Of a command that streams, the last result is given.

        Raises:
            LacksPermission, OnlyOnThisMachine: see `check`.
            TimedOut: it took longer than the caller waits.
            NotFound: it streamed nothing.
            InvalidInput, Conflict, Overloaded: the idempotency key is wrong, or was used for another call.
            SynapseError: whatever the command raises.
        """
        self.check(params, call)

        async def work() -> BaseModel:
            if self.streams:
                last: BaseModel | None = None
                async with aclosing(self.stream(params, context, call)) as results:
                    async for result in results:
                        last = result
                if last is None:
                    raise NotFound(f"{self.name} gave nothing")
                return last
            with carrying_out(call):
                return await self._handle(params, context, call)  # type: ignore[no-any-return]

        async with self._within(call):
            if call.idempotency_key is None:
                return await work()
            carried = await context.get(open_carried_out)
            return await carried.once((call.key, self.name, call.idempotency_key), params, work)

    async def stream(self, params: BaseModel, context: Context, call: Call = IN_PROCESS) -> AsyncGenerator[BaseModel]:
        """Run it, and give each result as it comes: of a command that does not stream, its only one.

        Raises:
            as `run`; a command that streams cannot have an idempotency key.
        """
        if not self.streams:
            yield await self.run(params, context, call)
            return
        self.check(params, call)
        if call.idempotency_key is not None:
            raise InvalidInput(f"{self.name} streams its results, so it takes no idempotency key")
        async with self._within(call), aclosing(self._handle(params, context, call)) as results:
            while True:
                with carrying_out(call):  # for a step at a time: what asks for the next one runs in between
                    result = await anext(results, None)
                if result is None:
                    return
                yield result

    def _handle(self, params: BaseModel, context: Context, call: Call) -> Any:
        return self.handler(params, context, call) if self.takes_call else self.handler(params, context)

    @asynccontextmanager
    async def _within(self, call: Call) -> AsyncIterator[None]:
        limit = asyncio.timeout(call.timeout)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimedOut(
                f"{self.name} was not done within the {call.timeout:g} seconds that the caller waits",
                hint="wait longer, or ask again: what was fetched or built so far is kept",
            ) from error


def _is_path(mark: LocalPath, value: str) -> bool:
    return mark.names_path is None or mark.names_path(value)


_commands: dict[str, Command] = {}


def command(name: str, *, permission: Permission, of_server: bool = False) -> Callable[[H], H]:
    """Register ``async def verb(params: Params, context: Context) -> Result`` under ``group/verb``.

    A third parameter ``call: Call`` gets the call, for its progress. An asynchronous generator,
    ``-> AsyncIterator[Result]``, streams its results. The docstring's first line is the summary, the rest the
    description. The function itself is returned unchanged.

    Args:
        of_server: see `Command`.

    Raises:
        TypeError: the name, the signature or the docstring does not have that form (found when the room is imported).
    """

    def register(handler: H) -> H:
        if not NAME.fullmatch(name) or name.partition("/")[0] not in GROUPS:
            raise TypeError(f"a command is called group/verb with a group of GROUPS, not {name!r}")
        if name in _commands:
            raise TypeError(f"the command {name} is registered twice")
        hints = get_type_hints(handler)
        names = list(inspect.signature(handler).parameters)
        streams = inspect.isasyncgenfunction(handler)
        if not (streams or inspect.iscoroutinefunction(handler)) or len(names) not in (2, 3):
            raise TypeError(f"the command {name} must be `async def f(params, context)` or `(params, context, call)`")
        if len(names) == 3 and hints.get(names[2]) is not Call:
            raise TypeError(f"the third parameter of the command {name} must be a `Call`")
        params, result = hints.get(names[0]), hints.get("return")
        if streams:
            result = get_args(result)[0] if get_origin(result) in (AsyncIterator, AsyncGenerator) else None
        for model in (params, result):
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                raise TypeError(f"the command {name} must take and return a pydantic model, not {model!r}")
        text = inspect.getdoc(handler)
        if not text:
            raise TypeError(f"the command {name} needs a docstring: its first line is the help")
        summary, _, description = text.partition("\n")
        _commands[name] = Command(
            name,
            summary,
            description.strip(),
            permission,
            params,  # type: ignore[arg-type]
            result,  # type: ignore[arg-type]
            handler,
            streams,
            len(names) == 3,
            of_server,
        )
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
