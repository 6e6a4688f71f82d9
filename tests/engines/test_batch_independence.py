"""What a sequence gets does not depend on what else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.layers import random_adapter
from support.engine_runs import Answer
from support.tiny_models import build_tiny_model
from synapse.engines import Engine, Event, Finished, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.transformer import StepLogits
from synapse.engines.sequence import Sequence

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arrival:
    """A request, the step it arrives at, and the step after that at which it is cancelled, if it is."""

    request: Request
    step: int
    cancelled_after: int | None


class Watched:
    """An engine whose chosen logits are noted, by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logits: dict[str, list[NDArray[np.float32]]] = {}
        choose = engine._continue

        def noting(seq: Sequence, logits: StepLogits, row: int) -> list[Event]:
            self.logits.setdefault(seq.id, []).append(logits.values[row].copy())
            return choose(seq, logits, row)

        engine._continue = noting  # type: ignore[method-assign]

    def run(self, arrivals: list[Arrival]) -> list[tuple[Answer, list[NDArray[np.float32]]]]:
        engine, step = self.engine, 0
        ids: dict[int, str] = {}
        answers: dict[str, Answer] = {}
        while len(ids) < len(arrivals) or engine.busy:
            for n, arrival in enumerate(arrivals):
                if n not in ids and arrival.step <= step:
                    ids[n] = engine.add(arrival.request)
                    answers[ids[n]] = Answer()
                elif (
                    arrival.cancelled_after is not None and n in ids and step >= arrival.step + arrival.cancelled_after
                ):
                    engine.cancel(ids[n])
            for event in engine.step():
                answers[event.request_id].add(event)
            step += 1
        assert engine.kv_tokens_held == 0
        return [(answers[ids[n]], self.logits.pop(ids[n], [])) for n in range(len(arrivals))]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, list[str]]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny = build_tiny_model(folder / "tiny.gguf", "llama")
    limits = Limits(max_context=128, max_batch=4, kv_cache_tokens=256, step_tokens=24)
    engine = open_engine_file(tiny.path, "reference", limits)
    layers = [
        engine.load_layer(random_adapter(folder / str(rank), engine.config, rank=rank, seed=rank))
        for rank in (1, 4, 16)
    ]
    return Watched(engine), layers


def arrivals(layers: list[str]) -> st.SearchStrategy[list[Arrival]]:
    stacks = st.lists(
        st.tuples(st.sampled_from(layers), st.sampled_from([0.25, 1.0])), max_size=2, unique_by=lambda layer: layer[0]
    )
    # Prompts that are mostly one token repeated, so that many share blocks with one another.
    endings = st.lists(st.sampled_from([5, 6]), min_size=1, max_size=4)
    prompts = st.builds(lambda count, ending: (5,) * count + tuple(ending), st.integers(0, 80), endings)
    requests = st.builds(
        Request,
        prompt=prompts,
        layers=stacks.map(tuple),
        sampling=st.builds(Sampling, temperature=st.sampled_from([0.0, 0.9]), seed=st.integers(0, 3)),
        max_tokens=st.integers(1, 30),
    )
    arrival = st.builds(
        Arrival, requests, step=st.integers(0, 20), cancelled_after=st.none() | st.none() | st.integers(0, 10)
    )
    return st.lists(arrival, min_size=1, max_size=7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_logits_and_tokens_are_those_of_the_sequence_alone(
    watched: tuple[Watched, list[str]], data: st.DataObject
) -> None:
    engine, layers = watched
    batch = data.draw(arrivals(layers))
    for arrival, (answer, noted) in zip(batch, engine.run(batch), strict=True):
        request = arrival.request
        assert isinstance(answer.finished, Finished)
        if arrival.cancelled_after is None:
            assert answer.finished.reason in ("stop", "length")
        if not answer.tokens:
            continue
        ids = [*request.prompt, *answer.tokens]
        alone = engine.engine.logits(ids, request.layers)[len(request.prompt) - 1 : -1]
        assert len(noted) == len(alone)
        for together, expected in zip(noted, alone, strict=True):
            assert np.linalg.norm(together - expected) <= TOLERANCE * np.linalg.norm(expected)
        if request.sampling.temperature == 0:
            second, best = np.sort(alone, axis=1)[:, -2:].T
            clear = best - second > TOLERANCE * np.abs(best)
            assert (np.asarray(answer.tokens)[clear] == alone.argmax(axis=1)[clear]).all()
