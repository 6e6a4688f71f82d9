"""The real default models, in a home that is kept between runs, so that each is fetched once."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from synapse.commands import Context
from synapse.config import Settings
from synapse.models.library import open_library
from synapse.models.record import LibraryModel

if TYPE_CHECKING:
    from synapse.engines.native.packed.file import Quantisation


def default_model_path() -> Path:
    """The GGUF file of the chat model, pulled if need be.

    `SYNAPSE_TEST_HOME` moves the home out of the platform's cache folder.
    """
    return asyncio.run(_pull(Settings(home=_home()).default_model)).path


def put_packed(home: Path, quantisation: Quantisation = "auto") -> None:
    """Give a home the packed weights of the chat model, which are made once and kept between runs."""
    from synapse.engines.native.packed.file import VERSION, open_packed
    from synapse.engines.native.packed.source_hash import source_sha256
    from synapse.models.gguf_file import open_model_file

    path, folder = default_model_path(), _home() / "packed"
    sha256 = source_sha256(path, folder)
    open_packed(open_model_file(path), sha256, folder, quantisation).close()
    target = home / "packed" / f"{sha256}-{quantisation}-v{VERSION}.pack"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        link_or_copy(folder / target.name, target)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def default_encoder_path() -> Path:
    """The folder of the encoder, pulled if need be."""
    return asyncio.run(_pull(Settings(home=_home()).default_encoder)).folder


def _home() -> Path:
    return Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests"))


async def _pull(name: str) -> LibraryModel:
    async with Context(Settings(home=_home())) as context:
        return await (await context.get(open_library)).pull(name)
