"""What is published about personas and their turns. Nothing that was said is ever in it."""

from __future__ import annotations

import time

from synapse.callosum.message import Tract
from synapse.callosum.payloads import Payload, event
from synapse.callosum.publish.publishing import publish
from synapse.errors import SynapseError
from synapse.personas.entities import Persona


@event("persona.created")
@event("persona.changed")
@event("persona.deleted")
class PersonaNews(Payload):
    """A persona was created, changed or deleted; `changed` names the fields that were."""

    id: str
    name: str
    base_model: str
    changed: tuple[str, ...] = ()


class TurnPayload(Payload):
    """Which turn of which persona. One that a bare model answered over HTTP is the persona's `base`."""

    persona: str
    model: str
    conversation: str | None
    seconds: float


@event("persona.turn.finished")
class FinishedTurn(TurnPayload):
    """A persona has answered. `tokens` are those of the answer (of all, when several were asked for)."""

    reason: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int


@event("persona.turn.failed")
class FailedTurn(TurnPayload):
    """A persona could not answer; `error` is the code of why."""

    error: str


@event("persona.turn.cancelled")
class CancelledTurn(TurnPayload):
    """Nobody waited for the rest of an answer."""


def publish_persona(topic: str, persona: Persona, changed: tuple[str, ...] = ()) -> None:
    """Publish what happened to a persona. Call it when the transaction is over."""
    news = PersonaNews(id=persona.id, name=persona.name, base_model=persona.base_model, changed=changed)
    publish(topic, news)


class TurnNews:
    """Publishes how one turn ended: the first thing it is told counts."""

    def __init__(self, persona: Persona, conversation: str | None) -> None:
        """Begin to count the seconds of a turn."""
        self._about = {"persona": persona.name, "model": persona.base_model, "conversation": conversation}
        self._started = time.perf_counter()
        self._told = False

    def finished(self, reason: str, *, prompt_tokens: int, tokens: int, cached_tokens: int) -> None:
        """The answer is complete."""
        counts = {"prompt_tokens": prompt_tokens, "tokens": tokens, "cached_tokens": cached_tokens}
        self._tell("persona.turn.finished", FinishedTurn, reason=reason, **counts)

    def failed(self, error: Exception) -> None:
        """There will be no answer, or no more of it."""
        code = error.code if isinstance(error, SynapseError) else "internal_error"
        self._tell("persona.turn.failed", FailedTurn, error=code)

    def cancelled(self) -> None:
        """Nobody waits for it any more."""
        self._tell("persona.turn.cancelled", CancelledTurn)

    def _tell(self, topic: str, payload: type[TurnPayload], **more: object) -> None:
        if not self._told:
            self._told = True
            facts = {**self._about, "seconds": time.perf_counter() - self._started, **more}
            publish(topic, payload.model_validate(facts), tract=Tract.EXTERNAL)
