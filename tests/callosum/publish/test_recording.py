"""What a process publishes is in the log of its home, and a log that is away disturbs nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from support.valkey import shared_server
from synapse.callosum.bus.opening import open_bus, open_observer
from synapse.callosum.log.contract import Log
from synapse.callosum.log.opening import LOG_FILE, connect_log, open_log
from synapse.callosum.log.reading import recent
from synapse.callosum.message import Message, Tract
from synapse.callosum.payloads import Untyped
from synapse.callosum.publish.publishing import publish
from synapse.callosum.publish.recording import recording
from synapse.commands import Context
from synapse.config import Settings
from synapse.hotpath.news import News, tell


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


async def topics_of(log: Log) -> list[str]:
    return [entry.message.topic for entry in (await recent(log)).entries]


async def recorded(settings: Settings) -> list[str]:
    """The topics in the log of a home, as another process reads them."""
    log = await connect_log(settings)
    try:
        return await topics_of(log)
    finally:
        await log.close()


async def test_what_is_published_until_the_end_is_in_the_log_when_the_process_has_ended(settings: Settings) -> None:
    async with Context(settings) as context, recording(context):
        publish("a.first", Untyped({}))
        thread = threading.Thread(target=publish, args=("a.second", Untyped({})))
        thread.start()
        await asyncio.to_thread(thread.join)
        publish("a.third", Untyped({}))
    publish("a.late", Untyped({}))
    assert await recorded(settings) == ["a.first", "a.second", "a.third"]


async def test_nothing_is_opened_for_a_process_that_publishes_nothing(settings: Settings) -> None:
    async with Context(settings) as context, recording(context):
        await asyncio.sleep(0)
    assert not (settings.home / LOG_FILE).exists()


async def test_news_of_the_hot_paths_is_recorded_too_while_somebody_records(settings: Settings) -> None:
    other = Settings(home=settings.home / "other")
    async with Context(settings) as context, recording(context), Context(other) as another, recording(another):
        tell(News("quarantined", "total", "b1", "process 7 died while it was running"))
    tell(News("cleared", "total", "b1", ""))
    assert await recorded(settings) == await recorded(other) == ["hotpath.quarantined"]


async def test_a_log_that_is_away_for_a_while_loses_nothing(settings: Settings) -> None:
    (settings.folder("") / LOG_FILE).mkdir()
    with capture_logs() as logs:
        async with Context(settings) as context, recording(context) as outbox:
            publish("a.first", Untyped({}))
            assert not await outbox.settled(0.2)
            (settings.home / LOG_FILE).rmdir()
            publish("a.second", Untyped({}))
            assert await outbox.settled(10)
    assert await recorded(settings) == ["a.first", "a.second"]
    assert [entry["event"] for entry in logs] == ["events.delayed"]


async def test_over_a_bus_subscribers_hear_what_is_recorded(settings: Settings) -> None:
    heard: list[Message] = []
    async with Context(settings) as context:
        bus = await context.get(open_bus)
        bus.subscribe("a.*", heard.append)
        async with recording(context, bus.publish_many):
            publish("a.first", Untyped({}))
            publish("b.first", Untyped({}))
    assert [message.topic for message in heard] == ["a.first"]
    assert await recorded(settings) == ["a.first", "b.first"]


async def test_the_observer_of_a_process_counts_what_it_and_others_publish(settings: Settings) -> None:
    async with Context(settings) as context:
        observer = await context.get(open_observer)
        bus = await context.get(open_bus)
        await bus.publish(Message("a.mine", Untyped({"seconds": 0.5}), Tract.EXTERNAL))
        other = await connect_log(settings)
        async with asyncio.timeout(20):
            while len(observer.report().topics) < 2:
                # What is written before the bus has begun to read is not for it, so another process goes on writing.
                await other.append([Message("a.others", Untyped({}))])
                await asyncio.sleep(0.05)
        await other.close()
        mine = observer.report().topics[0]
    assert (mine.topic, mine.count) == ("a.mine", 1)
    assert mine.latency is not None
    assert mine.duration is not None


@pytest.fixture
def valkey_url() -> Iterator[str]:
    """An empty database of a real server."""
    server = shared_server()
    yield f"{server.url}?db=7"
    with server.client() as client:
        client.select(7)
        client.flushdb()


async def test_with_a_url_the_log_is_in_that_server(settings: Settings, valkey_url: str) -> None:
    there = settings.model_copy(update={"events": valkey_url})
    async with Context(there) as context, recording(context) as outbox:
        publish("a.first", Untyped({}))
        assert await outbox.settled()
        publish("a.second", Untyped({}))
    assert await recorded(there) == ["a.first", "a.second"]
    assert not there.home.exists()


async def test_with_the_setting_memory_the_log_is_that_of_the_process(settings: Settings) -> None:
    kept = settings.model_copy(update={"events": "memory"})
    async with Context(kept) as context:
        log = await context.get(open_log)
        async with recording(context) as outbox:
            publish("a.first", Untyped({}))
            assert await outbox.settled()
        assert await topics_of(log) == ["a.first"]
    assert not kept.home.exists()
