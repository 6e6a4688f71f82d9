"""What is wrong with data, said in a sentence: which field, what was expected, what was found."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.errors import InvalidInput
from synapse.genome.entities import Genome, GenomeLayer
from synapse.server.keys import ApiKey
from synapse.store import build
from synapse.store.validation import changed, check_storable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": 1}, r"GenomeLayer has no field 'sizes'"),
        ({"rank": "8"}, r"GenomeLayer\.rank must be a valid integer, not '8' \(str\)"),
        ({"rslora": 1}, r"GenomeLayer\.rslora must be a valid boolean"),
        ({"rank": 257}, r"GenomeLayer\.rank must be less than or equal to 256"),
        ({"size_mb": float("nan")}, r"GenomeLayer\.size_mb must be a finite number"),
        ({"trait_type": "wit"}, r"GenomeLayer\.trait_type must be 'general_reasoning'"),
        ({"share_permission": {"free": True}}, r"no field 'share_permission\.free'"),
        ({"id": "other"}, r"GenomeLayer\.id is set by the store"),
        ({"createdAt": "2026-01-01T00:00:00Z"}, r"GenomeLayer\.created_at is set by the store"),
        ({"sizeMB": 1.0, "size_mb": 2.0}, r"GenomeLayer\.size_mb is given twice"),
        ({"name": None}, r"GenomeLayer\.name must be a valid string, not None"),
        ({"name": "a:b"}, r"a name has 1 to 100 characters"),
    ],
)
def test_a_wrong_change_names_the_field_what_was_expected_and_what_was_found(
    changes: dict[str, Any], message: str
) -> None:
    layer = GenomeLayer(name="captain")
    with pytest.raises(InvalidInput, match=message) as caught:
        changed(layer, changes)
    assert caught.value.details["field"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "GenomeLayer needs the field name"),
        ({"name": "a", "colour": "red"}, "GenomeLayer has no field 'colour'"),
        ({"name": "a", "rank": "8"}, r"GenomeLayer\.rank must be a valid integer, not '8' \(str\)"),
        ({"name": "a", "tags": {"x": 1}}, r"GenomeLayer\.tags must be a valid"),
        ({"name": "a", "sha256": "../../etc"}, r"GenomeLayer\.sha256"),
        ({"name": "a", "embedding": [2**70]}, r"GenomeLayer\.embedding"),
        ({"name": "a", "id": "mine"}, r"GenomeLayer\.id is set by the store"),
        ({"name": "a", "description": "\x00"}, r"GenomeLayer\.description cannot be stored: it holds a NUL"),
        ({"name": "a", "tags": ["\ud83d"]}, r"GenomeLayer\.tags cannot be stored: it holds half a character"),
        ({"name": "a" * 101}, "a name has 1 to 100 characters"),
    ],
)
def test_data_that_makes_no_entity_is_refused_by_field(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(GenomeLayer, data)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"weight": 1.5}, r"layers\.0\.weight must be less than or equal to 1"),
        ({"weight": -0.1}, r"layers\.0\.weight must be greater than or equal to 0"),
        ({"weight": float("nan")}, r"layers\.0\.weight must be a finite number"),
        ({"orderIndex": -1}, r"layers\.0\.order_index must be greater than or equal to 0"),
        ({"traitType": "wit"}, r"layers\.0\.trait_type must be"),
    ],
)
def test_a_structure_inside_is_checked_and_named_by_its_path(place: dict[str, Any], message: str) -> None:
    good = {"layerId": "x", "traitType": "domain_expertise", "orderIndex": 0, "weight": 1}
    assert build(Genome, {"baseModel": "tiny", "layers": [good]}).layers[0].weight == 1
    with pytest.raises(InvalidInput, match=message):
        build(Genome, {"baseModel": "tiny", "layers": [good | place]})


@pytest.mark.parametrize("value", [2**63, -(2**70), {"a": [2**64]}, {"\x00": 1}, datetime(2026, 1, 1), ["x", "\udc00"]])
def test_what_no_database_takes_is_found_however_deep(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"ApiKey\.permissions"):
        check_storable(ApiKey, "permissions", value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*GenomeLayer.model_fields, "sizeMB", "colour"]), values, max_size=5))
def test_any_json_makes_an_entity_or_an_error_that_can_be_sent_on(data: dict[str, Any]) -> None:
    try:
        found = build(GenomeLayer, data)
    except InvalidInput as error:
        json.dumps([error.message, error.details], ensure_ascii=False)
    else:
        assert found.name == data["name"]
