"""Databases as they are found: by URL, locked, damaged, out of reach."""

from __future__ import annotations

import asyncio
import builtins
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from synapse.commands import Context
from synapse.config import Settings
from synapse.errors import Corrupt, InvalidInput, Overloaded, Unavailable
from synapse.genome.entities import Genome, GenomeLayer
from synapse.store import Contention, Store, connect, open_store, sqlite
from synapse.store.columns import from_row, to_row
from synapse.store.database import open_engine, parse_url
from synapse.store.postgresql import PostgresDatabase
from synapse.store.sqlite import SqliteDatabase
from synapse.store.transaction import Query


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("sqlite:////data/x.db", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:////data/x.db", "sqlite+aiosqlite"),
        ("postgresql://ada@host/x", "postgresql+psycopg"),
        ("postgres://ada@host/x", "postgresql+psycopg"),
        ("postgresql+asyncpg://ada@host/x", "postgresql+psycopg"),
    ],
)
def test_a_url_gets_the_driver_that_synapse_uses(text: str, driver: str) -> None:
    assert parse_url(text).drivername == driver


@pytest.mark.parametrize("text", ["", "nonsense", "mysql://host/x", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_url(text)


async def test_the_store_of_the_settings_is_a_private_file_in_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with Context(Settings(home=home)) as context:
        store = await context.get(open_store)
        await store.create(GenomeLayer(name="captain"))
        for path in home.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert [path.name for path in home.iterdir()] == ["synapse.db"]


async def test_sqlite_keeps_a_write_ahead_log_and_foreign_keys(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "x.db")
    engine = open_engine(parse_url(f"sqlite:///{tmp_path / 'x.db'}"))
    async with database._connection() as ours, engine.connect() as alembics:
        for pragma, expected in (("journal_mode", "wal"), ("foreign_keys", 1), ("synchronous", 2)):
            assert (await alembics.execute(sa.text(f"PRAGMA {pragma}"))).scalar() == expected
            assert list(await ours.execute_fetchall(f"PRAGMA {pragma}")) == [(expected,)]
    await engine.dispose()
    await database.close()


async def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    writer, reader = await connect(url), await connect(url)
    async with writer.transaction():
        await writer.create(GenomeLayer(name="a"))
        assert await asyncio.wait_for(reader.count(GenomeLayer), 2) == 0
    assert await reader.count(GenomeLayer) == 1
    await writer.close()
    await reader.close()


async def test_a_database_that_stays_locked_is_overloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_MILLISECONDS", 50)
    path = tmp_path / "x.db"
    store = await connect(f"sqlite:///{path}")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Overloaded, match="locked"):
        await store.create(GenomeLayer(name="a"))
    holder.execute("ROLLBACK")
    holder.close()
    assert (await store.create(GenomeLayer(name="a"))).name == "a"
    await store.close()


async def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database, " * 1000)
    with pytest.raises(Corrupt, match=r"x\.db"):
        await connect(f"sqlite:///{tmp_path / 'x.db'}")


async def test_a_folder_that_does_not_exist_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be created"):
        await connect(f"sqlite:///{tmp_path / 'no' / 'where' / 'x.db'}")


async def test_a_server_that_does_not_answer_is_unavailable_and_its_password_stays_secret(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        await connect(f"postgresql://ada:hunter2@/x?host={tmp_path}")
    assert "hunter2" not in caught.value.message
    assert caught.value.hint


async def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_psycopg(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "psycopg":
            raise ModuleNotFoundError("No module named 'psycopg'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_psycopg)
    with pytest.raises(Unavailable) as caught:
        await connect("postgresql://ada@host/x")
    assert caught.value.hint == "pip install 'synapse[postgres]'"


async def test_a_row_that_something_else_wrote_is_corrupt_not_believed(database_url: str) -> None:
    store = await connect(database_url)
    made = await store.create(GenomeLayer(name="a"))
    engine = open_engine(parse_url(database_url))
    async with engine.begin() as connection:
        await connection.execute(sa.text("UPDATE genome_layers SET trait_type = 'wit'"))
    await engine.dispose()
    with pytest.raises(Corrupt, match=f"GenomeLayer {made.id} .* trait_type"):
        await store.get(GenomeLayer, made.id)
    await store.close()


async def test_two_transactions_that_cross_on_postgresql_do_not_both_win(postgres_url: str) -> None:
    one, other = await connect(postgres_url), await connect(postgres_url)
    genome = await one.create(Genome(base_model="tiny"))

    async def bump(store: Store, meet: asyncio.Barrier) -> None:
        async with store.transaction():
            found = await store.get(Genome, genome.id)
            await meet.wait()
            generation = found.metadata.generation + 1
            await store.update(Genome, genome.id, {"metadata": {"generation": generation}})

    meet = asyncio.Barrier(2)
    outcomes = await asyncio.gather(bump(one, meet), bump(other, meet), return_exceptions=True)
    assert sorted(type(outcome) for outcome in outcomes if outcome) == [Contention]
    assert (await one.get(Genome, genome.id)).metadata.generation == 2
    await one.close()
    await other.close()


async def test_single_writes_that_cross_on_postgresql_are_tried_again(postgres_url: str) -> None:
    stores = [await connect(postgres_url) for _ in range(3)]
    made = await stores[0].create(GenomeLayer(name="a"))
    await asyncio.gather(
        *(
            store.update(GenomeLayer, made.id, {field: value})
            for store in stores
            for field, value in (("creator", "ada"), ("description", "d"), ("tags", ["x"]))
        )
    )
    found = await stores[0].get(GenomeLayer, made.id)
    assert (found.creator, found.description, found.tags) == ("ada", "d", ("x",))
    for store in stores:
        await store.close()


async def test_what_is_written_directly_is_what_sqlalchemy_reads(tmp_path: Path) -> None:
    """Both ways of speaking to SQLite keep every kind of value alike, so that migrations may go the other way."""
    path = tmp_path / "x.db"
    store = await connect(f"sqlite:///{path}")
    made = await store.create(
        GenomeLayer(name="a", rslora=True, alpha=0.5, rank=3, tags=("x", "ü"), targets=("q_proj",), sha256="0" * 64)
    )
    through = PostgresDatabase(open_engine(parse_url(f"sqlite:///{path}")))
    async with through.begin(writes=True) as transaction:
        [row] = await transaction.select(GenomeLayer, Query({"name": "a"}))
        assert from_row(GenomeLayer, row) == made
        other = made.model_copy(update={"id": "b", "name": "b", "alpha": None})
        await transaction.insert(GenomeLayer, to_row(other))
    await through.close()
    assert await store.get(GenomeLayer, "b") == other
    assert await store.list(GenomeLayer, {"alpha": None}) == [other]
    await store.close()
