"""API keys: making, using and revoking them, all over HTTP."""

from __future__ import annotations

import sqlite3

import httpx
import openai
import pytest

from support.live_server import Live
from synapse.server.keys import PREFIX_LENGTH, digest_of, new_key


def with_key(live: Live, key: str) -> httpx.Client:
    return live.http(headers={"Authorization": f"Bearer {key}"})


def make(live: Live, name: str, *permissions: str, key: str = "") -> str:
    made = live.command("key/create", key, name=name, permissions=list(permissions))
    return str(made["key"])


def test_a_key_is_256_random_bits_and_only_its_digest_is_kept() -> None:
    secret, key = new_key("laptop", ["chat", "chat"])
    assert secret.startswith("syn-")
    assert len(secret) == len("syn-") + 43  # 32 bytes in base64 without padding
    assert key.digest == digest_of(secret)
    assert key.prefix == secret[:PREFIX_LENGTH]
    assert secret[PREFIX_LENGTH:] not in key.model_dump_json()
    assert key.permissions == ["chat"]
    assert new_key("other", ["chat"])[0] != secret


def test_the_secret_is_shown_once_and_is_nowhere_in_the_database(empty: Live) -> None:
    secret = make(empty, "laptop", "chat", "manage")
    listed = empty.command("key/list", secret)["items"]
    assert [row["name"] for row in listed] == ["laptop"]
    assert secret not in str(listed)
    with sqlite3.connect(empty.home / "synapse.db") as database:
        dump = "\n".join(database.iterdump())
    assert digest_of(secret) in dump
    assert secret[PREFIX_LENGTH:] not in dump


def test_with_a_key_in_the_store_every_request_needs_one(empty: Live) -> None:
    secret = make(empty, "laptop", "chat")
    for wrong in ("none", "syn-" + "x" * 43, secret[:-1], secret + "x", secret[:PREFIX_LENGTH] + "y" * 35):
        with pytest.raises(openai.AuthenticationError) as caught:
            empty.openai(wrong).models.list()
        assert caught.value.status_code == 401
        assert caught.value.code == "invalid_api_key"
        assert wrong not in caught.value.message
    assert empty.openai(secret).models.list().data == []
    with empty.http() as client:
        missing = client.get("/v1/models")
        assert missing.status_code == 401
        assert missing.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"Authorization": f"Basic {secret}"}).status_code == 401


def test_with_a_key_the_host_and_the_origin_do_not_matter(empty: Live) -> None:
    secret = make(empty, "laptop", "chat")
    with with_key(empty, secret) as client:
        response = client.get("/v1/models", headers={"Host": "synapse.example", "Origin": "https://chat.example"})
    assert response.status_code == 200


def test_a_key_opens_what_its_permissions_say(empty: Live) -> None:
    admin = make(empty, "admin", "manage")
    keys = {"chat": make(empty, "a", "chat", key=admin), "read": make(empty, "b", "read", key=admin), "manage": admin}
    tries = {
        "models": ("GET", "/v1/models", None),
        "list": ("POST", "/v1/commands/key/list", {}),
        "create": ("POST", "/v1/commands/key/create", {}),
        "commands": ("GET", "/v1/commands", None),
    }
    opened = {}
    for permission, key in keys.items():
        with with_key(empty, key) as client:
            opened[permission] = {
                name: client.request(method, path, json=body).status_code
                for name, (method, path, body) in tries.items()
            }
    assert opened == {
        "chat": {"models": 200, "list": 403, "create": 403, "commands": 200},
        "read": {"models": 403, "list": 200, "create": 403, "commands": 200},
        "manage": {"models": 403, "list": 200, "create": 400, "commands": 200},  # 400: let in, but without a name
    }


def test_lacking_a_permission_is_told_in_the_shape_of_the_route(empty: Live) -> None:
    secret = make(empty, "reader", "read")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        empty.openai(secret).models.list()
    assert caught.value.code == "insufficient_permissions"
    with with_key(empty, secret) as client:
        problem = client.post("/v1/commands/key/create", json={"name": "mine"})
    assert problem.status_code == 403
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json()["code"] == "insufficient_permissions"
    assert "manage" in problem.json()["hint"]


def test_revoking_works_with_the_next_request_and_never_opens_the_server(empty: Live) -> None:
    secret = make(empty, "only", "chat", "manage")
    with with_key(empty, secret) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/commands/key/revoke", json={"name": "only"}).json()["revoked_at"]
        assert client.get("/v1/models").status_code == 401
    with empty.http() as client:
        assert client.get("/v1/models").status_code == 401


def test_the_last_key_is_removed_only_when_it_is_said_that_the_server_may_be_open(empty: Live) -> None:
    secret = make(empty, "only", "manage")
    with with_key(empty, secret) as client:
        other = client.post("/v1/commands/key/create", json={"name": "other"}).json()["key"]
        assert client.post("/v1/commands/key/revoke", json={"name": "other"}).status_code == 200
        assert client.post("/v1/commands/key/remove", json={"name": "other"}).status_code == 200
        refused = client.post("/v1/commands/key/remove", json={"name": "only"})
        assert (refused.status_code, refused.json()["code"]) == (409, "last_key")
        assert "lets every program on this machine in" in refused.json()["detail"]
        assert "--force" in refused.json()["hint"]
        assert client.get("/v1/models").status_code == 403  # the key still works, and may not chat
    for wrong in (other, "syn-nothing"):
        with with_key(empty, wrong) as client:
            assert client.get("/v1/models").status_code == 401
    empty.command("key/remove", secret, name="only", force=True)
    with empty.http() as client:
        assert client.get("/v1/models").status_code == 200
    assert make(empty, "only", "manage") != secret


def test_a_name_is_used_once_and_an_unknown_one_cannot_be_revoked(empty: Live) -> None:
    secret = make(empty, "laptop", "manage")
    with with_key(empty, secret) as client:
        assert client.post("/v1/commands/key/create", json={"name": "laptop"}).status_code == 409
        assert client.post("/v1/commands/key/revoke", json={"name": "phone"}).status_code == 404
        revoked = client.post("/v1/commands/key/create", json={"name": "phone"}).json()["name"]
        first = client.post("/v1/commands/key/revoke", json={"name": revoked}).json()
        assert client.post("/v1/commands/key/revoke", json={"name": revoked}).json() == first


def test_the_last_use_of_a_key_is_noted(empty: Live) -> None:
    secret = make(empty, "laptop", "read")
    assert empty.command("key/list", secret)["items"][0]["last_used_at"]


def test_no_key_is_made_with_no_or_an_unknown_permission(empty: Live) -> None:
    with empty.http() as client:
        for permissions in ([], ["root"]):
            response = client.post("/v1/commands/key/create", json={"name": "k", "permissions": permissions})
            assert response.status_code == 400
            assert response.json()["details"]["param"].startswith("permissions")
