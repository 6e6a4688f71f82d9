"""Models come into memory when they are asked for, and leave it when nobody uses them or others need the room."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from support.heard import Heard, listening
from support.tiny_encoders import build_tiny_encoder
from support.tiny_models import build_tiny_model
from synapse.commands import Context
from synapse.config import Settings, load_settings, seconds_of
from synapse.encoders import open_encoders
from synapse.engines import EngineClient, EngineHost, Finished, Request, Sampling, open_engines
from synapse.engines.cache.memory import machine_memory
from synapse.engines.residency import MakeRoom, NoMemory, Residency, open_residency
from synapse.errors import InvalidInput, Unavailable
from synapse.models.in_use import processes
from synapse.models.library import open_library

QUESTION = Request((5, 6, 7), sampling=Sampling(temperature=0), max_tokens=4, ignore_eos=True)
ENDLESS = Request((5, 6, 7), sampling=Sampling(temperature=0), ignore_eos=True)
LIMITS: dict[str, Any] = {
    "max_context": 512,
    "max_layer_bytes": 2**20,
    "kv_cache_tokens": 512,
    "threads": 1,
    "backend": "reference",
}


@pytest.fixture
def heard() -> Iterator[Heard]:
    with listening() as heard:
        yield heard


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two chat models, `one` and `two`, and an encoder `vectors`."""
    folder = tmp_path_factory.mktemp("residency")
    sources = {
        "one": build_tiny_model(folder / "one.gguf", "llama", context=512).path,
        "two": build_tiny_model(folder / "two.gguf", "qwen2", context=512).path,
        "vectors": build_tiny_encoder(folder / "encoder").folder,
    }

    async def pull() -> None:
        async with Context(Settings(home=folder / "home")) as context:
            for name, source in sources.items():
                await (await context.get(open_library)).pull(str(source), name=name)

    asyncio.run(pull())
    return folder / "home"


@asynccontextmanager
async def living(home: Path, **settings: Any) -> AsyncIterator[Context]:
    """A process in that home, with no model open yet."""
    async with Context(Settings(home=home, **(LIMITS | settings))) as context:
        yield context


async def answer(client: EngineClient) -> None:
    """One answer, to its end."""
    events = [event async for event in client.generate(QUESTION)]
    assert isinstance(events[-1], Finished)


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until something holds; the test's time limit ends what never does."""
    while not holds():
        await asyncio.sleep(0.005)


def open_now(host: EngineHost) -> list[str]:
    return sorted(client.front.name for client in host.clients())


async def test_a_model_that_nobody_uses_is_closed_and_opened_again_when_asked_for(home: Path, heard: Heard) -> None:
    async with living(home, keep_alive="50ms") as context:
        host = await context.get(open_engines)
        for _ in range(2):
            client = await host.get("one")
            await answer(client)
            client.close()
            await until(lambda: not host.loaded)
        folder = (await context.get(open_library)).resolve("one").parent
        await until(lambda: not processes(folder))
    assert heard.about("engine.closed") == 2 * [{"model": "one", "reason": "idle"}]
    assert heard.topics.count("engine.opened") == 2


async def test_a_model_stays_open_while_any_client_of_it_lives(home: Path) -> None:
    """Between being given a client and asking it something, while it answers, and after, until all let go."""
    async with living(home, keep_alive=0) as context:
        host = await context.get(open_engines)
        first, second = await asyncio.gather(host.get("one"), host.get("one"))
        first.close()
        async with aclosing(second.generate(ENDLESS)) as events:
            await anext(events)
            third = await host.get("one")
            assert open_now(host) == ["one"]
        second.close()
        second.close()  # once more changes nothing
        for _ in range(5):
            await asyncio.sleep(0)
        await answer(third)
        del third  # a client that is dropped lets go, too
        gc.collect()
        await until(lambda: not host.loaded)


