"""The tables: those that migrations make are those that the entities describe, made once, whoever comes first."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from synapse.genome.entities import GenomeLayer
from synapse.store import DatabaseTooNew, connect
from synapse.store.database import open_engine, parse_url
from synapse.store.entity import COLLECTIONS, all_kinds, spec_of
from synapse.store.migrate import alembic_config
from synapse.store.migrations import REVISIONS
from synapse.store.tables import METADATA, table_of


async def run(url: str, work: Any) -> Any:
    engine = open_engine(parse_url(url))
    async with engine.begin() as connection:
        found = await connection.run_sync(work)
    await engine.dispose()
    return found


def shape(connection: sa.Connection) -> dict[str, Any]:
    """What Alembic's comparison does not look at: what happens to references when something is deleted."""
    inspector = sa.inspect(connection)
    return {
        table: sorted(
            (key["constrained_columns"][0], key["referred_table"], key["options"].get("ondelete", ""))
            for key in inspector.get_foreign_keys(table)
        )
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


async def test_migrations_make_exactly_the_tables_that_the_entities_describe(database_url: str) -> None:
    await (await connect(database_url)).close()
    tables = [table_of(kind) for kind in all_kinds()]

    def compare(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, METADATA))

    assert await run(database_url, compare) == []
    assert await run(database_url, shape) == {
        table.name: sorted((key.parent.name, key.column.table.name, key.ondelete or "") for key in table.foreign_keys)
        for table in tables
    }


def test_tables_are_called_after_their_collections() -> None:
    tables = {spec_of(kind).collection: spec_of(kind).table for kind in all_kinds()}
    assert tables["GenomeLayer"] == "genome_layers"
    assert tables["ApiKey"] == "api_keys"
    assert tables["Message"] == "messages"
    assert len(all_kinds()) == len(COLLECTIONS)


def test_the_revisions_stated_in_code_are_those_of_the_scripts() -> None:
    script = ScriptDirectory.from_config(alembic_config())
    assert [revision.revision for revision in script.walk_revisions()][::-1] == list(REVISIONS)
    assert script.get_heads() == [REVISIONS[-1]]


async def test_the_first_migration_can_be_taken_back(database_url: str) -> None:
    await (await connect(database_url)).close()

    def downgrade(connection: sa.Connection) -> list[str]:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        return sa.inspect(connection).get_table_names()

    assert await run(database_url, downgrade) == ["alembic_version"]
    store = await connect(database_url)
    assert await store.list(GenomeLayer) == []
    await store.close()


async def test_opening_again_keeps_what_is_there(database_url: str) -> None:
    store = await connect(database_url)
    made = await store.create(GenomeLayer(name="captain"))
    await store.close()
    store = await connect(database_url)
    assert await store.list(GenomeLayer) == [made]
    await store.close()


async def test_a_database_of_a_newer_version_is_left_alone(database_url: str) -> None:
    await (await connect(database_url)).close()
    await run(database_url, lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(DatabaseTooNew, match="9999") as caught:
        await connect(database_url)
    assert caught.value.hint


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_succeed(database_url: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from synapse.store import connect\n"
        "from synapse.genome.entities import GenomeLayer\n"
        "async def main():\n"
        "    store = await connect(sys.argv[1])\n"
        "    await store.create(GenomeLayer(name=sys.argv[2]))\n"
        "    print(await store.count(GenomeLayer))\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, database_url, f"layer-{number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert max(int(out) for out, _ in outputs) == 3
