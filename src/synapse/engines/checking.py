"""What a request must be before an engine takes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from synapse.engines.grammar import BadGrammar
from synapse.engines.request import HIGHEST_PRIORITY, Grammar, Request
from synapse.engines.sampling import MAX_LOGPROBS, check_sampling
from synapse.errors import InvalidInput

GRAMMAR_TOKENS = 1024
"""Longest answer under a grammar when the request says nothing: a string that a model goes on with has no other end."""
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


class ContextOverflow(InvalidInput):
    """More tokens than the context holds."""

    code = "context_length_exceeded"


def check_request(request: Request, vocab: int, context: int) -> int:
    """Refuse what makes no sense; otherwise the most tokens the sequence may reach."""
    prompt = len(request.prompt)
    if not prompt:
        raise InvalidInput("the prompt is empty; at least one token is needed", param="prompt")
    if not all(0 <= token < vocab for token in request.prompt):
        raise InvalidInput(f"the prompt has a token outside 0 to {vocab - 1}", param="prompt")
    if prompt >= context:
        raise ContextOverflow(
            f"the prompt has {prompt} tokens; the context holds {context}, and the answer needs some of them",
            hint="shorten the prompt, or raise SYNAPSE_MAX_CONTEXT if the model allows",
            param="messages",
        )
    limit = context
    if request.max_tokens is not None:
        if request.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, not {request.max_tokens}", param="max_tokens")
        limit = prompt + request.max_tokens
        if limit > context:
            raise ContextOverflow(
                f"the prompt's {prompt} tokens and max_tokens {request.max_tokens} make {limit}; "
                f"the context holds {context}",
                hint=f"ask for at most {context - prompt} tokens, or shorten the prompt",
                param="max_tokens",
            )
    if not 0 <= request.priority <= HIGHEST_PRIORITY:
        raise InvalidInput(f"the priority must lie between 0 and {HIGHEST_PRIORITY}, not {request.priority}")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise InvalidInput(f"logprobs must lie between 0 and {MAX_LOGPROBS}", param="top_logprobs")
    if len(request.stop) > MAX_STOP_STRINGS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in request.stop):
        raise InvalidInput(
            f"stop takes up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters", param="stop"
        )
    if not all(0 <= token < vocab for token in request.answered):
        raise InvalidInput(f"the answer has a token outside 0 to {vocab - 1}", param="answered")
    if prompt + len(request.answered) > limit:
        allowed = limit - prompt
        raise InvalidInput(
            f"the answer has {len(request.answered)} tokens already; {allowed} are allowed", param="answered"
        )
    check_sampling(request.sampling, vocab)
    return limit


def check_budget(request: Request, limit: int, shortest: int) -> int:
    """Refuse a grammar whose shortest answer does not fit; otherwise the most tokens the sequence may reach."""
    prompt = len(request.prompt)
    if shortest > limit - prompt:
        what = "max_tokens allows" if request.max_tokens is not None else "the context has room for"
        raise BadGrammar(
            f"the shortest answer that fits the {(request.grammar or Grammar('regex')).kind.replace('_', ' ')}"
            f" has {shortest} tokens; {what} {limit - prompt}",
            hint=f"ask for at least {shortest} tokens, or simplify the schema",
            param="max_tokens",
        )
    if request.max_tokens is None:
        limit = min(limit, prompt + max(GRAMMAR_TOKENS, 2 * shortest))
    return limit


def check_stack(layers: Sequence[tuple[str, float]]) -> None:
    """Refuse a stack of layers that makes no sense."""
    if len({layer_id for layer_id, _ in layers}) < len(layers):
        raise InvalidInput("a layer stands in the stack twice", hint="add the two weights up")
    for layer_id, weight in layers:
        if not np.isfinite(weight):
            raise InvalidInput(f"the weight of layer {layer_id} is {weight}, not a finite number")
