"""Commands over HTTP, and what `/openapi.json` says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.live_server import Live
from synapse.commands import all_commands


def test_every_command_has_a_path_with_its_own_schemas(empty: Live) -> None:
    with empty.http() as client:
        schema = client.get("/openapi.json").json()
        listed = client.get("/v1/commands").json()["items"]
    schemas = schema["components"]["schemas"]
    commands = all_commands()
    assert [row["name"] for row in listed] == [command.name for command in commands]
    for command, row in zip(commands, listed, strict=True):
        assert row["path"] == f"/v1/commands/{command.name}"
        operation = schema["paths"][row["path"]]["post"]
        assert operation["summary"] == command.summary == row["summary"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        result = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert set(schemas[body].get("properties", {})) == set(command.params.model_json_schema().get("properties", {}))
        assert body.startswith((command.params.__name__, "synapse"))
        assert result.startswith((command.result.__name__, "synapse"))
    assert schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "temperature" in schemas["ChatBody"]["properties"]


def test_a_persona_can_be_made_shown_and_deleted(empty: Live) -> None:
    made = empty.command("persona/create", name="clerk", system_prompt="Be precise.")
    assert made["name"] == "clerk"
    assert empty.command("persona/show", name="clerk") == made
    assert [row["name"] for row in empty.command("persona/list")["items"]] == ["clerk"]
    assert [model.id for model in empty.openai().models.list()] == ["clerk"]
    empty.command("persona/delete", name="clerk")
    assert empty.command("persona/list") == {"items": []}


def test_an_error_of_a_command_is_a_problem_with_a_hint(empty: Live) -> None:
    with empty.http() as client:
        response = client.post("/v1/commands/persona/show", json={"name": "nobody"})
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == "urn:synapse:error:persona_not_found"
    assert problem["title"] == "Not found"
    assert problem["status"] == 404
    assert "nobody" in problem["detail"]
    assert problem["instance"] == "/v1/commands/persona/show"
    assert problem["code"] == "persona_not_found"
    assert problem["hint"]


def test_parameters_that_do_not_fit_are_a_problem_that_names_them(empty: Live) -> None:
    with empty.http() as client:
        for body, param in (({}, "name"), ({"name": "X Y"}, "name"), ({"name": "x", "temperature": 9}, "temperature")):
            response = client.post("/v1/commands/persona/create", json=body)
            assert response.status_code == 400
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["details"]["param"] == param
            assert param in response.json()["detail"]
        for raw in (b"", b"[]", b"5", b"{", b'{"name": "\\ud800"}', b"\xff", b'{"a":' * 5000):
            response = client.post(
                "/v1/commands/persona/create", content=raw, headers={"Content-Type": "application/json"}
            )
            assert (response.status_code, response.json()["status"]) == (400, 400)


def test_a_command_that_does_not_exist_is_a_problem(empty: Live) -> None:
    with empty.http() as client:
        missing = client.post("/v1/commands/persona/clone", json={})
        wrong_method = client.get("/v1/commands/persona/list")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong_method.status_code, wrong_method.json()["code"]) == (405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    assert missing.headers["content-type"] == wrong_method.headers["content-type"] == "application/problem+json"


def posted_events(client: httpx.Client, name: str, headers: dict[str, str], /, **params: Any) -> list[tuple[str, Any]]:
    """The server-sent events that a command answers with."""
    with client.stream("POST", f"/v1/commands/{name}", json=params, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        lines = [line for line in response.iter_lines() if line]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in pairs]


@pytest.mark.usefixtures("compiles_once")
def test_a_long_command_tells_its_progress_when_events_are_asked_for(empty: Live) -> None:
    stream = {"Accept": "text/event-stream"}
    with empty.http() as client:
        events = posted_events(client, "kernels/build", stream, names=["router"])
        failed = posted_events(client, "persona/show", stream, name="nobody")
    assert [name for name, _ in events] == ["progress", "progress", "result"]
    assert events[0][1] == {"label": "building kernels", "done": 0, "total": 1}
    assert events[-1][1]["items"][0]["name"] == "router"
    assert [(name, body["code"]) for name, body in failed] == [("error", "persona_not_found")]


def test_a_command_that_streams_answers_with_events(empty: Live) -> None:
    empty.command("persona/create", name="streamer")
    with empty.http() as client:
        events = posted_events(client, "events/tail", {}, pattern="persona.*", lines=1)
    assert [(name, body["topic"]) for name, body in events] == [("result", "persona.created")]


@pytest.mark.parametrize(
    ("name", "params", "field"),
    [
        ("kernels/build", {"standalone": "pattern_search", "output": "FILE"}, "standalone"),
        ("kernels/build", {"cpu": "x86-64-v3", "output": "FILE"}, "cpu"),
        ("layer/export", {"name": "noise", "folder": "FILE"}, "folder"),
        ("layer/add", {"source": "FILE"}, "source"),
        ("model/pull", {"source": "FILE.gguf"}, "source"),
        ("persona/create", {"name": "spy", "model": "FILE.gguf"}, "model"),
        ("embedding/create", {"texts": ["a"], "model": "FILE/encoder"}, "model"),
    ],
)
def test_over_http_no_parameter_names_a_path_of_the_host(
    empty: Live, tmp_path: Path, name: str, params: dict[str, Any], field: str
) -> None:
    file = tmp_path / "kept"
    file.write_text("kept")
    given = {
        key: value.replace("FILE", str(file)) if isinstance(value, str) else value for key, value in params.items()
    }
    with empty.http() as client:
        response = client.post(f"/v1/commands/{name}", json=given)
    assert response.status_code == 403, response.text
    problem = response.json()
    assert (problem["code"], problem["details"]["param"]) == ("only_on_this_machine", field)
    assert file.read_text() == "kept"


def test_a_call_says_how_long_it_waits_and_may_be_sent_twice(empty: Live) -> None:
    with empty.http(headers={"Idempotency-Key": "make-clerk"}) as client:
        made = [client.post("/v1/commands/persona/create", json={"name": "once"}) for _ in range(2)]
    assert [response.status_code for response in made] == [200, 200]
    assert made[0].json() == made[1].json()
    with empty.http() as client:
        late = client.post("/v1/commands/persona/list", json={}, headers={"X-Timeout": "0.000001"})
        odd = client.post("/v1/commands/persona/list", json={}, headers={"X-Timeout": "soon"})
    assert (late.status_code, late.json()["code"]) == (504, "timed_out")
    assert (odd.status_code, odd.json()["code"]) == (400, "invalid_input")
