"""Connections that never become requests, more of them than there are files, and clients that do not read."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from support.live_server import running, wait_until

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
SERVE = """
import asyncio, resource, sys
from synapse.commands import Context
from synapse.config import load_settings
from synapse.server.app import create_app
from synapse.server.http.request_log import configure_logging
from synapse.server.run import bind, make_server

async def main():
    async with Context(load_settings()) as context:
        listener = await bind(context)
        print(listener.getsockname()[1], flush=True)
        await make_server(create_app(context)).serve(sockets=[listener])

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
configure_logging()
asyncio.run(main())
"""


@contextmanager
def with_few_files(home: Path, log: Path) -> Iterator[int]:
    """A server as a process that may open 256 files, and its port. It has no model, and needs none here."""
    environment = {"SYNAPSE_HOME": str(home), "SYNAPSE_PORT": "0", "PATH": "/usr/bin:/bin"}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=60)


def half_sent(port: int, count: int, stack: ExitStack) -> list[socket.socket]:
    sockets = []
    for _ in range(count):
        sockets.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)))
        sockets[-1].sendall(HALF)
    return sockets


def test_health_answers_beside_more_connections_than_there_are_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with with_few_files(tmp_path / "home", log) as port, ExitStack() as stack:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
        half_sent(port, 400, stack)
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    assert log.stat().st_size < 64 * 1024, log.read_text()[:2000]


def test_half_sent_requests_are_closed_and_idle_connections_are_not(tmp_path: Path) -> None:
    with running(tmp_path / "home", limits={"header_seconds": 0.5}) as live, ExitStack() as stack:
        idle = stack.enter_context(live.http())
        assert idle.get("/health").status_code == 200
        waiting = stack.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=60))  # sends nothing
        again = stack.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=60))
        again.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += again.recv(4096)
        again.sendall(HALF)  # a second request of a connection is no better than a first
        for each in [*half_sent(live.port, 300, stack), waiting, again]:
            said = b"".join(iter(lambda each=each: each.recv(4096), b""))
            assert said.startswith(b"HTTP/1.1 408")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        wait_until(lambda: len(live.server.server_state.connections) == 1)
        assert idle.get("/health").status_code == 200


def test_who_waits_without_a_request_gives_way_and_who_has_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synapse.server.run.most_connections", lambda: 3)
    with running(tmp_path / "home") as live, ExitStack() as stack, live.http() as client:
        listeners = []
        for _ in range(2):
            response = stack.enter_context(client.stream("GET", "/v1/events"))
            listeners.append(response)
        half_sent(live.port, 1, stack)
        assert httpx.get(f"{live.url}/health").status_code == 200, "the half-sent one gave way"
        listeners.append(stack.enter_context(client.stream("GET", "/v1/events")))
        refused = httpx.get(f"{live.url}/health")
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert "3 connections" in refused.json()["error"]["message"]
        listeners.pop().close()
        wait_until(lambda: len(live.server.server_state.connections) < 3)
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_client_that_does_not_read_is_let_go_and_the_log_says_so(tmp_path: Path) -> None:
    with (
        capture_logs() as logs,
        running(tmp_path / "home", limits={"unread_seconds": 0.5}) as live,
        ExitStack() as stack,
    ):
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stack.enter_context(deaf)
        deaf.connect(("127.0.0.1", live.port))
        wait_until(lambda: len(live.server.server_state.connections) == 1)
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        for _ in range(200):  # of which each has tens of kilobytes to answer
            try:
                deaf.sendall(ask)
            except OSError:
                break
        wait_until(lambda: not live.server.server_state.connections)
    told = [entry for entry in logs if "did not read its answer" in entry["event"]]
    assert [(entry["log_level"], entry["seconds"]) for entry in told] == [("warning", 0.5)]
