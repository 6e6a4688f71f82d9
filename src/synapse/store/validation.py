"""From data of a stranger to a checked entity, and from pydantic's complaint to one a person can act on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from synapse.errors import InvalidInput
from synapse.store.columns import is_structure
from synapse.store.entity import KEPT_BY_THE_STORE, Entity, field_names, plain, spec_of

E = TypeVar("E", bound=Entity)
MAX_INTEGER = 2**63 - 1
SHOWN = 60


def build(kind: type[E], data: Mapping[str, Any]) -> E:
    """A new entity from JSON values. Types are taken strictly: ``"5"`` is not a number.

    Raises:
        InvalidInput: a field is unknown, missing, kept by the store, or has a value of the wrong type or range.
    """
    return _checked(kind, _named(kind, data))


def changed(entity: E, changes: Mapping[str, Any]) -> E:
    """The entity with some fields changed, checked as a whole.

    Raises:
        InvalidInput: as `build`.
    """
    return _checked(type(entity), plain(entity) | _named(type(entity), changes))


def comparable(kind: type[Entity], name: str, value: Any) -> Any:
    """The value of a condition on a field, as the database compares it.

    Raises:
        InvalidInput: there is no such field, rows cannot be found by it, or the value is of the wrong type.
    """
    field = known_field(kind, name)
    if is_structure(kind, field):
        raise InvalidInput(f"{spec_of(kind).collection} cannot be searched by {field}: it holds a structure")
    check_storable(kind, field, value)
    if value is None:
        return None
    try:
        return _adapter(kind, field).validate_json(to_json(value), strict=True)
    except (ValidationError, PydanticSerializationError) as error:
        raise refusal(kind, error, field) from error


def known_field(kind: type[Entity], name: str) -> str:
    """The name of a field, which may be written in camelCase.

    Raises:
        InvalidInput: there is no such field.
    """
    names = field_names(kind)
    if name not in names:
        raise InvalidInput(
            f"{spec_of(kind).collection} has no field {name!r:.{SHOWN}}",
            hint=f"its fields are {', '.join(kind.model_fields)}",
            field=name[:SHOWN],
        )
    return names[name]


def check_storable(kind: type[Entity], field: str, value: Any) -> None:
    """Check what pydantic lets pass and a database does not take, or would change.

    That is NUL and lone surrogates in text, integers beyond 64 bits, and times without a zone.

    Raises:
        InvalidInput: naming the field.
    """
    fault = _fault(value)
    if fault:
        raise InvalidInput(f"{spec_of(kind).collection}.{field} cannot be stored: it holds {fault}", field=field)


def refusal(kind: type[Entity], error: ValidationError | PydanticSerializationError, field: str = "") -> InvalidInput:
    """The first thing that is wrong, in a sentence."""
    collection = spec_of(kind).collection
    if isinstance(error, PydanticSerializationError):
        return InvalidInput(f"{collection}: {error}", field=field)
    details = error.errors(include_url=False)
    return _sentence(collection, kind, details[0], field)


def _sentence(collection: str, kind: type[Entity], first: ErrorDetails, field: str) -> InvalidInput:
    path = ".".join(map(str, first["loc"])) or field
    hint = f"its fields are {', '.join(kind.model_fields)}"
    if first["type"] == "extra_forbidden":
        return InvalidInput(f"{collection} has no field {path!r:.{SHOWN}}", hint=hint, field=path[:SHOWN])
    if first["type"] == "missing":
        return InvalidInput(f"{collection} needs the field {path}", hint=hint, field=path)
    found = f"{first['input']!r:.{SHOWN}} ({type(first['input']).__name__})"
    message = first["msg"]
    if first["type"] == "value_error":
        text = message.removeprefix("Value error, ")
        return InvalidInput(f"{collection}.{path}: {text}", field=path, expected=text, found=found)
    expected = message.removeprefix("Input should be ")
    must = "must be" if expected != message else "is wrong:"
    return InvalidInput(
        f"{collection}.{path} {must} {expected}, not {found}", field=path, expected=expected, found=found
    )


def _named(kind: type[Entity], data: Mapping[str, Any]) -> dict[str, Any]:
    """The data by field names; each field once, and none that the store keeps."""
    named: dict[str, Any] = {}
    for written, value in data.items():
        name = known_field(kind, written)
        if name in KEPT_BY_THE_STORE:
            raise InvalidInput(
                f"{spec_of(kind).collection}.{name} is set by the store", hint=f"leave {written} out", field=name
            )
        if name in named:
            raise InvalidInput(f"{spec_of(kind).collection}.{name} is given twice", field=name)
        check_storable(kind, name, value)
        named[name] = value
    return named


def _checked(kind: type[E], data: Mapping[str, Any]) -> E:
    try:
        return kind.model_validate_json(to_json(data), strict=True)
    except (ValidationError, PydanticSerializationError) as error:
        raise refusal(kind, error) from error


@cache
def _adapter(kind: type[Entity], field: str) -> TypeAdapter[Any]:
    annotation: Any = kind.model_fields[field].annotation
    return TypeAdapter(annotation)


def _fault(value: Any) -> str:
    """What in a value no database takes, or an empty string."""
    fault = ""
    if isinstance(value, str):
        if "\x00" in value:
            fault = "a NUL character"
        elif not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            fault = "half a character (a lone surrogate)"
    elif isinstance(value, datetime):
        fault = "a time without a zone" if value.tzinfo is None else ""
    elif isinstance(value, int):
        fault = "a whole number beyond 64 bits" if abs(value) > MAX_INTEGER else ""
    elif isinstance(value, BaseModel):
        fault = _fault(dict(value))
    elif isinstance(value, Mapping):
        fault = next(filter(None, (_fault(part) for pair in value.items() for part in pair)), "")
    elif isinstance(value, list | tuple):
        fault = next(filter(None, map(_fault, value)), "")
    return fault
