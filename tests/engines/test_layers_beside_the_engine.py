"""A layer that is not in memory is read beside the engine: its requests wait, all others go on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.layers import random_adapter
from support.engine_runs import Answer, run
from support.tiny_models import build_tiny_model
from synapse.engines import DeadlineExceeded, Delta, Engine, EngineRunner, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.lora import Layer
from synapse.models.adapters.adapter import Adapter

GREEDY = Sampling(temperature=0)
ACTIVE = 40


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama", context=1024)
    opened = open_engine_file(tiny.path, "reference", Limits(max_context=1024, max_layers=3, max_batch=4))
    yield opened
    opened.close()


@pytest.fixture
def layers(engine: Engine, tmp_path: Path) -> list[str]:
    """Six layers, of which the first three had to make room for the others."""
    folders = [random_adapter(tmp_path / str(n), engine.config, rank=2, seed=n, strength=4) for n in range(6)]
    return [engine.load_layer(folder) for folder in folders]


class Gate:
    """Holds up whoever packs a layer, until it is opened; so the test decides how long reading takes."""

    def __init__(self, prepare: Callable[[Adapter], Layer]) -> None:
        self._prepare = prepare
        self._open = threading.Event()
        self.threads: list[str] = []

    def __call__(self, adapter: Adapter) -> Layer:
        self.threads.append(threading.current_thread().name)
        assert self._open.wait(30)
        return self._prepare(adapter)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(engine: Engine, layers: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(engine.layers._prepare)
    monkeypatch.setattr(engine.layers, "_prepare", gate)
    yield gate
    gate.open()


def asking(*layers: str, tokens: int = 8, **fields: object) -> Request:
    options: dict[str, object] = {"sampling": GREEDY, "ignore_eos": True, **fields}
    return Request((5, 6, 7), tuple((each, 1.0) for each in layers), max_tokens=tokens, **options)  # type: ignore[arg-type]


def test_other_streams_get_a_token_in_every_step_while_a_layer_is_read(
    engine: Engine, layers: list[str], gate: Gate
) -> None:
    answers = {engine.add(asking(layers[5], tokens=400)): Answer()}
    engine.step()
    needs = [engine.add(asking(layers[0])), engine.add(asking(layers[0], layers[4]))]
    answers |= {each: Answer() for each in needs}
    for _ in range(200):
        events = engine.step()
        assert {type(event) for event in events} == {Delta}, "one stream runs, and misses no step"
    gate.open()
    while engine.busy:
        for event in engine.step():
            answers[event.request_id].add(event)
    assert gate.threads == ["synapse-layers"], "both wait for one reading"
    assert [len(answers[each].tokens) for each in needs] == [8, 8]


def test_answers_do_not_depend_on_whether_their_layer_had_to_be_read_again(
    engine: Engine, layers: list[str], tmp_path: Path
) -> None:
    random_adapter(tmp_path / "new", engine.config, rank=2, seed=9)
    requests = [asking(each) for each in layers]
    alone = [run(engine, each)[0].tokens for each in requests]
    assert len(set(map(tuple, alone))) > 1
    assert [answer.tokens for answer in run(engine, *requests, *reversed(requests))] == [*alone, *reversed(alone)]
    assert len(engine.layers.sizes()) <= 4, "as many as run at once"
    engine.load_layer(tmp_path / "new")
    assert len(engine.layers.sizes()) == 3, "what has ended holds no layer"


def test_a_layer_that_cannot_be_read_any_more_ends_only_its_requests(
    engine: Engine, layers: list[str], tmp_path: Path
) -> None:
    (tmp_path / "0" / "adapter_model.safetensors").unlink()
    (tmp_path / "1" / "adapter_model.safetensors").write_bytes(b"damaged")
    gone, damaged, fine, whole = run(
        engine, asking(layers[0]), asking(layers[1], layers[5]), asking(layers[2]), asking(layers[5])
    )
    assert gone.finished is not None
    assert "adapter_model.safetensors" in str(gone.finished.error)
    assert damaged.finished is not None
    assert damaged.finished.error is not None
    assert len(fine.tokens) == len(whole.tokens) == 8
    assert engine.kv_tokens_held == 0


def test_who_waits_for_a_layer_can_be_cancelled_and_runs_into_its_deadline(
    engine: Engine, layers: list[str], gate: Gate
) -> None:
    answers = {engine.add(asking(layers[5], tokens=30)): Answer()}
    cancelled = engine.add(asking(layers[0]))
    late = engine.add(asking(layers[1], deadline=time.monotonic() + 0.05))
    answers |= {cancelled: Answer(), late: Answer()}
    engine.step()
    engine.cancel(cancelled)
    while engine.busy:
        for event in engine.step():
            answers[event.request_id].add(event)
    ends = {each: answers[each].finished for each in (cancelled, late)}
    assert [end.reason for end in ends.values() if end] == ["cancelled", "error"]
    assert isinstance(ends[late].error, DeadlineExceeded)  # type: ignore[union-attr]
    assert "its layers to be read" in str(ends[late].error)  # type: ignore[union-attr]
    gate.open()
    assert len(run(engine, asking(layers[0]))[0].tokens) == 8


async def test_the_runner_sleeps_while_a_layer_is_read_and_wakes_when_it_is_there(
    engine: Engine, layers: list[str], gate: Gate
) -> None:
    runner = EngineRunner(engine)
    events = runner.generate(asking(layers[0]))
    with pytest.raises(DeadlineExceeded):
        await anext(runner.generate(asking(layers[1], deadline=time.monotonic() + 0.1)))
    first = anext(events)
    opener = threading.Timer(0.2, gate.open)
    opener.start()
    assert isinstance(await first, Delta)
    assert engine.counters.steps < 10
    await events.aclose()
    await runner.close()


def test_forty_active_layers_in_a_cache_of_twenty_hold_no_stream_up(tmp_path: Path) -> None:
    """Each answer is short, so layers come and go all the time. What runs gets a token in every step."""
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama")
    engine = open_engine_file(tiny.path, "reference", Limits(max_context=128, max_layers=20, max_batch=16))
    layers = [
        engine.load_layer(random_adapter(tmp_path / str(n), engine.config, rank=2, seed=n)) for n in range(ACTIVE)
    ]
    before = engine.layers.reads
    for turn in range(3):
        for number in range(ACTIVE):
            engine.add(asking(layers[(7 * number + turn) % ACTIVE], tokens=6 + number % 5))
    last: dict[str, int] = {}
    widest = step = 0
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Delta):
                widest = max(widest, step - last.get(event.request_id, step))
                last[event.request_id] = step
        step += 1
        assert len(engine.layers.sizes()) <= 20
    engine.close()
    assert len(last) == 3 * ACTIVE
    assert engine.layers.reads > before
    assert widest == 1


def test_files_that_changed_behind_their_times_are_not_taken_for_the_layer(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not changed is not hashed again; neither size nor a modification time that is put back hide a change."""
    monkeypatch.setattr("synapse.engines.cache.layers.SETTLED_SECONDS", -1.0)
    folder = random_adapter(tmp_path / "layer", engine.config, rank=2, seed=0)
    layer = engine.load_layer(folder)
    with monkeypatch.context() as unread:
        unread.setattr("synapse.models.adapters.adapter.content_address", lambda *_: "hashed again")
        assert engine.layers.read(folder).layer.id == layer
    file = folder / "adapter_model.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert engine.layers.read(folder).layer.id != layer
    assert engine.load_layer(folder) != layer
