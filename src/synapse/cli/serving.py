"""`synapse up`: the default model is fetched if it is not here, and the server runs until it is told to stop."""

from __future__ import annotations

import asyncio

from synapse.callosum.publish.recording import recording
from synapse.cli.progress import TerminalProgress
from synapse.cli.text import tell
from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.personas.base_model import ensure_base_model
from synapse.server.run import serve


def run_up(host: str | None, port: int | None, *, as_json: bool) -> None:
    """Serve with the settings, of which the address may be given anew.

    Raises:
        SynapseError: what stands in the way, see `synapse.server.run.serve`.
    """
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = load_settings().model_copy(update=given)
    asyncio.run(_fetch(settings, as_json))
    serve(settings)


async def _fetch(settings: Settings, as_json: bool) -> None:
    with TerminalProgress(quiet=as_json) as progress:
        async with Context(settings) as context, recording(context):
            await ensure_base_model(context, settings.default_model, None if as_json else tell, progress)
