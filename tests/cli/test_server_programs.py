"""The server apart from the terminal: up, down, status, ps, and chats that use its models."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.tiny_home import MODEL

Synapse = Callable[..., Any]


@pytest.fixture
def server(persona_home: Path, synapse: Synapse, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the home with the persona `pip`; its address."""
    monkeypatch.setenv("SYNAPSE_PORT", "0")
    monkeypatch.setenv("SYNAPSE_EVENTS", "memory")
    ran = synapse("up", "--detach")
    assert ran.code == 0, ran.err
    yield ran.out.split("answers at ")[1].split()[0]
    synapse("down")


def row(ran: Any) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    (found,) = json.loads(ran.out)["items"]
    return found


@pytest.mark.usefixtures("server")
def test_a_server_is_started_once_looked_at_and_stopped(synapse: Synapse) -> None:
    again = synapse("up", "--detach")
    assert (again.code, "running already" in again.err) == (4, True)
    state = json.loads(synapse("status", "--json").out)
    assert (state["pool"], state["models"], state["workers"]) == ("process", 1, 1)
    model = row(synapse("ps", "--json"))
    assert (model["model"], model["backend"], model["workers"], model["active"]) == (MODEL, "reference", 1, 0)
    assert synapse("down").code == 0
    for program in (("status",), ("ps",), ("down",), ("daemon", "workers")):
        ran = synapse(*program)
        assert (ran.code, "no server of this home is running" in ran.err) == (5, True)


@pytest.mark.usefixtures("server")
def test_a_chat_uses_the_servers_model_and_answers_as_it_would_alone(
    synapse: Synapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_server = synapse("chat", "pip", "-m", "hello", "--json")
    assert with_server.code == 0, with_server.err
    assert row(synapse("daemon", "workers", "--json"))["steps"] > 0
    monkeypatch.setenv("SYNAPSE_DAEMON__POOL", "here")
    alone = synapse("chat", "pip", "-m", "hello", "--json")
    assert json.loads(with_server.out)["content"] == json.loads(alone.out)["content"] != ""


def test_an_answer_over_http_outlives_its_worker(server: str, synapse: Synapse) -> None:
    body = {
        "model": MODEL,
        "prompt": "once",
        "max_tokens": 150,
        "temperature": 1.1,
        "seed": 5,
        "logit_bias": {"2": -100},
    }
    alone = httpx.post(f"{server}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    process = row(synapse("daemon", "workers", "--json"))["process"]
    text = ""
    with httpx.stream("POST", f"{server}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if process:
                    os.kill(process, signal.SIGKILL)
                    process = 0
    assert len(text) == len(alone)
    assert text == alone
    assert row(synapse("ps", "--json"))["resumed"] == 1


def test_a_worker_is_ended_and_drained_by_its_number(server: str, synapse: Synapse) -> None:
    def wait_until_ready() -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            rows = json.loads(synapse("daemon", "workers", "--json").out)["items"]
            if [found["state"] for found in rows] == ["ready"]:
                return rows[0]
            time.sleep(0.05)
        raise AssertionError(rows)

    first = wait_until_ready()
    assert json.loads(synapse("daemon", "kill", str(first["worker"]), "--json").out)["state"] == "ended"
    second = wait_until_ready()
    assert second["worker"] > first["worker"]
    assert json.loads(synapse("daemon", "drain", str(second["worker"]), "--json").out)["state"] == "ended"
    assert wait_until_ready()["worker"] > second["worker"]
    missing = synapse("daemon", "kill", "999")
    assert (missing.code, "no worker 999" in missing.err) == (3, True)
    assert httpx.get(f"{server}/ready").json()["ready"] is True


def test_what_keeps_a_server_from_starting_is_shown(
    persona_home: Path, synapse: Synapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_HOST", "192.0.2.1")  # an address of no machine, RFC 5737
    ran = synapse("up", "--detach")
    assert (ran.code, "there is no API key" in ran.err) == (5, True)
    assert (persona_home / "run" / "server.log").exists()


def test_a_unit_for_systemd_names_this_home(persona_home: Path, synapse: Synapse) -> None:
    unit = synapse("up", "--systemd").out
    assert f"Environment=SYNAPSE_HOME={persona_home}" in unit
    assert "ExecStart=" in unit
