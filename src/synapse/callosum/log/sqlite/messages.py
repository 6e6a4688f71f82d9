"""The statements that accept, read and trim the messages of the embedded log.

Each row that a statement gives would be a round of Python's global lock, for which a busy event loop lets this thread
wait: so what has many rows goes in and comes out as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from synapse.callosum.log.contract import UNREAD_S
from synapse.callosum.log.sqlite.commits import Row, Transaction
from synapse.callosum.topics import matcher

ROWS_AT_ONCE = 256
MOST_TRIMMED = 5000
"""How many messages one transaction forgets; more than one accepts."""
PAGE = 32
MOST_CHARACTERS = 8 << 20
"""Whoever asks for more messages gets them a page at a time, and no further page behind so much."""

_KNOWN = "SELECT json_group_array(key) FROM messages WHERE key IN (SELECT value FROM json_each(?))"
_INSERT = "INSERT INTO messages (number, tract, topic, key, body) VALUES "
_PAGE = """SELECT json_group_array(number), json_group_array(topic), json_group_array(body) FROM
    (SELECT number, topic, body FROM messages WHERE number > ? AND topic GLOB ? {} ORDER BY number LIMIT ?)"""
_READ = _PAGE.format("")
_NEW = _PAGE.format(
    "AND tract = ? AND NOT EXISTS (SELECT 1 FROM pending WHERE owner = ? AND pending.number = messages.number)"
)

# The first message of each tract that some group has not looked at, and the first one pending.
_UNHANDLED = """SELECT
    min((SELECT min(number) FROM messages WHERE tract = 0 AND number > cursor0)),
    min((SELECT min(number) FROM messages WHERE tract = 1 AND number > cursor1)),
    min((SELECT min(number) FROM pending WHERE owner = id)) FROM groups WHERE read_at > ?"""

Found = list[tuple[int, str]]
"""Number and body of messages."""


def accept(transaction: Transaction, rows: Sequence[Row], keep: int, clock: Callable[[], float]) -> list[bool]:
    """Accept messages, except those whose key is there, and forget what nobody needs any more."""
    db, head = transaction.db, transaction.head
    known = set(json.loads(db.execute(_KNOWN, (json.dumps([key for _, _, key, _ in rows]),)).fetchone()[0]))
    accepted = []
    values: list[int | str] = []
    for tract, topic, key, body in rows:
        accepted.append(key not in known)
        if key not in known:
            known.add(key)
            head.accepted += 1
            values += (head.accepted, tract, topic, key, body)
    for start in range(0, len(values), 5 * ROWS_AT_ONCE):
        part = values[start : start + 5 * ROWS_AT_ONCE]
        db.execute(_INSERT + ",".join(["(?,?,?,?,?)"] * (len(part) // 5)), part)
    head.duplicates += len(rows) - sum(accepted)
    head.news += bool(values)
    _trim(transaction, keep, clock() - UNREAD_S)
    return accepted


def _trim(transaction: Transaction, keep: int, read_after: float) -> None:
    """Forget the messages that every group that is read has handled, from the oldest on, but for the newest."""
    head = transaction.head
    most = head.accepted - keep
    least = max(1, min(1000, keep // 10))
    if most - head.trimmed < least:
        return
    unhandled = transaction.db.execute(_UNHANDLED, (read_after,)).fetchone()
    most = min(most, head.trimmed + MOST_TRIMMED, *(number - 1 for number in unhandled if number is not None))
    if most - head.trimmed >= least:
        transaction.db.execute("DELETE FROM messages WHERE number <= ?", (most,))
        head.trimmed = most
        _pass_over(transaction, read_after)


def _pass_over(transaction: Transaction, read_after: float) -> None:
    """What was forgotten is forgotten by the groups that nobody reads, too."""
    db = transaction.db
    unread = db.execute("SELECT id, name, unread FROM groups WHERE read_at <= ?", (read_after,)).fetchall()
    for owner, name, said in unread:
        lost = db.execute(
            "DELETE FROM pending WHERE owner = ? AND number <= ? AND body IS NULL", (owner, transaction.head.trimmed)
        ).rowcount
        behind = "UPDATE groups SET unread = 1 WHERE id = ? AND (? OR min(cursor0, cursor1) < ?)"
        if not said and db.execute(behind, (owner, lost, transaction.head.trimmed)).rowcount:
            transaction.unread.append(name)


def read(transaction: Transaction, after: int, limit: int, pattern: str) -> Found:
    """Messages behind a number that match a pattern."""
    return _pages(transaction, after, limit, pattern)[0]


def new_of(
    transaction: Transaction, after: int, limit: int, pattern: str, *, tract: int, owner: int
) -> tuple[Found, int]:
    """Messages of a tract behind a number, for a group that has not got them yet, and the last number looked at."""
    return _pages(transaction, after, limit, pattern, (tract, owner))


def _pages(
    transaction: Transaction, after: int, limit: int, pattern: str, tract_and_owner: tuple[int, ...] = ()
) -> tuple[Found, int]:
    statement = _NEW if tract_and_owner else _READ
    matches = matcher(pattern)
    glob = pattern.replace("**", "*")  # whatever matches the pattern matches this, and a little more does
    found: Found = []
    characters = 0
    while (wanted := min(PAGE, limit - len(found))) > 0 and characters < MOST_CHARACTERS:
        page = transaction.db.execute(statement, (after, glob, *tract_and_owner, wanted)).fetchone()
        numbers, topics, bodies = map(json.loads, page)
        for number, topic, body in zip(numbers, topics, bodies, strict=True):
            if matches(topic):
                found.append((number, body))
                characters += len(body)
        if len(numbers) < wanted:
            return found, transaction.head.accepted
        after = numbers[-1]
    return found, after
