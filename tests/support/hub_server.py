"""A server that speaks as much of the Hugging Face hub's protocol as a download needs: HEAD, GET, ranges, errors."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What the server has and what it was asked for.

    Attributes:
        files: content by path, ``org/repo/resolve/main/file.gguf``.
        etags: what it claims as sha256, where that is not the truth.
        gated: paths that it refuses until terms are accepted.
        break_after: it hangs up after so many bytes of a body, once.
        requests: method, path and Range of each request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    break_after: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path, wanted = self.path.lstrip("/"), self.headers.get("Range")
            hub.requests.append((self.command, path, wanted))
            content = hub.files.get(path)
            if path in hub.gated or content is None:
                self.send_response(403 if path in hub.gated else 404)
                self.send_header("X-Error-Code", "GatedRepo" if path in hub.gated else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hub.etags.get(path) or hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                end = len(content)
                if hub.break_after is not None:
                    end, hub.break_after = start + hub.break_after, None
                self.wfile.write(content[start:end])
                if end < len(content):
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
