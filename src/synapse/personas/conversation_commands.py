"""Commands for the conversations that personas have had."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field

from synapse.commands import Argument, Context, command
from synapse.personas.conversations import messages_of
from synapse.personas.entities import Conversation, Message, Persona
from synapse.personas.lookup import find_persona
from synapse.store import Store, open_store


class ListConversations(BaseModel):
    """Which conversations."""

    persona: str | None = Field(None, description="only those of this persona")
    limit: int = Field(50, ge=1, le=1000, description="at most so many, the latest first")


class ConversationId(BaseModel):
    """Which conversation."""

    id: Annotated[str, Argument()] = Field(description="id of the conversation")


class ConversationRow(BaseModel):
    """A conversation in a list."""

    id: str
    persona: str
    messages: int
    updated_at: datetime
    title: str


class ConversationList(BaseModel):
    """Conversations, the latest first."""

    items: list[ConversationRow]


class MessageRow(BaseModel):
    """One message."""

    role: str
    content: str
    finish_reason: str | None


class ConversationInfo(ConversationRow):
    """A conversation with everything that was said."""

    created_at: datetime
    said: list[MessageRow]


@command("conversation/list", permission="read")
async def list_conversations(params: ListConversations, context: Context) -> ConversationList:
    """List conversations, the latest first."""
    store = await context.get(open_store)
    where = {"persona_id": (await find_persona(store, params.persona)).id} if params.persona else {}
    found = await store.list(Conversation, where, order_by="-updated_at", limit=params.limit)
    return ConversationList(items=[await _row(store, conversation) for conversation in found])


@command("conversation/show", permission="read")
async def show_conversation(params: ConversationId, context: Context) -> ConversationInfo:
    """Show everything that was said in a conversation."""
    store = await context.get(open_store)
    conversation = await store.get(Conversation, params.id)
    row = await _row(store, conversation)
    said = [MessageRow.model_validate(m, from_attributes=True) for m in await messages_of(store, conversation.id)]
    return ConversationInfo(**dict(row), created_at=conversation.created_at, said=said)


@command("conversation/delete", permission="manage")
async def delete_conversation(params: ConversationId, context: Context) -> ConversationRow:
    """Delete a conversation."""
    store = await context.get(open_store)
    row = await _row(store, await store.get(Conversation, params.id))
    await store.delete(Conversation, params.id)
    return row


async def _row(store: Store, conversation: Conversation) -> ConversationRow:
    return ConversationRow(
        id=conversation.id,
        persona=(await store.get(Persona, conversation.persona_id)).name,
        messages=await store.count(Message, {"conversation_id": conversation.id}),
        updated_at=conversation.updated_at,
        title=conversation.title,
    )
