"""Running one command of the registry from the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from synapse.callosum.publish.recording import recording
from synapse.cli.logs import log_to_stderr
from synapse.cli.options import read_params
from synapse.cli.output import show_result
from synapse.cli.progress import TerminalProgress
from synapse.commands import Call, Command, Context
from synapse.config import load_settings


def run_command(command: Command, values: Mapping[str, Any], *, as_json: bool) -> None:
    """Check what was typed, run the command with a progress bar, and show its result.

    Raises:
        SynapseError: whatever the command raises, or InvalidInput for a value that does not fit.
    """
    log_to_stderr()
    params = read_params(command.params, values)
    with TerminalProgress(quiet=as_json) as progress:
        result = asyncio.run(_run(command, params, Call("terminal", progress=progress)))
    show_result(result, as_json=as_json)


async def _run(command: Command, params: BaseModel, call: Call) -> BaseModel:
    settings = load_settings()
    if command.of_server:
        from synapse.daemon.door import find_server

        server = await find_server(settings)
        if server is not None:
            given = params.model_dump(mode="json", exclude_unset=True)
            return command.result.model_validate(await server.ask("command", command.name, given))
    async with Context(settings) as context, recording(context):
        return await command.run(params, context, call)
