"""A context whose default model is tiny and random, with two layers for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.tiny_home import MODEL, TinyHome, build_tiny_home
from synapse.commands import Context
from synapse.config import Settings
from synapse.personas.commands import CreatePersona, create_persona
from synapse.personas.entities import Persona
from synapse.personas.lookup import find_persona
from synapse.store import Store, open_store


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return build_tiny_home(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
async def context(tiny_home: TinyHome, tmp_path: Path) -> AsyncIterator[Context]:
    home = tiny_home.copy(tmp_path / "tiny-home")
    async with Context(Settings(home=home, default_model=MODEL, max_context=1024)) as context:
        yield context


@pytest.fixture
async def store(context: Context) -> Store:
    return await context.get(open_store)


@pytest.fixture
async def persona(context: Context, store: Store) -> Persona:
    """`pip`, who says at most 24 tokens and wears one layer."""
    params = CreatePersona(name="pip", system_prompt="You are Pip.", layers="first:0.5", max_tokens=24, seed=1)
    await create_persona(params, context)
    return await find_persona(store, "pip")
