"""What a durable backend does: keeps messages, and remembers for each group what it has handled.

The contract of every backend; `tests/callosum/log/test_contract.py` holds each to it:

- `append` returns when every message of it is durable: killing any process, or the server of a backend that has one,
  loses none of them. A message whose key was accepted before is not accepted again.
- A group gets every message that matches its pattern and was accepted after it joined (or from the first one kept),
  at least once, in the order of acceptance within a tract; each goes to one consumer of the group at a time.
- A delivery that is neither acknowledged, retried, released nor buried within the group's lease is delivered again.
  Only what a handler has failed at (`retry`) counts as an attempt: being delivered does not.
- What nobody handles is not lost: `bury` keeps it as a dead letter until it is replayed or dropped, or `MOST_DEAD`
  newer ones are there, or `OLDEST_DEAD_S` have passed.
- A group that nobody has claimed from for `UNREAD_S` loses what the log would otherwise have forgotten; that is said
  once (`callosum.group.unread`). It goes on with what is left when somebody claims again.
- Who comes late takes nothing away: acknowledging a delivery that has gone to another meanwhile still counts as
  handled, retrying or burying it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from synapse.callosum.message import Message, Tract
from synapse.callosum.topics import matcher
from synapse.errors import InvalidInput, NotFound

Position = str
"""A place between two messages of a log: as text, the number of the message before it, which is 1 for the first one
accepted. Make one only with `back`."""
BEGINNING: Position = "0"
Reason = Literal["failed", "deadline", "overflow", "unreadable"]
Start = Literal["new", "first"]
MOST_NAME = 200
KEEP = 100_000
"""Of the newest messages, so many are kept although every group has handled them."""
UNREAD_S = 7 * 24 * 3600.0
"""A group that nobody has read for so long keeps nothing from being forgotten any more."""
READ_NOTED_S = 3600.0
"""A log need not note more often than this that a group was read."""
MOST_DEAD = 10_000
OLDEST_DEAD_S = 30 * 24 * 3600.0
"""Dead letters that are kept, and how long; the oldest are dropped, and counted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A message of the log, and the position just behind it."""

    position: Position
    message: Message


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that one consumer of a group has now.

    Attributes:
        token: what the log knows the delivery by.
        attempt: 1, and 1 more for each time that `retry` was asked for.
        deliveries: how often it was delivered and not released, this time included.
    """

    token: str
    message: Message
    attempt: int
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a group could not handle, or that expired."""

    id: str
    """The dead letter's own id, for `replay`."""
    group: str
    reason: Reason
    error: str
    attempts: int
    at: float
    """When it was buried, seconds since 1970."""
    message: Message


@dataclass(frozen=True, slots=True)
class GroupStats:
    """A group's share of the log: `waiting` were never delivered; `pending` are with a consumer, or to be retried.

    `read_at`: when somebody last claimed from it, seconds since 1970, to the hour.
    """

    group: str
    pattern: str
    waiting: int
    pending: int
    handled: int
    redelivered: int
    dead: int
    read_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class LogStats:
    """`kept` messages are in the log; `duplicates` were refused because of their key.

    `dead_dropped`: dead letters that had to go because there were too many, or they were too old.
    """

    kept: int
    accepted: int
    duplicates: int
    groups: tuple[GroupStats, ...]
    dead_dropped: int = 0


class Log(Protocol):
    """A durable log. Every method raises `Unavailable` when its storage cannot be reached or written just now."""

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        """Accept messages, durably, all or none; False for those whose key was accepted before. Raises TooLarge too."""
        ...

    async def read(self, after: Position | None, limit: int, pattern: str = "**") -> list[Entry]:
        """Messages behind a position (None: from the first one kept), oldest first.

        Raises:
            InvalidInput: the position is none of this log.
        """
        ...

    async def end(self) -> Position:
        """The position behind the newest message."""
        ...

    async def join(self, group: str, pattern: str, *, start: Start = "new", lease_s: float = 30.0) -> None:
        """Make a group, or change the pattern and the lease of one.

        A new one begins behind the newest message, or at the first one kept.

        Raises:
            InvalidInput: the group has no name of 1 to 200 printable characters, no pattern, or no positive lease.
        """
        ...

    async def leave(self, group: str) -> None:
        """Forget a group and what it had not handled. Its dead letters stay."""
        ...

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        """Up to `limit` messages of a tract for this consumer: retries that are due and expired leases first.

        Raises:
            NotFound: there is no such group.
        """
        ...

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """They were handled. Doing it again, or late, is no error."""
        ...

    async def retry(self, group: str, delivery: Delivery, after_s: float) -> None:
        """Deliver it again, in so many seconds or later, with `attempt` one higher."""
        ...

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """Nobody has begun to handle them: deliver them again, at once, as if this delivery had not been."""
        ...

    async def bury(self, group: str, delivery: Delivery, reason: Reason, error: str) -> None:
        """Keep it as a dead letter."""
        ...

    async def dead(self, limit: int = 100) -> list[DeadLetter]:
        """Dead letters, newest first."""
        ...

    async def replay(self, ids: Sequence[str] | None = None) -> int:
        """Give dead letters back to their groups (None: all whose group is there), with `attempt` from 1 again.

        Returns:
            How many.

        Raises:
            NotFound: there is no such dead letter, or its group has left; none was given back.
        """
        ...

    async def drop(self, ids: Sequence[str] | None = None) -> int:
        """Forget dead letters (None: all). Returns how many. Raises NotFound."""
        ...

    async def stats(self) -> LogStats:
        """How much there is."""
        ...

    async def changed(self, timeout_s: float) -> None:
        """Return when there may be something new to claim or read, at the latest after the timeout.

        New is what came since the task that calls this last claimed, read or waited.
        """
        ...

    async def close(self) -> None:
        """Let go of it. Nothing is lost by not calling it."""
        ...


def checked_join(group: str, pattern: str, lease_s: float) -> None:
    """What `join` refuses.

    Raises:
        InvalidInput: see `Log.join`.
    """
    if not isinstance(group, str) or not 1 <= len(group) <= MOST_NAME or not group.isprintable():
        raise InvalidInput(f"a group is named by 1 to {MOST_NAME} printable characters, not {str(group)[:60]!r}")
    matcher(pattern)
    if not (math.isfinite(lease_s) and lease_s > 0):
        raise InvalidInput(f"a lease is a number of seconds above 0, not {lease_s!r}")


def no_group(group: str) -> NotFound:
    """The error for a group that has not joined."""
    return NotFound(f"the log has no group {group[:60]!r}", hint="join it first")


def no_dead_letter(letter: str) -> NotFound:
    """The error for a dead letter that does not exist."""
    return NotFound(f"the log has no dead letter {letter[:60]!r}", hint="`synapse events dead` lists them")


def no_position(position: str) -> InvalidInput:
    """The error for a position that is none of this log."""
    return InvalidInput(
        f"{position[:60]!r} is no position of this log", hint="it may be of an older log; begin without one"
    )


def position_number(position: Position | None, newest: int) -> int:
    """The number in the position of a log that numbers its messages from 1 to `newest`; 0 for None.

    Raises:
        InvalidInput: it is no such number.
    """
    if position is None:
        return 0
    if not (position.isascii() and position.isdigit() and len(position) < 20 and int(position) <= newest):
        raise no_position(position)
    return int(position)


def back(position: Position, count: int) -> Position:
    """The position so many messages before another one, `BEGINNING` at most. What is no longer kept counts too."""
    return str(max(0, int(position) - count))
