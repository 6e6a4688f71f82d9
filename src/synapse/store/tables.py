"""From the fields of an entity to a table, and from an entity to a row and back.

text, enumerations and literals of text → TEXT, int → BIGINT, float → DOUBLE, bool → BOOLEAN, datetime → a time in
UTC, everything with a structure → JSON. A field that may be None is a nullable column.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import sqlalchemy as sa
from pydantic import AwareDatetime, ValidationError
from sqlalchemy.dialects.postgresql import JSONB

from synapse.errors import Corrupt
from synapse.store.entity import Entity, Spec, kind_of, spec_of

E = TypeVar("E", bound=Entity)

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


STRUCTURE = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
SCALARS: tuple[tuple[type, sa.types.TypeEngine[Any]], ...] = (
    (str, sa.Text()),
    (bool, sa.Boolean()),  # before int: a bool is one
    (int, sa.BigInteger()),
    (float, sa.Double()),
    (datetime, UtcDateTime()),
)


def column_type(annotation: Any) -> tuple[sa.types.TypeEngine[Any], bool]:
    """The SQL type of a field with this annotation, and whether it may be null."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return column_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not types.NoneType]
        nullable = len(rest) < len(get_args(annotation))
        return (column_type(rest[0])[0] if len(rest) == 1 else STRUCTURE), nullable
    if origin is Literal and all(isinstance(value, str) for value in get_args(annotation)):
        return sa.Text(), False
    if annotation is AwareDatetime:  # at run time a class of its own
        return UtcDateTime(), False
    if isinstance(annotation, type):
        for scalar, sql in SCALARS:
            if issubclass(annotation, scalar):
                return sql, False
    return STRUCTURE, False


def derive_table(
    kind: type[Entity], spec: Spec, table_of_collection: Mapping[str, str], metadata: sa.MetaData
) -> sa.Table:
    """The table of an entity. `table_of_collection` names the tables that its references point to."""
    columns: list[sa.Column[Any]] = []
    for name, field in kind.model_fields.items():
        sql, nullable = column_type(field.annotation)
        foreign: list[sa.ForeignKey] = []
        if name in spec.references:
            reference = spec.references[name]
            target = f"{table_of_collection[reference.collection]}.id"
            foreign.append(sa.ForeignKey(target, ondelete=reference.on_delete.upper()))
        columns.append(
            sa.Column(name, sql, *foreign, primary_key=name == "id", nullable=nullable, index=name in spec.indexes)
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


def is_structure(kind: type[Entity], name: str) -> bool:
    """Whether a field is kept as JSON, so that rows cannot be found or ordered by it."""
    return isinstance(table_of(kind).c[name].type, sa.JSON)


def to_row(entity: Entity) -> dict[str, Any]:
    """The values of the columns."""
    kind = type(entity)
    as_json = entity.model_dump(mode="json", by_alias=False)
    return {
        name: as_json[name] if is_structure(kind, name) or isinstance(value, str) else value
        for name, value in ((name, getattr(entity, name)) for name in kind.model_fields)
    }


def from_row(kind: type[E], row: Mapping[str, Any]) -> E:
    """The entity of a row.

    Raises:
        Corrupt: the row does not fit the entity, so something other than Synapse wrote it.
    """
    try:
        return kind.model_validate(dict(row))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Corrupt(
            f"{spec_of(kind).collection} {row.get('id')} in the database cannot be read: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint="restore the database from a backup, or delete the row",
        ) from error
