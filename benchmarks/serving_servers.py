"""The servers that `benchmarks.serving` compares, each a process of its own: `synapse up`, and llama.cpp's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.neighbours import cpu_seconds
from synapse.errors import Unavailable

ROOT = Path(__file__).parents[1]
START_S = 180.0
"""Seconds that a server gets until it is ready: ours may have to build its kernel first."""
CLOSE_S = 40.0


class ServerProcess:
    """A server in a process of its own, on a free port, as a context manager; it is ready once the block begins."""

    def __init__(
        self, command: Sequence[str], *, port: int, ready: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            ready: the path that answers 200 when it is.
            log: where its output goes.
        """
        self.port = port
        self._ready = ready
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **(environment or {})}, cwd=ROOT
            )
        self.process = self._process.pid

    def __enter__(self) -> ServerProcess:
        until = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self._end()
                last = self._log.read_text(errors="replace")[-2000:]
                raise Unavailable(f"{self._process.args!r:.200} was not ready after {START_S:g} seconds: {last}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def idle_share(self, seconds: float) -> float:
        """The share of one core that the server and its children take while nobody asks for anything."""
        before = cpu_seconds(self.process)
        time.sleep(seconds)
        return (cpu_seconds(self.process) - before) / seconds

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def synapse_up(settings: Mapping[str, object], log: Path) -> ServerProcess:
    """`synapse up` with these settings."""
    port = free_port()
    environment = {f"SYNAPSE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]
    command += ["up", "--port", str(port)]
    return ServerProcess(command, port=port, ready="/ready", log=log, environment=environment)


def llama_server(
    binary: Path, model: Path, adapters: Sequence[Path], *, flags: Sequence[str], log: Path
) -> ServerProcess:
    """llama.cpp's server with all adapters, none of which is on unless a request asks for it."""
    port = free_port()
    command = [str(binary), "--model", str(model), "--port", str(port), *flags]
    command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    return ServerProcess(command, port=port, ready="/health", log=log)


def quantised(binary: Path, model: Path, target: Path, name: str, threads: int) -> Path:
    """The model in another format, made by the `llama-quantize` that lies beside the server."""
    command = [str(binary.with_name("llama-quantize")), "--allow-requantize", str(model), str(target), name]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"llama-quantize cannot make {name}: {done.stderr[-1000:]}")
    return target
