"""Workers that are killed, stopped, cut off or that crash: no answer is lost, changed, or told twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from support.tiny_models import build_tiny_model
from synapse.config import Settings
from synapse.daemon import process
from synapse.daemon.supervisor import EndsWorkers, Supervisor
from synapse.daemon.worker import Start
from synapse.engines import Delta, Finished, Request, Sampling
from synapse.engines.limits import limits_from
from synapse.engines.opening import open_engine_file
from synapse.engines.runner import EngineRunner
from synapse.errors import SynapseError, Unavailable
from synapse.models.errors import ModelFileCorrupt

Answer = tuple[str, tuple[int, ...], Finished]
"""Its text, its tokens, and how it ended."""
LONG = 600
GREEDY = Request((5, 6, 7), sampling=Sampling(temperature=0), max_tokens=LONG, ignore_eos=True)
SEEDED = Request((8, 9), sampling=Sampling(temperature=1.3, seed=7), max_tokens=LONG, ignore_eos=True)
PENALISED = Request((5, 5), sampling=Sampling(seed=3, frequency_penalty=1.5), max_tokens=LONG, ignore_eos=True)


@pytest.fixture
def start(tmp_path: Path, native_home: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("SYNAPSE_HOME", str(native_home))
    monkeypatch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
    model = build_tiny_model(tmp_path / "tiny.gguf", "llama", context=1024)
    return Start(model.path, "tiny", Settings(home=native_home, backend="native", events="memory", threads=1))


@pytest.fixture
async def supervised(start: Start) -> AsyncIterator[Callable[..., Supervisor]]:
    """Makes supervisors, and closes them."""
    made: list[Supervisor] = []

    def make(workers: int = 1, most: int = 2**40) -> Supervisor:
        made.append(Supervisor(start, workers=workers, max_active=64, memory_bytes=most))
        return made[-1]

    yield make
    for supervisor in made:
        await supervisor.close()


async def answer(source: Supervisor | EngineRunner, request: Request) -> Answer:
    text, tokens = "", []
    async with aclosing(source.generate(request)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return text, tuple(tokens), event
            text += event.text
            tokens += event.tokens
    raise AssertionError("no end")


async def alone(start: Start, *requests: Request) -> list[Answer]:
    """What an engine in this process answers."""
    runner = EngineRunner(open_engine_file(start.path, "native", limits_from(start.settings)))
    try:
        return [await answer(runner, request) for request in requests]
    finally:
        await runner.close()


async def worker_of(supervisor: Supervisor) -> process.WorkerProcess:
    """The worker that is ready."""
    async with asyncio.timeout(60):
        while not (ready := [worker for worker in supervisor.workers if worker.state == "ready"]):
            await asyncio.sleep(0.01)
    return ready[0]


async def kill_after(
    supervisor: Supervisor, events: int, number: signal.Signals, request: Request, times: int = 3
) -> Answer:
    """The answer to a request whose worker gets a signal each time that so many events have come."""
    text, tokens, seen = "", [], 0
    async with aclosing(supervisor.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Finished):
                return text, tuple(tokens), event
            text += event.text
            tokens += event.tokens
            seen += 1
            if seen % events == 0 and seen <= times * events:
                os.kill((await worker_of(supervisor)).pid or 0, number)
    raise AssertionError("no end")


async def test_an_answer_whose_worker_is_killed_goes_on_as_it_would_have(
    start: Start, supervised: Callable[..., Supervisor]
) -> None:
    requests = [GREEDY, SEEDED, PENALISED]
    expected = await alone(start, *requests)
    supervisor = supervised()
    await supervisor.start()
    killed, *others = await asyncio.gather(
        kill_after(supervisor, 40, signal.SIGKILL, requests[0]),
        *(answer(supervisor, request) for request in requests[1:]),
    )
    for found, wanted in zip([killed, *others], expected, strict=True):
        assert found[:2] == wanted[:2]
        assert (found[2].reason, found[2].completion_tokens) == ("length", LONG)
    assert killed[2].resumed >= 1


async def test_a_request_that_ends_its_worker_is_refused_and_its_neighbours_are_answered(
    start: Start, supervised: Callable[..., Supervisor]
) -> None:
    innocent = replace(SEEDED, max_tokens=200)
    (expected,) = await alone(start, innocent)
    supervisor = supervised()
    await supervisor.start()

    async def fatal() -> None:
        async with aclosing(supervisor.generate(GREEDY)) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    os.kill((await worker_of(supervisor)).pid or 0, signal.SIGSEGV)

    neighbour = asyncio.create_task(answer(supervisor, innocent))
    with pytest.raises(EndsWorkers, match="SIGSEGV"):
        await fatal()
    found = await neighbour
    assert found[:2] == expected[:2]
    with pytest.raises(EndsWorkers, match="before"):  # whatever seed it comes with
        await answer(supervisor, replace(GREEDY, sampling=Sampling(temperature=0, seed=99)))
    assert (await answer(supervisor, innocent))[:2] == expected[:2]


async def test_a_worker_that_is_stopped_is_replaced(
    start: Start, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SILENT_SECONDS", 3.0)
    (expected,) = await alone(start, GREEDY)
    supervisor = supervised()
    await supervisor.start()
    found = await kill_after(supervisor, 20, signal.SIGSTOP, GREEDY, times=1)
    assert found[:2] == expected[:2]
    assert found[2].resumed == 1


async def test_a_worker_that_takes_too_much_memory_is_ended(supervised: Callable[..., Supervisor]) -> None:
    supervisor = supervised(most=1)
    await supervisor.start()
    death = await (await worker_of(supervisor)).ended
    assert "memory" in death.reason


async def test_a_model_that_cannot_be_opened_says_so(supervised: Callable[..., Supervisor], start: Start) -> None:
    start.path.write_bytes(start.path.read_bytes()[:1000])
    with pytest.raises(ModelFileCorrupt):
        await supervised().start()


async def test_a_drained_worker_finishes_what_it_has_and_another_takes_its_place(
    start: Start, supervised: Callable[..., Supervisor]
) -> None:
    supervisor = supervised()
    await supervisor.start()
    before = await worker_of(supervisor)
    running = asyncio.create_task(answer(supervisor, GREEDY))
    while not before.caller.lost.done() and not (await supervisor.stats()).running:
        await asyncio.sleep(0.005)
    await supervisor.drain(before)
    _, tokens, end = await running
    assert (len(tokens), end.resumed) == (LONG, 0)
    after = await worker_of(supervisor)
    assert after.number != before.number


async def test_a_reader_that_leaves_frees_its_place(supervised: Callable[..., Supervisor]) -> None:
    supervisor = supervised()
    await supervisor.start()
    async with aclosing(supervisor.generate(GREEDY)) as stream:
        await anext(stream)
    async with asyncio.timeout(10):
        while (await supervisor.stats()).running:
            await asyncio.sleep(0.01)
    assert (await supervisor.stats()).active == 0


async def test_errors_of_a_request_arrive_as_they_are(supervised: Callable[..., Supervisor]) -> None:
    supervisor = supervised()
    await supervisor.start()
    with pytest.raises(SynapseError) as found:
        await answer(supervisor, Request(()))
    assert (found.value.code, found.value.details) == ("invalid_input", {"param": "prompt"})


async def test_closing_ends_the_processes_and_tells_who_waits(supervised: Callable[..., Supervisor]) -> None:
    supervisor = supervised(workers=2)
    await supervisor.start()
    pids = [worker.pid or 0 for worker in supervisor.workers]
    waiting = asyncio.create_task(answer(supervisor, GREEDY))
    await asyncio.sleep(0)
    await supervisor.close()
    with pytest.raises(Unavailable):
        await waiting
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
