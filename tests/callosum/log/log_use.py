"""What the tests of every log do with one."""

from __future__ import annotations

import asyncio
from typing import Any

from callosum.log.log_backends import note, said
from synapse.callosum.log.contract import Delivery, Entry, Log, Position
from synapse.callosum.message import Message, Tract

SHORT = 0.15
"""A lease, in seconds, that a test can wait for."""
LONG = 60.0
EXTERNAL, INTERNAL = Tract.EXTERNAL, Tract.INTERNAL


async def claim(log: Log, group: str = "g", limit: int = 100, tract: Tract = INTERNAL) -> list[Delivery]:
    return await log.claim(group, "somebody", limit, tract)


async def claim_until_some(log: Log, group: str = "g") -> list[Delivery]:
    """As a consumer does it: look, and where there is nothing, wait for a change."""
    async with asyncio.timeout(20):
        while not (found := await claim(log, group)):
            await log.changed(0.5)
    return found


async def read_all(log: Log, pattern: str = "**", page: int = 1000) -> list[Entry]:
    entries: list[Entry] = []
    after: Position | None = None
    while found := await log.read(after, page, pattern):
        entries += found
        after = found[-1].position
    return entries


def fields(message: Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in Message.__slots__}


async def buried(log: Log, *texts: str, group: str = "g") -> list[str]:
    """Dead letters that say these texts, and their ids."""
    await log.join(group, "**", lease_s=LONG)
    await log.append([note(text, key=f"{group} {text}") for text in texts])
    for delivery in await claim(log, group):
        await log.bury(group, delivery, "failed", f"no {said([delivery])[0]}")
    found = {said([letter])[0]: letter.id for letter in await log.dead() if letter.group == group}
    return [found[text] for text in texts]


async def claim_after_change(log: Log) -> list[Delivery]:
    while not (found := await claim(log)):
        await log.changed(LONG)
    return found
