"""Answers under a grammar are whole at any budget and any choice of tokens, or the grammar is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from synapse.engines.grammar import BadGrammar, Constraint, GrammarFailed, Grammars
from synapse.engines.grammar import compiler as compiler_module
from synapse.engines.request import Grammar
from synapse.models.gguf_file import open_model_file
from synapse.models.tokenizer import Tokenizer, load_tokenizer

Answer = Callable[[object, int, int], str]
TEXT = {"type": "string"}


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(open_model_file(default_model))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, 2048)


def compiled(grammars: Grammars, schema: object) -> Constraint:
    return grammars.compile(Grammar("json_schema", json.dumps(schema)))


@pytest.fixture(scope="module")
def answer(grammars: Grammars, tokenizer: Tokenizer) -> Answer:
    """An answer of tokens drawn evenly from those allowed: worse than any model. It must end within the budget."""

    def draw(schema: object, budget: int, seed: int) -> str:
        constraint, random, said = compiled(grammars, schema), np.random.default_rng(seed), b""
        for remaining in reversed(range(budget)):
            token = constraint.accept(int(random.choice(np.flatnonzero(constraint.allowed()))), remaining)
            said += tokenizer.token_bytes(token)
            if token in tokenizer.eos_ids or constraint.complete:
                break
        assert constraint.accepting or constraint.complete
        constraint.check_answer()
        return said.decode()

    return draw


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


PERSON = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": TEXT},
    },
    "required": ["name", "mail", "tags"],
}
HARD = {
    "a key that the grammar offers and cannot end": {
        "type": "object", "properties": {"a": TEXT}, "patternProperties": {"^a$": TEXT}, "additionalProperties": False
    },
    "two rules for one key": {
        "type": "object", "properties": {"a": TEXT}, "patternProperties": {"^a$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "only one key there is": {
        "type": "object", "patternProperties": {"^a$": {"type": "integer"}}, "additionalProperties": False
    },
    "an email": {"type": "string", "format": "email"},
    "a date and time": {"type": "string", "format": "date-time"},
    "a person": PERSON,
    "a branch that never ends": {
        "anyOf": [{"const": 1}, {"$ref": "#/$defs/endless"}],
        "$defs": {"endless": {"type": "array", "items": {"$ref": "#/$defs/endless"}, "minItems": 1}},
    },
    "a long text": {"type": "string", "minLength": 90},
    "free objects": {"type": "array", "items": {"type": "object"}, "minItems": 2},
    "numbers": {"type": "object", "additionalProperties": {"type": "number"}},
}  # fmt: skip


@pytest.mark.parametrize("schema", HARD.values(), ids=HARD.keys())
def test_any_choice_of_tokens_ends_whole_within_any_budget_there_is_room_in(
    schema: object, answer: Answer, grammars: Grammars
) -> None:
    shortest = compiled(grammars, schema).shortest
    for seed, budget in enumerate((shortest, shortest + 1, shortest + 3, 20, 40, 120)):
        if budget >= shortest:
            value = json.loads(answer(schema, budget, seed), object_pairs_hook=no_key_twice)
            if schema is not HARD["two rules for one key"]:
                jsonschema.validate(value, schema)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 1_000_000},
        {"type": "string", "minLength": 60_000},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"$ref": "#"},
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}},
        {"type": "integer", "minimum": 3, "maximum": 2},
    ],
)  # fmt: skip
def test_what_no_answer_within_the_limits_can_satisfy_is_refused_in_a_few_seconds(
    schema: object, grammars: Grammars
) -> None:
    started = time.process_time()
    with pytest.raises(BadGrammar):
        compiled(grammars, schema)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1, 2**60, 10**30, 1e300, 2**53])
@pytest.mark.parametrize("form", ["const", "enum", "nested"])
def test_a_large_number_is_itself_or_refused(number: float, form: str, grammars: Grammars, answer: Answer) -> None:
    schema = {"const": {"const": number}, "enum": {"enum": [number]}, "nested": {"const": {"a": [number]}}}[form]
    try:
        shortest = compiled(grammars, schema).shortest
    except BadGrammar as error:
        assert "exactly" in error.message
        return
    value = json.loads(answer(schema, shortest, 0))
    assert value == schema.get("const", number)


def test_ranges_beyond_2_to_the_53_are_kept(answer: Answer, grammars: Grammars) -> None:
    low, high = 2**53 + 1, 2**53 + 9
    for seed in range(12):
        assert low <= json.loads(answer({"type": "integer", "minimum": low, "maximum": high}, 20, seed)) <= high
    whole_words = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
    assert all(-(2**63) <= json.loads(answer(whole_words, 30, seed)) < 2**64 for seed in range(5))
    with pytest.raises(BadGrammar):
        compiled(grammars, {"type": "integer", "minimum": low, "maximum": low})


NAMED = {"type": "object", "properties": {"a": TEXT, "b": {"type": "integer"}}}
CLOSED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "an object": (NAMED, {"a", "b"}),
    "one in a list": ({"type": "array", "items": NAMED, "minItems": 1}, {"a", "b"}),
    "one that is referred to": ({"$ref": "#/$defs/n", "$defs": {"n": NAMED}}, {"a", "b"}),
    "branches": ({"anyOf": [NAMED, {"type": "object", "properties": {"c": TEXT}}]}, {"a", "b", "c"}),
    "inheritance": (
        {"allOf": [{"$ref": "#/$defs/n"}, {"type": "object", "properties": {"c": TEXT}}], "$defs": {"n": NAMED}},
        {"a", "b", "c"},
    ),
}


@pytest.mark.parametrize(("schema", "keys"), CLOSED.values(), ids=CLOSED.keys())
def test_an_object_that_names_its_properties_has_no_others(
    schema: dict[str, Any], keys: set[str], answer: Answer
) -> None:
    for seed in range(12):
        value = json.loads(answer(schema, 60, seed), object_pairs_hook=no_key_twice)
        for each in value if isinstance(value, list) else [value]:
            assert set(each) <= keys


def test_an_object_is_open_where_the_schema_says_so(answer: Answer) -> None:
    values = [json.loads(answer({**NAMED, "additionalProperties": True}, 60, seed)) for seed in range(30)]
    assert any(set(value) - {"a", "b"} for value in values)


def test_a_key_that_is_there_is_not_offered_again(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = compiled(grammars, {"type": "object"})
    for token in tokenizer.encode('{"ab": 1, "a'):
        assert constraint.accept(token, 1000) == token
    (rest,) = tokenizer.encode("b")
    assert constraint.accept(rest, 1000) == rest
    allowed = constraint.allowed()
    assert not any(allowed[token] for token in range(len(allowed)) if tokenizer.token_bytes(token).startswith(b'"'))
    assert allowed[rest]


def test_a_failure_of_the_library_is_an_error_and_no_end(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = compiled(grammars, PERSON)
    constraint._matcher.consume_token(0)  # what the grammar does not allow: from here on the library is in error
    assert not constraint.complete
    with pytest.raises(GrammarFailed):
        constraint.mask()


def test_an_answer_that_is_not_whole_fails_its_validation(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = compiled(grammars, PERSON)
    constraint.accept(tokenizer.encode('{"')[0], 100)
    with pytest.raises(GrammarFailed, match="does not fit"):
        constraint.check_answer()


def test_options_of_the_library_are_not_the_clients_to_set(answer: Answer) -> None:
    loose = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": "[ \\n]+"}, **NAMED, "required": ["a"]}
    assert all("\n" not in answer(loose, 40, seed) for seed in range(5))


def test_compiled_grammars_are_bounded_by_size_and_by_what_they_take(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadGrammar, match="at most"):
        compiled(grammars, {"enum": [f"word {n}" for n in range(20_000)]})
    monkeypatch.setattr(compiler_module, "CACHE_BYTES", 2**21)
    small = Grammars(tokenizer, 256)
    for n in range(8):
        compiled(small, {"enum": [f"a {n}", "x" * 1000]})
    assert 1 <= len(small._compiled) < 4
