"""Which messages of a conversation reach the model: the system prompt first, the rest made to alternate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from synapse.models.chat_template import Message as ChatMessage


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
