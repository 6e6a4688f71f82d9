"""Schemas that would keep the grammar library, or us, busy without end are refused, and stop nobody else."""

from __future__ import annotations

import json
import signal
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.tiny_models import build_tiny_model
from synapse.engines.grammar import BadGrammar, Grammars
from synapse.engines.grammar import compiler as compiler_module
from synapse.engines.grammar import trial as trial_module
from synapse.engines.grammar.trial import Trial
from synapse.engines.request import Grammar
from synapse.models.gguf_file import open_model_file
from synapse.models.tokenizer import load_tokenizer

NAMED = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return Grammars(load_tokenizer(open_model_file(model.path)), 512)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A trial of a second, for this test alone."""
    found = Trial(seconds=1)
    monkeypatch.setattr(compiler_module, "TRIAL", found)
    return found


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def many_patterns() -> Grammar:
    """A kilobyte that the library needs minutes for: a text that has every letter, in any order."""
    return schema({"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in string.ascii_lowercase]})


def doubling(times: int) -> Grammar:
    """Each object has the one before twice: two kilobytes that become 2^times."""
    kinds: dict[str, object] = {"k0": {"type": "object", "properties": {"x": {"type": "string"}}}}
    for n in range(1, times):
        kinds[f"k{n}"] = {"allOf": [{"$ref": f"#/$defs/k{n - 1}"}, {"$ref": f"#/$defs/k{n - 1}"}]}
    properties = {f"p{n}": {"$ref": f"#/$defs/k{n}"} for n in range(times)}
    return schema({"type": "object", "properties": properties, "$defs": kinds})


def test_a_schema_that_takes_too_long_is_refused_and_holds_up_no_other(grammars: Grammars, trial: Trial) -> None:
    ended = threading.Event()

    def hostile() -> None:
        try:
            with pytest.raises(BadGrammar, match="more than 1 seconds to compile"):
                grammars.compile(many_patterns())
        finally:
            ended.set()

    with ThreadPoolExecutor() as pool:
        running = pool.submit(hostile)
        assert grammars.compile(schema(NAMED)).shortest > 0
        assert not ended.is_set()
        running.result(60)
    assert trial._process is None
    assert grammars.compile(Grammar("regex", "[ab]{3}")).shortest == 3  # the next one has a fresh process


def test_a_schema_that_grows_without_end_is_refused_before_it_does(grammars: Grammars, trial: Trial) -> None:
    assert grammars.compile(doubling(8)).shortest > 0
    with pytest.raises(BadGrammar, match="when its parts are combined"):
        grammars.compile(doubling(60))


def test_what_the_library_refuses_is_said_in_its_words(grammars: Grammars, trial: Trial) -> None:
    with pytest.raises(BadGrammar, match=r"cannot be used as a constraint: .*regex parse error") as refused:
        grammars.compile(Grammar("regex", "(a"))
    assert refused.value.hint


def test_a_process_that_is_gone_is_started_again(trial: Trial) -> None:
    assert trial.fault('{"grammars": [{"json_schema": {"type": "object"}}]}') == ""
    process = trial._process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert trial.fault('{"grammars": [{"json_schema": {"type": "object"}}]}') == ""
    assert trial._process is not process


def test_simple_schemas_need_no_process(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "PROGRAM", Path("/nowhere"))
    monkeypatch.setattr(compiler_module, "TRIAL", Trial())
    optional = {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "title": "Age"}
    person = {"type": "object", "properties": {"age": optional, "tags": {"type": "array", "items": {"type": "string"}}}}
    assert grammars.compile(schema({"$ref": "#/$defs/person", "$defs": {"person": person}})).shortest > 0
    assert grammars.compile(Grammar("json_object", "")).shortest > 0
