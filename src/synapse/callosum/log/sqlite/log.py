"""The embedded log: one SQLite file that many processes may use, durable against crashes and loss of power.

A message is accepted when the disk has it: every transaction waits for that, and one transaction takes what is waiting
(`synapse.callosum.log.sqlite.commits`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from synapse.callosum.log.changes import Changes
from synapse.callosum.log.contract import (
    KEEP,
    MOST_DEAD,
    DeadLetter,
    Delivery,
    Entry,
    LogStats,
    Position,
    Reason,
    Start,
    checked_join,
    position_number,
)
from synapse.callosum.log.sqlite import dead as sqlite_dead
from synapse.callosum.log.sqlite import groups as sqlite_groups
from synapse.callosum.log.sqlite import messages as sqlite_messages
from synapse.callosum.log.sqlite.commits import Commits, Transaction
from synapse.callosum.log.sqlite.groups import Claimed
from synapse.callosum.log.unread import tell_unread
from synapse.callosum.log.unreadable import is_unreadable, read_message
from synapse.callosum.message import Message, Tract, to_wire
from synapse.callosum.topics import matcher
from synapse.errors import InvalidInput


class SqliteLog:
    """A log in an SQLite file. For one event loop; other processes open the file for themselves.

    When `append` raises `Unavailable`, or is cancelled, it is not known whether the messages were accepted: append the
    same ones again, their keys see to it that they are accepted once.

    Leases and pauses go by the clock of the machine, which the processes share.
    """

    def __init__(self, path: Path, keep: int, most_dead: int, clock: Callable[[], float]) -> None:
        self._clock, self._most_dead = clock, most_dead
        self._changes = Changes()
        accept = partial(sqlite_messages.accept, keep=keep, clock=clock)
        self._commits = Commits(path, accept, self._changes.note, tell_unread)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        keep: int = KEEP,
        most_dead: int = MOST_DEAD,
        clock: Callable[[], float] = time.time,
    ) -> SqliteLog:
        """The log in this file, made where there is none. Close it when done.

        Args:
            path: the file, in a folder that exists, on a disk of this machine.
            keep: how many of the newest messages are kept although every group has handled them.
            most_dead: how many dead letters are kept.
            clock: seconds since 1970.

        Raises:
            InvalidInput: `keep` is negative.
            Unavailable: the file cannot be made or opened.
            Corrupt: it is no SQLite database, or a damaged one.
            Conflict: it is the database of something else, or (DatabaseTooNew) of a newer version.
        """
        if keep < 0:
            raise InvalidInput(f"a log keeps 0 or more messages, not {keep}")
        log = cls(path, keep, most_dead, clock)
        await log._commits.open()
        return log

    @property
    def commits(self) -> int:
        """How many transactions this log has written, each with one wait for the disk."""
        return self._commits.commits

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        rows = [(int(one.tract), one.topic, one.dedupe_key, to_wire(one).decode()) for one in messages]
        return await self._commits.append(rows) if rows else []

    async def read(self, after: Position | None, limit: int, pattern: str = "**") -> list[Entry]:
        self._changes.look()
        matcher(pattern)

        def run(transaction: Transaction) -> sqlite_messages.Found:
            number = position_number(after, transaction.head.accepted)
            return sqlite_messages.read(transaction, number, limit, pattern)

        found = await self._commits.read(run)
        return [Entry(str(number), read_message(body.encode())) for number, body in found]

    async def end(self) -> Position:
        return await self._commits.read(lambda transaction: str(transaction.head.accepted))

    async def join(self, group: str, pattern: str, *, start: Start = "new", lease_s: float = 30.0) -> None:
        checked_join(group, pattern, lease_s)
        await self._commits.write(
            partial(sqlite_groups.join, group=group, pattern=pattern, start=start, lease_s=lease_s, now=self._clock())
        )

    async def leave(self, group: str) -> None:
        await self._commits.write(partial(sqlite_groups.leave, group=group))

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        self._changes.look()

        def run(transaction: Transaction) -> list[Claimed]:
            return sqlite_groups.claim(transaction, group, limit, tract, self._clock())

        def undo(claimed: list[Claimed], transaction: Transaction) -> None:
            sqlite_groups.unclaim(transaction, group, claimed)

        deliveries = []
        for one in await self._commits.write(run, undo):
            delivery = Delivery(one.token, read_message(one.body.encode(), tract), one.failures + 1, one.deliveries)
            if is_unreadable(delivery.message):
                await self.bury(group, delivery, "unreadable", "this version of Synapse cannot read the message")
            else:
                deliveries.append(delivery)
        return deliveries

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        numbers = [sqlite_groups.token_parts(delivery.token)[0] for delivery in deliveries]
        await self._commits.write(partial(sqlite_groups.acknowledge, group=group, numbers=numbers))

    async def retry(self, group: str, delivery: Delivery, after_s: float) -> None:
        due = self._clock() + after_s
        await self._commits.write(partial(sqlite_groups.retry, group=group, token=delivery.token, due=due))

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        if tokens := [delivery.token for delivery in deliveries]:
            await self._commits.write(partial(sqlite_groups.release, group=group, tokens=tokens))

    async def bury(self, group: str, delivery: Delivery, reason: Reason, error: str) -> None:
        writable = error.encode(errors="backslashreplace").decode()
        await self._commits.write(
            partial(
                sqlite_dead.bury,
                group=group,
                token=delivery.token,
                reason=reason,
                error=writable,
                now=self._clock(),
                most=self._most_dead,
            )
        )

    async def dead(self, limit: int = 100) -> list[DeadLetter]:
        found = await self._commits.read(partial(sqlite_dead.dead, limit=limit))
        return [
            DeadLetter(str(number), group, reason, error, attempts, at, read_message(body.encode(), Tract(tract)))
            for number, group, reason, error, attempts, at, tract, body in found
        ]

    async def replay(self, ids: Sequence[str] | None = None) -> int:
        return await self._commits.write(partial(sqlite_dead.replay, ids=ids))

    async def drop(self, ids: Sequence[str] | None = None) -> int:
        return await self._commits.write(partial(sqlite_dead.drop, ids=ids))

    async def stats(self) -> LogStats:
        return await self._commits.read(sqlite_groups.stats)

    async def changed(self, timeout_s: float) -> None:
        self._commits.waiting += 1  # before the thread is asked something: from then on it looks for others' news
        try:
            now = self._clock()
            due = await self._commits.read(partial(sqlite_groups.next_due, now=now))
            await self._changes.wait(timeout_s if due is None else min(timeout_s, due - now))
        finally:
            self._commits.waiting -= 1

    async def close(self) -> None:
        await self._commits.close()
        self._changes.note()
