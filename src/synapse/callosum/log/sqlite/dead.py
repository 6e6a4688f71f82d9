"""The statements of the embedded log for its dead letters."""

from __future__ import annotations

import json
from collections.abc import Sequence

from synapse.callosum.log.contract import OLDEST_DEAD_S, Reason, no_dead_letter, no_group
from synapse.callosum.log.sqlite.commits import Transaction
from synapse.callosum.log.sqlite.groups import token_parts

Letter = tuple[int, str, Reason, str, int, float, int, str]
"""Id, group, reason, error, attempts, time, tract and body of a dead letter."""


def bury(
    transaction: Transaction, *, group: str, token: str, reason: Reason, error: str, now: float, most: int
) -> None:
    """Make a dead letter of what is pending, and drop those that are too old or too many."""
    number, claim = token_parts(token)
    made = transaction.db.execute(
        """INSERT INTO dead (name, number, tract, reason, error, attempts, at, body)
        SELECT ?, p.number, p.tract, ?, ?, p.failures + 1, ?, coalesce(p.body, m.body)
        FROM pending AS p LEFT JOIN messages AS m ON m.number = p.number
        WHERE p.owner = (SELECT id FROM groups WHERE name = ?) AND p.number = ? AND p.claim = ?""",
        (group, reason, error, now, group, number, claim),
    ).rowcount
    if made:
        transaction.db.execute(
            "DELETE FROM pending WHERE owner = (SELECT id FROM groups WHERE name = ?) AND number = ?", (group, number)
        )
        transaction.head.dead_dropped += transaction.db.execute(
            """DELETE FROM dead WHERE at < ? OR id <= (SELECT id FROM dead ORDER BY id DESC LIMIT 1 OFFSET ?)""",
            (now - OLDEST_DEAD_S, most),
        ).rowcount


def dead(transaction: Transaction, limit: int) -> list[Letter]:
    """Dead letters, newest first."""
    return transaction.db.execute(
        "SELECT id, name, reason, error, attempts, at, tract, body FROM dead ORDER BY id DESC LIMIT ?", (max(0, limit),)
    ).fetchall()


def replay(transaction: Transaction, ids: Sequence[str] | None) -> int:
    """Give dead letters back to their groups."""
    db = transaction.db
    if ids is None:
        wanted = "SELECT json_group_array(dead.id) FROM dead JOIN groups USING (name)"
        chosen = db.execute(wanted).fetchone()[0]
    else:
        chosen = _chosen(transaction, ids)
        gone = db.execute(
            """SELECT name FROM dead WHERE id IN (SELECT value FROM json_each(?))
            AND name NOT IN (SELECT name FROM groups) LIMIT 1""",
            (chosen,),
        ).fetchone()
        if gone:
            raise no_group(gone[0])
    db.execute(
        """INSERT INTO pending (owner, number, tract, attempt, due, claim, body)
        SELECT groups.id, dead.number, dead.tract, 0, 0, 0, dead.body FROM dead JOIN groups USING (name)
        WHERE dead.id IN (SELECT value FROM json_each(?)) ON CONFLICT (owner, number) DO NOTHING""",
        (chosen,),
    )
    transaction.head.news += 1
    return _forget(transaction, chosen)


def drop(transaction: Transaction, ids: Sequence[str] | None) -> int:
    """Forget dead letters."""
    if ids is None:
        return transaction.db.execute("DELETE FROM dead").rowcount
    return _forget(transaction, _chosen(transaction, ids))


def _forget(transaction: Transaction, chosen: str) -> int:
    return transaction.db.execute("DELETE FROM dead WHERE id IN (SELECT value FROM json_each(?))", (chosen,)).rowcount


def _chosen(transaction: Transaction, ids: Sequence[str]) -> str:
    """The ids as JSON, each once. Raises NotFound where there is no such dead letter."""
    for text in ids:
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise no_dead_letter(text)
    chosen = json.dumps([int(text) for text in ids])
    (known,) = transaction.db.execute(
        "SELECT json_group_array(id) FROM dead WHERE id IN (SELECT value FROM json_each(?))", (chosen,)
    ).fetchone()
    for missing in set(json.loads(chosen)) - set(json.loads(known)):
        raise no_dead_letter(str(missing))
    return chosen
