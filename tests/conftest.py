"""Fixtures that several rooms share. The default model is real: it is pulled once and kept between runs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

from synapse.commands import Context
from synapse.config import Settings
from synapse.models.library import open_library


def _kept_home() -> Path:
    return Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests"))


async def _pull_default_model(home: Path) -> Path:
    async with Context(Settings(home=home)) as context:
        library = await context.get(open_library)
        name = context.settings.default_model
        await library.pull(name)
        return library.resolve(name)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of the default chat model, in a home that is kept between runs. Read it, do not change it."""
    return asyncio.run(_pull_default_model(_kept_home()))


@pytest.fixture
def default_model_home(default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh SYNAPSE_HOME that has the default model already (hard-linked where the file system can)."""
    home = tmp_path / "home"
    source = default_model.parent
    target = home / "models" / source.name
    shutil.copytree(source, target, copy_function=_link_or_copy)
    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    return home


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A test never sees the SYNAPSE_* variables or the home folder of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("SYNAPSE_") and name != "SYNAPSE_TEST_HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "home"))
    yield
