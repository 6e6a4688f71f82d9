"""A running server sees what another process changes, although it reads the store once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.live_server import Live, is_ready, running, wait_until
from support.tiny_home import MODEL, TinyHome, build_tiny_home
from synapse.callosum.kept import Kept, open_kept

RUN = "import sys; from synapse.cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return build_tiny_home(tmp_path_factory.mktemp("tiny") / "home")


@pytest.fixture
def live(tiny_home: TinyHome, tmp_path: Path) -> Iterator[Live]:
    """A server that reads nothing again by itself: only an event can tell it."""
    home = tiny_home.copy(tmp_path / "home")
    terminal(home, "persona", "create", "ada", "--layers", "first:1.0")
    with running(home, default_model=MODEL, backend="reference") as server:
        wait_until(lambda: is_ready(server), 60)
        kept: Kept = asyncio.run_coroutine_threadsafe(server.state.context.get(open_kept), server.loop).result(30)
        wait_until(lambda: kept._listening)
        kept._longest_s = 3600
        yield server


def terminal(home: Path, *words: str) -> str:
    """Run `synapse` in a process of its own."""
    environment = {"SYNAPSE_HOME": str(home), "SYNAPSE_DEFAULT_MODEL": MODEL, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", RUN, *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(live: Live, secret: str = "", **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    body = {"model": "ada", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "seed": 1} | more
    with live.http(headers=headers) as client:
        return client.post("/v1/chat/completions", json=body)


def prompt_tokens(live: Live) -> int:
    return int(ask(live).json()["usage"]["prompt_tokens"])


def test_a_persona_that_is_edited_in_a_terminal(live: Live) -> None:
    before = prompt_tokens(live)
    terminal(live.home, "persona", "edit", "ada", "--system-prompt", "You speak at length, and of the sea.")
    wait_until(lambda: prompt_tokens(live) > before)
    terminal(live.home, "persona", "delete", "ada")
    wait_until(lambda: ask(live).status_code == 404)


def test_a_key_that_is_made_and_revoked_in_a_terminal(live: Live) -> None:
    assert ask(live).status_code == 200
    secret = json.loads(terminal(live.home, "key", "create", "laptop"))["key"]
    wait_until(lambda: ask(live).status_code == 401)
    assert [ask(live, secret).status_code for _ in range(3)] == [200, 200, 200]
    terminal(live.home, "key", "revoke", "laptop")
    wait_until(lambda: ask(live, secret).status_code == 401)


def test_what_the_server_itself_changes_counts_for_the_next_request(live: Live) -> None:
    before = prompt_tokens(live)
    for length in (20, 40, 60):
        live.command("persona/edit", name="ada", system_prompt="word " * length)
        assert prompt_tokens(live) > before
        before = prompt_tokens(live)


def count_reads(live: Live, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    from synapse.store import Store

    reads = []
    atomically = Store.atomically

    async def counted(self: Store, work: Any, **options: Any) -> Any:
        reads.append(work)
        return await atomically(self, work, **options)

    monkeypatch.setattr(Store, "atomically", counted)
    return lambda: len(reads)


def test_a_second_request_reads_nothing_of_the_store(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(live)
    reads = count_reads(live, monkeypatch)
    for _ in range(3):
        assert ask(live).status_code == 200
    assert reads() == 0
