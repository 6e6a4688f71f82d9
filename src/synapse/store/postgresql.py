"""PostgreSQL, through SQLAlchemy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from synapse.store.database import translated
from synapse.store.entity import Entity
from synapse.store.tables import table_of
from synapse.store.transaction import Query, Row, Transaction


class PostgresDatabase:
    """A database on a server, with SQLAlchemy's pool of connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def begin(self, *, writes: bool) -> AsyncIterator[Transaction]:
        """A transaction."""
        with translated(self._engine.url):
            async with self._engine.connect() as connection, connection.begin():
                yield SqlTransaction(connection)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


class SqlTransaction:
    """The five statements as SQLAlchemy writes them."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def select(self, kind: type[Entity], query: Query) -> Sequence[Row]:
        table = table_of(kind)
        order = [
            column.desc() if query.descending else column.asc() for column in (table.c[query.order_by], table.c.id)
        ]
        statement = sa.select(table).where(*_conditions(table, query.where)).order_by(*order).offset(query.offset)
        if query.limit is not None:
            statement = statement.limit(query.limit)
        return [dict(row) for row in (await self._execute(statement)).mappings().all()]

    async def count(self, kind: type[Entity], where: Mapping[str, Any]) -> int:
        table = table_of(kind)
        statement = sa.select(sa.func.count()).select_from(table).where(*_conditions(table, where))
        return int((await self._execute(statement)).scalar_one())

    async def insert(self, kind: type[Entity], row: Row) -> None:
        await self._execute(sa.insert(table_of(kind)).values(row))

    async def update(self, kind: type[Entity], id: str, row: Row) -> None:  # noqa: A002
        table = table_of(kind)
        await self._execute(sa.update(table).where(table.c.id == id).values(row))

    async def delete(self, kind: type[Entity], id: str) -> None:  # noqa: A002
        table = table_of(kind)
        await self._execute(sa.delete(table).where(table.c.id == id))

    async def _execute(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        with translated(self._connection.engine.url):
            return await self._connection.execute(statement)


def _conditions(table: sa.Table, where: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    return [table.c[name] == value for name, value in where.items()]
