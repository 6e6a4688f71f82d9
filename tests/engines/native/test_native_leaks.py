"""Memory stays what it is, whatever comes and goes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from support.native_engine import resident_bytes, tiny_adapter, write_adapter
from support.tiny_models import build_tiny_model
from synapse.engines import Engine, Finished, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LAYERS = 12
SPARE = 4 * 2**20
"""Bytes by which memory may grow: pages of the allocator's, not objects of ours."""


@pytest.fixture
def engine(tmp_path: Path, at_home: Path) -> Iterator[Engine]:
    path = build_tiny_model(tmp_path / "tiny.gguf", "llama", storage="Q8_0").path
    opened = open_engine_file(path, "native", Limits(max_context=64, max_batch=16, max_layers=2, threads=2))
    yield opened
    opened.close()


def finish(engine: Engine, requests: Iterator[Request]) -> int:
    """Answer requests, 16 at a time. Returns how many ended as they should."""
    ended, more = 0, True
    while more or engine.busy:
        while more and engine.running + engine.waiting < 16:
            following = next(requests, None)
            more = following is not None
            if following is not None:
                engine.add(following)
        ended += sum(isinstance(e, Finished) and e.reason == "length" for e in engine.step())
    return ended


def growth(work: Callable[[int], None], warm_up: int, count: int) -> int:
    """Bytes that are resident after `count` rounds of work, beyond those after the first `warm_up`."""
    work(warm_up)
    gc.collect()
    before = resident_bytes()
    work(count)
    gc.collect()
    return resident_bytes() - before


def test_a_thousand_layers_come_and_go(engine: Engine, tmp_path: Path) -> None:
    """Each is read anew, used by one request and evicted by those after it; every tenth time one is unloaded."""
    folders = [
        write_adapter(tmp_path / str(n), tiny_adapter(engine.config, rank=32 + n, seed=n)) for n in range(LAYERS)
    ]
    turns = cycle(range(LAYERS))

    def load_and_evict(count: int) -> None:
        for n, turn in enumerate(islice(turns, count)):
            layer = engine.load_layer(folders[turn])
            request = Request((5, 6, 7), ((layer, 1.0),), Sampling(temperature=0), max_tokens=2, ignore_eos=True)
            assert finish(engine, iter([request])) == 1
            if n % 10 == 0:
                engine.unload_layer(layer)

    read = engine.layers.reads
    assert growth(load_and_evict, 200, 1000) < SPARE
    assert engine.layers.reads - read == 1200
    assert len(engine.layers.sizes()) <= 2


def test_ten_thousand_requests_come_and_go(engine: Engine, tmp_path: Path) -> None:
    adapters = [tiny_adapter(engine.config, seed=n) for n in range(2)]
    layers = [engine.load_layer(write_adapter(tmp_path / str(n), adapter)) for n, adapter in enumerate(adapters)]
    number = iter(range(10**6))

    def answer(count: int) -> None:
        def requests() -> Iterator[Request]:
            for n in islice(number, count):
                stack = ((layers[n % 2], 1.0),) if n % 3 else ()
                sampling = Sampling(temperature=0.8, top_k=20, seed=n)
                prompt = (3 + n % 250, 3 + n // 250 % 250, 9)
                yield Request(prompt, stack, sampling, max_tokens=1 + n % 4, ignore_eos=True)

        assert finish(engine, requests()) == count

    assert growth(answer, 2000, 10_000) < SPARE


def test_engines_come_and_go(at_home: Path, tmp_path: Path) -> None:
    """A closed engine gives back its weights, its KV cache, its threads and its map of the packed file."""
    path = build_tiny_model(tmp_path / "tiny.gguf", "llama", storage="Q8_0").path
    before = threading.active_count()

    def open_and_close(count: int) -> None:
        for _ in range(count):
            opened = open_engine_file(path, "native", Limits(max_context=64, max_batch=16, threads=2))
            layer = opened.load_layer(adapter)
            requests = [Request((5, 6, n), ((layer, 1.0),), max_tokens=40, ignore_eos=True) for n in range(3, 19)]
            assert finish(opened, iter(requests)) == 16
            opened.close()

    config = open_engine_file(path, "reference").config
    adapter = write_adapter(tmp_path / "layer", tiny_adapter(config))
    assert growth(open_and_close, 10, 60) < SPARE
    assert threading.active_count() == before
    assert ".pack" not in Path("/proc/self/maps").read_text()
