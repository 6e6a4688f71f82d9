"""What goes into an engine and what comes out: requests and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from synapse.callosum.message import Tract
from synapse.errors import Corrupt, TimedOut

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_object", "json_schema", "regex"]
HIGHEST_PRIORITY = 10
NAMELESS: Mapping[str, str] = MappingProxyType({})


class DeadlineExceeded(TimedOut):
    """The deadline of a request passed while it waited for its turn."""

    code = "deadline_exceeded"


class LayersOverflow(Corrupt):
    """With these layers the model's numbers overflow: `details["layers"]` has the id and the weight of each."""

    code = "layers_overflow"


def layers_overflow(stack: Sequence[tuple[str, float]], names: Mapping[str, str] = NAMELESS) -> LayersOverflow:
    """The error about a stack of (layer id, weight); who knows the layers' names gives them by id."""
    said = ", ".join(f"{names.get(layer_id, layer_id[:12])} (weight {weight:g})" for layer_id, weight in stack)
    if len(stack) == 1:
        what = f"the layer {said} makes the model's numbers overflow"
        hint = "give it less weight; if that does not help it is damaged, or was trained for another model: remove it"
    else:
        what = f"together the layers {said} make the model's numbers overflow"
        hint = "give them less weight, or leave them out one by one to find which it is"
    return LayersOverflow(f"the answer cannot be computed: {what}", hint=hint, layers=[list(pair) for pair in stack])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution.

    Attributes:
        temperature: 0 is greedy (the most likely token, ties to the lowest id).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this.
        min_p: keep tokens at least this share of the most likely token's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.
        frequency_penalty: subtracted from a logit once for every time its token is in the answer.
        presence_penalty: subtracted once if the token is in the answer.
        seed: same seed, same text, whatever shares the batch; None draws a fresh one.
        logit_bias: added to the logits of these token ids before anything else.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the answer: any JSON object, JSON that fits a schema (`source`, as JSON text), or a regex."""

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        layers: the layer stack, (layer id, weight) pairs; the ids come from `Engine.load_layer`.
        max_tokens: at most so many new tokens; None means as many as the context still holds (at most 1,024 under a
            grammar).
        stop: strings that end the answer and are not part of it, found across token borders.
        logprobs: how many alternatives to report beside each token; None reports nothing, 0 only the token itself.
        ignore_eos: go on after an end-of-text token (for benchmarks).
        tract: external while a person waits for the answer, internal when nobody does. External requests go first, and
            take the place of internal ones, which go on later and lose nothing.
        priority: 0 to 10; of the requests of one tract the higher go first. Who waits rises, so that nobody starves.
        deadline: the time of `time.monotonic()` (the same in all processes of a machine) after which nobody wants the
            answer: a request that still waits for its turn then ends with `DeadlineExceeded`. None never does.
        answered: tokens of the answer that another engine has told already. The answer goes on behind them as it would
            have gone on there, provided that the seed is given; they are not told again, and count as its tokens.
    """

    prompt: tuple[int, ...]
    layers: tuple[tuple[str, float], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    ignore_eos: bool = False
    tract: Tract = Tract.EXTERNAL
    priority: int = 5
    deadline: float | None = None
    answered: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the model itself, before bias, penalties and temperature.

    `top` holds the most likely (token id, logprob) pairs, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer. `text` can be empty while a character or a possible stop string is incomplete."""

    request_id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request.

    Attributes:
        cached_tokens: of the prompt, those that were not computed again (shared prefix).
        resumed: how often the answer went on in another process, because the one it was computed in had ended.
    """

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    error: Exception | None = None
    resumed: int = 0


Event = Delta | Finished
