"""Prompt lookup: what is guessed, how guesses are judged, and that the text is the same as without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.engine_runs import run
from synapse.engines import Engine, Limits, Request, Sampling
from synapse.engines.lookup import FIRST_GUESSES, GRAM, LONGEST_PAUSE, PromptLookup


def test_what_followed_the_same_tokens_before_is_guessed() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert lookup.guess(tokens, 8) == [4, 5]
    lookup.judge(2, 2, len(tokens) + 3)
    tokens += [4, 5, 6]
    assert lookup.guess(tokens, 8) == [9, 1, 2, 3, 4]
    assert lookup.guess(tokens, 1) == [9]
    assert lookup.guess(tokens, 0) == []
    assert PromptLookup().guess([1, 2, 3, 4, 5], 8) == []


def test_the_latest_place_is_the_one_that_is_gone_on_from() -> None:
    assert PromptLookup().guess([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == [5]


def test_wrong_guesses_become_rare() -> None:
    lookup, tokens, guesses = PromptLookup(), [1, 2, 3, 4] * 2, 0
    for _ in range(1000):
        guess = lookup.guess(tokens, 7)
        tokens += [1, 2, 3] if len(tokens) % 2 else [1, 2, 3, 4]
        if guess:
            guesses += 1
            lookup.judge(len(guess), 0, len(tokens))
    assert 0 < guesses < 1000 * 4 / LONGEST_PAUSE * 2


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9))
def test_a_guess_always_follows_a_place_that_is_alike(tokens: list[int], most: int) -> None:
    lookup = PromptLookup()
    for length in range(len(tokens) + 1):
        guess = lookup.guess(tokens[:length], most)
        assert len(guess) <= min(most, FIRST_GUESSES)
        if guess:
            gram = tokens[length - GRAM : length] + guess
            assert any(tokens[at : at + len(gram)] == gram for at in range(length - GRAM))


@pytest.fixture(scope="module")
def pair(open_default: Callable[[Limits], Engine]) -> tuple[Engine, Engine]:
    """An engine that guesses and one that does not."""
    return open_default(Limits(max_context=512)), open_default(Limits(max_context=512, prompt_lookup=False))


QUOTED = "Repeat this list, word for word: apple, banana, cherry, date, elder, fig, grape. apple, banana, cherry,"
SETTINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(temperature=0.7, top_p=0.95, seed=3),
    "wild": Sampling(temperature=1.3, seed=4),
    "penalised": Sampling(temperature=0.5, repetition_penalty=1.3, seed=5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_the_same_as_without(pair: tuple[Engine, Engine], name: str) -> None:
    prompt = tuple(pair[0].tokenizer.encode(QUOTED))
    request = Request(prompt, sampling=SETTINGS[name], max_tokens=48, stop=("cherry, date, elder, fig, grape, apple",))
    before = pair[0].counters.right_guesses
    with_guesses, without = (run(engine, request)[0] for engine in pair)
    assert (with_guesses.text, with_guesses.tokens) == (without.text, without.tokens)
    assert pair[1].counters.guessed_tokens == 0
    if name == "greedy":
        assert pair[0].counters.right_guesses > before
        assert pair[0].counters.steps < pair[1].counters.steps


def test_two_that_share_steps_guess_and_end_as_alone(pair: tuple[Engine, Engine]) -> None:
    engine, plain = pair
    requests = [
        Request(tuple(engine.tokenizer.encode(text)), sampling=Sampling(temperature=0), max_tokens=tokens)
        for text, tokens in ((QUOTED, 40), ("1 2 3 4 5 6 1 2 3 4 5 6 1 2 3", 23))
    ]
    alone = [run(plain, request)[0] for request in requests]
    together = run(engine, *requests)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.finished.completion_tokens for answer in together if answer.finished] == [40, 23]
    assert engine.kv_tokens_held == 0
