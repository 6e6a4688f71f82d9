"""Who gets the messages of a topic within this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from synapse.callosum.bus.consumer_group import ConsumerGroup
from synapse.callosum.bus.subscription import Subscription
from synapse.callosum.message import Message

MOST_ROUTES = 4096


class Target(Protocol):
    """A subscription or a group of them."""

    def try_put(self, message: Message) -> bool:
        """Queue a message; whether there was room."""
        ...

    def has_room(self, message: Message) -> bool:
        """Whether `try_put` would find room."""
        ...

    def overflowed(self, message: Message) -> None:
        """There was no room for a message."""
        ...

    async def put(self, message: Message) -> bool:
        """Queue a message for which there was no room just now, as `overflow` says. False where it is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Who gets the messages of one topic, and which of them refuse one rather than lose it."""

    targets: tuple[Target, ...]
    patient: tuple[Target, ...]


class Routes:
    """Subscriptions and groups of this process, and the routes of the topics that were asked for lately.

    Attributes:
        known: routes by topic; what is not in it `find` finds.
    """

    def __init__(self) -> None:
        self._alone: list[Subscription] = []
        self._groups: dict[str, ConsumerGroup] = {}
        self.known: dict[str, Route] = {}

    def add(self, subscription: Subscription) -> None:
        """Give it messages from now on."""
        group = subscription.terms.group
        if group is None:
            self._alone.append(subscription)
        else:
            self._groups.setdefault(group, ConsumerGroup()).members.append(subscription)
        self.known.clear()

    def remove(self, subscription: Subscription) -> None:
        """Give it none any more. No error where it never got any."""
        if subscription in self._alone:
            self._alone.remove(subscription)
        for name, group in list(self._groups.items()):
            if subscription in group.members:
                group.members.remove(subscription)
            if not group.members:
                del self._groups[name]
        self.known.clear()

    def group(self, name: str | None) -> ConsumerGroup | None:
        """The group of a name, where it has members."""
        return None if name is None else self._groups.get(name)

    def find(self, topic: str) -> Route:
        """Who gets the messages of a topic; remembered until a subscription comes or goes."""
        if len(self.known) >= MOST_ROUTES:
            self.known.clear()
        targets: list[Target] = [one for one in self._alone if one.matches(topic)]
        patient: list[Target] = [one for one in self._alone if one.matches(topic) and one.patient]
        for group in self._groups.values():
            if group.members[0].matches(topic):
                targets.append(group)
                if any(member.patient for member in group.members):
                    patient.append(group)
        route = self.known[topic] = Route(tuple(targets), tuple(patient))
        return route
