"""What the store asks of a database: transactions, and five statements inside of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from synapse.store.entity import Entity

Row = dict[str, Any]
"""Values by field, as `columns.to_row` makes them and `columns.from_row` takes them."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which rows: those whose fields equal `where`, ordered by a field and then by id."""

    where: Mapping[str, Any]
    order_by: str = "created_at"
    descending: bool = False
    limit: int | None = None
    offset: int = 0


class Transaction(Protocol):
    """Statements that happen as a whole or not at all. Each raises what the database's errors are translated to."""

    async def select(self, kind: type[Entity], query: Query) -> Sequence[Row]: ...

    async def count(self, kind: type[Entity], where: Mapping[str, Any]) -> int: ...

    async def insert(self, kind: type[Entity], row: Row) -> None: ...

    async def update(self, kind: type[Entity], id: str, row: Row) -> None: ...  # noqa: A002

    async def delete(self, kind: type[Entity], id: str) -> None: ...  # noqa: A002


class Database(Protocol):
    """A database that is open."""

    def begin(self, *, writes: bool) -> AbstractAsyncContextManager[Transaction]:
        """A transaction: committed when the block is left, rolled back when it raises."""
        ...

    async def close(self) -> None: ...
