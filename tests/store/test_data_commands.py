"""`synapse data`, as every surface runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from synapse.commands import Context, find_command
from synapse.config import Settings
from synapse.errors import Forbidden, InvalidInput, NotFound


@pytest.fixture
async def context(database_url: str, tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home", database_url=database_url)) as opened:
        yield opened


async def run(context: Context, verb: str, **params: Any) -> dict[str, Any]:
    command = find_command(f"data/{verb}")
    return (await command.run(command.params(**params), context)).model_dump(mode="json")


async def test_the_seeds_own_examples_work(context: Context) -> None:
    genome = await run(
        context,
        "create",
        collection="Genome",
        data={"personaId": "persona_123", "baseModel": "llama-3.1-8B", "layers": []},
    )
    layer = await run(
        context,
        "create",
        collection="GenomeLayer",
        data={"name": "Math Expert", "traitType": "domain_expertise", "sizeMB": 50},
    )
    assert genome["collection"] == "Genome"
    assert genome["entity"]["persona_id"] == "persona_123"
    assert genome["entity"]["base_model"] == "llama-3.1-8B"
    assert layer["entity"]["size_mb"] == 50
    assert layer["entity"]["trait_type"] == "domain_expertise"


async def test_an_entity_is_created_shown_changed_listed_and_deleted(context: Context) -> None:
    made = (await run(context, "create", collection="GenomeLayer", data={"name": "a"}))["entity"]
    await run(context, "create", collection="GenomeLayer", data={"name": "b", "size_mb": 2})
    assert (await run(context, "get", collection="GenomeLayer", id=made["id"]))["entity"] == made

    changed = await run(context, "update", collection="GenomeLayer", id=made["id"], data={"sizeMB": 3})
    assert changed["entity"]["size_mb"] == 3

    page = await run(context, "list", collection="GenomeLayer", order_by="-size_mb", limit=1)
    assert (page["collection"], page["total"], [row["name"] for row in page["items"]]) == ("GenomeLayer", 2, ["a"])
    found = await run(context, "list", collection="GenomeLayer", where={"sizeMB": 2})
    assert [row["name"] for row in found["items"]] == ["b"]

    assert (await run(context, "delete", collection="GenomeLayer", id=made["id"]))["entity"] == changed["entity"]
    with pytest.raises(NotFound):
        await run(context, "get", collection="GenomeLayer", id=made["id"])


async def test_data_that_does_not_fit_is_refused_by_field(context: Context) -> None:
    with pytest.raises(InvalidInput, match=r"GenomeLayer\.rank must be a valid integer, not '8' \(str\)"):
        await run(context, "create", collection="GenomeLayer", data={"name": "a", "rank": "8"})
    assert (await run(context, "list", collection="GenomeLayer"))["total"] == 0


async def test_api_keys_are_out_of_reach(context: Context) -> None:
    for verb, params in (
        ("list", {}),
        ("get", {"id": "x"}),
        ("create", {"data": {"name": "k", "prefix": "p", "digest": "d", "permissions": ["manage"]}}),
        ("update", {"id": "x", "data": {"permissions": ["manage"]}}),
        ("delete", {"id": "x"}),
    ):
        with pytest.raises(Forbidden, match="ApiKey"):
            await run(context, verb, collection="ApiKey", **params)


async def test_collections_are_listed_without_the_private_ones(context: Context) -> None:
    await run(context, "create", collection="GenomeLayer", data={"name": "a"})
    rows = {row["name"]: row for row in (await run(context, "collections"))["items"]}
    assert {"Genome", "GenomeLayer", "Persona", "Conversation", "Message"} <= set(rows)
    assert "ApiKey" not in rows
    assert rows["GenomeLayer"]["count"] == 1
    assert "trait_type" in rows["GenomeLayer"]["fields"]


async def test_an_unknown_collection_is_not_found(context: Context) -> None:
    with pytest.raises(NotFound, match="Layer"):
        await run(context, "list", collection="Layer")
