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

from synapse.engines.request import Sampling, TokenLogprob
from synapse.errors import InvalidInput

MAX_LOGPROBS = 20
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


Best = tuple[NDArray[np.int32], NDArray[np.float32]]


class Sampler:
    """The choices of one sequence: its random stream, and which tokens it has seen."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab: int) -> None:
        self._sampling = sampling
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._bias_tokens = np.fromiter(sampling.logit_bias.keys(), np.intp, len(sampling.logit_bias))
        self._bias_values = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self.penalised = bool(
            sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
        )
        if self.penalised:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[np.asarray(prompt, np.intp)] = True
            self._counts = np.zeros(vocab, np.float32)

    def choose(
        self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None, best: Best | None = None
    ) -> int:
        """The next token.

        Args:
            logits: float32[vocab], not changed.
            allowed: the tokens a grammar permits, or None for all.
            best: the k most likely tokens, most likely first, and their logits, so that the rest need not be looked at
                when the settings keep no more than k.
        """
        s = self._sampling
        if best is not None and allowed is None and not self.penalised and not len(self._bias_tokens):
            kept = 1 if s.temperature == 0 else s.top_k
            if 0 < kept <= len(best[0]):
                order = np.argsort(best[0][:kept])
                return int(best[0][0]) if kept == 1 else self._pick(best[0][:kept][order], best[1][:kept][order])
        logits = self._adjusted(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        return int(logits.argmax()) if self._sampling.temperature == 0 else self._draw(logits)

    def note(self, token: int) -> None:
        """Remember a token of the answer, for the penalties."""
        if self.penalised:
            self._seen[token] = True
            self._counts[token] += 1

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        s = self._sampling
        if len(self._bias_tokens):
            logits = logits.copy()
            logits[self._bias_tokens] += self._bias_values
        if self.penalised:
            penalty = np.float32(s.repetition_penalty)
            repeated = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(self._seen, repeated, logits)
            logits = logits - s.frequency_penalty * self._counts - s.presence_penalty * (self._counts > 0)
        return logits

    def _draw(self, logits: NDArray[np.float32]) -> int:
        s = self._sampling
        tokens = np.flatnonzero(logits > -np.inf)
        if 0 < s.top_k < len(tokens):
            tokens = np.sort(tokens[np.argpartition(-logits[tokens], s.top_k - 1)[: s.top_k]])
        return self._pick(tokens, logits[tokens])

    def _pick(self, tokens: NDArray[np.signedinteger], logits: NDArray[np.float32]) -> int:
        """Draw one of these tokens, which are in the order of their ids."""
        s = self._sampling
        kept_logits = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity, rightly
            p = np.exp((kept_logits - kept_logits.max()) / s.temperature)
        p /= p.sum()
        if s.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            kept = np.sort(order[before < s.top_p])
            tokens, p = tokens[kept], p[kept]
        if s.min_p > 0:
            kept = np.flatnonzero(p >= s.min_p * p.max())
            tokens, p = tokens[kept], p[kept]
        # The kept tokens stay in the order of their ids: a tie in probability that rounding turns over, because other
        # sequences share the batch, then moves no token's share of the unit interval.
        cumulative = np.cumsum(p)
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])


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
