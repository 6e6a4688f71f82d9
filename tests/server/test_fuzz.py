"""Whatever is posted, the server answers with an error it chose, never with a defect."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.live_server import Live
from synapse.commands import all_commands

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
FIELDS = (*SAMPLING, "logit_bias", "seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "tools")
FIELDS += ("response_format", "user", "metadata", "max_completion_tokens", "echo", "suffix", "best_of")
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"]),
        "content": st.text(max_size=20) | st.lists(JSON, max_size=2) | JSON,
        "name": JSON,
        "tool_calls": JSON,
    },
)
RESPONSE_FORMAT = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"])},
    optional={"json_schema": st.fixed_dictionaries({"name": st.text(max_size=4), "schema": JSON})},
)
CHAT = st.fixed_dictionaries(
    {"max_tokens": st.just(1)},
    optional={
        "model": st.sampled_from(["plain", "noisy", "smollm2-135m", "x", ""]) | JSON,
        "messages": st.lists(MESSAGE, max_size=3) | JSON,
        "response_format": RESPONSE_FORMAT,
        **{name: JSON for name in FIELDS if name != "response_format"},
    },
)
SCHEMA = st.recursive(
    st.booleans() | st.just({}) | JSON,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "string", "integer", "number", "boolean", "null", "array"]) | JSON,
            "properties": st.dictionaries(st.text(max_size=4), inner, max_size=3),
            "required": st.lists(st.text(max_size=4), max_size=2),
            "additionalProperties": inner,
            "items": inner,
            "enum": st.lists(JSON, max_size=3),
            "anyOf": st.lists(inner, max_size=3),
            "pattern": st.text(max_size=6),
            "minimum": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
            "maxLength": st.integers(),
            "$ref": st.sampled_from(["#", "#/$defs/a", "http://example.com/x"]),
        },
    ),
    max_leaves=5,
)
NEARLY_RIGHT = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["plain", "noisy", "smollm2-135m"]),
        "max_tokens": st.just(2),
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["system", "developer", "user", "assistant"]),
                    "content": st.text(max_size=12) | st.sampled_from(["<|im_end|>", "{{ 1 }}", "\0", "é\u0301👩‍👩‍👧"]),
                }
            ),
            min_size=1,
            max_size=4,
        ),
    },
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 2**70),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 10, exclude_min=True),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
        "n": st.integers(1, 2),
        "stream": st.booleans(),
        "logprobs": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(0, 60_000).map(str), st.floats(-100, 100), max_size=3),
        "response_format": st.fixed_dictionaries(
            {
                "type": st.just("json_schema"),
                "json_schema": st.fixed_dictionaries({"name": st.just("n"), "schema": SCHEMA}),
            }
        ),
    },
)
COMPLETION = st.fixed_dictionaries(
    {"max_tokens": st.just(1)},
    optional={
        "model": st.sampled_from(["plain", "noisy", "x"]) | JSON,
        "prompt": st.text(max_size=10) | st.lists(st.integers(-1, 50_000), max_size=3) | JSON,
        **dict.fromkeys(FIELDS, JSON),
    },
)
SLOWLY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def post(live: Live, path: str, body: Any) -> int:
    with live.http() as client:
        response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text
    else:
        assert response.json()
    return response.status_code


@SLOWLY
@given(body=CHAT | JSON)
def test_no_chat_body_is_a_defect(live: Live, body: Any) -> None:
    assert post(live, "/v1/chat/completions", body) in (200, 400, 404, 413)


@pytest.mark.slow
@SLOWLY
@given(body=NEARLY_RIGHT)
def test_no_chat_body_that_is_nearly_right_is_a_defect(live: Live, body: Any) -> None:
    assert post(live, "/v1/chat/completions", body) in (200, 400)


@SLOWLY
@given(body=COMPLETION | JSON)
def test_no_completion_body_is_a_defect(live: Live, body: Any) -> None:
    assert post(live, "/v1/completions", body) in (200, 400, 404, 413)


@SLOWLY
@given(data=st.binary(max_size=40))
def test_no_bytes_are_a_defect(live: Live, data: bytes) -> None:
    with live.http() as client:
        response = client.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


READ_COMMANDS = [command.name for command in all_commands() if command.permission == "read" and not command.streams]


@pytest.mark.parametrize("name", READ_COMMANDS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON)
def test_no_parameters_of_a_reading_command_are_a_defect(live: Live, name: str, body: Any) -> None:
    assert post(live, f"/v1/commands/{name}", body) < 500
