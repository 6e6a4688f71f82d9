"""The statements of the embedded log for its groups: what each has handled, and what its consumers have now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from synapse.callosum.log.contract import READ_NOTED_S, GroupStats, LogStats, Start, no_group
from synapse.callosum.log.sqlite.commits import Transaction
from synapse.callosum.log.sqlite.messages import new_of
from synapse.callosum.message import Tract
from synapse.callosum.topics import matcher

_DUE = """SELECT json_group_array(number), json_group_array(attempt), json_group_array(failures),
    json_group_array(coalesce(body, text)) FROM (
    SELECT p.number, p.attempt, p.failures, p.body, m.body AS text FROM
        (SELECT * FROM pending WHERE owner = ? AND tract = ? AND due <= ? ORDER BY number LIMIT ?) AS p
        LEFT JOIN messages AS m ON m.number = p.number ORDER BY p.number)"""
_NEXT_DUE = """SELECT min((SELECT min(due) FROM pending WHERE owner = id AND tract = t.tract AND due > ?))
    FROM groups, (SELECT 0 AS tract UNION ALL SELECT 1) AS t"""

_TOPICS = """SELECT json_group_array(topic), json_group_array(many) FROM
    (SELECT topic, count(*) AS many FROM messages WHERE tract = ? AND number > ? GROUP BY topic)"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message that was claimed, as it is in the file."""

    number: int
    claim: int
    deliveries: int
    failures: int
    body: str

    @property
    def token(self) -> str:
        """What the log knows the delivery by."""
        return f"{self.number}-{self.claim}"


def token_parts(token: str) -> tuple[int, int]:
    """The numbers of the message and of the claim."""
    number, _, claim = token.partition("-")
    return int(number), int(claim)


def join(transaction: Transaction, *, group: str, pattern: str, start: Start, lease_s: float, now: float) -> None:
    """Make a group, or change its pattern and lease."""
    head = transaction.head
    begin = head.accepted if start == "new" else head.trimmed
    transaction.db.execute(
        """INSERT INTO groups (name, pattern, lease_s, cursor0, cursor1, handled, redelivered, read_at)
        VALUES (?, ?, ?, ?, ?, 0, 0, ?) ON CONFLICT (name) DO UPDATE
        SET pattern = excluded.pattern, lease_s = excluded.lease_s, read_at = excluded.read_at, unread = 0""",
        (group, pattern, lease_s, begin, begin, now),
    )


def leave(transaction: Transaction, group: str) -> None:
    """Forget a group."""
    transaction.db.execute("DELETE FROM pending WHERE owner = (SELECT id FROM groups WHERE name = ?)", (group,))
    transaction.db.execute("DELETE FROM groups WHERE name = ?", (group,))


def claim(transaction: Transaction, group: str, limit: int, tract: Tract, now: float) -> list[Claimed]:
    """Up to `limit` messages: first those that are due again, then new ones."""
    db, head = transaction.db, transaction.head
    cursor_name = f"cursor{int(tract)}"  # cursor0 or cursor1: nothing from outside is in the SQL below
    statement = f"SELECT id, pattern, lease_s, {cursor_name}, read_at FROM groups WHERE name = ?"  # noqa: S608
    mine = db.execute(statement, (group,)).fetchone()
    if mine is None:
        raise no_group(group)
    owner, pattern, lease_s, cursor, read_at = mine
    if now - read_at > READ_NOTED_S:
        db.execute("UPDATE groups SET read_at = ?, unread = 0 WHERE id = ?", (now, owner))
    head_claim = head.claims + 1
    numbers, attempts, failures, bodies = map(
        json.loads, db.execute(_DUE, (owner, tract, now, max(0, limit))).fetchone()
    )
    due = [
        Claimed(number, head_claim, attempt + 1, failed, body)
        for number, attempt, failed, body in zip(numbers, attempts, failures, bodies, strict=True)
    ]
    found, looked = new_of(transaction, cursor, limit - len(due), pattern, tract=tract, owner=owner)
    new = [Claimed(number, head_claim, 1, 0, body) for number, body in found]
    if due:
        db.execute(
            """UPDATE pending SET attempt = attempt + 1, due = ?, claim = ?
            WHERE owner = ? AND number IN (SELECT value FROM json_each(?))""",
            (now + lease_s, head_claim, owner, json.dumps(numbers)),
        )
    if new:
        db.execute(
            """INSERT INTO pending (owner, number, tract, attempt, due, claim)
            SELECT ?, value, ?, 1, ?, ? FROM json_each(?)""",
            (owner, tract, now + lease_s, head_claim, json.dumps([number for number, _ in found])),
        )
    again = sum(one.deliveries > 1 for one in due)
    if looked != cursor or again:
        db.execute(
            f"UPDATE groups SET {cursor_name} = ?, redelivered = redelivered + ? WHERE id = ?",  # noqa: S608
            (looked, again, owner),
        )
    head.claims += bool(due or new)
    return due + new


