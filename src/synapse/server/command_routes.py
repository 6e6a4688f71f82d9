"""Every registered command as a route: `POST /v1/commands/{group}/{verb}`, with its own schema in `/openapi.json`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from synapse.commands import GROUPS, Command, Permission, all_commands
from synapse.server.routing import ServerState, guarded


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="a URN that names the error")
    title: str = Field(description="its kind")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="what was expected and what was found")
    instance: str = Field(description="the path that was asked for")
    code: str = Field(description="the error's name within Synapse")
    hint: str | None = Field(None, description="what to do about it")
    details: dict[str, Any] | None = Field(None, description="facts for a program")


class CommandRow(BaseModel):
    """A command and where to post its parameters."""

    name: str
    summary: str
    permission: Permission
    path: str


class CommandList(BaseModel):
    """All commands."""

    items: list[CommandRow]


def command_routes() -> APIRouter:
    """The routes of all commands. Imports every room."""
    router = APIRouter()
    commands = all_commands()
    listing = CommandList(
        items=[CommandRow(name=c.name, summary=c.summary, permission=c.permission, path=path_of(c)) for c in commands]
    )

    async def list_commands() -> CommandList:
        """List the commands that the server runs."""
        return listing

    router.add_api_route(
        "/v1/commands", list_commands, methods=["GET"], tags=["commands"], route_class_override=guarded("any")
    )
    for command in commands:
        router.add_api_route(
            path_of(command),
            _endpoint(command),
            methods=["POST"],
            summary=command.summary,
            description=command.description,
            operation_id=command.name.replace("/", "_").replace("-", "_"),
            response_model=command.result,
            responses={"default": {"model": Problem, "description": "the command was refused or failed"}},
            tags=[GROUPS[command.group].summary],
            route_class_override=guarded(command.permission),
        )
    return router


def path_of(command: Command) -> str:
    """Where the command's parameters are posted."""
    return f"/v1/commands/{command.name}"


def _endpoint(command: Command) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, params: BaseModel) -> Response:
        state: ServerState = request.app.state.server
        result = await command.run(params, state.context)
        return Response(result.model_dump_json(by_alias=True), media_type="application/json")

    endpoint.__annotations__ = {"request": Request, "params": command.params, "return": Response}
    return endpoint
