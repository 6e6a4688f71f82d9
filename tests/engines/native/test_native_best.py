"""A token chosen among the most likely is the one that is chosen among all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.native_engine import by_kernel, new_cache, pieces, some_tokens, tiny_native
from synapse.engines.native.call import BEST
from synapse.engines.native.packed.packing import Kind
from synapse.engines.request import Sampling
from synapse.engines.sampling import Best, Sampler

GRID = st.integers(-24, 24).map(lambda number: number / 4)
"""Few different logits, so that many are equal."""


def best_of(logits: NDArray[np.float32], count: int) -> Best:
    """As the kernel finds them: most likely first, equal ones by id."""
    order = np.argsort(-logits, kind="stable")[:count].astype(np.int32)
    return order, logits[order]


def both(sampling: Sampling, logits: NDArray[np.float32], best: Best, draws: int = 5) -> tuple[list[int], list[int]]:
    """The tokens of two samplers with the same seed, one of which is told the most likely tokens."""
    told, plain = (Sampler(sampling, (1, 2), len(logits)) for _ in range(2))
    found: tuple[list[int], list[int]] = ([], [])
    for _ in range(draws):
        found[0].append(told.choose(logits, best=best))
        found[1].append(plain.choose(logits))
        for sampler, tokens in zip((told, plain), found, strict=True):
            sampler.note(tokens[-1])
    return found


@given(
    logits=st.lists(GRID, min_size=3, max_size=200).map(lambda row: np.array(row, np.float32)),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 80),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    seed=st.integers(0, 2**32),
)
def test_greedy_and_top_k_choose_the_same_ties_included(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=seed)
    told, plain = both(sampling, logits, best_of(logits, min(BEST, len(logits))))
    assert told == plain


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=70, max_size=200, unique=True),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.8]),
        top_k=st.sampled_from([0, 5, 64]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.sampled_from([{}, {3: 40.0}, {0: -40.0}]),
        seed=st.integers(0, 99),
    ),
)
def test_penalties_and_biases_look_at_all_tokens(logits: list[float], sampling: Sampling) -> None:
    """They may lift a token that was not among the most likely."""
    row = np.array(logits, np.float32)
    told, plain = both(sampling, row, best_of(row, BEST))
    assert told == plain


def test_without_the_most_likely_tokens_all_are_looked_at() -> None:
    logits = np.array([0.0, 2.0, 1.0], np.float32)
    nothing = np.empty(0, np.int32), np.empty(0, np.float32)
    assert Sampler(Sampling(temperature=0), (), 3).choose(logits, best=nothing) == 1


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
def test_what_the_kernel_finds_gives_the_tokens_of_its_logits(kind: Kind) -> None:
    model = tiny_native(kind=kind, threads=2, vocab=500)
    chunks = pieces(some_tokens(model.packed.config, 60), [1, 0])
    answer = by_kernel(model)(chunks, new_cache(model, 2))
    for row in range(60):
        for top_k in (1, 40, 64, 65):
            sampling = Sampling(0.9, top_k=top_k, seed=row)
            told, plain = both(sampling, answer.values[row], (answer.best_tokens[row], answer.best_values[row]), 2)
            assert told == plain
    model.close()
