"""`/health`, `/ready`, request ids and the log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from starlette.requests import Request

from support.live_server import Live, is_ready, running, wait_until
from synapse.commands import Context
from synapse.config import Settings
from synapse.server.app import create_app
from synapse.server.http.request_log import configure_logging


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What is logged, with the logging of the process put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    configure_logging(stream)
    yield stream
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_a_server_with_its_model_and_its_store_is_ready(live: Live) -> None:
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{live.url}/ready").json()["ready"] is True
    (engine,) = httpx.get(f"{live.url}/ready").json()["engines"]
    assert engine["backend"] == "native" or (engine["reason"] and engine["hint"])
    assert live.openai().models.retrieve(engine["model"]).backend == engine["backend"]


def test_a_server_without_its_model_is_healthy_and_not_ready(empty: Live) -> None:
    wait_until(lambda: "cannot be loaded" in str(empty.state.loading))
    assert httpx.get(f"{empty.url}/health").status_code == 200
    response = httpx.get(f"{empty.url}/ready")
    assert response.status_code == 503
    (reason,) = response.json()["reasons"]
    assert "smollm2-135m" in reason


def test_a_server_whose_model_was_unloaded_is_ready_and_says_what_is_so(make_model_home: Callable[[], Path]) -> None:
    with running(make_model_home(), keep_alive="0") as live:
        wait_until(lambda: is_ready(live), 60)
        wait_until(lambda: httpx.get(f"{live.url}/ready").json()["engines"] == [])
        assert httpx.get(f"{live.url}/ready").json()["ready"] is True
        assert live.openai().models.retrieve("smollm2-135m").backend is None
        assert live.command("engine/stats")["items"] == []
        answer = live.openai().chat.completions.create(
            model="smollm2-135m", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
        with live.openai().chat.completions.create(
            model="smollm2-135m", messages=[{"role": "user", "content": "Hello"}], max_tokens=100, stream=True
        ) as stream:
            next(iter(stream))
            assert len(live.command("engine/stats")["items"]) == 1
        wait_until(lambda: live.command("engine/stats")["items"] == [])  # a client that hangs up lets go, too


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(make_model_home: Callable[[], Path]) -> None:
    with running(make_model_home(), max_model_bytes=2**20) as live:
        wait_until(lambda: "needs" in str(live.state.loading))
        assert httpx.get(f"{live.url}/ready").status_code == 503
        body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}
        refused = httpx.post(f"{live.url}/v1/chat/completions", json=body)
        assert refused.status_code == 503
        error = refused.json()["error"]
        assert error["code"] == "no_memory"
        assert "all models together may take 1.05 MB" in error["message"]


def test_neither_needs_a_key(empty: Live) -> None:
    empty.command("key/create", name="laptop")
    assert httpx.get(f"{empty.url}/health").status_code == 200
    assert httpx.get(f"{empty.url}/ready").status_code == 503


async def test_a_server_that_is_stopping_or_has_no_store_says_so(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url=f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/secret.db")
    async with Context(settings) as context:
        app = create_app(context)
        app.state.server.loading = None
        app.state.server.stop.set()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.get("/ready")
    assert response.status_code == 503
    assert response.json()["reasons"] == ["the store does not answer", "the server is stopping"]
    assert "secret" not in response.text


def test_a_request_id_is_echoed_when_it_is_plain_and_made_when_it_is_not(empty: Live) -> None:
    with empty.http() as client:
        assert client.get("/health", headers={"X-Request-ID": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
        for odd in ("", "a b", "x" * 200, '{"forged": 1}'):
            made = client.get("/nowhere", headers={"X-Request-ID": odd}).headers["x-request-id"]
            assert made != odd
            assert len(made) == 32


def test_each_request_is_one_line_without_bodies_keys_or_queries(empty: Live, logged: io.StringIO) -> None:
    with empty.http() as client:
        headers = {"Authorization": "Bearer syn-very-secret", "X-Request-ID": "me"}
        client.post("/v1/commands/persona/show?token=hidden", json={"name": "private-name"}, headers=headers)
    wait_until(lambda: "persona/show" in logged.getvalue())
    (line,) = [line for line in logged.getvalue().splitlines() if "persona/show" in line]
    entry = json.loads(line)
    assert {name: entry[name] for name in ("event", "method", "path", "status", "request_id", "level")} == {
        "event": "request",
        "method": "POST",
        "path": "/v1/commands/persona/show",
        "status": 404,
        "request_id": "me",
        "level": "info",
    }
    assert entry["ms"] > 0
    for secret in ("very-secret", "hidden", "private-name"):
        assert secret not in logged.getvalue()


def test_the_log_is_readable_on_a_terminal(logged: io.StringIO) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    configure_logging(terminal)
    structlog.get_logger("synapse.server").info("request", path="/health")
    assert "/health" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


async def test_a_defect_is_500_and_tells_nothing_of_what_is_inside(tmp_path: Path) -> None:
    async with Context(Settings(home=tmp_path)) as context:
        app = create_app(context)

        @app.get("/v1/broken")
        async def broken(request: Request) -> None:
            raise RuntimeError("the inner secret")

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.get("/v1/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "inner secret" not in response.text


def test_metrics_are_prometheus_text_and_need_permission_once_there_are_keys(empty: Live) -> None:
    response = httpx.get(f"{empty.url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert "# TYPE synapse_hotpath_answers_total counter" in response.text
    assert "# TYPE synapse_engine_slow_readers_total counter" in response.text
    empty.command("key/create", name="chatter")
    assert httpx.get(f"{empty.url}/metrics").status_code == 401


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/openapi.json", "/nowhere", "/v1/events"])
def test_head_is_answered_as_get_without_the_body(empty: Live, path: str) -> None:
    with empty.http() as client:
        head = client.head(path)
        with client.stream("GET", path) as get:
            assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
            assert head.headers.get("content-length") == get.headers.get("content-length")
        assert head.content == b""
