"""What a bus and its subscriptions have now and have done."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from synapse.callosum.bus.delivery.breaker import State
from synapse.callosum.message import Tract


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts since a subscription, or the bus, began.

    Attributes:
        handled, failed: how often a handler returned, and raised.
        retried: attempts after the first.
        dead: messages that became dead letters; of these `expired` had passed their deadline.
    """

    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    expired: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """What a subscription has now and has done.

    Attributes:
        waiting: messages in its queue; `running` are with its handler, `retrying` wait for their next attempt.
        oldest_s: how long ago the oldest of those that are next in the queue was made, None when there is none.
        breakers: the state of each tract's.
    """

    name: str
    pattern: str
    group: str | None
    waiting: int
    running: int
    retrying: int
    oldest_s: float | None
    tally: Tally
    breakers: dict[Tract, State]


@dataclass(frozen=True, slots=True)
class BusStats:
    """What a bus has done since it began.

    Attributes:
        published: messages that it took.
        tally: the sums over its subscriptions, also those that are closed.
        lost_letters: dead letters of this process that had to go because there were too many.
    """

    published: int
    tally: Tally
    lost_letters: int
    subscriptions: tuple[SubscriptionStats, ...]
