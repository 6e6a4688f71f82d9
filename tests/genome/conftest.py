"""A store on each kind of database, and a home with a tiny base model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.peft_layers import save_layer
from support.postgres import database_url, postgres_url
from support.tiny_models import build_tiny_model
from synapse.commands import Context
from synapse.config import Settings
from synapse.genome.opening import open_layers
from synapse.genome.registry import LayerRegistry
from synapse.models.library import open_library
from synapse.store import Store, open_store

__all__ = ["database_url", "postgres_url"]


@dataclass(frozen=True)
class Bench:
    """A GGUF file and two different layers that PEFT trained on it. Read them, do not change them."""

    model: Path
    layer: Path
    other: Path


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    layers = []
    for seed, name in enumerate(("captain", "dates")):
        tiny = build_tiny_model(folder / "tiny.gguf")
        layers.append(save_layer(folder / name, seed=seed, model=tiny.reference))
    return Bench(folder / "tiny.gguf", *layers)


@pytest.fixture
async def context(bench: Bench, database_url: str, tmp_path: Path) -> AsyncIterator[Context]:
    settings = Settings(home=tmp_path / "synapse", database_url=database_url, default_model="tiny")
    async with Context(settings) as opened:
        await (await opened.get(open_library)).pull(str(bench.model), name="tiny")
        yield opened


@pytest.fixture
async def store(context: Context) -> Store:
    return await context.get(open_store)


@pytest.fixture
async def registry(context: Context) -> LayerRegistry:
    return await context.get(open_layers)
