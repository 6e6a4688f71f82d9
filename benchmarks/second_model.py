"""What the opening of a second model does to the gaps between the tokens of a first one that answers meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

from synapse.commands import Context
from synapse.config import Settings
from synapse.engines import Delta, EngineClient, Request, Sampling, open_engines

PAUSE = 0.5
"""Seconds in which a model is closed again."""
PROMPT = tuple(range(100, 132))


def another_file(model: Path, folder: Path) -> Path:
    """A copy of a model whose last weight is another one: a second model of the same size."""
    folder.mkdir(parents=True)
    copy = folder / model.name
    shutil.copyfile(model, copy)
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    return copy


class Streaming:
    """One answer after another, without end; when each token came."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._times: list[float] = []
        self._began = asyncio.Event()
        self._task = asyncio.create_task(self._stream())

    async def _stream(self) -> None:
        for seed in range(10**6):
            request = Request(PROMPT, sampling=Sampling(seed=seed), max_tokens=400, ignore_eos=True)
            async with aclosing(self._client.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        self._times.append(time.perf_counter())
                        self._began.set()

    async def gaps(self, work: Callable[[], Awaitable[object]]) -> tuple[list[float], float]:
        """The gaps that end while some work is done, and how long that takes."""
        await self._began.wait()
        start = time.perf_counter()
        await work()
        end = time.perf_counter()
        return [b - a for a, b in pairwise(self._times) if start <= b and a <= end], end - start

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def second_model_rows(
    model: Path, home: Path, openings: int, *, idle_seconds: float = 5.0, **settings: Any
) -> list[dict[str, Any]]:
    """Gaps while nothing else is done, while a model is opened that has to be packed, and while one is that is packed.

    Args:
        home: a folder, for packed models.
        openings: of each kind.
        settings: what else is not as by default.
    """
    second = another_file(model, home / "second")
    found: dict[str, list[tuple[list[float], float]]] = {}
    async with Context(Settings(home=home, keep_alive=0, **settings)) as context:
        host = await context.get(open_engines)
        client = await host.get(str(model))
        packed = {*(home / "packed").glob("*.pack")}

        async def open_it() -> None:
            (await host.get(str(second))).close()

        streaming = Streaming(client)
        found["nothing"] = [await streaming.gaps(lambda: asyncio.sleep(idle_seconds))]
        for _ in range(openings):
            for pack in {*(home / "packed").glob("*.pack")} - packed:
                pack.unlink()
            for name in ("a model that is not packed", "a model that is packed"):
                found.setdefault(name, []).append(await streaming.gaps(open_it))
                await asyncio.sleep(PAUSE)
        await streaming.stop()
        client.close()
    rows = [_row(name, measured) for name, measured in found.items()]
    return [{**row, "p99_of_idle": row["gap_p99_ms"] / rows[0]["gap_p99_ms"]} for row in rows]


def _row(name: str, measured: list[tuple[list[float], float]]) -> dict[str, Any]:
    gaps = sorted(gap for each, _ in measured for gap in each)
    return {
        "opened meanwhile": name,
        "seconds": statistics.median(seconds for _, seconds in measured),
        "gaps": len(gaps),
        "gap_p50_ms": 1000 * gaps[len(gaps) // 2],
        "gap_p99_ms": 1000 * gaps[int(0.99 * len(gaps))],
        "widest_gap_ms": 1000 * gaps[-1],
    }
