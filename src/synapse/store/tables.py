"""SQLAlchemy's tables for the entities: what migrations are compared with, and what PostgreSQL is asked through.

text → TEXT, int → BIGINT, float → DOUBLE, bool → BOOLEAN, datetime → a time in UTC, a structure → JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from synapse.store.columns import Kind, columns_of
from synapse.store.entity import Entity, Spec, kind_of, spec_of

# Every constraint has a name, so that a later migration can change it on both databases.
NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}
METADATA = sa.MetaData(naming_convention=NAMING)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A time with its zone; SQLite, which has none, keeps the time in UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


TYPES: Mapping[Kind, sa.types.TypeEngine[Any]] = {
    Kind.TEXT: sa.Text(),
    Kind.BOOLEAN: sa.Boolean(),
    Kind.INTEGER: sa.BigInteger(),
    Kind.FLOAT: sa.Double(),
    Kind.TIME: UtcDateTime(),
    Kind.STRUCTURE: sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
}


def derive_table(
    kind: type[Entity], spec: Spec, table_of_collection: Mapping[str, str], metadata: sa.MetaData
) -> sa.Table:
    """The table of an entity. `table_of_collection` names the tables that its references point to."""
    columns: list[sa.Column[Any]] = []
    for name, column in columns_of(kind).items():
        foreign: list[sa.ForeignKey] = []
        if name in spec.references:
            reference = spec.references[name]
            target = f"{table_of_collection[reference.collection]}.id"
            foreign.append(sa.ForeignKey(target, ondelete=reference.on_delete.upper()))
        columns.append(
            sa.Column(
                name,
                TYPES[column.kind],
                *foreign,
                primary_key=name == "id",
                nullable=column.nullable,
                index=name in spec.indexes,
            )
        )
    constraints = (sa.UniqueConstraint(*group) for group in spec.unique)
    return sa.Table(spec.table, metadata, *columns, *constraints)


def table_of(kind: type[Entity]) -> sa.Table:
    """The table of a registered kind, derived once."""
    spec = spec_of(kind)
    found = METADATA.tables.get(spec.table)
    if found is not None:
        return found
    names = {
        reference.collection: spec_of(kind_of(reference.collection)).table for reference in spec.references.values()
    }
    return derive_table(kind, spec, names, METADATA)
