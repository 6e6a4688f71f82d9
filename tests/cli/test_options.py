from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from synapse.cli.options import Form, form_of, read_params, signature_of

pytestmark = pytest.mark.usefixtures("sample_group")


class Size(Enum):
    SMALL = 1
    LARGE = 2


@pytest.mark.parametrize(
    ("annotation", "form"),
    [
        (str, Form("text", "text")),
        (int | None, Form("text", "int")),
        (Annotated[float, Field(ge=0)], Form("text", "float")),
        (Path, Form("text", "path")),
        (bool, Form("flag", "")),
        (bool | None, Form("flag", "")),
        (Literal["a", "b"], Form("text", "a|b", False, ("a", "b"))),
        (Size, Form("text", "1|2", False, ("1", "2"))),
        (list[str], Form("text", "text", True)),
        (tuple[int, ...], Form("text", "int", True)),
        (list[Literal["a"]], Form("text", "a", True, ("a",))),
        (dict[str, int], Form("json", "json")),
        (BaseModel, Form("json", "json")),
        (list[BaseModel], Form("json", "json")),
        (list[list[str]], Form("json", "json")),
        (str | int, Form("json", "json")),
        (Any, Form("json", "json")),
        (complex, Form("text", "complex")),
    ],
)
def test_each_type_has_its_form(annotation: Any, form: Form) -> None:
    assert form_of(annotation) == form


def test_every_type_of_field_arrives_as_its_value(synapse, tmp_path: Path) -> None:
    ran = synapse(
        *("sample", "echo", "ab", "one.txt", "two.txt", "--count", "4", "--ratio", "0.5", "--colour", "blue"),
        *("--mode", "slow", "--tags", "x", "--tags", "y", "--loud", "--no-polite", "--data", '{"a": [1, null]}'),
        *("--inner", '{"weight": 0.25}', "--inners", '[{"weight": 1}]', "--json"),
    )
    assert ran.err == ""
    assert json.loads(ran.out) == {
        "name": "ab",
        "files": ["one.txt", "two.txt"],
        "count": 4,
        "ratio": 0.5,
        "colour": "blue",
        "mode": "slow",
        "tags": ["x", "y"],
        "loud": True,
        "polite": False,
        "data": {"a": [1, None]},
        "inner": {"weight": 0.25},
        "inners": [{"weight": 1.0}],
    }


def test_what_is_not_given_keeps_its_default(synapse) -> None:
    result = json.loads(synapse("sample", "echo", "ab", "--json").out)
    assert (result["count"], result["colour"], result["polite"], result["loud"]) == (3, "red", True, False)


def test_json_can_come_from_a_file_or_from_standard_input(synapse, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('{"from": "file"}')
    assert json.loads(synapse("sample", "echo", "ab", "--data", f"@{file}", "--json").out)["data"] == {"from": "file"}
    ran = synapse("sample", "echo", "ab", "--data", "-", "--json", stdin='{"from": "stdin"}')
    assert json.loads(ran.out)["data"] == {"from": "stdin"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ab", "--count", "ten"), "--count: should be a valid integer"),
        (("ab", "--count", "10"), "--count: should be less than or equal to 9, found '10'"),
        (("ab", "--ratio", "much"), "--ratio: should be a valid number"),
        (("ab", "--colour", "green"), "--colour: should be 'red' or 'blue', found 'green'"),
        (("ab", "--mode", "idle"), "--mode: should be 'fast' or 'slow', found 'idle'"),
        (("ab", "--tags", "two words"), "--tags: a tag is one word"),
        (("a",), "NAME: String should have at least 2 characters, found 'a'"),
        (("ab", "--inner", '{"weight": 7}'), "--inner weight: should be less than or equal to 1, found '7'"),
        (("ab", "--inner", "{}"), "--inner weight: Field required"),
        (("ab", "--data", "[1]"), "--data: should be a valid dictionary, found '[1]'"),
        (("ab", "--data", "{a: 1}"), "--data takes JSON, but '{a: 1}' is not"),
        (("ab", "--data", "@/no/such/file"), "--data: cannot read the file /no/such/file"),
    ],
)
def test_a_value_that_does_not_fit_names_the_option_what_was_expected_and_what_was_found(
    synapse, args: tuple[str, ...], message: str
) -> None:
    ran = synapse("sample", "echo", *args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {message}")
    assert "\nhint: " in ran.err or "cannot read" in ran.err


def test_several_wrong_values_are_told_together_and_long_ones_are_cut(synapse) -> None:
    ran = synapse("sample", "echo", "ab", "--count", "0", "--mode", "x" * 200)
    assert "--count: " in ran.err
    assert "--mode: " in ran.err
    assert "…'" in ran.err
    assert len(ran.err) < 300


def test_the_help_of_a_command_shows_types_bounds_defaults_and_choices(synapse) -> None:
    text = " ".join(synapse("sample", "echo", "--help").out.split())
    for part in (
        "Give back what was given.",
        "The description [of the command] is longer.",
        "What it is called",
        "--count <int> How many [of them] (1 to 9, default: 3)",
        "--colour <red|blue> Its colour (default: red)",
        "--tags <text> Words for it (repeatable)",
        "--polite / --no-polite",
        "With a greeting (default: on)",
        "--data <json>",
        "--json Print the result as JSON",
    ):
        assert part in text


def test_the_help_of_a_group_lists_whole_summaries(synapse) -> None:
    out = synapse("sample").out
    assert "echo   Give back what was given." in out


def test_a_field_called_json_is_refused_when_the_command_is_built() -> None:
    class Clash(BaseModel):
        json_: str = Field("", alias="json")
        as_json: bool = False

    with pytest.raises(ValueError, match="duplicate parameter name"):
        signature_of(Clash)


class Numbers(BaseModel):
    whole: int = 0
    real: float = 0.0
    text: str = ""


@given(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_reading_what_was_printed_gives_the_same_values(whole: int, real: float, text: str) -> None:
    params = read_params(Numbers, {"whole": str(whole), "real": repr(real), "text": text})
    assert params == Numbers(whole=whole, real=real, text=text)
