"""Streaming clients of an OpenAI-compatible server, in a process of their own: `python -m benchmarks.serving_clients`.

One JSON job a line in, one JSON answer a line out. The process shares the cores with the server that is measured, so it
does next to nothing: one selector, no HTTP library, and no more of a stream is read than when its text began, and the
token counts at its end.

| field of a job | |
| --- | --- |
| port | of the server, on this machine |
| clients | for each client the bodies of its requests, which it sends one after the other |
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from synapse.errors import Unavailable

ROOT = Path(__file__).parents[1]
TEXT = re.compile(rb'"content":\s*"[^"]')
"""A chunk with text. The chunk that only names the role has none."""
TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
END = b"data: [DONE]"
TAIL = 4096
"""Bytes kept of a stream, for its end: the chunk with the token counts is one of the last."""
PATIENCE_S = 300.0


@dataclass(slots=True)
class Answer:
    """One answer: seconds until its text began and until it ended, and its tokens."""

    first_s: float
    seconds: float
    tokens: int


@dataclass(slots=True)
class Answers:
    """What all clients got, and the seconds from the first request to the end of the last answer."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


class Client:
    """One client: its requests one after the other, each over a connection of its own."""

    def __init__(self, port: int, bodies: Sequence[str], selector: selectors.BaseSelector) -> None:
        self.answers: list[Answer] = []
        self._port = port
        self._bodies = iter(bodies)
        self._selector = selector
        self.next()

    def next(self) -> bool:
        """Send the next request; whether there was one."""
        body = next(self._bodies, None)
        if body is None:
            return False
        data = body.encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self._tail = b""
        self._first = 0.0
        self._socket = socket.create_connection(("127.0.0.1", self._port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start = time.perf_counter()
        self._socket.sendall(head.encode() + data)
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ, self)
        return True

    def read(self) -> bool:
        """Take what has arrived; whether this client has more to come."""
        data = self._socket.recv(65536)
        self._tail = (self._tail + data)[-TAIL:]
        if not self._first and TEXT.search(self._tail):
            self._first = time.perf_counter()
        if data and END not in self._tail:
            return True
        self._selector.unregister(self._socket)
        self._socket.close()
        tokens = TOKENS.search(self._tail)
        if END not in self._tail or not self._first or tokens is None:
            raise Unavailable(f"an answer broke off: {self._tail[-1000:].decode(errors='replace')}")
        now = time.perf_counter()
        self.answers.append(Answer(self._first - self._start, now - self._start, int(tokens[1])))
        return self.next()


def run_clients(port: int, clients: Sequence[Sequence[str]]) -> Answers:
    """Run all clients at once, until the last has its last answer.

    Raises:
        Unavailable: a server refused a request, or did not go on.
    """
    with selectors.DefaultSelector() as selector:
        start = time.perf_counter()
        running = [Client(port, bodies, selector) for bodies in clients]
        left = len(running)
        while left:
            ready = selector.select(PATIENCE_S)
            if not ready:
                raise Unavailable(f"nothing came for {PATIENCE_S:g} seconds")
            left -= sum(not key.data.read() for key, _ in ready)
        seconds = time.perf_counter() - start
    return Answers(seconds, [answer for client in running for answer in client.answers])


class Clients:
    """The process of the clients, as a context manager. It lives on between the jobs."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.serving_clients"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
        )
        self.process = self._process.pid

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, port: int, clients: Sequence[Sequence[dict[str, Any]]]) -> Answers:
        """As `run_clients`, with bodies that are not yet written as JSON."""
        assert self._process.stdin and self._process.stdout
        bodies = [[json.dumps(body) for body in of_one] for of_one in clients]
        print(json.dumps({"port": port, "clients": bodies}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        said = json.loads(line) if line else {"error": "the clients have ended"}
        if "error" in said:
            raise Unavailable(said["error"])
        return Answers(said["seconds"], [Answer(**answer) for answer in said["answers"]])


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        try:
            said = asdict(run_clients(job["port"], job["clients"]))
        except (Unavailable, OSError) as error:
            said = {"error": str(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
