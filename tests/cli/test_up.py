from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

SYNAPSE = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]

pytestmark = pytest.mark.usefixtures("persona_home")


def test_up_serves_the_personas_until_it_is_interrupted() -> None:
    with subprocess.Popen(
        [*SYNAPSE, "up", "--port", "0"], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as up:
        assert up.stdout is not None
        try:
            greeting = up.stdout.readline()
            url = greeting.split("answers at ")[1].split()[0]
            with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:  # noqa: S310 (our own server)
                served = json.load(response)
            assert "pip" in [model["id"] for model in served["data"]]
            up.send_signal(signal.SIGINT)
            assert up.wait(30) == 0
        except BaseException:
            up.kill()  # leaving the block waits for it
            raise


def test_up_on_a_port_that_is_taken_is_a_conflict(synapse) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = synapse("up", "--port", str(taken.getsockname()[1]), "--json")
    assert ran.code == 4
    assert json.loads(ran.err.splitlines()[-1])["code"] == "port_in_use"


def test_a_port_that_is_none_is_refused(synapse) -> None:
    ran = synapse("up", "--port", "99999")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: invalid value for '--port': ")


def test_a_default_model_that_cannot_be_fetched_is_told(
    synapse, monkeypatch: pytest.MonkeyPatch, persona_home: Path
) -> None:
    monkeypatch.setenv("SYNAPSE_DEFAULT_MODEL", "nowhere")
    ran = synapse("up", "--port", "0")
    assert ran.code == 3
    assert "the model nowhere is not here yet" in ran.err
