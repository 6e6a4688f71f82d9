"""Commands over the entities of the store, by the name of their collection."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from synapse.commands import Argument, Context, command
from synapse.errors import Forbidden
from synapse.store.entity import Entity, all_kinds, kind_of, plain, spec_of
from synapse.store.opening import open_store
from synapse.store.validation import build

MAX_PAGE = 1000

Collection = Annotated[str, Argument()]
Id = Annotated[str, Argument()]


class AnyEntity(BaseModel):
    """The fields of an entity; which ones depends on its collection."""

    model_config = ConfigDict(extra="allow")


class EntityResult(BaseModel):
    """One entity, as it now is (or, when it was deleted, was)."""

    collection: str
    entity: AnyEntity


class EntityList(BaseModel):
    """A page of a collection. `total` counts all that fit the conditions."""

    collection: str
    total: int
    items: list[AnyEntity]


class CollectionRow(BaseModel):
    """A kind of entity."""

    name: str
    fields: list[str]
    count: int


class CollectionList(BaseModel):
    """Every collection there is."""

    items: list[CollectionRow]


class CreateEntity(BaseModel):
    """A new entity."""

    collection: Collection = Field(description="what kind of entity, for example GenomeLayer")
    data: dict[str, Any] = Field(description="its fields, as a JSON object; snake_case and camelCase both work")


class OneEntity(BaseModel):
    """Which entity."""

    collection: Collection = Field(description="what kind of entity")
    id: Id = Field(description="its id")


class UpdateEntity(OneEntity):
    """Which entity, and its new values."""

    data: dict[str, Any] = Field(description="the fields to change, as a JSON object; others stay as they are")


class ListEntities(BaseModel):
    """Which page of which collection."""

    collection: Collection = Field(description="what kind of entity")
    where: dict[str, Any] = Field(default_factory=dict, description="values that fields must have, as a JSON object")
    order_by: str = Field("created_at", description="the field to order by; -field is descending")
    limit: int = Field(100, ge=1, le=MAX_PAGE, description="how many to show at most")
    offset: int = Field(0, ge=0, description="how many to leave out first")


class ListCollections(BaseModel):
    """Nothing to choose."""


@command("data/create", permission="manage")
async def create(params: CreateEntity, context: Context) -> EntityResult:
    """Create an entity from JSON."""
    kind = _open_kind(params.collection)
    store = await context.get(open_store)
    return _result(await store.create(build(kind, params.data)))


@command("data/get", permission="read")
async def get(params: OneEntity, context: Context) -> EntityResult:
    """Show one entity."""
    kind = _open_kind(params.collection)
    store = await context.get(open_store)
    return _result(await store.get(kind, params.id))


@command("data/list", permission="read")
async def list_entities(params: ListEntities, context: Context) -> EntityList:
    """List the entities of a collection."""
    kind = _open_kind(params.collection)
    store = await context.get(open_store)
    found = await store.list(kind, params.where, order_by=params.order_by, limit=params.limit, offset=params.offset)
    return EntityList(
        collection=spec_of(kind).collection,
        total=await store.count(kind, params.where),
        items=[AnyEntity(**plain(entity)) for entity in found],
    )


@command("data/update", permission="manage")
async def update(params: UpdateEntity, context: Context) -> EntityResult:
    """Change fields of an entity."""
    kind = _open_kind(params.collection)
    store = await context.get(open_store)
    return _result(await store.update(kind, params.id, params.data))


@command("data/delete", permission="manage")
async def delete(params: OneEntity, context: Context) -> EntityResult:
    """Delete an entity; refused while others refer to it.

    Only the entity goes: the files of a layer are deleted by `synapse layer rm`.
    """
    kind = _open_kind(params.collection)
    store = await context.get(open_store)
    return _result(await store.delete(kind, params.id))


@command("data/collections", permission="read")
async def collections(params: ListCollections, context: Context) -> CollectionList:
    """List the collections, their fields and how much is in them."""
    store = await context.get(open_store)
    kinds = [kind for kind in all_kinds() if not spec_of(kind).private]
    return CollectionList(
        items=[
            CollectionRow(name=spec_of(kind).collection, fields=list(kind.model_fields), count=await store.count(kind))
            for kind in kinds
        ]
    )


def _open_kind(collection: str) -> type[Entity]:
    """The class of a collection that `synapse data` may touch.

    Raises:
        NotFound: there is no such collection.
        Forbidden: it is private.
    """
    kind = kind_of(collection)
    if spec_of(kind).private:
        raise Forbidden(
            f"the collection {collection} holds secrets and is closed to `synapse data`",
            hint="it has commands of its own: see `synapse --help`",
        )
    return kind


def _result(entity: Entity) -> EntityResult:
    return EntityResult(collection=spec_of(type(entity)).collection, entity=AnyEntity(**plain(entity)))
