"""Servers that are running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.live_server import Live, is_ready, make_layer, running, wait_until


@pytest.fixture(scope="session")
def live(make_model_home: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the default model and two personas: `plain`, and `noisy`, which has a layer."""
    with running(make_model_home(), keep_alive="-1") as server:
        layer = make_layer(tmp_path_factory.mktemp("layers") / "noise")
        server.run_inside("layer/add", source=str(layer), name="noise")
        server.command("persona/create", name="plain", system_prompt="You are brief.", temperature=0.5)
        server.command("persona/create", name="noisy", system_prompt="You are brief.", layers="noise:1.0")
        wait_until(lambda: is_ready(server), 60)
        yield server


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Live]:
    """A server that has no model and no personas, for what needs none."""
    with running(tmp_path / "empty-home") as server:
        yield server
