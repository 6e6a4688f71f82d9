"""A log in the memory of the process: what a log promises, for as long as the process lives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from synapse.callosum.log.changes import Changes
from synapse.callosum.log.contract import (
    KEEP,
    MOST_DEAD,
    OLDEST_DEAD_S,
    READ_NOTED_S,
    UNREAD_S,
    DeadLetter,
    Delivery,
    Entry,
    GroupStats,
    LogStats,
    Position,
    Reason,
    Start,
    checked_join,
    no_dead_letter,
    no_group,
    position_number,
)
from synapse.callosum.log.unread import tell_unread
from synapse.callosum.message import Message, Tract, to_wire
from synapse.callosum.topics import matcher
from synapse.errors import InvalidInput, Unavailable


@dataclass(slots=True)
class _Pending:
    message: Message
    failures: int
    deliveries: int
    due: float
    """When it may be delivered again: the end of the lease, or of the pause before a retry."""
    claim: int = 0
    replayed: bool = False


@dataclass(slots=True)
class _Group:
    pattern: str
    lease_s: float
    cursors: dict[Tract, int]
    """The number of the last message of each tract that was looked at."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    handled: int = 0
    redelivered: int = 0
    read_at: float = 0.0
    unread: bool = False


class MemoryLog:
    """A log that is forgotten when the process ends. For one event loop.

    Args:
        keep: how many of the newest messages are kept although every group has handled them.
        most_dead: how many dead letters are kept.
        clock: seconds since 1970.
    """

    def __init__(self, *, keep: int = KEEP, most_dead: int = MOST_DEAD, clock: Callable[[], float] = time.time) -> None:
        if keep < 0:
            raise InvalidInput(f"a log keeps 0 or more messages, not {keep}")
        self._keep, self._most_dead, self._dead_dropped = keep, most_dead, 0
        self._clock = clock
        self._messages: dict[int, Message] = {}
        self._keys: set[str] = set()
        self._accepted = self._trimmed = self._duplicates = self._claims = self._buried = 0
        self._groups: dict[str, _Group] = {}
        self._dead: dict[str, tuple[int, DeadLetter]] = {}
        """Dead letters by id, oldest first, each with the number of its message."""
        self._changes = Changes()
        self._open = True

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        self._check_open()
        for message in messages:
            to_wire(message)
        accepted = [self._accept(message) for message in messages]
        self._trim()
        self._changes.note()
        return accepted

    async def read(self, after: Position | None, limit: int, pattern: str = "**") -> list[Entry]:
        self._check_open()
        self._changes.look()
        matches = matcher(pattern)
        entries: list[Entry] = []
        for number in self._numbers_behind(position_number(after, self._accepted)):
            if len(entries) >= limit:
                break
            if matches(self._messages[number].topic):
                entries.append(Entry(str(number), self._messages[number]))
        return entries

    async def end(self) -> Position:
        self._check_open()
        return str(self._accepted)

    async def join(self, group: str, pattern: str, *, start: Start = "new", lease_s: float = 30.0) -> None:
        self._check_open()
        checked_join(group, pattern, lease_s)
        if known := self._groups.get(group):
            known.pattern, known.lease_s, known.read_at, known.unread = pattern, lease_s, self._clock(), False
        else:
            begin = self._accepted if start == "new" else self._trimmed
            self._groups[group] = _Group(pattern, lease_s, dict.fromkeys(Tract, begin), read_at=self._clock())

    async def leave(self, group: str) -> None:
        self._check_open()
        self._groups.pop(group, None)

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        self._check_open()
        self._changes.look()
        if (mine := self._groups.get(group)) is None:
            raise no_group(group)
        now = self._clock()
        if now - mine.read_at > READ_NOTED_S:
            mine.read_at, mine.unread = now, False
        found = sorted(number for number, one in mine.pending.items() if one.due <= now and one.message.tract == tract)[
            : max(0, limit)
        ]
        mine.redelivered += sum(mine.pending[number].deliveries > 0 for number in found)
        found += self._new_for(mine, limit - len(found), tract)
        self._claims += 1
        deliveries = []
        for number in found:
            one = mine.pending[number]
            one.deliveries, one.due, one.claim = one.deliveries + 1, now + mine.lease_s, self._claims
            deliveries.append(Delivery(f"{number}-{one.claim}", one.message, one.failures + 1, one.deliveries))
        return deliveries

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        self._check_open()
        if mine := self._groups.get(group):
            for delivery in deliveries:
                if mine.pending.pop(int(delivery.token.partition("-")[0]), None):
                    mine.handled += 1

    async def retry(self, group: str, delivery: Delivery, after_s: float) -> None:
        self._check_open()
        _, pending = self._held(group, delivery)
        if pending:
            pending.due, pending.claim, pending.failures = self._clock() + after_s, 0, pending.failures + 1
            self._changes.note()

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        self._check_open()
        for delivery in deliveries:
            _, pending = self._held(group, delivery)
            if pending:
                pending.due, pending.claim, pending.deliveries = 0.0, 0, pending.deliveries - 1
                self._changes.note()

    async def bury(self, group: str, delivery: Delivery, reason: Reason, error: str) -> None:
        self._check_open()
        number, pending = self._held(group, delivery)
        if pending:
            del self._groups[group].pending[number]
            self._buried += 1
            letter = str(self._buried)
            self._dead[letter] = (
                number,
                DeadLetter(letter, group, reason, error, pending.failures + 1, self._clock(), pending.message),
            )
            self._drop_oldest_dead()

    async def dead(self, limit: int = 100) -> list[DeadLetter]:
        self._check_open()
        return [letter for _, letter in reversed(self._dead.values())][: max(0, limit)]

    async def replay(self, ids: Sequence[str] | None = None) -> int:
        self._check_open()
        wanted = self._known(ids)
        if ids is None:
            wanted = [one for one in wanted if self._dead[one][1].group in self._groups]
        for one in wanted:
            if (group := self._dead[one][1].group) not in self._groups:
                raise no_group(group)
        for one in wanted:
            number, letter = self._dead.pop(one)
            self._groups[letter.group].pending.setdefault(number, _Pending(letter.message, 0, 0, 0.0, replayed=True))
        self._changes.note()
        return len(wanted)

    async def drop(self, ids: Sequence[str] | None = None) -> int:
        self._check_open()
        wanted = self._known(ids)
        for one in wanted:
            del self._dead[one]
        return len(wanted)

    async def stats(self) -> LogStats:
        self._check_open()
        groups = []
        for name, group in sorted(self._groups.items()):
            matches = matcher(group.pattern)
            waiting = sum(
                message.tract == tract and matches(message.topic)
                for tract, cursor in group.cursors.items()
                for message in (self._messages[number] for number in self._numbers_behind(cursor))
            )
            dead = sum(letter.group == name for _, letter in self._dead.values())
            groups.append(
                GroupStats(
                    name,
                    group.pattern,
                    waiting,
                    len(group.pending),
                    group.handled,
                    group.redelivered,
                    dead,
                    group.read_at,
                )
            )
        return LogStats(len(self._messages), self._accepted, self._duplicates, tuple(groups), self._dead_dropped)

    async def changed(self, timeout_s: float) -> None:
        self._check_open()
        now = self._clock()
        dues = (one.due for group in self._groups.values() for one in group.pending.values() if one.due > now)
        await self._changes.wait(min(timeout_s, min(dues, default=now + timeout_s) - now))

    async def close(self) -> None:
        self._open = False
        self._changes.note()

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable("the log is closed")

    def _accept(self, message: Message) -> bool:
        key = message.dedupe_key
        if key in self._keys:
            self._duplicates += 1
            return False
        self._accepted += 1
        self._keys.add(key)
        self._messages[self._accepted] = message
        return True

    def _trim(self) -> None:
        """Forget the messages that every group has handled, from the oldest on, but for the newest."""
        most = self._accepted - self._keep
        if most - self._trimmed < max(1, self._keep // 10):
            return  # not at every message: looking at what is pending takes its time
        unread = {name: one for name, one in self._groups.items() if one.read_at <= self._clock() - UNREAD_S}
        for name, group in self._groups.items():
            if name in unread:
                continue
            for tract in Tract:
                self._pass_over_other_tract(group, tract)
            most = min(most, *group.cursors.values(), *(number - 1 for number in group.pending))
        for number in range(self._trimmed + 1, most + 1):
            self._keys.discard(self._messages.pop(number).dedupe_key)
        self._trimmed = max(self._trimmed, most)
        for name, group in unread.items():
            lost = [number for number, one in group.pending.items() if number <= self._trimmed and not one.replayed]
            for number in lost:
                del group.pending[number]
            if not group.unread and (lost or min(group.cursors.values()) < self._trimmed):
                group.unread = True
                tell_unread(name)

    def _drop_oldest_dead(self) -> None:
        """Let go of dead letters that are too old or too many."""
        oldest = self._clock() - OLDEST_DEAD_S
        while self._dead:
            first = next(iter(self._dead))
            if len(self._dead) <= self._most_dead and self._dead[first][1].at >= oldest:
                return
            del self._dead[first]
            self._dead_dropped += 1

    def _pass_over_other_tract(self, group: _Group, tract: Tract) -> None:
        """Move the group's cursor up to the next message of the tract, claimed or not."""
        for number in self._numbers_behind(group.cursors[tract]):
            if self._messages[number].tract == tract:
                break
            group.cursors[tract] = number

    def _numbers_behind(self, number: int) -> Iterator[int]:
        return iter(range(max(number, self._trimmed) + 1, self._accepted + 1))

    def _new_for(self, group: _Group, limit: int, tract: Tract) -> list[int]:
        matches = matcher(group.pattern)
        found: list[int] = []
        for number in self._numbers_behind(group.cursors[tract]):
            if len(found) >= limit:
                break
            message = self._messages[number]
            group.cursors[tract] = number
            if message.tract == tract and matches(message.topic) and number not in group.pending:
                group.pending[number] = _Pending(message, 0, 0, 0.0)
                found.append(number)
        return found

    def _held(self, group: str, delivery: Delivery) -> tuple[int, _Pending | None]:
        """The number of a delivery's message and where it stands, None where another has it or nobody any more."""
        number, _, claim = delivery.token.partition("-")
        mine = self._groups.get(group)
        pending = mine.pending.get(int(number)) if mine else None
        return int(number), pending if pending and str(pending.claim) == claim else None

    def _known(self, ids: Sequence[str] | None) -> list[str]:
        wanted = list(self._dead) if ids is None else list(dict.fromkeys(ids))
        for one in wanted:
            if one not in self._dead:
                raise no_dead_letter(one)
        return wanted
