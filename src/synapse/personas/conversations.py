"""Conversations in the store: beginning one, finding it again, and what was said in it."""

from __future__ import annotations

from synapse.errors import NotFound
from synapse.personas.entities import Conversation, Message, Persona
from synapse.store import Store

TITLE_LENGTH = 60


def new_conversation(persona: Persona, first_message: str) -> Conversation:
    """A conversation named after its first message, with which it is kept: see `synapse.personas.talking`."""
    title = " ".join(first_message.split())
    if len(title) > TITLE_LENGTH:
        title = title[: TITLE_LENGTH - 1].rstrip() + "…"
    return Conversation(persona_id=persona.id, title=title)


async def latest_conversation(store: Store, persona: Persona) -> Conversation:
    """The conversation this persona has had last.

    Raises:
        NotFound: there has been none.
    """
    found = await store.list(Conversation, where={"persona_id": persona.id}, order_by="-updated_at", limit=1)
    if not found:
        raise NotFound(f"{persona.name} has had no conversation yet", hint=f"start one: synapse chat {persona.name}")
    return found[0]


async def conversation_of(store: Store, persona: Persona, conversation_id: str) -> Conversation:
    """A conversation by its id.

    Raises:
        NotFound: there is none of that id, or it is another persona's.
    """
    conversation = await store.get(Conversation, conversation_id)
    if conversation.persona_id != persona.id:
        raise NotFound(
            f"the conversation {conversation_id} is not one of {persona.name}'s",
            hint=f"synapse conversation list --persona {persona.name}",
        )
    return conversation


async def messages_of(store: Store, conversation_id: str) -> list[Message]:
    """All messages, in order."""
    return await store.list(Message, where={"conversation_id": conversation_id}, order_by="position")
