"""What a caller of the engine sees: answers, their ends, their limits, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.engine_runs import run
from synapse.engines import (
    BadGrammar,
    ContextOverflow,
    Delta,
    Engine,
    Finished,
    Grammar,
    LayerNotLoaded,
    Limits,
    Request,
    Sampling,
)
from synapse.engines.opening import open_engine_file
from synapse.errors import InvalidInput, Unavailable

Chat = Callable[[str], tuple[int, ...]]
OpenDefault = Callable[[Limits], Engine]
GREEDY = Sampling(temperature=0)


def test_a_question_gets_its_answer_and_usage(engine: Engine, chat: Chat) -> None:
    prompt = chat("What is the capital of Japan?")
    (answer,) = run(engine, Request(prompt, sampling=GREEDY, max_tokens=30))
    assert answer.text == "The capital of Japan is Tokyo."
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    assert answer.finished.prompt_tokens == len(prompt)
    assert answer.finished.completion_tokens == len(answer.tokens) == 8


def test_max_tokens_ends_an_answer_with_length(engine: Engine, chat: Chat) -> None:
    (answer,) = run(engine, Request(chat("Count to one hundred."), sampling=GREEDY, max_tokens=5))
    assert answer.finished is not None
    assert (answer.finished.reason, len(answer.tokens)) == ("length", 5)


def test_a_stop_string_across_tokens_ends_an_answer_and_is_left_out(engine: Engine, chat: Chat) -> None:
    prompt = chat("What is the capital of Japan?")
    (answer,) = run(engine, Request(prompt, sampling=GREEDY, max_tokens=30, stop=("Japan is T",)))
    assert answer.text == "The capital of "
    assert answer.finished is not None
    assert answer.finished.reason == "stop"


def test_characters_of_several_tokens_stream_whole(engine: Engine) -> None:
    text = "naïve 日本語 🦜🦜 и так далее"
    ids = engine.tokenizer.encode(text, special=False)
    assert len(ids) > len(text.split())
    for token in ids:  # bias forces the model to say exactly this, one token a request
        (answer,) = run(engine, Request((1,), sampling=Sampling(temperature=0, logit_bias={token: 1e6}), max_tokens=1))
        assert answer.tokens == [token]
    pieces = b"".join(engine.tokenizer.token_bytes(token) for token in ids)
    assert pieces.decode() == text


def test_the_same_seed_gives_the_same_text_whatever_shares_the_batch(engine: Engine, chat: Chat) -> None:
    request = Request(chat("Tell me a story."), sampling=Sampling(seed=11), max_tokens=20)
    others = [Request(chat(f"Say {n}."), sampling=Sampling(seed=n), max_tokens=9 + n) for n in range(3)]
    (alone,) = run(engine, request)
    together = run(engine, *others, request)[-1]
    assert together.text == alone.text
    (other_seed,) = run(engine, Request(request.prompt, sampling=Sampling(seed=12), max_tokens=20))
    assert other_seed.text != alone.text


def test_logprobs_are_those_of_the_model(engine: Engine, chat: Chat) -> None:
    prompt = chat("Say yes.")
    request = Request(prompt, sampling=Sampling(seed=4, top_k=3, logit_bias={5: 2.0}), max_tokens=4, logprobs=5)
    (answer,) = run(engine, request)
    logits = engine.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    reported = [entry for event in answer.events if isinstance(event, Delta) for entry in event.logprobs]
    assert [entry.token for entry in reported] == answer.tokens
    for entry, row in zip(reported, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-3)
        assert [token for token, _ in entry.top] == list(np.argsort(-row)[:5])


def test_a_shared_prefix_is_computed_once(engine: Engine, chat: Chat) -> None:
    prompt = chat("A question whose beginning is long enough to fill a whole block of the cache, at the least. " * 3)
    first, second = (run(engine, Request(prompt, sampling=GREEDY, max_tokens=6))[0] for _ in range(2))
    assert first.finished is not None
    assert second.finished is not None
    assert second.finished.cached_tokens >= 32 > first.finished.cached_tokens
    assert second.tokens == first.tokens


def test_cancelling_frees_the_place_within_a_step(engine: Engine, chat: Chat) -> None:
    held = engine.kv_tokens_held
    request_id = engine.add(Request(chat("Count."), sampling=GREEDY, max_tokens=200))
    engine.step()
    assert engine.running == 1
    assert engine.cancel(request_id)
    events = engine.step()
    assert [event.reason for event in events if isinstance(event, Finished)] == ["cancelled"]
    assert not engine.busy
    assert engine.kv_tokens_held == held
    assert not engine.cancel(request_id)


def test_a_full_cache_delays_sequences_and_changes_none(open_default: OpenDefault, chat: Chat) -> None:
    small = open_default(Limits(max_context=128, kv_cache_tokens=160, max_batch=4))
    requests = [Request(chat(f"Tell me about {n}."), sampling=GREEDY, max_tokens=60) for n in ("cats", "dogs", "owls")]
    alone = [run(small, request)[0].tokens for request in requests]
    together = [answer.tokens for answer in run(small, *requests)]
    assert together == alone
    assert small._scheduler.preemptions > 0
    assert small.kv_tokens_held == 0


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
)


def test_a_schema_holds_at_any_temperature_and_the_answer_is_whole_when_the_budget_ends(
    engine: Engine, chat: Chat
) -> None:
    prompt = chat("Describe a ship.")
    grammar = Grammar("json_schema", SCHEMA)
    requests = [
        Request(prompt, sampling=Sampling(seed=n, temperature=1.5), max_tokens=tokens, grammar=grammar)
        for n, tokens in enumerate((16, 20, 24, 28))
    ]
    for answer in run(engine, *requests):
        value = json.loads(answer.text)
        assert isinstance(value["name"], str)
        assert all(isinstance(tag, str) for tag in value["tags"])
        assert answer.finished is not None
        assert answer.finished.reason == "stop"


def test_a_budget_too_small_for_any_whole_answer_is_refused(engine: Engine, chat: Chat) -> None:
    with pytest.raises(BadGrammar, match=r"the shortest answer .* tokens; max_tokens allows 2"):
        engine.add(Request(chat("Hi"), max_tokens=2, grammar=Grammar("json_schema", SCHEMA)))
    assert not engine.busy


def test_json_object_and_regex_grammars_hold(engine: Engine, chat: Chat) -> None:
    sampling = Sampling(seed=5)
    as_object, as_date = run(
        engine,
        Request(chat("JSON please"), sampling=sampling, max_tokens=40, grammar=Grammar("json_object")),
        Request(
            chat("A date?"), sampling=sampling, max_tokens=20, grammar=Grammar("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
        ),
    )
    assert isinstance(json.loads(as_object.text), dict)
    assert [len(part) for part in as_date.text.split("-")] == [4, 2, 2]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[]"),
        Grammar("json_schema", '{"type": "objekt"}'),
        Grammar("json_schema", '{"$ref": "http://example.com/schema"}'),
        Grammar("json_schema", '{"a":' * 5000 + "1" + "}" * 5000),
        Grammar("regex", "("),
    ],
)
def test_a_grammar_that_cannot_be_enforced_is_refused(engine: Engine, grammar: Grammar) -> None:
    with pytest.raises(BadGrammar):
        engine.add(Request((1,), grammar=grammar))
    assert not engine.busy


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request(()), InvalidInput, "empty"),
        (Request((49152,)), InvalidInput, "outside 0 to 49151"),
        (Request((1,) * 1024), ContextOverflow, "1024 tokens; the context holds 1024"),
        (Request((1,) * 1000, max_tokens=25), ContextOverflow, "make 1025"),
        (Request((1,), max_tokens=0), InvalidInput, "at least 1"),
        (Request((1,), logprobs=21), InvalidInput, "between 0 and 20"),
        (Request((1,), stop=("",)), InvalidInput, "1 to 1024 characters"),
        (Request((1,), sampling=Sampling(top_p=2)), InvalidInput, "top_p"),
        (Request((1,), layers=(("nobody", 1.0),)), LayerNotLoaded, "nobody"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    engine: Engine, request_: Request, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        engine.add(request_)
    assert not engine.busy


def test_the_context_is_filled_to_its_last_token_and_then_ends(open_default: OpenDefault) -> None:
    small = open_default(Limits(max_context=40))
    (answer,) = run(small, Request((1,) * 30, sampling=GREEDY, ignore_eos=True))
    assert answer.finished is not None
    assert (answer.finished.reason, len(answer.tokens)) == ("length", 10)


def test_the_native_backend_is_refused_with_a_reason_where_python_is_forced(
    default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    with pytest.raises(Unavailable, match="Python is forced"):
        open_engine_file(default_model, "native")
    with pytest.raises(InvalidInput, match="reference, native or auto"):
        open_engine_file(default_model, "fast")  # type: ignore[arg-type]


def test_logits_refuses_what_does_not_fit(engine: Engine) -> None:
    with pytest.raises(InvalidInput):
        engine.logits([])
    with pytest.raises(ContextOverflow):
        engine.logits([1] * 1025)
