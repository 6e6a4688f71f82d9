"""Answers constrained while they are sampled: JSON objects, JSON schemas and regular expressions, through llguidance.

A constrained answer that runs out of tokens in the middle of a string is of no use to anyone, so a constraint also
watches the budget: as soon as the shortest way it knows to a complete answer would no longer fit, it takes that way.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from synapse.engines.request import Grammar
from synapse.errors import InternalError, InvalidInput
from synapse.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

COMPILED_KEPT = 64
LONGEST_CLOSING = 512
"""Steps after which looking for the shortest end is given up, in tokens."""
CHECK_EVERY = 16
"""Tokens between two looks at the way to the end while the budget is ample."""
_JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class BadGrammar(InvalidInput):
    """A schema or expression that cannot be compiled."""

    code = "bad_grammar"


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. `compile` may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._eos = sorted(tokenizer.eos_ids)
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=self._eos)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
        self._closers = _Closers(
            free_text=self._single("z", "Q"), quote=self._single('"'), brackets=self._single("}", "]", '"')
        )

    def _single(self, *characters: str) -> tuple[int, ...]:
        tokens = [self._tokenizer.tokenize_str(character) for character in characters]
        return tuple(ids[0] for ids in tokens if len(ids) == 1)

    def compile(self, grammar: Grammar) -> Constraint:
        """A fresh constraint.

        Raises:
            BadGrammar: the schema or expression is malformed, or uses what llguidance cannot enforce.
        """
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0)
            if matcher.is_error():
                raise BadGrammar(
                    f"the {grammar.kind.replace('_', ' ')} cannot be used as a constraint: "
                    f"{matcher.get_error().splitlines()[0]}"
                )
            self._compiled[grammar] = matcher
            while len(self._compiled) > COMPILED_KEPT:
                self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._eos, self._lengths, self._closers)


def _source(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.source))
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.source
    try:
        if not isinstance(json.loads(schema), dict):
            raise BadGrammar("a JSON schema is an object", hint='for example {"type": "object", "properties": {…}}')
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_STYLE))
    except ValueError as error:
        raise BadGrammar(f"the JSON schema is not JSON: {error}") from error
    except RecursionError as error:
        raise BadGrammar("the JSON schema is nested too deeply") from error


class _Closers:
    """The single-character tokens that tell where in a JSON text a matcher is, and that end what is open there."""

    def __init__(self, free_text: tuple[int, ...], quote: tuple[int, ...], brackets: tuple[int, ...]) -> None:
        self.free_text = free_text
        self.quote = quote
        self.brackets = brackets


class Constraint:
    """The grammar's state within one answer."""

    def __init__(self, matcher: LLMatcher, eos: list[int], lengths: NDArray[np.int_], closers: _Closers) -> None:
        self._matcher = matcher
        self._eos = eos
        self._lengths = lengths
        self._closers = closers
        self._vocab = len(lengths)
        self._bits = allocate_token_bitmask(1, self._vocab)
        self._closing = False
        self._since_check = CHECK_EVERY
        self._to_close = LONGEST_CLOSING

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> NDArray[np.uint32]:
        """Which tokens may come next, uint32[ceil(vocab / 32)]: token t is bit t % 32 of word t // 32.

        The same array each time, overwritten by the next call.
        """
        if self._closing:
            token = self._closing_token(self._matcher)
            self._bits[:] = 0
            self._bits.view(np.uint32)[0, token // 32] = np.uint32(1 << token % 32)
        else:
            fill_next_token_bitmask(self._matcher, self._bits)
        return self._bits.view(np.uint32)[0]

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool[vocab]."""
        bits = self.mask().view(np.uint8)
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)

    def accept(self, token: int, remaining: int) -> int:
        """Take the sampled token, or, when the answer could then no longer end in time, one that leads to the end.

        Args:
            token: one of the allowed.
            remaining: how many tokens may follow it.

        Returns:
            The token that was taken.
        """
        self._since_check += 1
        if not self._closing and (self._since_check >= CHECK_EVERY or remaining <= 2 * self._to_close + CHECK_EVERY):
            self._since_check = 0
            after = self._matcher.deep_copy()
            after.consume_token(token)
            self._to_close = self._distance_to_end(after)
            if self._to_close > remaining and self._distance_to_end(self._matcher) <= remaining + 1:
                self._closing = True
                token = self._closing_token(self._matcher)
        if not self._matcher.consume_token(token):
            raise InternalError(f"the grammar refused a token it had allowed: {self._matcher.get_error()}")
        return token

    def _distance_to_end(self, matcher: LLMatcher) -> int:
        """Tokens until the answer is whole, when only closing tokens are taken."""
        probe = matcher.deep_copy()
        for count in range(LONGEST_CLOSING):
            if probe.is_stopped() or probe.is_accepting():
                return count
            if not probe.consume_token(self._closing_token(probe)):
                break
        return LONGEST_CLOSING

    def _closing_token(self, matcher: LLMatcher) -> int:
        mask = self._mask(matcher)
        for token in self._eos:
            if mask[token]:
                return token
        in_text = all(mask[token] for token in self._closers.free_text)
        for token in self._closers.quote if in_text else self._closers.brackets:
            if mask[token]:
                return token
        return int(np.where(mask, self._lengths, -1).argmax())

    def _mask(self, matcher: LLMatcher) -> NDArray[np.bool_]:
        fill_next_token_bitmask(matcher, self._bits)
        return np.unpackbits(self._bits.view(np.uint8)[0], count=self._vocab, bitorder="little").astype(np.bool_)
