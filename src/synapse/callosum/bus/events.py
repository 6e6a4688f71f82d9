"""What the bus itself publishes: a message died, a breaker opened or closed."""

from __future__ import annotations

from synapse.callosum.log.contract import Reason
from synapse.callosum.payloads import Payload, event

OWN_TOPICS = "callosum."
DEAD = "callosum.dead"
OPENED = "callosum.breaker.opened"
CLOSED = "callosum.breaker.closed"
OWN_PRIORITY = 7


@event(DEAD)
class Died(Payload):
    """A message has become a dead letter of a subscription or group: its topic and id, and why."""

    group: str
    reason: Reason
    error: str
    attempts: int
    topic: str
    message: str


@event(OPENED)
class BreakerOpened(Payload):
    """A subscription gets nothing of a tract for now, because it failed; the last error."""

    subscription: str
    tract: str
    error: str


@event(CLOSED)
class BreakerClosed(Payload):
    """A subscription gets the messages of a tract again."""

    subscription: str
    tract: str
