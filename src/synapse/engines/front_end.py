"""What can be known of a model without its weights: tokenizer, template, context, and the prompts that these make."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from synapse.engines.checking import ContextOverflow
from synapse.engines.engine import Engine
from synapse.engines.limits import Limits
from synapse.models.chat_template import ChatTemplate, Message, encode_chat
from synapse.models.config import ModelConfig
from synapse.models.head import ModelHead, read_head
from synapse.models.tokenizer import Tokenizer

ANSWER_TOKENS = 256
"""Tokens kept free for the answer while older turns can still be left out."""
STEPS = 4
"""A conversation that has outgrown its context loses one of so many parts of it at once."""


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """Makes prompts for a model. It pickles as the path of the file, from which it is opened again.

    Safe to use from several threads.

    Attributes:
        name: what the model is called here.
        limits: what its engine may hold.
        context: the longest sequence, in tokens.
    """

    path: Path
    name: str
    limits: Limits
    config: ModelConfig
    context: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate

    def __reduce__(self) -> tuple[Callable[..., FrontEnd], tuple[Path, Limits, str]]:
        return open_front_end, (self.path, self.limits, self.name)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a bare prompt: it begins with the model's begin-of-text token, if the model uses one.

        Special tokens in the text are read as such: whoever sends a bare prompt writes the template themselves.
        """
        tokenizer = self.tokenizer
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return (*start, *tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation.

        Raises:
            ChatTemplateError, InvalidInput: see `synapse.models.chat_template.encode_chat`.
        """
        return encode_chat(self.tokenizer, self.chat_template, messages)

    def fit_chat(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt of as much of a conversation as the context holds, and how many messages were left out: see `fit`.

        Raises:
            ContextOverflow: as `fit`.
            ChatTemplateError, InvalidInput: as `encode_chat`.
        """
        return fit(messages, self.encode_chat, self.context)


def open_front_end(path: Path, limits: Limits | None = None, name: str | None = None) -> FrontEnd:
    """The front end of a GGUF file. No weight of it is read.

    Raises:
        NotFound, ModelFileCorrupt, UnsupportedModel: the file cannot be used.
    """
    return front_end_from(read_head(path), limits or Limits(), name or path.parent.name)


def front_end_from(head: ModelHead, limits: Limits, name: str) -> FrontEnd:
    """The front end of a model whose file has been read."""
    context = min(head.config.context, limits.max_context)
    return FrontEnd(head.path, name, limits, head.config, context, head.tokenizer.build(), head.chat_template)


def front_end_of(engine: Engine, path: Path, name: str) -> FrontEnd:
    """The front end of an engine that has been opened from this file."""
    template = engine.chat_template
    return FrontEnd(path, name, engine.limits, engine.config, engine.context, engine.tokenizer, template)


def fit(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], context: int
) -> tuple[list[int], int]:
    """The prompt of the latest turns that the context holds, beside room for an answer.

    A turn is a user message with everything up to the next one; the oldest go first, and whole. The system message
    and the last user message always stay. What is left out is left out in steps of a quarter of the room: for as many
    turns as then fit the prompt begins as before, and the engine finds that beginning in its cache.

    Args:
        messages: a system message or none, then user and assistant messages; the last one is the user's.
        encode: renders messages with the chat template and tokenises them.
        context: the longest sequence, in tokens.

    Returns:
        The prompt's token ids, and how many messages were left out.

    Raises:
        ContextOverflow: the system message and the last message alone leave no room for an answer.
    """
    head = 1 if messages and messages[0].role == "system" else 0
    room = context - min(ANSWER_TOKENS, context // 4)
    prompt = encode(messages)
    if len(prompt) <= room:
        return prompt, 0
    starts = [i for i in range(head, len(messages)) if messages[i].role == "user"]
    if not starts or starts[0] != head:
        starts.insert(0, head)
    prompts: dict[int, list[int]] = {}

    def fits(start: int) -> bool:
        prompts[start] = encode([*messages[:head], *messages[start:]])
        return len(prompts[start]) <= room

    # Fewer turns are fewer tokens, so where a template is not quite the sum of its turns, the first start that fits
    # is found in a logarithmic number of tries.
    first = _start_in_steps(messages, head, starts, encode, room)
    found = first if fits(starts[first]) else bisect_left(starts, True, lo=first + 1, key=fits)
    start = starts[min(found, len(starts) - 1)]
    if start not in prompts:
        fits(start)
    prompt = prompts[start]
    if len(prompt) >= context:
        raise ContextOverflow(
            f"the message and the system prompt are {len(prompt)} tokens long, and this model's context is {context}",
            hint="shorten the message, or raise SYNAPSE_MAX_CONTEXT if the model's own context is longer",
        )
    return prompt, start - head


def _start_in_steps(
    messages: Sequence[Message],
    head: int,
    starts: Sequence[int],
    encode: Callable[[Sequence[Message]], list[int]],
    room: int,
) -> int:
    """Which of the turns comes first when whole steps of the conversation's beginning are left out.

    It depends on what was said before alone, and moves only when the conversation has grown by another step.
    """
    opening, short = messages[:head], Message("user", "x")
    without = len(encode([*opening, short]))
    before = [0]  # tokens of the conversation in front of each turn
    for start, end in pairwise(starts):
        before.append(before[-1] + len(encode([*opening, *messages[start:end], short])) - without)
    total = before[-1] + len(encode([*opening, *messages[starts[-1] :]]))
    step = max(1, room // STEPS)
    left_out = -(-(total - room) // step) * step
    return min(bisect_left(before, left_out), len(starts) - 1)
