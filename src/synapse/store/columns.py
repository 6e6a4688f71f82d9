"""From the fields of an entity to columns, and from an entity to a row and back, whatever the database.

A field is text, a number, a truth value, a time in UTC, or a structure, which is kept as JSON. One that may be None
is a nullable column.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AwareDatetime, ValidationError

from synapse.errors import Corrupt
from synapse.store.entity import Entity, spec_of

E = TypeVar("E", bound=Entity)


class Kind(Enum):
    """What a column holds."""

    TEXT = "text"
    BOOLEAN = "boolean"
    INTEGER = "integer"
    FLOAT = "float"
    TIME = "time"
    STRUCTURE = "structure"


@dataclass(frozen=True, slots=True)
class Column:
    """The column of one field."""

    name: str
    kind: Kind
    nullable: bool


SCALARS: tuple[tuple[type, Kind], ...] = (
    (str, Kind.TEXT),
    (bool, Kind.BOOLEAN),  # before int: a bool is one
    (int, Kind.INTEGER),
    (float, Kind.FLOAT),
    (datetime, Kind.TIME),
)


def column_kind(annotation: Any) -> tuple[Kind, bool]:
    """What the column of a field with this annotation holds, and whether it may be null."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return column_kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not types.NoneType]
        nullable = len(rest) < len(get_args(annotation))
        return (column_kind(rest[0])[0] if len(rest) == 1 else Kind.STRUCTURE), nullable
    if origin is Literal and all(isinstance(value, str) for value in get_args(annotation)):
        return Kind.TEXT, False
    if annotation is AwareDatetime:  # at run time a class of its own
        return Kind.TIME, False
    if isinstance(annotation, type):
        for scalar, kind in SCALARS:
            if issubclass(annotation, scalar):
                return kind, False
    return Kind.STRUCTURE, False


@cache
def columns_of(kind: type[Entity]) -> Mapping[str, Column]:
    """The columns of a kind of entity, by name, in the order of its fields."""
    return {name: Column(name, *column_kind(field.annotation)) for name, field in kind.model_fields.items()}


def is_structure(kind: type[Entity], name: str) -> bool:
    """Whether a field is kept as JSON, so that rows cannot be found or ordered by it."""
    return columns_of(kind)[name].kind is Kind.STRUCTURE


def to_row(entity: Entity) -> dict[str, Any]:
    """The values of the columns, structures as JSON values."""
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
