"""Commands over HTTP, and what `/openapi.json` says about them."""

from __future__ import annotations

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
