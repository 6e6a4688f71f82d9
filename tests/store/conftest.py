"""A store on each kind of database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.postgres import database_url, postgres_url
from synapse.store import Store, connect

__all__ = ["database_url", "postgres_url"]


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """A store with its tables and nothing in them."""
    opened = await connect(database_url)
    yield opened
    await opened.close()