def unclaim(transaction: Transaction, group: str, claimed: Sequence[Claimed]) -> None:
    """Take back a claim that reached nobody."""
    if claimed:
        transaction.db.execute(
            """UPDATE pending SET attempt = attempt - 1, due = 0
            WHERE owner = (SELECT id FROM groups WHERE name = ?) AND number IN (SELECT value FROM json_each(?))
            AND claim = ?""",
            (group, json.dumps([one.number for one in claimed]), claimed[0].claim),
        )
        transaction.db.execute(
            "UPDATE groups SET redelivered = redelivered - ? WHERE name = ?",
            (sum(one.deliveries > 1 for one in claimed), group),
        )
        transaction.head.news += 1


def release(transaction: Transaction, group: str, tokens: Sequence[str]) -> None:
    """Deliver again, at once, what nobody has begun to handle."""
    parts = [token_parts(token) for token in tokens]
    transaction.head.news += transaction.db.execute(
        """UPDATE pending SET attempt = attempt - 1, due = 0, claim = 0
        WHERE owner = (SELECT id FROM groups WHERE name = ?) AND (number, claim) IN
        (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))""",
        (group, json.dumps(parts)),
    ).rowcount


def acknowledge(transaction: Transaction, group: str, numbers: Sequence[int]) -> None:
    """These messages were handled."""
    handled = transaction.db.execute(
        """DELETE FROM pending WHERE owner = (SELECT id FROM groups WHERE name = ?)
        AND number IN (SELECT value FROM json_each(?))""",
        (group, json.dumps(numbers)),
    ).rowcount
    if handled:
        transaction.db.execute("UPDATE groups SET handled = handled + ? WHERE name = ?", (handled, group))


def retry(transaction: Transaction, group: str, token: str, due: float) -> None:
    """Deliver it again, then or later."""
    changed = transaction.db.execute(
        """UPDATE pending SET due = ?, claim = 0, failures = failures + 1
        WHERE owner = (SELECT id FROM groups WHERE name = ?) AND number = ? AND claim = ?""",
        (due, group, *token_parts(token)),
    ).rowcount
    transaction.head.news += changed


def next_due(transaction: Transaction, now: float) -> float | None:
    """When the next lease or pause ends."""
    due: float | None = transaction.db.execute(_NEXT_DUE, (now,)).fetchone()[0]
    return due


def stats(transaction: Transaction) -> LogStats:
    """How much there is."""
    db, head = transaction.db, transaction.head
    dead = dict(db.execute("SELECT name, count(*) FROM dead GROUP BY name"))
    pending = dict(db.execute("SELECT owner, count(*) FROM pending GROUP BY owner"))
    groups = [
        GroupStats(
            name,
            pattern,
            sum(_waiting(transaction, tract, cursor, pattern) for tract, cursor in enumerate(cursors)),
            pending.get(owner, 0),
            handled,
            redelivered,
            dead.get(name, 0),
            read_at,
        )
        for owner, name, pattern, *cursors, handled, redelivered, read_at in db.execute(
            "SELECT id, name, pattern, cursor0, cursor1, handled, redelivered, read_at FROM groups ORDER BY name"
        ).fetchall()
    ]
    return LogStats(head.accepted - head.trimmed, head.accepted, head.duplicates, tuple(groups), head.dead_dropped)


def _waiting(transaction: Transaction, tract: int, cursor: int, pattern: str) -> int:
    """How many messages of a tract behind a number match a pattern."""
    counted = transaction.db.execute(_TOPICS, (tract, cursor)).fetchone()
    matches = matcher(pattern)
    return sum(count for topic, count in zip(*map(json.loads, counted), strict=True) if matches(topic))
