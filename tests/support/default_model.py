"""The real default model, in a home that is kept between runs, so that it is fetched once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import platformdirs

from synapse.commands import Context
from synapse.config import Settings
from synapse.models.library import open_library


def default_model_path() -> Path:
    """The GGUF file, pulled if need be. `SYNAPSE_TEST_HOME` moves the home out of the platform's cache folder."""
    return asyncio.run(
        _pull(Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests")))
    )


async def _pull(home: Path) -> Path:
    async with Context(Settings(home=home)) as context:
        library = await context.get(open_library)
        await library.pull(context.settings.default_model)
        return library.resolve(context.settings.default_model)
