"""A resource is opened once, shared, and closed with its context, the last opened first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from synapse.commands import Context
from synapse.config import load_settings
from synapse.errors import Unavailable

happened: list[str] = []


@asynccontextmanager
async def open_cellar(context: Context) -> AsyncIterator[str]:
    happened.append("cellar opens")
    await asyncio.sleep(0.01)
    yield "cellar"
    happened.append("cellar closes")


@asynccontextmanager
async def open_house(context: Context) -> AsyncIterator[str]:
    cellar = await context.get(open_cellar)
    happened.append("house opens")
    yield f"house over {cellar}"
    happened.append("house closes")


@asynccontextmanager
async def open_after_a_failure(context: Context) -> AsyncIterator[str]:
    happened.append("try")
    if happened.count("try") == 1:
        raise ConnectionError("not yet")
    yield "opened"


@pytest.fixture(autouse=True)
def _nothing_happened() -> None:
    happened.clear()


async def test_resources_open_once_and_close_in_reverse() -> None:
    async with Context(load_settings()) as context:
        houses = await asyncio.gather(*(context.get(open_house) for _ in range(3)))
        assert houses == ["house over cellar"] * 3
        assert await context.get(open_cellar) == "cellar"
    assert happened == ["cellar opens", "house opens", "house closes", "cellar closes"]


async def test_a_failed_opening_reaches_everybody_who_waits_and_is_tried_again() -> None:
    async with Context(load_settings()) as context:
        with pytest.raises(ConnectionError):
            await context.get(open_after_a_failure)
        assert await context.get(open_after_a_failure) == "opened"


async def test_one_impatient_caller_does_not_cancel_the_opening_of_the_others() -> None:
    async with Context(load_settings()) as context:
        patient = asyncio.create_task(context.get(open_cellar))
        await asyncio.sleep(0)
        impatient = asyncio.create_task(context.get(open_cellar))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await patient == "cellar"
        assert happened == ["cellar opens"]


async def test_the_first_caller_may_be_cancelled_and_those_who_wait_get_what_it_asked_for() -> None:
    async with Context(load_settings()) as context:
        first = asyncio.create_task(context.get(open_house))
        await asyncio.sleep(0)
        others = [asyncio.create_task(context.get(open_house)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.gather(*others) == ["house over cellar"] * 3
        assert first.cancelled()
    assert happened == ["cellar opens", "house opens", "house closes", "cellar closes"]


async def test_a_context_that_closes_gives_up_what_is_being_opened() -> None:
    forever = asyncio.Event()

    @asynccontextmanager
    async def open_never(context: Context) -> AsyncIterator[None]:
        await context.get(open_cellar)
        happened.append("begins")
        try:
            await forever.wait()
            yield
        finally:
            happened.append("given up")

    async with Context(load_settings()) as context:
        asked = asyncio.create_task(context.get(open_never))
        while "begins" not in happened:
            await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="closed"):
        await asked
    assert happened == ["cellar opens", "begins", "given up", "cellar closes"]
