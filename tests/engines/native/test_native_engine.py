"""An engine on the native backend: what a caller sees of it, whoever shares its steps."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from openfeature import api
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from support.engine_runs import Answer, run
from support.native_engine import distances, living_in, tiny_adapter, write_adapter
from support.tiny_models import VOCAB, build_tiny_model
from synapse.engines import Delta, Engine, EngineRunner, Finished, Grammar, Limits, Request, Sampling
from synapse.engines.native.transformer import NativeTransformer
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.transformer import ReferenceTransformer
from synapse.engines.request import Event
from synapse.errors import Corrupt, InvalidInput, Unavailable
from synapse.models.adapters.adapter import LoraFactors
from synapse.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("at_home")

GREEDY = Sampling(temperature=0)
LIMITS = Limits(max_context=160, max_batch=40, kv_cache_tokens=8192, step_tokens=48, threads=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return build_tiny_model(folder / "tiny.gguf", "qwen2", storage="Q4_0", heads=4, kv_heads=2).path


@pytest.fixture(scope="module")
def engine(tiny: Path, native_home: Path) -> Iterator[Engine]:
    with living_in(native_home):
        opened = open_engine_file(tiny, "native", LIMITS)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def layers(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("layers")
    adapters = [tiny_adapter(engine.config, rank=rank, seed=rank, size=0.3) for rank in (1, 4, 16)]
    return [engine.load_layer(write_adapter(folder / str(adapter.rank), adapter)) for adapter in adapters]


def prompt(number: int, length: int = 20) -> tuple[int, ...]:
    return tuple(np.random.default_rng(number).integers(3, 259, length).tolist())


def request(number: int, tokens: int = 12, **fields: object) -> Request:
    options: dict[str, object] = {"sampling": GREEDY, "ignore_eos": True, **fields}
    return Request(prompt(number), max_tokens=tokens, **options)  # type: ignore[arg-type]


def overflowing(config: ModelConfig, folder: Path) -> Path:
    """A layer of finite weights that no sum survives."""
    adapter = tiny_adapter(config, rank=4)
    huge = np.float32(1e30)
    factors = {key: LoraFactors(f.A * huge, f.B * huge, f.scale) for key, f in adapter.factors.items()}
    return write_adapter(folder, replace(adapter, factors=factors))


def test_the_kernel_answers(engine: Engine) -> None:
    from synapse.hotpath import PATHS

    assert isinstance(engine._transformer, NativeTransformer)
    engine.logits([1, 2, 3])
    assert PATHS["engine"].native_answered


def test_the_same_requests_get_the_same_tokens_again_alone_and_together(engine: Engine, layers: list[str]) -> None:
    stacks = [(), ((layers[0], 1.0),), ((layers[1], 0.5), (layers[2], -1.0)), ((layers[2], 1.0), (layers[1], 1.0))]
    sampled = Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=5)
    requests = [request(n, layers=stacks[n % 4], sampling=sampled if n % 3 else GREEDY) for n in range(17)]
    alone = [run(engine, one)[0].tokens for one in requests]
    together = [answer.tokens for answer in run(engine, *requests)]
    again = [answer.tokens for answer in run(engine, *reversed(requests))][::-1]
    assert together == alone
    assert again == alone
    assert len(set(map(tuple, alone))) == 17


def test_a_shared_prefix_is_computed_once_and_gives_the_same_answer(tiny: Path, at_home: Path) -> None:
    fresh = open_engine_file(tiny, "native", LIMITS)
    long = Request(prompt(1, 100), sampling=GREEDY, max_tokens=20, ignore_eos=True)
    first, second = (run(fresh, long)[0] for _ in range(2))
    fresh.close()
    assert first.finished is not None
    assert second.finished is not None
    assert (first.finished.cached_tokens, second.finished.cached_tokens) == (0, 99)
    assert second.tokens == first.tokens


def test_cancelling_takes_one_step_and_disturbs_nobody(engine: Engine) -> None:
    (expected,) = run(engine, request(2, 30))
    kept, given_up = engine.add(request(2, 30)), engine.add(request(3, 100))
    answer = Answer()
    for _ in range(5):
        for event in engine.step():
            if event.request_id == kept:
                answer.add(event)
    assert engine.cancel(given_up)
    events = engine.step()
    assert [e.reason for e in events if isinstance(e, Finished)] == ["cancelled"]
    for event in [e for e in events if e.request_id == kept] + list(rest_of(engine)):
        answer.add(event)
    assert answer.tokens == expected.tokens
    assert engine.kv_tokens_held == 0


def rest_of(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()


def test_a_full_cache_delays_sequences_and_changes_none(tiny: Path, at_home: Path) -> None:
    small = open_engine_file(tiny, "native", Limits(max_context=128, kv_cache_tokens=160, max_batch=4, threads=2))
    requests = [request(n, 90) for n in range(4)]
    alone = [run(small, one)[0].tokens for one in requests]
    together = [answer.tokens for answer in run(small, *requests)]
    preempted = small._scheduler.preemptions
    small.close()
    assert together == alone
    assert preempted > 0


def test_the_context_is_filled_to_its_last_token(engine: Engine) -> None:
    at_most = engine.context
    (answer,) = run(engine, Request(prompt(4, at_most - 1), sampling=GREEDY, ignore_eos=True))
    assert len(answer.tokens) == 1
    logits = engine.logits(prompt(4, at_most))
    assert np.isfinite(logits).all()
    assert int(logits[at_most - 2].argmax()) == answer.tokens[0]


def test_the_first_and_the_last_token_of_the_vocabulary(engine: Engine) -> None:
    (answer,) = run(engine, Request((0, VOCAB - 1, 0), sampling=GREEDY, max_tokens=3, ignore_eos=True))
    assert len(answer.tokens) == 3
    for token in (-1, VOCAB):
        with pytest.raises(InvalidInput, match=f"0 to {VOCAB - 1}"):
            engine.add(Request((token,)))
        with pytest.raises(InvalidInput, match=f"0 to {VOCAB - 1}"):
            engine.logits([token])


def test_logprobs_grammars_and_logits_are_of_one_model(engine: Engine) -> None:
    (answer,) = run(engine, request(5, 6, logprobs=3))
    logits = engine.logits([*prompt(5), *answer.tokens])[19:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    reported = [entry for event in answer.events if isinstance(event, Delta) for entry in event.logprobs]
    for entry, row in zip(reported, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
        assert [token for token, _ in entry.top] == list(np.argsort(-row)[:3])
    (dated,) = run(engine, request(5, 20, grammar=Grammar("regex", "[0-9]{4}-[0-9]{2}")))
    assert [len(part) for part in dated.text.split("-")] == [4, 2]


def test_a_layer_that_overflows_ends_its_own_request_with_an_error(
    engine: Engine, layers: list[str], tmp_path: Path
) -> None:
    bad = engine.load_layer(overflowing(engine.config, tmp_path / "bad"))
    healthy = [request(n, layers=((layers[n % 3], 1.0),)) for n in range(6)]
    expected = [answer.tokens for answer in run(engine, *healthy)]
    ill = request(7, layers=((bad, 1.0), (layers[0], 1.0)))
    answers = run(engine, *healthy[:3], ill, *healthy[3:])
    failed = answers.pop(3).finished
    assert failed is not None
    assert (failed.reason, failed.completion_tokens) == ("error", 0)
    assert isinstance(failed.error, Corrupt)
    assert "overflow" in failed.error.message
    assert [answer.tokens for answer in answers] == expected


def test_it_stays_near_the_reference_in_float32(engine: Engine, tiny: Path) -> None:
    exact = open_engine_file(tiny, "reference", LIMITS)
    tokens = prompt(8, 150)
    assert distances(engine.logits(tokens), exact.logits(tokens)).mean() < 0.05


def test_a_step_after_closing_is_refused_and_the_map_of_the_weights_is_gone(tiny: Path, at_home: Path) -> None:
    gc.collect()
    maps = Path("/proc/self/maps")
    before, mapped = threading.active_count(), maps.read_text().count(".pack")
    engine = open_engine_file(tiny, "native", LIMITS)
    engine.add(request(1))
    engine.step()
    assert maps.read_text().count(".pack") > mapped
    engine.close()
    with pytest.raises(Unavailable, match="the engine is closed"):
        engine.step()
    with pytest.raises(Unavailable, match="the engine is closed"):
        engine.logits([1])
    assert threading.active_count() == before
    assert maps.read_text().count(".pack") == mapped


def test_an_engine_that_is_forgotten_leaves_neither_threads_nor_maps(tiny: Path, at_home: Path) -> None:
    gc.collect()
    before, mapped = threading.active_count(), Path("/proc/self/maps").read_text().count(".pack")
    for _ in range(2):
        engine = open_engine_file(tiny, "native", LIMITS)
        run(engine, request(1))
    del engine
    gc.collect()
    assert threading.active_count() == before
    assert Path("/proc/self/maps").read_text().count(".pack") == mapped


async def test_the_runner_closes_its_engine(tiny: Path, at_home: Path) -> None:
    before = threading.active_count()
    runner = EngineRunner(await asyncio.to_thread(open_engine_file, tiny, "native", LIMITS))
    events = [event async for event in runner.generate(request(1))]
    assert isinstance(events[-1], Finished)
    await runner.close()
    runner.engine.add(request(1))
    with pytest.raises(Unavailable, match="the engine is closed"):
        runner.engine.step()
    assert threading.active_count() <= before + 1, "but for the thread that asyncio keeps"


def test_two_engines_of_one_model_share_its_packed_file(tiny: Path, engine: Engine, at_home: Path) -> None:
    files = sorted(path.name for path in (at_home / "packed").iterdir() if path.suffix == ".pack")
    other = open_engine_file(tiny, "auto", LIMITS)
    assert sorted(path.name for path in (at_home / "packed").iterdir() if path.suffix == ".pack") == files
    assert run(other, request(1))[0].tokens == run(engine, request(1))[0].tokens
    other.close()


def reasons(tiny: Path) -> str:
    """Open with `auto`, which must give the reference, and return the reason that was logged."""
    with structlog.testing.capture_logs() as logs:
        engine = open_engine_file(tiny, "auto", LIMITS)
    assert isinstance(engine._transformer, ReferenceTransformer)
    assert run(engine, request(1))[0].tokens
    (entry,) = [entry for entry in logs if entry["event"] == "engine.reference"]
    return str(entry["reason"])


def test_with_python_forced_auto_is_the_reference_and_native_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    assert reasons(tiny) == "the native engine is not ready: Python is forced"
    with pytest.raises(Unavailable, match="not ready: Python is forced"):
        open_engine_file(tiny, "native", LIMITS)


def test_in_quarantine_auto_is_the_reference_and_an_open_engine_goes_on(tiny: Path, engine: Engine) -> None:
    expected = run(engine, request(1))[0].tokens
    api.set_provider(
        InMemoryProvider({"hotpath.engine.quarantine": InMemoryFlag("on", {"on": True})}), domain="synapse.hotpath"
    )
    try:
        assert reasons(tiny) == "the native engine is not ready: quarantined by a flag"
        with pytest.raises(Unavailable, match="quarantined by a flag"):
            open_engine_file(tiny, "native", LIMITS)
        (answer,) = run(engine, request(1))
        assert answer.finished is not None
        assert answer.finished.error is None
        assert len(answer.tokens) == len(expected)
    finally:
        api.clear_providers()
