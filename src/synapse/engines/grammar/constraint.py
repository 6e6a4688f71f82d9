"""The state of a grammar within one answer.

A constrained answer that is cut in the middle of a string is of no use to anyone, and some grammars have states that
lead nowhere. So a constraint always knows a way to a complete answer that fits into what is left of the budget, and a
token after which there is none is not taken: the first token of the way that is known is.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from synapse.engines.grammar.completion import Completions
from synapse.engines.grammar.errors import GrammarFailed
from synapse.engines.grammar.keys import Keys


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar ready for use.

    Attributes:
        matcher: in its first state; only copies of it are moved.
        scout: the same over bytes (see `completion`).
        shortest: the shortest complete answer.
        json: the answer is a JSON text.
        open_keys: it can have objects whose keys the grammar does not name one by one.
    """

    matcher: LLMatcher
    scout: LLMatcher
    shortest: bytes
    json: bool
    open_keys: bool


class Vocabulary:
    """The tokens of a model: their bytes (none for a control token), and those that end a turn."""

    def __init__(self, pieces: Sequence[bytes], eos: Sequence[int]) -> None:
        self.pieces = pieces
        self.eos = tuple(eos)
        in_order = sorted(range(len(pieces)), key=pieces.__getitem__)
        self._tokens = np.array(in_order, np.intp)
        self._sorted = [pieces[token] for token in in_order]

    def beginning_with(self, prefix: bytes) -> NDArray[np.intp]:
        """The tokens whose bytes begin so."""
        start = bisect_left(self._sorted, prefix)
        return self._tokens[start : bisect_left(self._sorted, prefix + b"\xff" * 4, start)]


class Constraint:
    """The grammar's state within one answer."""

    def __init__(self, compiled: Compiled, completions: Completions, vocabulary: Vocabulary) -> None:
        self._compiled = compiled
        self._completions = completions
        self._vocabulary = vocabulary
        self._matcher = compiled.matcher.deep_copy()
        self._scout = compiled.scout.deep_copy()
        self._keys = Keys() if compiled.open_keys else None
        self._completion = compiled.shortest
        self._closing: list[int] | None = None  # the tokens that are left, when nothing else fits any more
        self._answer: list[bytes] = []
        self._bits = allocate_token_bitmask(1, len(vocabulary.pieces))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest complete answer."""
        return len(self._completions.tokens(self._compiled.shortest))

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing but the end can follow."""
        return self.accepting and bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether the answer is whole; more may follow."""
        return bool(self._matcher.is_accepting()) and not self._matcher.is_error()

    def mask(self) -> NDArray[np.uint32]:
        """Which tokens may come next, uint32[ceil(vocab / 32)]: token t is bit t % 32 of word t // 32.

        The same array each time, overwritten by the next call.

        Raises:
            GrammarFailed: the library gave up.
        """
        row: NDArray[np.uint32] = self._bits.view(np.uint32)[0]
        if self._closing is None:
            fill_next_token_bitmask(self._matcher, self._bits)
            self._check_matcher()
            for ending in self._keys.endings() if self._keys is not None else ():
                tokens = self._vocabulary.beginning_with(ending)
                np.bitwise_and.at(row, tokens >> 5, ~(np.uint32(1) << (tokens & 31).astype(np.uint32)))
        else:
            row[:] = 0
        if not row.any():
            token = self._known()
            row[token // 32] |= np.uint32(1 << token % 32)
        return row

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool[vocab]."""
        bits = self.mask().view(np.uint8)
        return np.unpackbits(bits, count=len(self._vocabulary.pieces), bitorder="little").view(np.bool_)

    def accept(self, token: int, remaining: int) -> int:
        """Take the sampled token, or, when no complete answer would then follow in time, one that leads to an end.

        Args:
            token: one of the allowed.
            remaining: how many tokens may follow it.

        Returns:
            The token that was taken.

        Raises:
            GrammarFailed: the library gave up.
        """
        if self._closing is None:
            if token in self._vocabulary.eos and self.accepting:
                self._matcher.consume_token(token)
                return token
            if self._take(token, remaining):
                return token
        token = self._known()
        if token in self._vocabulary.eos:
            self._matcher.consume_token(token)
        elif self._closing is not None:
            self._matcher.consume_token(token)
            self._answer.append(self._vocabulary.pieces[token])
            del self._closing[0]
        elif not self._take(token, remaining):
            raise GrammarFailed("the way to the end of the answer is lost", hint="ask again, or use a simpler schema")
        self._check_matcher()
        if self._closing is None and remaining <= len(self._completions.tokens(self._completion)):
            self._closing = [*self._completions.tokens(self._completion)]
        return token

    def _take(self, token: int, remaining: int) -> bool:
        """Take a token if the answer can still be completed after it."""
        piece = self._vocabulary.pieces[token]
        keys = self._keys.after(piece) if self._keys is not None else None
        if keys is None and self._keys is not None:
            return False
        if self._scout.validate_tokens([*piece]) < len(piece):
            return False
        scout = self._scout.deep_copy()
        scout.consume_tokens([*piece])
        completion = self._completions.after(scout, keys, piece, self._completion, remaining)
        if completion is None:
            return False
        self._matcher.consume_token(token)
        self._check_matcher()
        self._scout, self._keys, self._completion = scout, keys, completion
        self._answer.append(piece)
        return True

    def _known(self) -> int:
        """The first token of the way that is known; with none left the answer is whole, and ends."""
        if self._closing:
            return self._closing[0]
        return self._completions.tokens(self._completion)[0] if self._completion else self._vocabulary.eos[0]

    def check_answer(self) -> None:
        """Validate the finished answer: from its bytes alone, by a fresh matcher and a JSON parser.

        Raises:
            GrammarFailed: it does not fit.
        """
        answer = b"".join(self._answer)
        fresh = self._compiled.matcher.deep_copy()
        tokens = self._completions.tokens(answer)
        if not fresh.consume_tokens(list(tokens)) or not fresh.is_accepting():
            raise GrammarFailed("the finished answer does not fit the grammar", hint="ask again")
        if self._compiled.json:
            try:
                json.loads(answer, object_pairs_hook=_without_repeats)
            except (ValueError, RecursionError) as error:
                raise GrammarFailed(f"the finished answer is not JSON: {error}", hint="ask again") from error

    def _check_matcher(self) -> None:
        if self._matcher.is_error():
            reason = (self._matcher.get_error().splitlines() or [""])[0][:300]
            raise GrammarFailed(
                f"the grammar cannot be followed any further: {reason}", hint="ask again, or use a simpler schema"
            )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
