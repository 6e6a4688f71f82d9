"""OpenAI's own client against a real server with the real default model."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import openai
import pytest

from support.live_server import CONTEXT, Live

pytestmark = pytest.mark.peer

QUESTION: Any = [{"role": "user", "content": "Name a colour."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "mood": {"enum": ["calm", "cross", "glad"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "mood", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.openai()


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**({"model": "plain", "messages": QUESTION, "max_tokens": 8} | options))


def test_personas_are_models_and_so_are_pulled_base_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"plain", "noisy", "smollm2-135m"}
    assert (models["plain"].owned_by, models["smollm2-135m"].owned_by) == ("persona", "base-model")
    assert client.models.retrieve("noisy") == models["noisy"]
    assert models["noisy"].object == "model"
    assert models["noisy"].created > 1_700_000_000


def test_a_persona_answers(client: openai.OpenAI) -> None:
    answer = ask(client)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.model == "plain"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert choice.logprobs is None
    usage = answer.usage
    assert usage.prompt_tokens > 10
    assert 1 <= usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_prompt_that_was_asked_before_is_counted_as_cached(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea, ships, harbours and everything that sails. " * 3}]
    ask(client, messages=messages, max_tokens=1)
    again = ask(client, messages=messages, max_tokens=1)
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


def test_a_layer_changes_what_a_persona_says(client: openai.OpenAI) -> None:
    plain, noisy = (ask(client, model=model, temperature=0).choices[0].message.content for model in ("plain", "noisy"))
    assert plain != noisy


def test_a_base_model_answers_without_any_character(client: openai.OpenAI) -> None:
    assert ask(client, model="smollm2-135m").choices[0].message.content


def test_a_stream_has_the_same_text_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0, max_tokens=12)
    chunks = list(ask(client, temperature=0, max_tokens=12, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_can_end_with_the_token_counts(client: openai.OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens >= 1
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_stream_is_server_sent_events_that_end_with_done(live: Live) -> None:
    body = {"model": "plain", "messages": QUESTION, "max_tokens": 3, "stream": True}
    with live.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["model"] for line in lines[:-1]] == ["plain"] * (len(lines) - 1)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    text = ask(client, temperature=0, max_tokens=20).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for given in (stop, ["never in there", stop]):
        choice = ask(client, temperature=0, max_tokens=20, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
    chunks = ask(client, temperature=0, max_tokens=20, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    first, second, other = (
        ask(client, temperature=1.5, seed=seed, max_tokens=16).choices[0].message.content for seed in (7, 7, 8)
    )
    assert first == second != other


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    three = ask(client, temperature=1.5, seed=100, n=3, max_tokens=12)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert ask(client, temperature=1.5, seed=101, max_tokens=12).choices[0].message.content == texts[1]
    assert 3 <= three.usage.completion_tokens <= 36
    streamed = ["", ""]
    for chunk in ask(client, temperature=1.5, seed=100, n=2, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts[:2]


def test_logprobs_come_with_alternatives_and_bytes(client: openai.OpenAI) -> None:
    choice = ask(client, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy takes the likeliest
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
    streamed = [
        token
        for chunk in ask(client, temperature=0, max_tokens=6, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert all(token.top_logprobs == [] for token in streamed)


def test_a_token_can_be_forced_by_its_bias(client: openai.OpenAI) -> None:
    options: Any = {"model": "plain", "prompt": "The sky is", "max_tokens": 2, "temperature": 0}
    assert client.completions.create(**options, logit_bias={"504": 100}).choices[0].text == "TheThe"


@pytest.mark.slow
def test_twenty_of_twenty_sampled_answers_fit_a_json_schema(client: openai.OpenAI) -> None:
    texts: list[str] = []
    for round_ in range(5):
        answer = ask(
            client,
            model=("plain", "noisy")[round_ % 2],
            messages=[{"role": "user", "content": "Describe a person as JSON."}],
            temperature=1,
            n=4,
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON, "strict": True},
            },
        )
        texts += [choice.message.content for choice in answer.choices]
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert len(texts) == 20
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_json_object_can_be_asked_for(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=40, temperature=1, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_completions_go_on_from_text_and_from_tokens(client: openai.OpenAI) -> None:
    text = client.completions.create(model="smollm2-135m", prompt="The sky is", max_tokens=5, temperature=0, logprobs=2)
    (choice,) = text.choices
    assert text.object == "text_completion"
    assert choice.text
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    both = client.completions.create(
        model="smollm2-135m", prompt=[[504, 6376, 314], [504, 6376, 314]], max_tokens=2, temperature=0, n=2
    )
    assert [each.index for each in both.choices] == [0, 1, 2, 3]
    assert len({each.text for each in both.choices}) == 1
    assert both.usage.prompt_tokens == 6
    assert both.usage.completion_tokens == 8


def test_completions_stream(client: openai.OpenAI) -> None:
    options: Any = {"model": "noisy", "prompt": ["One, two,", "Red, blue,"], "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**options, logprobs=0)
    streamed = ["", ""]
    offsets: list[list[int]] = [[], []]
    for chunk in client.completions.create(**options, logprobs=0, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert streamed == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_text_parts_and_developer_messages_are_read(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    messages: Any = [{"role": "user", "content": parts}]
    assert ask(client, messages=messages, seed=1).choices == ask(client, seed=1).choices
    instructed: Any = [{"role": "developer", "content": "Speak of the sea."}, *QUESTION]
    assert ask(client, messages=instructed).usage.prompt_tokens > ask(client).usage.prompt_tokens


def test_extensions_of_sampling_are_taken(client: openai.OpenAI) -> None:
    greedy = ask(client, temperature=0)
    only_one = ask(client, temperature=2, extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0})
    assert only_one.choices == greedy.choices


# What is refused.


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    for name in ("nobody", "../../etc/passwd", "/etc/hostname", "smollm2-135m.gguf"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, model=name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_400(client: openai.OpenAI, stream: bool) -> None:
    long: Any = [{"role": "user", "content": "word " * CONTEXT}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=long, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="plain", prompt="word " * CONTEXT, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=CONTEXT, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


@pytest.mark.parametrize("schema", [{"type": "wizard"}, {"type": "object", "properties": 5}, {"$ref": "#/nowhere"}])
def test_a_schema_that_cannot_be_followed_is_400(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}})
    assert (caught.value.code, caught.value.param) == ("bad_grammar", "response_format")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"n": 9}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0]",
        ),
        ({"extra_body": {"tpo_p": 1}}, "tpo_p"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_400_and_named(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert str(caught.value.param).startswith(param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", [], [[]], [5, -1], [10**6], ["a", 5]])
def test_a_prompt_that_is_none_is_400(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="plain", prompt=prompt, max_tokens=1)
    assert str(caught.value.param).startswith("prompt")
