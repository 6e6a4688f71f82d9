"""The engine in its thread: the event loop stays free, callers come and go, a failure loses only what was active."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.layers import random_adapter
from support.tiny_models import build_tiny_model
from synapse.commands import Context
from synapse.config import Settings
from synapse.engines import (
    ContextOverflow,
    Delta,
    Engine,
    EngineRunner,
    Finished,
    Grammar,
    Limits,
    Request,
    Sampling,
    limits_from,
    open_engine,
    open_engines,
)
from synapse.engines.opening import engine_of, open_engine_file
from synapse.engines.sampling import Sampler
from synapse.engines.unread import SlowReader
from synapse.errors import Conflict, Corrupt, InternalError, NotFound, Overloaded, Unavailable
from synapse.models.head import ModelHead
from synapse.models.library import open_library

ENDLESS = Request((5, 6, 7), sampling=Sampling(seed=1), ignore_eos=True)


@pytest.fixture
def tiny_engine(tmp_path: Path) -> Engine:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama", context=4096)
    return open_engine_file(tiny.path, "reference", Limits(max_context=4096, max_layers=2))


@pytest.fixture
async def runner(tiny_engine: Engine) -> AsyncIterator[EngineRunner]:
    runner = EngineRunner(tiny_engine, max_active=3)
    yield runner
    await runner.close()


async def text_of(runner: EngineRunner, request: Request) -> tuple[str, Finished]:
    text, finished = "", None
    async for event in runner.generate(request):
        if isinstance(event, Delta):
            text += event.text
        else:
            finished = event
    assert finished is not None
    return text, finished


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until something becomes true; fail if it does not within ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_that_run_together_get_what_they_get_alone(runner: EngineRunner) -> None:
    requests = [Request((5 + n, 6), sampling=Sampling(seed=n), max_tokens=20) for n in range(3)]
    alone = [await text_of(runner, request) for request in requests]
    together = await asyncio.gather(*(text_of(runner, request) for request in requests))
    assert [text for text, _ in together] == [text for text, _ in alone]


async def test_the_event_loop_keeps_turning_while_the_engine_works(runner: EngineRunner) -> None:
    task = asyncio.create_task(text_of(runner, Request((5,) * 200, max_tokens=100, ignore_eos=True)))
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(0)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < 1.0


async def test_closing_the_stream_cancels_the_request(runner: EngineRunner) -> None:
    async with aclosing(runner.generate(ENDLESS)) as events:
        async for _ in events:
            break
    await settled(lambda: runner.snapshot().running == 0)
    assert runner.snapshot().kv_tokens_held == 0
    assert runner.snapshot().active == 0


async def test_cancelling_the_task_cancels_the_request_even_before_it_has_started(runner: EngineRunner) -> None:
    tasks = [asyncio.create_task(text_of(runner, ENDLESS)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settled(lambda: runner.snapshot().running == runner.snapshot().waiting == 0)
    _, finished = await text_of(runner, Request((5,), max_tokens=3, ignore_eos=True))
    assert finished.completion_tokens == 3


async def test_more_requests_than_allowed_are_refused_at_once_and_the_others_go_on(runner: EngineRunner) -> None:
    tasks = [asyncio.create_task(text_of(runner, Request((5,), max_tokens=300, ignore_eos=True))) for _ in range(3)]
    await settled(lambda: runner.snapshot().active == 3)
    with pytest.raises(Overloaded, match="limit"):
        await text_of(runner, Request((5,)))
    finished = [end for _, end in await asyncio.gather(*tasks)]
    assert [end.completion_tokens for end in finished] == [300] * 3


async def test_a_refusal_of_the_engine_reaches_the_caller(runner: EngineRunner) -> None:
    with pytest.raises(ContextOverflow):
        await text_of(runner, Request((5,) * 5000))
    with pytest.raises(Exception, match="cannot be used as a constraint"):
        await text_of(runner, Request((5,), grammar=Grammar("regex", "(")))
    assert runner.snapshot().active == 0


async def test_a_failing_step_fails_what_was_active_and_nothing_after(
    runner: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise MemoryError("no room for the scores")

        broken.setattr(runner.engine._transformer, "forward", fail)
        with pytest.raises(InternalError, match="no room for the scores"):
            await text_of(runner, ENDLESS)
    _, finished = await text_of(runner, Request((5,), max_tokens=3, ignore_eos=True))
    assert finished.reason == "length"
    assert runner.snapshot().kv_tokens_held == 0


async def test_a_defect_in_choosing_ends_only_the_sequence_it_struck(
    runner: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sane = asyncio.create_task(
        text_of(runner, Request((5,), sampling=Sampling(temperature=0), max_tokens=60, ignore_eos=True))
    )
    await settled(lambda: runner.snapshot().running == 1)
    with monkeypatch.context() as broken:
        broken.setattr(Sampler, "_uniform", lambda *_: 1 // 0)
        with pytest.raises(InternalError, match="choosing the next token failed"):
            await text_of(runner, Request((6,), sampling=Sampling(seed=1), max_tokens=5))
    assert (await sane)[1].completion_tokens == 60


async def test_logits_that_are_not_finite_end_only_their_own_request(runner: EngineRunner, tmp_path: Path) -> None:
    folder = random_adapter(tmp_path / "layer", runner.engine.config, rank=4, seed=0)
    loaded = runner.engine.layers.read(folder)
    layer = loaded.layer
    for _, B in layer.factors.values():
        B[:] = np.float32(3e38)
    await runner.call(lambda: runner.engine.put_layer(loaded))
    sane = asyncio.create_task(text_of(runner, Request((5,), max_tokens=50, ignore_eos=True)))
    with pytest.raises(Corrupt, match="overflow"):
        await text_of(runner, Request((5,), ((layer.id, 1.0),), max_tokens=5))
    assert (await sane)[1].completion_tokens == 50


async def test_closing_tells_whoever_still_waits(tiny_engine: Engine) -> None:
    runner = EngineRunner(tiny_engine)
    task = asyncio.create_task(text_of(runner, ENDLESS))
    await settled(lambda: runner.snapshot().running == 1)
    await runner.close()
    with pytest.raises(Unavailable, match="stopped"):
        await task


async def test_layers_are_evicted_least_recently_used_first_and_read_again_when_needed(
    runner: EngineRunner, tmp_path: Path
) -> None:
    engine = runner.engine
    folders = [random_adapter(tmp_path / str(n), engine.config, rank=4, seed=n) for n in range(3)]
    first, second, third = [await runner.load_layer(folder) for folder in folders]
    assert list(runner.snapshot().layers) == [second, third]
    read = engine.layers.reads
    assert await runner.load_layer(folders[0]) == first
    assert engine.layers.reads == read, "an unchanged folder is not read again"
    await text_of(runner, Request((5,), ((first, 1.0),), max_tokens=2))
    assert list(runner.snapshot().layers) == [third, first]
    assert engine.layers.evictions == 2


async def test_a_layer_in_use_is_neither_evicted_nor_unloaded(runner: EngineRunner, tmp_path: Path) -> None:
    engine = runner.engine
    folders = [random_adapter(tmp_path / str(n), engine.config, rank=4, seed=n) for n in range(4)]
    pinned = await runner.load_layer(folders[0])
    task = asyncio.create_task(text_of(runner, Request((5,), ((pinned, 1.0),), max_tokens=400, ignore_eos=True)))
    await settled(lambda: runner.snapshot().running == 1)
    for folder in folders[1:]:
        await runner.load_layer(folder)
    assert pinned in runner.snapshot().layers
    with pytest.raises(Conflict, match="in use"):
        await runner.call(lambda: engine.unload_layer(pinned))
    await task
    await runner.call(lambda: engine.unload_layer(pinned))
    with pytest.raises(NotFound):
        await text_of(runner, Request((5,), ((pinned, 1.0),)))
    with pytest.raises(NotFound):
        await runner.call(lambda: engine.unload_layer(pinned))


async def test_a_layer_whose_files_changed_after_loading_is_not_used_under_its_old_name(
    runner: EngineRunner, tmp_path: Path
) -> None:
    engine = runner.engine
    folders = [random_adapter(tmp_path / str(n), engine.config, rank=4, seed=n) for n in range(3)]
    first, *_ = [await runner.load_layer(folder) for folder in folders]
    random_adapter(folders[0], engine.config, rank=4, seed=99)
    with pytest.raises(Exception, match="have changed"):
        await text_of(runner, Request((5,), ((first, 1.0),)))
    assert await runner.load_layer(folders[0]) != first


async def test_the_host_opens_each_model_once_and_by_name(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama")
    settings = Settings(home=tmp_path / "home", max_batch=3, max_context=64, threads=1)
    async with Context(settings) as context:
        library = await context.get(open_library)
        await library.pull(str(tiny.path), name="tiny")
        host = await context.get(open_engines)
        first, second = await asyncio.gather(host.get("tiny"), host.get("tiny"))
        assert first.front is second.front
        assert len(host.loaded) == 1
        assert first.front.limits == limits_from(settings)
        assert first.front.context == 64
        with pytest.raises(NotFound):
            await host.get("no-such-model")
    with pytest.raises(Unavailable):
        await text_of(first, ENDLESS)


def test_open_engine_takes_a_path(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama")
    engine = open_engine(str(tiny.path))
    assert engine.logits([5, 6]).shape == (2, engine.config.vocab)


async def test_an_answer_that_nobody_reads_is_given_up_by_the_engine(runner: EngineRunner) -> None:
    async with aclosing(runner.generate(ENDLESS)) as events:
        await anext(events)
        while runner.snapshot().running:  # nobody reads: the engine goes on until the bound is reached
            await asyncio.sleep(0.01)
        with pytest.raises(SlowReader):
            while True:
                await anext(events)
    assert runner.snapshot().kv_tokens_held == 0
    assert runner.snapshot().counters.slow_readers == 1


async def test_a_model_under_two_names_is_one_engine_and_another_opens_beside_it(tmp_path: Path) -> None:
    tiny, other = (build_tiny_model(tmp_path / f"{kind}.gguf", kind) for kind in ("llama", "qwen2"))
    async with Context(Settings(home=tmp_path / "home", max_context=64, threads=1, backend="reference")) as context:
        library = await context.get(open_library)
        for name, model in (("one", tiny), ("two", tiny), ("other", other)):
            await library.pull(str(model.path), name=name)
        host = await context.get(open_engines)
        first = asyncio.create_task(host.get("one"))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(host.get(name)) for name in ("two", "other")]
        await asyncio.sleep(0)
        first.cancel()  # whoever asked first stops nobody who waits for the same opening
        again, beside = await asyncio.gather(*rest)
        assert (await host.get("one")).front is again.front is not beside.front
        assert len(host.loaded) == 2


async def test_an_opening_that_is_slow_holds_up_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: build_tiny_model(tmp_path / f"{name}.gguf", name) for name in ("llama", "qwen2")}
    slow, go_on = str(models["llama"].path), threading.Event()

    def opened(model: ModelHead, *args: Any) -> Engine:
        if str(model.path) == slow:
            assert go_on.wait(60)
        return engine_of(model, *args)

    monkeypatch.setattr("synapse.engines.host.engine_of", opened)
    async with Context(Settings(home=tmp_path / "home", max_context=64, threads=1, backend="reference")) as context:
        host = await context.get(open_engines)
        held = asyncio.create_task(host.get(slow))
        await text_of(await host.get(str(models["qwen2"].path)), Request((5,), max_tokens=2))
        assert not held.done()
        go_on.set()
        await text_of(await held, Request((5,), max_tokens=2))
