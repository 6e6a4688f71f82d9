"""The server as a process: where it binds, what it says, how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from synapse.commands import Context
from synapse.config import Settings
from synapse.errors import InvalidInput, NotFound, Unavailable
from synapse.server.keys import new_key
from synapse.server.run import NeedsKey, PortInUse, bind, greeting, serve
from synapse.store import open_store

SERVE = "from synapse.config import load_settings; from synapse.server.run import serve; serve(load_settings())"
EVERYWHERE = "0.0.0.0"  # noqa: S104 (what is tested)


def settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings(home=tmp_path / "home", **({"port": 0} | changes))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_loopback_needs_no_key(tmp_path: Path, host: str) -> None:
    async with Context(settings(tmp_path, host=host)) as context:
        with await bind(context) as listener:
            assert listener.getsockname()[1] > 0


async def test_other_addresses_need_a_key(tmp_path: Path) -> None:
    async with Context(settings(tmp_path, host=EVERYWHERE)) as context:
        with pytest.raises(NeedsKey) as caught:
            await bind(context)
        assert "synapse key create NAME" in str(caught.value.hint)
        _, key = new_key("laptop", ["chat"])
        await (await context.get(open_store)).create(key)
        with await bind(context) as listener:
            assert listener.getsockname()[0] == EVERYWHERE


async def test_a_port_in_use_is_said_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        async with Context(settings(tmp_path, port=other.getsockname()[1])) as context:
            with pytest.raises(PortInUse, match=r"another program listens on 127\.0\.0\.1:") as caught:
                await bind(context)
    assert "SYNAPSE_PORT" in str(caught.value.hint)


async def test_a_host_that_cannot_be_bound_is_said_in_words(tmp_path: Path) -> None:
    async with Context(settings(tmp_path, host="no such host")) as context:
        with pytest.raises(InvalidInput, match="cannot be found"):
            await bind(context)
    async with Context(settings(tmp_path, host="192.0.2.1")) as context:  # an address of no machine, RFC 5737
        _, key = new_key("laptop", ["chat"])
        await (await context.get(open_store)).create(key)
        with pytest.raises(Unavailable, match="cannot listen"):
            await bind(context)


async def test_the_greeting_says_where_who_and_how(tmp_path: Path) -> None:
    async with Context(settings(tmp_path)) as context:
        with await bind(context) as listener:
            text = await greeting(context, listener)
            assert f"http://127.0.0.1:{listener.getsockname()[1]}" in text
            assert "synapse persona create" in text
            assert "curl" in text
            assert "Bearer" not in text
            _, key = new_key("laptop", ["chat"])
            await (await context.get(open_store)).create(key)
            assert "Bearer KEY" in await greeting(context, listener)


async def test_a_server_for_everywhere_greets_with_an_address_that_can_be_asked(tmp_path: Path) -> None:
    async with Context(settings(tmp_path, host=EVERYWHERE)) as context:
        _, key = new_key("laptop", ["chat"])
        await (await context.get(open_store)).create(key)
        with await bind(context) as listener:
            text = await greeting(context, listener)
            url = text.split("answers at ")[1].split()[0]
            assert EVERYWHERE not in text
            host = url.removeprefix("http://").rpartition(":")[0]
            with socket.create_connection((host, listener.getsockname()[1]), timeout=10):
                pass


def test_without_the_default_model_it_stops_and_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        serve(settings(tmp_path))
    assert "synapse model pull" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_greets_answers_and_stops_cleanly_on_a_signal(default_model_home: Path, stop: signal.Signals) -> None:
    environment = os.environ | {"SYNAPSE_HOME": str(default_model_home), "SYNAPSE_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" ")[3]
        assert httpx.get(f"{url}/ready").json()["ready"] is True
        body = {"model": "smollm2-135m", "prompt": "One", "max_tokens": 30, "stream": True, "logit_bias": {"2": -100}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(stop)
            assert list(lines)[-2:] == ["data: [DONE]", ""]  # the answer in progress is finished first
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert '"path": "/v1/completions"' in errors
    assert "Traceback" not in errors
