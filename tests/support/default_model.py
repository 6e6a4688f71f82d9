"""The real default models, in a home that is kept between runs, so that each is fetched once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import platformdirs

from synapse.commands import Context
from synapse.config import Settings
from synapse.models.library import open_library
from synapse.models.record import LibraryModel


def default_model_path() -> Path:
    """The GGUF file of the chat model, pulled if need be.

    `SYNAPSE_TEST_HOME` moves the home out of the platform's cache folder.
    """
    return asyncio.run(_pull(Settings(home=_home()).default_model)).path


def default_encoder_path() -> Path:
    """The folder of the encoder, pulled if need be."""
    return asyncio.run(_pull(Settings(home=_home()).default_encoder)).folder


def _home() -> Path:
    return Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests"))


async def _pull(name: str) -> LibraryModel:
    async with Context(Settings(home=_home())) as context:
        return await (await context.get(open_library)).pull(name)
