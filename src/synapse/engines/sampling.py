"""Choosing the next token from logits.

The order is: logit bias, penalties, grammar, temperature, top-k, top-p, min-p, draw. Top-p is nucleus sampling
(Holtzman et al., 2019, arXiv:1904.09751), min-p is of Nguyen et al., 2024 (arXiv:2407.01082), the repetition penalty is
that of CTRL (Keskar et al., 2019, arXiv:1909.05858); frequency and presence penalties are OpenAI's.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from synapse.engines.choice import Choice, Edits
from synapse.engines.philox import uniforms
from synapse.engines.request import Sampling, TokenLogprob
from synapse.errors import InvalidInput

MAX_LOGPROBS = 20
LARGEST = np.finfo(np.float32).max
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
}


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Refuse settings that mean nothing.

    Raises:
        InvalidInput: a value is outside its range, or a biased token is outside the vocabulary.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise InvalidInput(f"{name} must lie between {low:g} and {high:g}, not {value}", param=name)
    if sampling.top_p == 0:
        raise InvalidInput(
            "top_p must be greater than 0", hint="for greedy decoding set temperature to 0", param="top_p"
        )
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocab:
            raise InvalidInput(
                f"logit_bias names token {token}; this model has tokens 0 to {vocab - 1}", param="logit_bias"
            )
        if not math.isfinite(bias):
            raise InvalidInput(f"the logit_bias of token {token} is {bias}, not a finite number", param="logit_bias")


DRAWS = 64
"""Random numbers that are made at once: one costs as much as all of these."""


class Sampler:
    """The choices of one sequence: its random numbers, and which tokens it has seen.

    A choice is a function of the sampling settings, the tokens before it, the logits, and the position in the sequence
    that the token will have: another process that has these goes on with the same text.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
        self._draws: list[float] = []
        self._first_draw = 0
        self._edits = _Edited(sampling, prompt)

    def note(self, token: int) -> None:
        """Remember a token of the answer, for the penalties."""
        self._edits.note(token, 1)

    def choice(self, position: int, mask: NDArray[np.uint32] | None = None, ahead: Sequence[int] = ()) -> Choice:
        """How the token at a position is to be chosen, if the answer goes on with the tokens `ahead` before it."""
        s = self._sampling
        for token in ahead:
            self._edits.note(token, 1)
        edits = self._edits.edits()
        for token in ahead:
            self._edits.note(token, -1)
        uniform = self._uniform(position) if s.temperature else 0.0
        return Choice(s.temperature, s.top_k, s.top_p, s.min_p, uniform, edits, mask)

    def _uniform(self, position: int) -> float:
        """The random number of a position."""
        if not 0 <= position - self._first_draw < len(self._draws):
            self._first_draw = position
            self._draws = uniforms(self.seed, position, DRAWS).tolist()
        return self._draws[position - self._first_draw]


class _Edited:
    """The tokens whose logits bias or penalties change, and by how much."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._penalised = bool(
            sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
        )
        self._places: dict[int, int] = {}
        self._tokens, self._bias = np.zeros(16, np.int32), np.zeros(16, np.float32)
        self._seen, self._answered = np.zeros(16, np.int64), np.zeros(16, np.int64)
        """How often each token is in prompt and answer, and in the answer."""
        for token, bias in sampling.logit_bias.items():
            place = self._place(token)  # first: it may put larger arrays into the place of these
            self._bias[place] = bias
        if self._penalised:
            for token in set(prompt):
                place = self._place(token)
                self._seen[place] = 1

    def note(self, token: int, times: int) -> None:
        """Note a token of the answer, or with -1 times that it is none."""
        if self._penalised:
            place = self._place(token)
            self._seen[place] += times
            self._answered[place] += times

    def edits(self) -> Edits | None:
        """What is done to the logits, in fresh arrays."""
        count, s = len(self._places), self._sampling
        if not count:
            return None
        factor = np.where(self._seen[:count] > 0, np.float32(s.repetition_penalty), np.float32(1))
        answered = self._answered[:count]
        less = s.frequency_penalty * answered + s.presence_penalty * (answered > 0)
        return Edits(self._tokens[:count].copy(), self._bias[:count].copy(), factor, less.astype(np.float32))

    def _place(self, token: int) -> int:
        """Where a token is in the arrays, put there if need be."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens, self._bias, self._seen, self._answered = (
                np.concatenate([array, np.zeros_like(array)])
                for array in (self._tokens, self._bias, self._seen, self._answered)
            )
        self._tokens[place] = token
        return place


def choose(logits: NDArray[np.float32], choice: Choice) -> int:
    """The next token. This is what kernels must choose too.

    Args:
        logits: float32[vocab], not changed.
    """
    logits = edited(logits, choice)
    if choice.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity, rightly
        weights = np.exp((logits.astype(np.float64) - np.float64(logits.max())) / choice.temperature)
    # The tokens that are kept stay in the order of their ids: a tie in probability that rounding turns over, because
    # other sequences share the batch, then moves no token's share of the unit interval.
    tokens = np.flatnonzero(kept(logits, weights, choice))
    cumulative = np.cumsum(weights[tokens])
    place = int(np.searchsorted(cumulative, choice.uniform * cumulative[-1], side="right"))
    return int(tokens[min(place, len(tokens) - 1)])


def edited(logits: NDArray[np.float32], choice: Choice) -> NDArray[np.float32]:
    """Logits with bias and penalties, and minus infinity for what the grammar does not allow."""
    if choice.edits is not None:
        edits = choice.edits
        logits = logits.copy()
        biased = logits[edits.tokens] + edits.bias
        edited = np.where(biased > 0, biased / edits.factor, biased * edits.factor) - edits.less
        logits[edits.tokens] = np.clip(edited, -LARGEST, LARGEST)  # an infinite one would take the others with it
    if choice.mask is not None:
        bits = np.unpackbits(choice.mask.view(np.uint8), count=len(logits), bitorder="little")
        logits = np.where(bits, logits, np.float32(-np.inf))
    return logits


def kept(logits: NDArray[np.float32], weights: NDArray[np.float64], choice: Choice) -> NDArray[np.bool_]:
    """Which tokens top-k, top-p and min-p keep, bool[vocab]; of equal logits, the lower ids go first.

    Args:
        weights: the tokens' probabilities, as shares of that of the most likely.
    """
    keep = logits > -np.inf
    if 0 < choice.top_k < len(logits):
        lowest = np.partition(logits, -choice.top_k)[-choice.top_k]
        keep &= logits >= lowest
        ties = np.flatnonzero(logits == lowest)
        keep[ties[len(ties) - max(int(keep.sum()) - choice.top_k, 0) :]] = False
    if choice.top_p < 1:
        total = weights[keep].sum()
        # Those of less than a vocabulary's share of 1 - top_p have less than that together: only the others are sorted.
        likely = np.flatnonzero(keep & (weights >= (1 - choice.top_p) * total / len(logits)))
        order = likely[np.argsort(-logits[likely], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        keep[:] = False
        keep[order[before < choice.top_p * total]] = True
    if choice.min_p > 0:
        keep &= weights >= choice.min_p
    return keep


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The log-probability of a token under the model itself, with the `top` most likely ones beside it."""
    exact = logits.astype(np.float64)
    peak = exact.max()
    normaliser = peak + math.log(np.exp(exact - peak).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        candidates = np.argpartition(-exact, top - 1)[:top]
        ordered = candidates[np.lexsort((candidates, -exact[candidates]))]
        best = tuple((int(i), float(exact[i] - normaliser)) for i in ordered)
    return TokenLogprob(token, float(exact[token] - normaliser), best)
