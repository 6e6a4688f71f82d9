"""A message as people and programs outside see it: in the terminal, in JSON, in a stream of the server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, Field, JsonValue

from synapse.callosum.message import Message


class EventView(BaseModel):
    """A message."""

    id: str = Field(description="UUID version 7")
    time: datetime = Field(description="when it was made")
    topic: str
    tract: Literal["external", "internal"] = Field(description="external: a person waits for it")
    priority: int = Field(description="0 to 9; 9 is the most urgent")
    evidence: Literal["known", "uncertain", "reported", "paradox"] = Field(description="how far it can be trusted")
    payload: JsonValue
    deadline: datetime | None = None
    trace: str | None = Field(None, description="W3C traceparent")
    reply_to: str | None = Field(None, description="topic of an answer")
    key: str | None = Field(None, description="what makes two messages the same one; by default the id")


def view_of(message: Message) -> EventView:
    """The view of a message."""
    return EventView.model_validate(
        {
            "id": message.id,
            "time": datetime.fromtimestamp(message.time, UTC),
            "topic": message.topic,
            "tract": message.tract.name.lower(),
            "priority": message.priority,
            "evidence": message.evidence.name.lower(),
            "payload": message.payload.model_dump(mode="json"),
            "deadline": None if message.deadline is None else datetime.fromtimestamp(message.deadline, UTC),
            "trace": message.trace,
            "reply_to": message.reply_to,
            "key": message.key,
        }
    )
