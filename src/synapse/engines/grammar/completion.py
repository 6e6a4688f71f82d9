"""The shortest way from a state of a grammar to a complete answer, found by a search in its automaton.

The search walks a second matcher of the same grammar, the *scout*, whose vocabulary is the 256 bytes and some pairs:
copying its state takes a microsecond, and its mask, which says what may come next, little more. States cannot be
compared, but masks can; so a state with a new mask is gone on from at once, cheapest first, and one whose mask was seen
before only when nothing new is left: most often it is the same state again, sometimes (``minLength``) the only way on.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from synapse.engines.grammar.keys import Keys
from synapse.engines.grammar.trial_program import END_OF_TEXT, byte_tokenizer
from synapse.models.tokenizer import Tokenizer

MOST_CHOICES = 40
"""Bytes that may follow, above which one letter stands for all."""
LONGEST_MATCH = 16
"""Bytes of the longest token that a completion is cut into."""
_STANDING_FOR_ALL = b'"}]a0 ,:' + bytes(range(0x21, 0x30)) + b"1:;<=>?@A[\\]^_`{|}~\n"
_IN_ORDER = [*dict.fromkeys((*_STANDING_FOR_ALL, *range(256)))]
_FIRST_TRIES = [
    b"", b'"', b'""', b"0", b"]", b"}", b'"]', b'"}', b"]}", b"}}", b"null", b'a"', b":", b'":', b", ", b" ",
]  # fmt: skip
_SUFFIXES = 24
LONGEST_RUN = 2**14
SHORTEST_RUN = 4
LONGEST_SHRUNK = 400
"""Bytes up to which a completion is made shorter by leaving parts of it out."""


class Completions:
    """Finds completions, and cuts them into tokens of one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.scout_tokenizer = byte_tokenizer()
        self._scout_vocab = self.scout_tokenizer.vocab_size
        self._first_token: dict[bytes, int] = {}
        for token in range(tokenizer.vocab_size):
            self._first_token.setdefault(tokenizer.token_bytes(token), token)
        self._first_token.pop(b"", None)
        self._tokenise = lru_cache(1024)(self._cut)

    def tokens(self, text: bytes) -> tuple[int, ...]:
        """The text in tokens, each the longest that fits."""
        return self._tokenise(text)

    def _cut(self, text: bytes) -> tuple[int, ...]:
        tokens, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + LONGEST_MATCH), start, -1):
                token = self._first_token.get(text[start:end])
                if token is not None:
                    break
            else:
                raise ValueError(f"the tokenizer has no token for the byte {text[start]}")
            tokens.append(token)
            start = end
        return tuple(tokens)

    def after(self, scout: LLMatcher, keys: Keys | None, piece: bytes, known: bytes, longest: int) -> bytes | None:
        """A completion of the answer, from the one that was known before its last piece; None when none is found.

        Args:
            scout, keys: the state after the piece.
            longest: how many tokens it may have.
        """
        likely = [known[len(piece) :]] if known.startswith(piece) else []
        suffixes = [known[cut:] for cut in range(min(len(known), _SUFFIXES) + 1)]
        tries = sorted((first + suffix for suffix in suffixes for first in _FIRST_TRIES), key=len)
        for candidate in itertools.chain(likely, (known,), tries):
            if _completes(scout, keys, candidate) and len(self.tokens(candidate)) <= longest:
                return candidate
        found = self.search(scout, keys, longest, states=100, seconds=0.05)
        return found if found is not None and len(self.tokens(found)) <= longest else None

    def search(self, scout: LLMatcher, keys: Keys | None, longest: int, *, states: int, seconds: float) -> bytes | None:
        """The shortest completion that is found, or None when there is none, or none in so many states or
        seconds of this thread, whatever else the machine does.

        Args:
            longest: how many tokens it may have, of up to `LONGEST_MATCH` bytes each.
        """
        deadline = time.thread_time() + seconds
        order = itertools.count()
        seen: set[bytes] = set()
        new: list[tuple[int, int, LLMatcher, Keys | None, bytes]] = [(0, 0, scout.deep_copy(), keys, b"")]
        again: dict[int, tuple[LLMatcher, Keys | None, bytes]] = {}
        deepest: list[tuple[int, int]] = []
        for turn in range(states):
            if not (new or again) or time.thread_time() > deadline:
                return None
            if new:
                _, _, state, state_keys, path = heapq.heappop(new)
            else:  # deeper and deeper, but also from the first
                while deepest[0][1] not in again:
                    heapq.heappop(deepest)
                state, state_keys, path = again.pop(deepest[0][1] if turn % 8 else next(iter(again)))
                run = self._run(state, path[-1:], longest * LONGEST_MATCH - len(path))
                if run:
                    state = state.deep_copy()
                    state.consume_tokens([*run])
                    state_keys = state_keys.after(run) if state_keys is not None else None
                    path += run
            if state.is_accepting():
                return _shrunk(scout, keys, path)
            found = [*self._following(state, state_keys, longest * LONGEST_MATCH - len(path))]
            for following, following_keys, more, signature in found:
                if signature and signature in seen:
                    number = next(order)
                    again[number] = (following, following_keys, path + more)
                    heapq.heappush(deepest, (-len(path) - len(more), number))
                    continue
                seen.add(signature)
                heapq.heappush(new, (len(path) + len(more), next(order), following, following_keys, path + more))
        return None

    def _run(self, state: LLMatcher, byte: bytes, longest: int) -> bytes:
        """How often a byte can be repeated until something else is possible than before; none if that never is."""
        limit = state.validate_tokens([*byte * min(longest, LONGEST_RUN)]) if byte.isalnum() or byte in b" }" else 0
        if limit < SHORTEST_RUN:
            return b""
        before = self._mask_after(state, b"")
        if self._mask_after(state, byte * limit) == before:
            return b""
        same, other = 0, limit
        while other - same > 1:
            middle = (same + other) // 2
            if self._mask_after(state, byte * middle) == before:
                same = middle
            else:
                other = middle
        return byte * other

    def _mask_after(self, state: LLMatcher, text: bytes) -> bytes:
        bits = allocate_token_bitmask(1, self._scout_vocab)
        state = state.deep_copy()
        state.consume_tokens([*text])
        fill_next_token_bitmask(state, bits)
        return bits.tobytes()

    def _following(
        self, state: LLMatcher, keys: Keys | None, longest: int
    ) -> Iterator[tuple[LLMatcher, Keys | None, bytes, bytes]]:
        """The states that stand for all that may follow one: scout, keys, the bytes between, and the mask."""
        bits = allocate_token_bitmask(1, self._scout_vocab)
        row = bits.view(np.uint32)[0]
        forced = state.compute_ff_bytes()[: longest + 1]
        if forced:
            choices = [forced]
        else:
            fill_next_token_bitmask(state, bits)
            choices = [bytes((byte,)) for byte in _choices(row)] if not state.is_error() else []
        siblings = set()
        for more in choices:
            if len(more) > longest or state.validate_tokens([*more]) < len(more):
                continue
            following = state.deep_copy()
            following.consume_tokens([*more])
            following_keys = keys.after(more) if keys is not None else None
            if keys is not None and following_keys is None:
                continue
            signature = b""
            if not following.is_accepting():
                fill_next_token_bitmask(following.deep_copy(), bits)
                signature = row.tobytes()
                if not row.any() or signature in siblings:
                    continue
            siblings.add(signature)
            yield following, following_keys, more, signature


def _choices(row: NDArray[np.uint32]) -> list[int]:
    """Bytes that stand for all that may follow, the likeliest to lead to an end first."""
    allowed = np.unpackbits(row.view(np.uint8), count=256, bitorder="little")
    if int(allowed.sum()) <= MOST_CHOICES:
        return [byte for byte in _IN_ORDER if allowed[byte]]
    return [byte for byte in _IN_ORDER[: len(set(_STANDING_FOR_ALL))] if allowed[byte]]


def _completes(scout: LLMatcher, keys: Keys | None, text: bytes) -> bool:
    """Whether the answer is whole after this text."""
    if not text:
        return bool(scout.is_accepting()) and not scout.is_error()
    if scout.validate_tokens([*text, END_OF_TEXT]) <= len(text):
        return False
    return keys is None or keys.after(text) is not None


def _shrunk(scout: LLMatcher, keys: Keys | None, text: bytes) -> bytes:
    """The completion without the parts that it can do without."""
    if len(text) > LONGEST_SHRUNK:
        return text
    start = 0
    while start < len(text):
        for end in range(len(text), start, -1):
            shorter = text[:start] + text[end:]
            if _completes(scout, keys, shorter):
                text = shorter
                break
        else:
            start += 1
    return text
