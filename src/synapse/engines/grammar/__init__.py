"""Answers constrained while they are sampled: JSON objects, JSON schemas and regular expressions (llguidance)."""

from synapse.engines.grammar.compiler import Grammars
from synapse.engines.grammar.constraint import Constraint
from synapse.engines.grammar.errors import BadGrammar, GrammarFailed

__all__ = ["BadGrammar", "Constraint", "GrammarFailed", "Grammars"]
