"""What an entity is: a frozen pydantic model with an id and two times, registered under the name of its collection.

`COLLECTIONS` names the module of each collection, so that the store knows them all without importing a room.
"""

from __future__ import annotations

import importlib
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel, to_snake

from synapse.errors import NotFound

if TYPE_CHECKING:
    from synapse.store.store import Store

COLLECTIONS: Mapping[str, str] = {
    "Genome": "synapse.genome.entities",
    "GenomeLayer": "synapse.genome.entities",
    "Persona": "synapse.personas.entities",
    "Conversation": "synapse.personas.entities",
    "Message": "synapse.personas.entities",
    "ApiKey": "synapse.server.keys",
    "HotPathState": "synapse.hotpath.rollout.entities",
    "HotPathEvent": "synapse.hotpath.rollout.entities",
}
KEPT_BY_THE_STORE = frozenset({"id", "created_at", "updated_at"})
"""Fields that the store sets and nobody changes."""


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """A UUID of version 7 (RFC 9562, section 5.7): milliseconds since 1970, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))


class Value(BaseModel):
    """A structure inside an entity. Fields are read as `snake_case` or `camelCase` and written as `snake_case`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        loc_by_alias=False,
        defer_build=True,  # built when it is first used: a command uses few of the entities that it declares
    )


class Entity(Value):
    """Something the store keeps."""

    id: str = Field(default_factory=new_id, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="what others refer to it by")
    created_at: AwareDatetime = Field(default_factory=now, description="when it was made")
    updated_at: AwareDatetime = Field(default_factory=now, description="when it was last changed")

    async def check(self, store: Store) -> None:
        """Run before the entity is created or updated, in the same transaction. Raise to refuse it."""

    async def before_delete(self, store: Store) -> None:
        """Run before the entity is deleted, in the same transaction. Raise to refuse it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A field that holds the id of another entity.

    Attributes:
        collection: what it refers to.
        on_delete: when the other one is deleted, refuse that (restrict) or delete this one as well (cascade).
    """

    collection: str
    on_delete: Literal["restrict", "cascade"] = "restrict"


@dataclass(frozen=True, slots=True)
class Spec:
    """How an entity is kept. `unique` holds groups of fields; a `private` collection is closed to `synapse data`."""

    collection: str
    table: str
    unique: tuple[tuple[str, ...], ...]
    references: Mapping[str, Reference]
    indexes: tuple[str, ...]
    private: bool


E = TypeVar("E", bound=Entity)
_specs: dict[type[Entity], Spec] = {}


def entity(
    collection: str,
    *,
    unique: tuple[str | tuple[str, ...], ...] = (),
    references: Mapping[str, Reference] | None = None,
    indexes: tuple[str, ...] = (),
    private: bool = False,
) -> Callable[[type[E]], type[E]]:
    """Register a pydantic class as an entity: ``@entity("GenomeLayer", unique=("name",))``.

    Its table is called after the collection (``genome_layers``), has one column a field, and must be in a migration.

    Args:
        unique: fields, or groups of fields, whose values no two entities share.
        references: fields that hold the id of another entity.
        indexes: fields that are searched by.
        private: keep it out of `synapse data`.

    Raises:
        TypeError: the collection is not in `COLLECTIONS`, is taken, or a name is not a field.
    """
    groups = tuple((group,) if isinstance(group, str) else group for group in unique)
    spec = Spec(collection, f"{to_snake(collection)}s", groups, references or {}, indexes, private)

    def register(kind: type[E]) -> type[E]:
        if collection not in COLLECTIONS or any(other.collection == collection for other in _specs.values()):
            raise TypeError(f"{collection!r} must be one of COLLECTIONS, and registered once")
        named = {*spec.references, *spec.indexes, *(field for group in groups for field in group)}
        if unknown := named - kind.model_fields.keys():
            raise TypeError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
        _specs[kind] = spec
        return kind

    return register


def spec_of(kind: type[Entity]) -> Spec:
    """How this kind of entity is kept. A KeyError means that the class was never registered."""
    return _specs[kind]


def kind_of(collection: str) -> type[Entity]:
    """The class of a collection; imports its room if need be.

    Raises:
        NotFound: there is no such collection.
    """
    if collection not in COLLECTIONS:
        raise NotFound(f"there is no collection {collection!r}", hint=f"there are {', '.join(sorted(COLLECTIONS))}")
    importlib.import_module(COLLECTIONS[collection])
    return next(kind for kind, spec in _specs.items() if spec.collection == collection)


def all_kinds() -> list[type[Entity]]:
    """Every kind of entity, in the order of `COLLECTIONS`. Imports the rooms that have any."""
    return [kind_of(collection) for collection in COLLECTIONS]


def label_of(found: Entity) -> str:
    """What a person calls it: its collection, and its name or else its id."""
    return f"{spec_of(type(found)).collection} {getattr(found, 'name', found.id)}"


def field_names(kind: type[Entity]) -> dict[str, str]:
    """From every way to write a field to its name."""
    written: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        written[name] = name
        written[field.alias or name] = name
    return written


def plain(found: Entity) -> dict[str, Any]:
    """The fields as JSON values, by their `snake_case` names."""
    return found.model_dump(mode="json", by_alias=False)
