"""Real servers on free ports, each in a thread with an event loop of its own, and what their tests need beside them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from safetensors.numpy import save_file

from synapse.commands import Context, find_command
from synapse.config import Settings
from synapse.engines import EngineHost, EngineStats, open_engines
from synapse.server.app import create_app
from synapse.server.http.routing import ServerState
from synapse.server.run import Server, bind, make_server

CONTEXT = 512
MAX_BODY = 64 * 1024
HIDDEN, KV_WIDTH, BLOCKS = 576, 192, 30  # of the default model


@dataclass
class Live:
    """A server that is running, and ways to look inside."""

    url: str
    port: int
    home: Path
    loop: asyncio.AbstractEventLoop
    server: Server
    state: ServerState

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=90, **options)

    def command(self, command: str, secret: str = "", /, **params: Any) -> Any:
        """Run a command over HTTP, with an API key if there is one."""
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        with self.http(headers=headers) as client:
            response = client.post(f"/v1/commands/{command}", json=params)
        assert response.status_code == 200, response.text
        return response.json()

    def run_inside(self, command: str, /, **params: Any) -> Any:
        """Run a command as code of the server's process does, which may name files of this machine."""
        found = find_command(command)
        call = found.run(found.params.model_validate(params), self.state.context)
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(60)

    def stats(self) -> EngineStats:
        """The engine of the only model that is loaded."""

        async def look() -> EngineStats:
            host: EngineHost = await self.state.context.get(open_engines)
            (runner,) = host.loaded.values()
            return runner.snapshot()

        return asyncio.run_coroutine_threadsafe(look(), self.loop).result(10)


@contextmanager
def running(
    home: Path, *, body_timeout: float = 30.0, limits: Mapping[str, float] | None = None, **settings: Any
) -> Iterator[Live]:
    """Run a server until the block is left. Errors of its thread are raised here.

    Args:
        limits: those of `make_server`, where they differ.
    """
    started: Future[Live] = Future()
    chosen = Settings(home=home, port=0, max_context=CONTEXT, max_request_bytes=MAX_BODY, **settings)

    async def main() -> None:
        async with Context(chosen) as context:
            listener = await bind(context)
            app = create_app(context, body_timeout=body_timeout)
            server = make_server(app, **(limits or {}))
            port = listener.getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            started.set_result(Live(url, port, home, asyncio.get_running_loop(), server, app.state.server))
            await server.serve(sockets=[listener])

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    live = started.result(30)
    try:
        yield live
    finally:
        live.loop.call_soon_threadsafe(live.server.stop)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that another thread does."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"did not come true within {seconds} seconds")


def is_ready(live: Live) -> bool:
    return httpx.get(f"{live.url}/ready").status_code == 200


def make_layer(folder: Path) -> Path:
    """A rank-2 adapter for the default model, random and strong enough to change what it says."""
    random = np.random.default_rng(7)
    tensors = {}
    for block in range(BLOCKS):
        for name, width in (("q_proj", HIDDEN), ("v_proj", KV_WIDTH)):
            prefix = f"base_model.model.model.layers.{block}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(0, 0.05, (2, HIDDEN)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.5, (width, 2)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
