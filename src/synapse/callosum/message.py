"""A message, and how it is written for a log or the network."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from synapse.callosum.ids import id_number, id_text, new_id
from synapse.callosum.payloads import Untyped, payload_model
from synapse.callosum.topics import checked_topic
from synapse.errors import Corrupt, InvalidInput, TooLarge
from synapse.evidence import Evidence

MOST_BYTES = 1 << 20
"""The largest message on a wire."""
MOST_KEY = 200
LATEST = 253_402_300_800.0
"""The year 10000, in seconds since 1970: what is told as a date is before it."""
PRIORITIES = 10
LANES = 2 * PRIORITIES
"""Queues of a router: one for each tract and priority."""


class Tract(IntEnum):
    """Who waits for it."""

    EXTERNAL = 0
    """A person does."""
    INTERNAL = 1
    """Nobody does: training, indexing, consolidation, statistics."""


@dataclass(slots=True, eq=False)
class Message:
    """Something that happened, or is asked for. Not to be changed once it is made: subscribers share it.

    Attributes:
        topic: what it is about (`synapse.callosum.topics`).
        payload: a pydantic model; the one declared for the topic, where there is one.
        tract: who waits for it.
        priority: 0 to 9; 9 is the most urgent.
        evidence: how far the payload can be trusted.
        deadline: seconds since 1970 after which nobody wants it any more, or None.
        trace: a W3C ``traceparent``, or None.
        reply_to: the topic of an answer, or None.
        key: what makes two messages the same one (the idempotency key), at most 200 characters. None: its id.
        number: its identifier, a UUID version 7; `id` is the text of it.
        lane: where a router puts it, from tract and priority: 0 to 19, the most urgent last. 20 more with a deadline.
    """

    topic: str
    payload: BaseModel
    tract: Tract = Tract.INTERNAL
    priority: int = 4
    evidence: Evidence = Evidence.KNOWN
    deadline: float | None = None
    trace: str | None = None
    reply_to: str | None = None
    key: str | None = None
    number: int = 0
    lane: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checked_topic(self.topic)
        if not 0 <= self.priority < PRIORITIES:
            raise InvalidInput(f"a priority is an integer from 0 to {PRIORITIES - 1}, not {self.priority!r}")
        if not self.number:
            self.number = new_id()
        lane = self.priority if self.tract else self.priority + PRIORITIES
        self.lane = lane if self.deadline is None else lane + LANES

    @property
    def id(self) -> str:
        """Its identifier as 36 characters."""
        return id_text(self.number)

    @property
    def time(self) -> float:
        """When it was made, in seconds since 1970, to the millisecond."""
        return (self.number >> 80) / 1000

    @property
    def dedupe_key(self) -> str:
        """Its key, or its id where it has none."""
        return self.key if self.key is not None else self.id

    def expired(self, now: float | None = None) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and self.deadline <= (time.time() if now is None else now)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)

    id: str
    topic: str
    tract: Tract
    priority: int
    evidence: Evidence
    deadline: float | None = None
    trace: Annotated[str, Field(max_length=MOST_KEY)] | None = None
    reply_to: str | None = None
    key: Annotated[str, Field(max_length=MOST_KEY)] | None = None
    payload: dict[str, JsonValue]


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_wire(message: Message) -> bytes:
    """The message as one JSON object, UTF-8.

    Raises:
        TooLarge: it has more than 1 MiB.
        InvalidInput: its payload is no JSON object, or a field cannot be written.
    """
    payload = message.payload.model_dump(mode="json")
    if not isinstance(payload, dict):
        raise InvalidInput(f"a payload is a JSON object, and {type(message.payload).__name__} is not")
    if message.key is not None and len(message.key) > MOST_KEY:
        raise InvalidInput(f"a key has at most {MOST_KEY} characters, this one {len(message.key)}")
    if message.key is not None and "\0" in message.key:
        raise InvalidInput("a key has no NUL character")
    _check_times(message)
    found: dict[str, JsonValue] = {
        "id": message.id,
        "topic": message.topic,
        "tract": int(message.tract),
        "priority": message.priority,
        "evidence": int(message.evidence),
        "payload": payload,
    }
    for name in ("deadline", "trace", "reply_to", "key"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    try:
        body = _ENCODER.encode(found).encode()
    except (UnicodeEncodeError, ValueError) as error:
        raise InvalidInput(f"the payload of {message.topic} cannot be written as JSON: {error}") from error
    if len(body) > MOST_BYTES:
        raise TooLarge(f"a message has at most {MOST_BYTES:,} bytes, this one {len(body):,}", hint="send a reference")
    return body


def from_wire(body: bytes) -> Message:
    """The message that `to_wire` wrote. A payload that its model refuses comes back `Untyped`.

    Raises:
        Corrupt: the bytes are no message.
    """
    if len(body) > MOST_BYTES:
        raise Corrupt(f"a message has at most {MOST_BYTES:,} bytes, this one {len(body):,}")
    try:
        wire = _Wire.model_validate_json(body)
        message = Message(
            wire.topic,
            _payload(wire.topic, wire.payload),
            wire.tract,
            wire.priority,
            wire.evidence,
            wire.deadline,
            wire.trace,
            wire.reply_to if wire.reply_to is None else checked_topic(wire.reply_to),
            wire.key,
            id_number(wire.id),
        )
        _check_times(message)
    except (ValidationError, InvalidInput) as error:
        raise Corrupt(f"these bytes are no message: {str(error)[:300]}") from error
    return message


def _check_times(message: Message) -> None:
    if message.deadline is not None and not 0 <= message.deadline < LATEST:
        raise InvalidInput(f"a deadline is seconds since 1970, before the year 10000, not {message.deadline}")
    if not 0 <= message.time < LATEST:
        raise InvalidInput(f"an id begins with a time before the year 10000: {message.id} does not")


def _payload(topic: str, found: dict[str, JsonValue]) -> BaseModel:
    try:
        return payload_model(topic).model_validate(found)
    except ValidationError:
        return Untyped(found)
