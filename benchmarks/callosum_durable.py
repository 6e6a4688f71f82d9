"""Durable publishing and consuming: the contenders of `benchmarks.callosum_peers` take turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.callosum_peers import Contender, Opening, embedded, nats_server, valkey_server
from benchmarks.callosum_router import BATCH, new_messages
from synapse.callosum.message import Message

PEER = "NATS"
OURS = ("embedded", "Valkey")
IN_FLIGHT = 64


@dataclass(frozen=True)
class Sizes:
    """Messages a round: waiting for each one, with several on the way, and in batches, which are then consumed."""

    alone: int
    in_flight: int
    batches: int


async def one_by_one(contender: Contender, messages: Sequence[Message]) -> None:
    for message in messages:
        await contender.publish(message)


async def in_flight(contender: Contender, messages: Sequence[Message]) -> None:
    async def publish(part: Sequence[Message]) -> None:
        await one_by_one(contender, part)

    await asyncio.gather(*(publish(messages[n::IN_FLIGHT]) for n in range(IN_FLIGHT)))


async def in_batches(contender: Contender, messages: Sequence[Message]) -> None:
    for start in range(0, len(messages), BATCH):
        await contender.publish_many(messages[start : start + BATCH])


Way = Callable[[Contender, Sequence[Message]], Awaitable[None]]


async def speed(work: Awaitable[None], number: int) -> float:
    start = time.perf_counter()
    await work
    return number / (time.perf_counter() - start)


async def turn(opening: Opening, sizes: Sizes) -> dict[str, float]:
    """Messages a second of each kind of work, for one contender; each on an empty stream, but the consuming."""
    ways: dict[str, tuple[Way, int]] = {
        "publish, each waited for": (one_by_one, sizes.alone),
        f"publish, {IN_FLIGHT} on their way": (in_flight, sizes.in_flight),
    }
    found = {}
    for name, (way, number) in ways.items():
        async with opening() as contender:
            found[name] = await speed(way(contender, new_messages(number)), number)
    async with opening() as contender:
        messages = new_messages(sizes.batches)
        found[f"publish in batches of {BATCH}"] = await speed(in_batches(contender, messages), len(messages))
        found["consume and acknowledge"] = await speed(contender.consume(len(messages)), len(messages))
    return found


async def durable(folder: Path, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Messages a second of each contender, and ours as a multiple of NATS."""
    speeds: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        contenders = {"embedded": embedded(folder)}
        for name, server in (("Valkey", valkey_server), (PEER, nats_server)):
            own = folder / name
            own.mkdir()
            contenders[name] = await stack.enter_async_context(server(own))
        for _ in range(rounds):
            for name, opening in contenders.items():
                for work, each in (await turn(opening, sizes)).items():
                    speeds.setdefault(work, {}).setdefault(name, []).append(each)
    rows: list[dict[str, Any]] = []
    for work, by_name in speeds.items():
        medians = {name: statistics.median(each) for name, each in by_name.items()}
        ratios = {f"{name}_ratio": medians[name] / medians[PEER] for name in OURS}
        rows.append({"work": work, **{f"{name}_per_s": each for name, each in medians.items()}, **ratios})
    return rows