async def test_who_asks_while_a_model_is_closed_gets_it_opened_again(home: Path, heard: Heard) -> None:
    async with living(home, keep_alive=0) as context:
        host = await context.get(open_engines)
        (await host.get("one")).close()
        await until(lambda: not host.loaded)
        clients = await asyncio.gather(*(host.get("one") for _ in range(3)))
        await asyncio.gather(*map(answer, clients))
    assert heard.topics[:3] == ["engine.opened", "engine.closed", "engine.opened"]
    assert heard.topics.count("engine.opened") == 2


async def test_an_opening_that_all_have_given_up_ends_and_is_closed_then(home: Path, heard: Heard) -> None:
    async with living(home, keep_alive=0) as context:
        host = await context.get(open_engines)
        residency = await context.get(open_residency)
        asking = asyncio.create_task(host.get("one"))
        await until(lambda: residency.bytes > 0)  # its room is taken, it is being opened
        asking.cancel()
        await until(lambda: "engine.closed" in heard.topics)
        await until(lambda: residency.bytes == 0)


async def test_minus_one_keeps_models_for_ever(home: Path) -> None:
    async with living(home, keep_alive=-1) as context:
        host = await context.get(open_engines)
        residency = await context.get(open_residency)
        (await host.get("one")).close()
        await until(lambda: all(not place.users for place in residency._places.values()))
        assert residency._timer is None
        assert open_now(host) == ["one"]


async def needs(home: Path) -> dict[str, int]:
    """What each of the models counts for."""
    found = {}
    async with living(home, keep_alive=-1) as context:
        host, residency = await context.get(open_engines), await context.get(open_residency)
        for name in ("one", "two", "vectors"):
            before = residency.bytes
            if name == "vectors":
                async with (await context.get(open_encoders)).use(name):
                    found[name] = residency.bytes - before
            else:
                (await host.get(name)).close()
                found[name] = residency.bytes - before
    return found


async def test_what_a_model_needs_is_what_it_may_come_to_take(home: Path) -> None:
    needed = await needs(home)
    async with living(home) as context:
        host = await context.get(open_engines)
        await host.get("one")
        (runner,) = host.loaded.values()
        engine = runner.engine
        kv = engine.kv_tokens * engine._transformer.kv_token_bytes
        assert needed["one"] == engine.weight_bytes + kv + LIMITS["max_layer_bytes"]


async def test_models_that_are_idle_give_way_the_least_recently_used_first(home: Path, heard: Heard) -> None:
    """Engines and encoders share one budget."""
    needed = await needs(home)
    limit = needed["one"] + needed["two"] + needed["vectors"] // 2
    async with living(home, keep_alive=-1, max_model_bytes=limit) as context:
        host, encoders = await context.get(open_engines), await context.get(open_encoders)
        residency = await context.get(open_residency)
        heard.clear()
        for name in ("one", "two", "one"):
            (await host.get(name)).close()
            await until(lambda: all(not place.users for place in residency._places.values()))
        async with encoders.use("vectors") as runner:
            await runner.encode(["a text"])
            assert open_now(host) == ["one"]
        await until(lambda: all(not place.users for place in residency._places.values()))
        await answer(await host.get("two"))
        assert open_now(host) == ["two"]
        assert len(residency.open_models()) == 2  # the encoder was used after `one`
    gave_way = [each["model"] for each in heard.about("engine.closed") if each["reason"] == "memory"]
    assert gave_way == ["two", "one"]


