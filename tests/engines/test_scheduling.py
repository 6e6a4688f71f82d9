"""Who gets a place: by tract, priority and age; with prompts computed once, and nothing lost by those that give way."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.engine_runs import Answer, run
from support.tiny_models import build_tiny_model
from synapse.callosum.message import Tract
from synapse.engines import DeadlineExceeded, Engine, Limits, Request, Sampling
from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool
from synapse.engines.opening import open_engine_file
from synapse.engines.scheduler import Scheduler
from synapse.engines.sequence import AGEING_SECONDS, Sequence
from synapse.errors import InvalidInput

GREEDY = Sampling(temperature=0)
LIMITS = Limits(max_context=160, max_batch=3, kv_cache_tokens=256, step_tokens=24)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama").path


@pytest.fixture(scope="module")
def small(tiny: Path) -> Engine:
    return open_engine_file(tiny, "reference", LIMITS)


@pytest.fixture
def large(tiny: Path) -> Engine:
    return open_engine_file(tiny, "reference", Limits(max_context=512, max_batch=8, step_tokens=64))


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(number).integers(3, 259, length).tolist())


def request(number: int = 0, length: int = 20, tokens: int = 10, **fields: object) -> Request:
    options: dict[str, object] = {"sampling": GREEDY, "ignore_eos": True, **fields}
    return Request(prompt(number, length), max_tokens=tokens, **options)  # type: ignore[arg-type]


def advance(engine: Engine, answers: dict[str, Answer], steps: int = 10**6) -> list[str]:
    """Step until nothing is left, or so many times. Returns whose events came last."""
    told: list[str] = []
    while engine.busy and steps > 0:
        events = engine.step()
        for event in events:
            answers.setdefault(event.request_id, Answer()).add(event)
        told, steps = [event.request_id for event in events], steps - 1
    return told


def test_several_choices_compute_their_prompt_once(large: Engine) -> None:
    asked = request(1, length=150)
    (alone,) = run(large, replace(asked, layers=()))
    fresh = request(2, length=150)
    before = replace(large.counters)
    answers = run(large, *[fresh] * 8)
    assert large.counters.prefill_tokens - before.prefill_tokens == 150 + 7, (
        "each computes the last token for its logits"
    )
    assert large.counters.cached_tokens - before.cached_tokens == 7 * 149
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert run(large, asked)[0].tokens == alone.tokens


@pytest.mark.parametrize("how", ["cancelled", "preempted"])
def test_who_waits_for_a_prefix_goes_on_when_the_one_that_computes_it_is_gone(tiny: Path, how: str) -> None:
    engine = open_engine_file(tiny, "reference", replace(LIMITS, max_batch=2, kv_cache_tokens=512))
    (alone,) = run(engine, request(3, length=140))
    engine = open_engine_file(tiny, "reference", replace(LIMITS, max_batch=2, kv_cache_tokens=512))
    asked = request(3, length=140, tract=Tract.INTERNAL)
    first, second = engine.add(asked), engine.add(asked)
    engine.step()
    assert (engine.running, engine.waiting) == (1, 1)
    assert engine.counters.prefill_tokens == 24
    if how == "cancelled":
        engine.cancel(first)
    else:
        for number in (4, 5):
            engine.add(request(number, length=100))
    answers: dict[str, Answer] = {}
    advance(engine, answers)
    assert answers[second].tokens == alone.tokens
    assert answers[first].tokens == ([] if how == "cancelled" else alone.tokens)


def test_conversations_that_diverge_inside_a_block_share_it_up_to_there(large: Engine) -> None:
    shared = prompt(6, 50)
    one, other = (Request((*shared, *prompt(n, 9)), sampling=GREEDY, max_tokens=5, ignore_eos=True) for n in (7, 8))
    expected = [large.logits(each.prompt)[-1].argmax() for each in (one, other)]
    first, second = run(large, one)[0], run(large, other)[0]
    assert first.finished is not None
    assert second.finished is not None
    assert (first.finished.cached_tokens, second.finished.cached_tokens) == (0, 50)
    assert [first.tokens[0], second.tokens[0]] == expected


def test_an_external_request_takes_the_place_of_an_internal_one_which_loses_nothing(small: Engine) -> None:
    internal = [request(n, tokens=30, tract=Tract.INTERNAL) for n in range(3)]
    alone = [run(small, each)[0].tokens for each in internal]
    ids = [small.add(each) for each in internal]
    answers: dict[str, Answer] = {}
    advance(small, answers, 6)
    assert (small.running, small.waiting) == (3, 0)
    before = small.counters.preemptions
    external = small.add(request(9, tokens=5))
    assert advance(small, answers, 1) == [*ids[:2], external], "the internal one that came last gives way"
    advance(small, answers)
    assert small.counters.preemptions == before + 1
    assert [answers[each].tokens for each in ids] == alone


def test_places_go_to_the_higher_priority_and_to_external_requests_first(small: Engine) -> None:
    for n in range(3):
        small.add(request(n, tokens=30))
    small.step()
    wishes = [(Tract.INTERNAL, 10), (Tract.EXTERNAL, 0), (Tract.INTERNAL, 0), (Tract.EXTERNAL, 10), (Tract.EXTERNAL, 5)]
    ids = [small.add(request(10 + n, tokens=1, tract=t, priority=p)) for n, (t, p) in enumerate(wishes)]
    answers: dict[str, Answer] = {}
    advance(small, answers)
    assert [ids.index(each) for each in answers if each in ids] == [3, 4, 1, 0, 2]
    with pytest.raises(InvalidInput, match="between 0 and 10"):
        small.add(request(priority=11))


def test_who_has_waited_long_goes_before_all_newcomers() -> None:
    """Newcomers of the highest rank come in every step; the lowest still gets its turn, within the promised time."""
    pool = BlockPool(8)
    scheduler = Scheduler(pool, max_batch=1, step_tokens=64, copy=lambda *_: None)

    def arriving(name: str, now: float, tract: Tract, priority: int) -> Sequence:
        asked = Request(prompt(hash(name) % 1000, 8), tract=tract, priority=priority)
        seq = Sequence(name, asked, arrived=now, limit=64, constraint=None)
        seq.stack = ()
        return seq

    lowest = arriving("lowest", 0.0, Tract.INTERNAL, 0)
    scheduler.add(lowest)
    for second in range(1, 200):
        scheduler.add(arriving(f"newcomer {second}", float(second), Tract.EXTERNAL, 10))
        (chosen,) = scheduler.schedule(float(second))
        if chosen is lowest:
            break
        scheduler.remove(chosen)
    assert 21 * AGEING_SECONDS <= second <= 21 * AGEING_SECONDS + 2
    scheduler.add(arriving("another", float(second), Tract.EXTERNAL, 10))
    assert list(scheduler.schedule(float(second))) == [lowest], "nor is it sent back for a newcomer"


def test_a_deadline_that_passes_in_the_queue_ends_a_request_and_says_where_the_time_went(small: Engine) -> None:
    for n in range(3):
        small.add(request(n, tokens=40))
    small.step()
    late = small.add(request(9, deadline=time.monotonic()))
    small.add(request(9, deadline=time.monotonic() + 3600))
    answers: dict[str, Answer] = {}
    advance(small, answers)
    ended = answers[late].finished
    assert ended is not None
    assert isinstance(ended.error, DeadlineExceeded)
    assert "while the request waited" in ended.error.message
    assert ended.error.details["waited"].keys() == {"place"}
    assert all(a.finished and a.finished.reason == "length" for each, a in answers.items() if each != late)


@dataclass(frozen=True)
class Arrival:
    request: Request
    step: int
    cancelled_after: int | None


def arrivals() -> st.SearchStrategy[list[Arrival]]:
    prompts = st.builds(
        lambda family, shared, own: prompt(family, 100)[:shared] + (5,) * own,
        st.integers(0, 2),
        st.integers(0, 100),
        st.integers(1, 20),
    )
    requests = st.builds(
        Request,
        prompt=prompts,
        sampling=st.builds(Sampling, temperature=st.sampled_from([0.0, 0.9]), seed=st.integers(0, 3)),
        max_tokens=st.integers(1, 30),
        tract=st.sampled_from(Tract),
        priority=st.integers(0, 10),
        ignore_eos=st.just(True),
    )
    arrival = st.builds(Arrival, requests, st.integers(0, 20), st.none() | st.none() | st.integers(0, 12))
    return st.lists(arrival, min_size=1, max_size=9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=arrivals())
def test_whoever_comes_and_goes_no_block_is_lost_nobody_starves_and_texts_are_those_alone(
    small: Engine, batch: list[Arrival]
) -> None:
    ids: dict[int, str] = {}
    answers: dict[str, Answer] = {}
    step = 0
    while len(ids) < len(batch) or small.busy:
        for n, arrival in enumerate(batch):
            if n not in ids and arrival.step <= step:
                ids[n] = small.add(arrival.request)
                answers[ids[n]] = Answer()
            elif n in ids and arrival.cancelled_after is not None and step >= arrival.step + arrival.cancelled_after:
                small.cancel(ids[n])
        for event in small.step():
            answers[event.request_id].add(event)
        held = {block for seq in small._scheduler for block in seq.block_table}
        assert small.kv_tokens_held == len(held) * BLOCK_TOKENS
        step += 1
        assert step < 20 + 40 * len(batch), "somebody starves"
    assert small._pool.ref_count == [0] * small._pool.blocks
    for n, arrival in enumerate(batch):
        answer = answers[ids[n]]
        (alone,) = run(small, replace(arrival.request, tract=Tract.EXTERNAL))
        if arrival.cancelled_after is None:
            assert answer.tokens == alone.tokens
        else:
            assert answer.tokens == alone.tokens[: len(answer.tokens)]
