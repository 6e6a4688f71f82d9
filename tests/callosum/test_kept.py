"""What is kept of the store, and what makes it be read again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from synapse.callosum.kept import MOST, Kept, open_kept
from synapse.callosum.log.opening import open_log
from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import publish
from synapse.commands import Context
from synapse.config import Settings
from synapse.errors import NotFound

LONG = 3600.0


class News(BaseModel):
    """Something happened."""

    name: str = "ada"


class Reads:
    """Counts, as something that changes at each reading."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> int:
        self.count += 1
        return self.count


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    async with Context(Settings(home=tmp_path / "home")) as context:
        found = await context.get(open_kept)
        found._longest_s = LONG
        stop = await found.listen(context)
        yield found
        stop()


async def other_process(tmp_path: Path, topic: str) -> None:
    """Write to the log of the same home as another process does, with a connection of its own."""
    async with Context(Settings(home=tmp_path / "home")) as context:
        await (await context.get(open_log)).append([Message(topic, News())])


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_nothing_is_kept_while_nothing_tells_of_changes() -> None:
    kept, read = Kept(), Reads()
    assert [await kept.get("a", read) for _ in range(3)] == [1, 2, 3]


async def test_a_value_is_read_once_until_an_event_of_this_process(kept: Kept) -> None:
    read = Reads()
    assert [await kept.get("a", read) for _ in range(3)] == [1, 1, 1]
    publish("persona.turn.finished", News())
    publish("layer.evicted", News())
    publish("server.request.finished", News())
    assert await kept.get("a", read) == 1, "these change nothing"
    for count, topic in enumerate(("persona.changed", "genome.deleted", "key.revoked", "model.removed"), 2):
        publish(topic, News())
        assert await kept.get("a", read) == count, "at once: whoever changed something reads what they wrote"


async def test_a_value_is_read_again_after_an_event_of_another_process(kept: Kept, tmp_path: Path) -> None:
    read = Reads()
    await kept.get("a", read)
    await other_process(tmp_path, "persona.changed")

    async def seen() -> bool:
        return await kept.get("a", read) > 1

    await until(seen)


async def test_what_changes_while_it_is_read_is_not_kept(kept: Kept) -> None:
    async def read() -> str:
        publish("key.revoked", News())
        return "read before the change"

    assert await kept.get("a", read) == "read before the change"
    assert await kept.get("a", Reads()) == 1


async def test_neither_failures_nor_endless_names_fill_it(kept: Kept) -> None:
    async def fail() -> None:
        raise NotFound("there is none")

    for name in range(3):
        with pytest.raises(NotFound):
            await kept.get(name, fail)
    assert not kept._values
    read = Reads()
    for name in range(2 * MOST):
        await kept.get(name, read)
    assert len(kept._values) <= MOST


async def test_a_value_is_read_again_after_a_while_in_any_case(kept: Kept) -> None:
    read = Reads()
    kept._longest_s = -1
    assert [await kept.get("a", read) for _ in range(2)] == [1, 2]
