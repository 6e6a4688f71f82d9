"""What a model took of the system's memory it gives back when it is closed, and no round of it leaves anything."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from support.native_engine import resident_bytes
from synapse.commands import Context
from synapse.config import Settings
from synapse.engines import EngineHost, Request, open_engines

pytestmark = pytest.mark.slow

SPARE = 48 * 2**20
"""Bytes that may stay: pages of the allocator's that something else lies on. The weights alone have 540 MB."""
ROUNDS = 2
REQUEST = Request(tuple(range(100, 200)), max_tokens=4, ignore_eos=True)


def test_memory_is_what_it_was_before_the_model_was_opened(default_model: Path, tmp_path: Path) -> None:
    """In a process of its own: here other tests have left what they have."""
    command = [
        sys.executable,
        "-c",
        "import sys; sys.path[:0] = ['tests', 'tests/engines']; from test_memory_returns import measure; measure()",
        str(default_model),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, taken = map(int, done.stdout.split()[-2:])
    assert taken > 540_000_000
    assert grown < SPARE


def measure() -> None:
    """Print by how many bytes the process has grown after all rounds but the first, and how many one model takes."""
    asyncio.run(_measure(sys.argv[1], Path(sys.argv[2])))


async def _measure(model: str, home: Path) -> None:
    async with Context(Settings(home=home, backend="reference", keep_alive=0, kv_cache_tokens=8192)) as context:
        host = await context.get(open_engines)
        await _open_and_close(host, model)
        gc.disable()  # nothing waits for the collector
        before = resident_bytes()
        taken = max([await _open_and_close(host, model) for _ in range(ROUNDS)]) - before
        print(resident_bytes() - before, taken)


async def _open_and_close(host: EngineHost, model: str) -> int:
    client = await host.get(model)
    async for _ in client.generate(REQUEST):
        pass
    taken = resident_bytes()
    client.close()
    while host.residency.bytes:
        await asyncio.sleep(0.01)
    return taken
