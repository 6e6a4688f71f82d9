"""Layers from the Hugging Face hub: its real client, against a server here that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from synapse.commands import Context
from synapse.errors import Forbidden, InvalidInput, NotFound, Unavailable
from synapse.genome.registry import LayerRegistry
from synapse.models.adapters.adapter import LayerRefused
from tests.genome.conftest import Bench

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Hub:
    """Repositories as folders of bytes. `asked` lists the files that were fetched."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        parts = urlsplit(request.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        files = self.repositories.get(repository)
        if repository in self.gated:
            return self._send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if files is None:
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if api and len(parts) > 4 and parts[5] not in ("main", COMMIT):
            return self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if api:
            siblings = [{"rfilename": n, "size": self.sizes.get(n, len(d))} for n, d in files.items()]
            text = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
            return self._send(request, 200, text.encode(), {"Content-Type": "application/json"}, body)
        name = parts[-1]
        if body:
            self.asked.append(name)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self._send(request, 200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        request.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when it is set before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    point_to(hub.url, monkeypatch)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def offer(hub: Hub, folder: Path, repository: str = "ada/captain", **extra: bytes) -> None:
    hub.repositories[repository] = {name: (folder / name).read_bytes() for name in LAYER_FILES} | extra


async def test_a_layer_is_fetched_with_its_card_and_nothing_else(
    registry: LayerRegistry, context: Context, hub: Hub, bench: Bench
) -> None:
    offer(hub, bench.layer, **{"optimizer.pt": b"x" * 1000, "training_args.bin": b"x"})
    told: list[tuple[int, int | None]] = []
    layer = await registry.add("hf:ada/captain", progress=lambda label, done, total: told.append((done, total)))
    assert (layer.name, layer.creator) == ("captain", "ada")
    assert sorted(hub.asked) == sorted(LAYER_FILES)
    for name in LAYER_FILES:
        assert (registry.path(layer) / name).read_bytes() == (bench.layer / name).read_bytes()
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    left = [path.name for path in (context.settings.home / "layers").iterdir()]
    assert sorted(left) == [".lock", layer.sha256]
    assert (await registry.add(f"hf:ada/captain@{COMMIT}")).id == layer.id


async def test_what_the_hub_does_not_have_is_not_found(registry: LayerRegistry, hub: Hub, bench: Bench) -> None:
    offer(hub, bench.layer)
    with pytest.raises(NotFound, match="no model ada/nothing"):
        await registry.add("hf:ada/nothing")
    with pytest.raises(NotFound, match="no revision 'v9'"):
        await registry.add("hf:ada/captain@v9")


async def test_what_the_hub_does_not_give_is_forbidden(registry: LayerRegistry, hub: Hub, bench: Bench) -> None:
    offer(hub, bench.layer)
    hub.gated.add("ada/captain")
    with pytest.raises(Forbidden, match="terms"):
        await registry.add("hf:ada/captain")


async def test_pickles_and_what_is_no_layer_are_refused_before_anything_is_fetched(
    registry: LayerRegistry, hub: Hub, bench: Bench
) -> None:
    offer(hub, bench.layer)
    weights = hub.repositories["ada/captain"].pop("adapter_model.safetensors")
    with pytest.raises(LayerRefused) as caught:
        await registry.add("hf:ada/captain")
    assert caught.value.reason == "missing_file"
    hub.repositories["ada/captain"]["adapter_model.bin"] = weights
    with pytest.raises(LayerRefused) as caught:
        await registry.add("hf:ada/captain")
    assert caught.value.reason == "pickle"
    assert hub.asked == []


async def test_a_layer_that_is_too_large_is_refused_before_anything_is_fetched(
    registry: LayerRegistry, hub: Hub, bench: Bench
) -> None:
    offer(hub, bench.layer)
    hub.sizes["adapter_model.safetensors"] = 10**10
    with pytest.raises(LayerRefused) as caught:
        await registry.add("hf:ada/captain")
    assert caught.value.reason == "too_large"
    assert hub.asked == []


async def test_without_a_network_the_error_says_what_to_do(
    registry: LayerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(Unavailable, match="ada/captain") as caught:
        await registry.add("hf:ada/captain")
    assert "network" in str(caught.value.hint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE"):
        await registry.add("hf:ada/captain")


@pytest.mark.parametrize("source", ["hf:", "hf:captain", "hf:a/b/c", "hf:../..", "hf:a b/c"])
async def test_a_source_that_names_no_repository_is_invalid(registry: LayerRegistry, source: str) -> None:
    with pytest.raises(InvalidInput):
        await registry.add(source)
