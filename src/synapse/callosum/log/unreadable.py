"""What stands in for a message of a log that this version cannot read, such as one that a newer version wrote."""

from __future__ import annotations

from synapse.callosum.message import Message, Tract, from_wire
from synapse.callosum.payloads import Payload, event
from synapse.errors import Corrupt
from synapse.evidence import Evidence

TOPIC = "callosum.unreadable"
MOST_SHOWN = 200


@event(TOPIC)
class Unreadable(Payload):
    """Why it cannot be read, and how it begins."""

    error: str
    start: str


def read_message(body: bytes, tract: Tract = Tract.INTERNAL) -> Message:
    """The message of these bytes, or one of the topic ``callosum.unreadable`` in its place."""
    try:
        return from_wire(body)
    except Corrupt as error:
        start = body[:MOST_SHOWN].decode(errors="replace")
        return Message(TOPIC, Unreadable(error=error.message, start=start), tract, evidence=Evidence.REPORTED)


def is_unreadable(message: Message) -> bool:
    """Whether the message stands in for one that cannot be read."""
    return isinstance(message.payload, Unreadable)
