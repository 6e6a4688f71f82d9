"""From a grammar as a client writes it to a matcher, within limits of size, time and memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from synapse.engines.grammar.completion import Completions
from synapse.engines.grammar.constraint import Compiled, Constraint, Vocabulary
from synapse.engines.grammar.errors import BadGrammar
from synapse.engines.grammar.keys import Keys
from synapse.engines.grammar.schema import prepare_schema
from synapse.engines.grammar.trial import TRIAL
from synapse.engines.grammar.trial_program import LIMITS
from synapse.engines.request import Grammar
from synapse.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST_SOURCE = 2**17
"""Characters of a schema or expression. What `TRIAL` lets pass of that length takes 30 MB at most."""
CACHE_BYTES = 64 * 2**20
"""Memory for compiled grammars, by the estimate of `_cost`."""
SEARCH_SECONDS = 2.0
"""For the shortest answer there is, of the processor."""
_JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. `compile` may be called from any thread.

    Args:
        longest: the most tokens an answer can have.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self._vocabulary = Vocabulary(pieces, sorted(tokenizer.eos_ids))
        self._longest = longest
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=len(pieces), eos_token=[*self._vocabulary.eos])
        self._completions = Completions(tokenizer)
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        self._compiled: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """A fresh constraint.

        Raises:
            BadGrammar: the schema or expression is malformed or too large, uses what cannot be enforced, or no answer
                within the limits satisfies it.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = compiled
                while sum(map(_cost, self._compiled)) > CACHE_BYTES:
                    self._compiled.popitem(last=False)
        return Constraint(compiled, self._completions, self._vocabulary)

    def _compile(self, grammar: Grammar) -> Compiled:
        kind = grammar.kind.replace("_", " ")
        if len(grammar.source) > LONGEST_SOURCE:
            raise BadGrammar(f"the {kind} has {len(grammar.source)} characters; at most {LONGEST_SOURCE} are read")
        open_keys = simple = False
        if grammar.kind == "regex":
            source = LLMatcher.grammar_from_regex(grammar.source)
        else:
            schema, open_keys, simple = prepare_schema(
                '{"type": "object"}' if grammar.kind == "json_object" else grammar.source
            )
            source = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)
        fault = "" if simple else TRIAL.fault(source)
        if fault:
            raise _unusable(kind, fault)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        scout = LLMatcher(self._completions.scout_tokenizer, source, log_level=0, limits=self._limits)
        for each in (matcher, scout):
            if each.is_error():
                raise _unusable(kind, each.get_error().splitlines()[0])
        keys = Keys() if open_keys else None
        shortest = self._completions.search(scout, keys, self._longest, states=50_000, seconds=SEARCH_SECONDS)
        if shortest is None or len(self._completions.tokens(shortest)) > self._longest:
            raise BadGrammar(
                f"no answer of at most {self._longest} tokens that fits the {kind} was found",
                hint="look for a minimum that is too large, or a reference that never ends",
            )
        return Compiled(matcher, scout, shortest, grammar.kind != "regex", open_keys)


def _cost(grammar: Grammar) -> int:
    """About how many bytes a compiled grammar takes, as measured: states of its lexer come with use."""
    return 2**19 + 256 * len(grammar.source)


def _unusable(kind: str, reason: str) -> BadGrammar:
    return BadGrammar(
        f"the {kind} cannot be used as a constraint: {reason}", hint="use a simpler one: fewer or smaller patterns"
    )
