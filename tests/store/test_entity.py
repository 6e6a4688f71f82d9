"""How a pydantic class becomes an entity and a table."""

from __future__ import annotations

import time
import uuid
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
import sqlalchemy as sa
from pydantic import AwareDatetime, Field, ValidationError

from synapse.errors import NotFound
from synapse.genome.entities import GenomeLayer
from synapse.store import Entity, Reference, Value, entity
from synapse.store.columns import column_kind
from synapse.store.entity import Spec, kind_of, new_id
from synapse.store.tables import TYPES, UtcDateTime, derive_table


class Colour(StrEnum):
    red = "red"


class Part(Value):
    x: int = 0


@pytest.mark.parametrize(
    ("annotation", "sql", "nullable"),
    [
        (str, sa.Text, False),
        (str | None, sa.Text, True),
        (Annotated[str, Field(max_length=3)], sa.Text, False),
        (Annotated[str, Field(max_length=3)] | None, sa.Text, True),
        (Colour, sa.Text, False),
        (Literal["a", "b"], sa.Text, False),
        (Literal[1, 2], sa.JSON, False),
        (int, sa.BigInteger, False),
        (float | None, sa.Double, True),
        (bool, sa.Boolean, False),
        (datetime, UtcDateTime, False),
        (AwareDatetime | None, UtcDateTime, True),
        (list[str], sa.JSON, False),
        (dict[str, Any], sa.JSON, False),
        (Part, sa.JSON, False),
        (Part | None, sa.JSON, True),
        (int | str, sa.JSON, False),
        (Any, sa.JSON, False),
    ],
)
def test_the_type_of_a_field_decides_the_type_of_its_column(
    annotation: Any, sql: type[sa.types.TypeEngine[Any]], nullable: bool
) -> None:
    kind, may_be_null = column_kind(annotation)
    assert isinstance(TYPES[kind], sql)
    assert may_be_null is nullable


def test_a_table_has_a_column_a_field_and_its_constraints() -> None:
    class Note(Entity):
        owner_id: str
        text: str
        colour: Colour | None = None

    spec = Spec("Note", "notes", (("owner_id", "text"),), {"owner_id": Reference("Owner", "cascade")}, ("text",), False)
    metadata = sa.MetaData()
    sa.Table("owners", metadata, sa.Column("id", sa.Text, primary_key=True))
    table = derive_table(Note, spec, {"Owner": "owners"}, metadata)

    assert list(table.c.keys()) == ["id", "created_at", "updated_at", "owner_id", "text", "colour"]
    assert [column.name for column in table.primary_key] == ["id"]
    assert {column.name for column in table.c if column.nullable} == {"colour"}
    (foreign,) = table.foreign_keys
    assert (foreign.parent.name, foreign.target_fullname, foreign.ondelete) == ("owner_id", "owners.id", "CASCADE")
    unique = [c for c in table.constraints if isinstance(c, sa.UniqueConstraint)]
    assert [[column.name for column in group.columns] for group in unique] == [["owner_id", "text"]]
    assert [[column.name for column in index.columns] for index in table.indexes] == [["text"]]


def test_an_entity_cannot_be_changed_in_place() -> None:
    layer = GenomeLayer(name="captain")
    with pytest.raises(ValidationError, match="frozen"):
        layer.name = "other"  # type: ignore[misc]


def test_fields_are_read_in_camel_case_too() -> None:
    found = GenomeLayer.model_validate({"name": "a", "traitType": "tone_and_voice", "sizeMB": 50, "baseModel": "m"})
    assert (found.trait_type, found.size_mb, found.base_model) == ("tone_and_voice", 50, "m")
    assert "size_mb" in found.model_dump(by_alias=False)


def test_ids_are_uuids_of_version_7_that_carry_their_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [uuid.UUID(new_id()) for _ in range(200)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 200
    for found in ids:
        assert found.version == 7
        assert found.variant == uuid.RFC_4122
        assert before <= found.int >> 80 <= after


def test_a_collection_nobody_knows_is_not_found() -> None:
    with pytest.raises(NotFound, match="Genom") as caught:
        kind_of("Genom")
    assert "GenomeLayer" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("collection", "options", "message"),
    [
        ("Nothing", {}, "must be one of COLLECTIONS"),
        ("GenomeLayer", {}, "registered once"),
    ],
)
def test_a_collection_is_known_and_registered_once(collection: str, options: dict[str, Any], message: str) -> None:
    class Note(Entity):
        text: str

    with pytest.raises(TypeError, match=message):
        entity(collection, **options)(Note)
