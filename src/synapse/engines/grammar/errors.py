"""What can be wrong with a grammar, and with an answer under one."""

from __future__ import annotations

from synapse.errors import InternalError, InvalidInput


class BadGrammar(InvalidInput):
    """A schema or expression that cannot be compiled, or that no answer within the limits can satisfy."""

    code = "bad_grammar"


class GrammarFailed(InternalError):
    """The grammar library failed in the middle of an answer, or the answer turned out not to fit."""

    code = "grammar_failed"
