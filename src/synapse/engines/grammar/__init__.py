"""Answers constrained while they are sampled: JSON objects, JSON schemas and regular expressions (llguidance)."""

from synapse.engines.grammar.compiler import BadGrammar, Grammars
from synapse.engines.grammar.constraint import Constraint, GrammarFailed

__all__ = ["BadGrammar", "Constraint", "GrammarFailed", "Grammars"]
