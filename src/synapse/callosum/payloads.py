"""What messages carry: one pydantic model for each topic.

A room declares the payload of its topic, so that whoever reads the message, in this process or from a log, gets it
typed::

    @event("persona.turn.finished")
    class TurnFinished(Payload):
        persona: str
        tokens: int
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, RootModel

from synapse.callosum.topics import checked_topic


class Payload(BaseModel):
    """The base of payloads. What a newer version has added is passed over, not refused."""

    # Built when it is first used: a process declares many events and publishes few.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Untyped(RootModel[dict[str, JsonValue]]):
    """The payload of a topic that this process knows no model for: a JSON object as it came."""

    model_config = ConfigDict(frozen=True)


P = TypeVar("P", bound=type[BaseModel])
_models: dict[str, type[BaseModel]] = {}


def event(topic: str) -> Callable[[P], P]:
    """Declare the payload of a topic.

    Raises:
        InvalidInput: it is not a topic.
        TypeError: the topic has a payload already.
    """

    def declare(model: P) -> P:
        if _models.setdefault(checked_topic(topic), model) is not model:
            raise TypeError(f"the topic {topic} has the payload {_models[topic].__name__} already")
        return model

    return declare


def payload_model(topic: str) -> type[BaseModel]:
    """The payload's model of a topic, `Untyped` where none is declared."""
    return _models.get(topic, Untyped)
