"""Each setting of the sampler does what its definition says, on distributions small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.engines.philox import philox
from synapse.engines.request import Sampling
from synapse.engines.sampling import Sampler, check_sampling, choose, edited, token_logprob
from synapse.errors import InvalidInput

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1], np.float64)
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def draws(sampling: Sampling, logits: np.ndarray = LOGITS, count: int = 4000) -> Counter[int]:
    sampler = Sampler(sampling, [0])
    return Counter(choose(logits, sampler.choice(position)) for position in range(1, 1 + count))


def test_temperature_zero_takes_the_most_likely_token_and_the_lowest_id_of_a_tie() -> None:
    assert set(draws(Sampling(temperature=0), count=5)) == {0}
    assert set(draws(Sampling(temperature=0), np.zeros(4, np.float32), count=5)) == {0}


def test_temperature_one_draws_from_the_distribution_itself() -> None:
    counts = draws(Sampling(seed=1), count=20_000)
    shares = np.array([counts[i] for i in range(4)]) / 20_000
    assert np.abs(shares - PROBABILITIES).max() < 0.015


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = draws(Sampling(temperature=0.25, seed=1)), draws(Sampling(temperature=4.0, seed=1))
    assert cold[0] > 0.65 * 4000
    assert hot[0] < 0.35 * 4000


def test_the_smallest_temperature_there_is_takes_the_most_likely_token() -> None:
    assert set(draws(Sampling(temperature=5e-324, seed=1), count=50)) == {0}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(Sampling(top_k=2, seed=1))) == {0, 1}
    assert set(draws(Sampling(top_k=1, seed=1))) == {0}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert set(draws(Sampling(top_p=0.65, seed=1))) == {0, 1}
    assert set(draws(Sampling(top_p=0.75, seed=1))) == {0, 1, 2}
    assert set(draws(Sampling(top_p=0.01, seed=1))) == {0}


def test_min_p_keeps_tokens_near_the_most_likely_one() -> None:
    assert set(draws(Sampling(min_p=0.6, seed=1))) == {0, 1}


def test_the_repetition_penalty_reaches_tokens_of_the_prompt() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0])
    assert choose(np.array([2.0, 1.5, 0, 0], np.float32), sampler.choice(1)) == 1


def test_the_frequency_penalty_grows_with_every_use_and_the_presence_penalty_does_not() -> None:
    logits = np.array([1.0, 0.0, -5.0, -5.0], np.float32)
    frequency = Sampler(Sampling(temperature=0, frequency_penalty=0.4), [0])
    presence = Sampler(Sampling(temperature=0, presence_penalty=0.4), [0])
    answers = []
    for sampler in (frequency, presence):
        for _ in range(3):
            sampler.note(0)
        answers.append(choose(logits, sampler.choice(4)))
    assert answers == [1, 0]


def test_logit_bias_can_force_and_forbid() -> None:
    assert set(draws(Sampling(logit_bias={3: 100.0}, seed=1), count=50)) == {3}
    assert 0 not in draws(Sampling(logit_bias={0: -100.0}, seed=1))


def test_a_grammar_mask_is_obeyed_by_greedy_and_by_drawing() -> None:
    mask = np.array([0b1000], np.uint32)
    for temperature in (0.0, 1.0):
        assert choose(LOGITS, Sampler(Sampling(temperature=temperature), [0]).choice(1, mask)) == 3


@given(st.integers(0, 2**64 - 1), st.floats(0.1, 2.0), st.floats(0.05, 1.0), st.integers(0, 50))
def test_the_same_seed_draws_the_same_tokens_although_logits_differ_by_rounding(
    seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((20, 100)).astype(np.float32) * 3
    settings = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    choices = [Sampler(settings, [0]).choice(position) for position in range(len(rows))]
    pairs = zip(rows, choices, strict=True)
    same = sum(choose(row, choice) == choose(row * np.float32(1 + 1e-6), choice) for row, choice in pairs)
    assert same >= 19


def test_without_a_seed_two_runs_differ() -> None:
    flat = np.zeros(1000, np.float32)
    one, other = ([choose(flat, sampler.choice(n)) for n in range(4)] for sampler in (Sampler(Sampling(), [0]),) * 2)
    assert one == other
    assert one != [choose(flat, Sampler(Sampling(), [0]).choice(n)) for n in range(4)]


def test_a_draw_is_that_of_seed_and_position_whoever_makes_it() -> None:
    """So that another process goes on with a sequence: with the tokens before it noted, or with them in its prompt."""
    settings = Sampling(seed=3, presence_penalty=0.5, repetition_penalty=1.2, logit_bias={2: 1.0})
    begun, ahead = Sampler(settings, [0]), Sampler(settings, [0])
    for position, token in enumerate([1, 1, 2], 1):
        begun.note(token)
        begun.choice(position)
    later, looked_ahead = begun.choice(150), ahead.choice(150, ahead=(1, 1, 2))
    assert choose(LOGITS, later) == choose(LOGITS, looked_ahead)
    assert np.array_equal(edited(LOGITS, later), edited(LOGITS, looked_ahead))
    assert np.array_equal(edited(LOGITS, ahead.choice(1)), edited(LOGITS, Sampler(settings, [0]).choice(1)))
    assert begun.choice(150).uniform == Sampler(settings, [0]).choice(150).uniform != begun.choice(151).uniform


def test_the_random_numbers_are_those_of_philox() -> None:
    """The published test vectors of Random123 for philox4x32-10."""
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        found = philox(np.array(counter, np.uint64).reshape(4, 1), np.array(key, np.uint64).reshape(2, 1))
        assert found.ravel().tolist() == expected


def test_logprobs_are_of_the_model_and_ordered() -> None:
    reported = token_logprob(LOGITS, 2, top=3)
    assert reported.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in reported.top] == [0, 1, 2]
    assert reported.top[0][1] == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-0.1),
        Sampling(temperature=math.nan),
        Sampling(top_p=0),
        Sampling(top_p=1.1),
        Sampling(top_k=-1),
        Sampling(min_p=2),
        Sampling(repetition_penalty=0),
        Sampling(frequency_penalty=math.inf),
        Sampling(logit_bias={4: 1.0}),
        Sampling(logit_bias={-1: 1.0}),
        Sampling(logit_bias={1: math.nan}),
    ],
)
def test_settings_that_mean_nothing_are_refused(sampling: Sampling) -> None:
    with pytest.raises(InvalidInput):
        check_sampling(sampling, 4)
