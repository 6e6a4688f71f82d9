"""How errors look over HTTP."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from synapse import errors
from synapse.server import app as app_module
from synapse.server.http.errors import KINDS, BadField, UnsupportedField, error_response, from_validation, kind_of
from synapse.server.openai.wire import ChatBody, CompletionBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def body_of(response) -> dict:
    return json.loads(response.body)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InvalidInput, 400),
        (errors.Unauthorized, 401),
        (errors.Forbidden, 403),
        (errors.NotFound, 404),
        (errors.Conflict, 409),
        (errors.TooLarge, 413),
        (errors.Corrupt, 422),
        (errors.Overloaded, 429),
        (errors.InternalError, 500),
        (errors.Unavailable, 503),
        (errors.TimedOut, 504),
        (errors.SynapseError, 500),
    ],
)
def test_each_kind_of_error_has_its_status_in_both_shapes(kind: type[errors.SynapseError], status: int) -> None:
    error = kind("it broke", hint="mend it", param="n")
    openai = error_response(error, "/v1/chat/completions")
    assert openai.status_code == status
    found = body_of(openai)["error"]
    assert found == {
        "message": "it broke (hint: mend it)",
        "type": kind_of(error).openai_type,
        "param": "n",
        "code": kind.code,
    }
    problem = error_response(error, "/v1/commands/key/list")
    assert problem.status_code == status
    assert problem.media_type == "application/problem+json"
    assert body_of(problem) == {
        "type": f"urn:synapse:error:{kind.code}",
        "title": kind_of(error).title,
        "status": status,
        "detail": "it broke",
        "instance": "/v1/commands/key/list",
        "code": kind.code,
        "hint": "mend it",
        "details": {"param": "n"},
    }


def test_every_kind_of_the_error_tree_has_a_status() -> None:
    assert set(errors.SynapseError.__subclasses__()) - set(KINDS) <= {errors.InternalError}


def test_an_overload_says_when_to_come_back_and_a_missing_key_how_to_come_in() -> None:
    assert error_response(errors.Overloaded("full"), "/v1/models").headers["retry-after"] == "1"
    assert error_response(errors.Unauthorized("no key"), "/v1/models").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"temprature": 1}, "temprature"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_value_that_does_not_fit_is_named(change: dict, param: str) -> None:
    body = CHAT | change
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate(body)
    error = from_validation(caught.value.errors(), body)
    assert isinstance(error, errors.InvalidInput)
    assert error.details["param"].startswith(param)
    assert param.split("[", maxsplit=1)[0].split(".", maxsplit=1)[0] in error.message


def test_an_image_is_refused_in_words() -> None:
    body = CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate(body)
    assert "images" in from_validation(caught.value.errors(), body).message


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"functions": [{"name": "f"}]},
        {"function_call": "auto"},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {"a": 1}},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "y"}]}]},
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(change: dict) -> None:
    with pytest.raises(UnsupportedField) as caught:
        ChatBody.model_validate(CHAT | change)
    assert caught.value.details["param"] in change


@pytest.mark.parametrize("change", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}])
def test_completions_refuse_what_they_cannot_do(change: dict) -> None:
    with pytest.raises(UnsupportedField) as caught:
        CompletionBody.model_validate({"model": "m", "prompt": "x"} | change)
    assert caught.value.details["param"] in change


@pytest.mark.parametrize(
    "change",
    [
        {"tools": None, "functions": [], "tool_choice": "none", "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {"parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"}, "safety_identifier": "s"},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(change: dict) -> None:
    ChatBody.model_validate(CHAT | change)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}},
            "response_format.json_schema",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change: dict, param: str) -> None:
    with pytest.raises(BadField) as caught:
        ChatBody.model_validate(CHAT | change)
    assert caught.value.details["param"] == param


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_json_that_is_nested_too_deeply_is_said_to_be_that(depth: int) -> None:
    app = FastAPI()
    app.exception_handler(HTTPException)(app_module._wrong_path)
    app.exception_handler(RequestValidationError)(app_module._wrong_body)

    @app.post("/v1/echo")
    async def echo(body: ChatBody) -> None:
        pass

    body = '{"model": "m", "messages": ' + "[" * depth + "]" * depth + "}"
    answer = TestClient(app).post("/v1/echo", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["error"]["message"]