async def test_what_does_not_fit_beside_models_in_use_is_refused_with_the_numbers(home: Path, heard: Heard) -> None:
    needed = await needs(home)
    limit = max(needed["one"], needed["two"]) + 1000
    async with living(home, keep_alive=-1, max_model_bytes=limit) as context:
        host, encoders = await context.get(open_engines), await context.get(open_encoders)
        client = await host.get("one")
        heard.clear()
        with pytest.raises(NoMemory, match=r"two needs .* of memory; .* in use by one \(.*, in use\)") as refused:
            await host.get("two")
        assert isinstance(refused.value, Unavailable)
        assert refused.value.details == {"needed": needed["two"], "used": needed["one"], "limit": limit}
        assert "SYNAPSE_MAX_MODEL_BYTES" in (refused.value.hint or "")
        with pytest.raises(NoMemory, match="vectors needs"):
            async with encoders.use("vectors"):
                pass
        await answer(client)  # nobody was closed under whom it is in use
        assert "engine.closed" not in heard.topics
        client.close()
        await answer(await host.get("two"))


async def test_a_model_larger_than_the_limit_is_refused_and_nothing_is_closed_for_it(home: Path) -> None:
    needed = await needs(home)
    async with living(home, keep_alive=-1, max_model_bytes=needed["vectors"] + 1000) as context:
        async with (await context.get(open_encoders)).use("vectors"):
            pass
        with pytest.raises(NoMemory, match="one needs"):
            await (await context.get(open_engines)).get("one")
        residency = await context.get(open_residency)
        assert len(residency.open_models()) == 1


async def test_two_that_are_opened_at_once_do_not_take_the_same_room(home: Path) -> None:
    needed = await needs(home)
    async with living(home, max_model_bytes=max(needed["one"], needed["two"]) + 1000) as context:
        host = await context.get(open_engines)
        found = await asyncio.gather(host.get("one"), host.get("two"), return_exceptions=True)
        assert sorted(type(each).__name__ for each in found) == ["EngineClient", "NoMemory"]


async def test_one_that_fails_to_open_takes_no_room(home: Path, tmp_path: Path) -> None:
    async with living(home) as context:
        host, residency = await context.get(open_engines), await context.get(open_residency)
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF" + bytes(100))
        for _ in range(2):
            with pytest.raises(Exception, match=r"broken\.gguf"):
                await host.get(str(broken))
        assert residency.bytes == 0
        assert not residency._places


async def test_the_process_ends_with_models_in_use(home: Path, heard: Heard) -> None:
    async with living(home) as context:
        host = await context.get(open_engines)
        client = await host.get("one")
        opening = asyncio.create_task(host.get("two"))
        await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await answer(client)
    with pytest.raises(Unavailable):
        await opening
    assert {"model": "one", "reason": "stopped"} in heard.about("engine.closed")


class Large:
    """A model that says it needs more than any machine has."""

    async def close(self, reason: str) -> None:
        pass


async def open_large(make_room: MakeRoom) -> Large:
    await make_room(2**60)
    return Large()


async def test_by_default_three_quarters_of_the_memory_here_are_shared_and_one_model_alone_is_opened() -> None:
    residency = Residency(0.0)
    assert residency.limit == int(0.75 * machine_memory())
    lease = await residency.lease("large", "large", open_large)
    with pytest.raises(NoMemory, match="other needs"):
        await residency.lease("other", "other", open_large)
    lease.release()
    await until(lambda: not residency.bytes)
    with pytest.raises(NoMemory, match="all models together may take"):
        await Residency(0.0, 2**30).lease("large", "large", open_large)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("30s", 30), ("5m", 300), ("2h", 7200), ("1h30m", 5400), ("0", 0), ("90", 90), (0, 0), ("-1", float("inf"))],
)
def test_a_duration_is_read_as_people_write_it(given: object, seconds: float) -> None:
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["", "soon", "5 minutes", "m", "5m3", "1e3", "--1", True, None])
def test_what_is_no_duration_is_refused_with_what_was_expected(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        seconds_of(given)
    monkeypatch.setenv("SYNAPSE_KEEP_ALIVE", "soon")
    with pytest.raises(InvalidInput, match=r"keep_alive is 'soon': expected a duration such as 30s") as refused:
        load_settings()
    assert "SYNAPSE_KEEP_ALIVE" in (refused.value.hint or "")
