"""Which messages of a conversation reach the model: made to alternate, and cut to what the context holds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

from synapse.engines.engine import ContextOverflow
from synapse.models.chat_template import Message as ChatMessage

ANSWER_TOKENS = 256
"""Tokens kept free for the answer while older turns can still be left out."""
STEPS = 4
"""A conversation that has outgrown its context loses one of so many parts of it at once."""


def with_system_prompt(system_prompt: str, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages with the persona's system prompt first.

    Chat templates take one system message, at the start: a system message that the messages bring along follows the
    persona's own in the same message, wherever it stood.
    """
    parts = [system_prompt, *(message.content for message in messages if message.role == "system")]
    system = "\n\n".join(part for part in parts if part)
    rest = [message for message in messages if message.role != "system"]
    return [ChatMessage("system", system), *rest] if system else rest


def alternating(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages with neighbours of one role joined and empty ones dropped.

    Many templates refuse two user messages in a row, which is what a conversation holds after an answer that was
    stopped before its first word.
    """
    spoken = [message for message in messages if message.content]
    return [
        ChatMessage(role, "\n\n".join(message.content for message in run))
        for role, run in groupby(spoken, key=lambda message: message.role)
    ]


def fit(
    messages: Sequence[ChatMessage], encode: Callable[[Sequence[ChatMessage]], list[int]], context: int
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
    messages: Sequence[ChatMessage],
    head: int,
    starts: Sequence[int],
    encode: Callable[[Sequence[ChatMessage]], list[int]],
    room: int,
) -> int:
    """Which of the turns comes first when whole steps of the conversation's beginning are left out.

    It depends on what was said before alone, and moves only when the conversation has grown by another step.
    """
    opening, short = messages[:head], ChatMessage("user", "x")
    without = len(encode([*opening, short]))
    before = [0]  # tokens of the conversation in front of each turn
    for start, end in pairwise(starts):
        before.append(before[-1] + len(encode([*opening, *messages[start:end], short])) - without)
    total = before[-1] + len(encode([*opening, *messages[starts[-1] :]]))
    step = max(1, room // STEPS)
    left_out = -(-(total - room) // step) * step
    return min(bisect_left(before, left_out), len(starts) - 1)
