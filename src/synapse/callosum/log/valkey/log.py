"""A durable log in Valkey or Redis Streams, for many machines.

It needs Valkey or Redis 7.2 or newer with `appendonly yes`. `append` and `join` return when the server has written to
its disk (WAITAOF), whatever `appendfsync` says: with `always` that is at once, with `everysec` it takes up to a second.
So a server that is killed or loses power loses nothing accepted; what was handled in its last second may be delivered
again. A replica that is made the primary may lack the newest messages. In a cluster, give a prefix with a hash tag,
``{synapse}:``, so that one node holds all of the log.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final, Self, get_args

from synapse.callosum.log.contract import (
    KEEP,
    MOST_DEAD,
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
    no_position,
)
from synapse.callosum.log.gathering import Gathering
from synapse.callosum.log.unread import tell_unread
from synapse.callosum.log.unreadable import is_unreadable, read_message
from synapse.callosum.log.valkey.changes import Changes, Look
from synapse.callosum.log.valkey.client import client, reachable
from synapse.callosum.log.valkey.script import Argument, Steps, rows
from synapse.callosum.message import Message, Tract, to_wire
from synapse.callosum.topics import matcher
from synapse.errors import Conflict, InvalidInput, Unavailable

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

LAYOUT: Final = 1
"""The version of the keys in the server."""
OLDEST_SERVER: Final = (7, 2)
MOST_ERROR: Final = 2000
"""Characters of an error that a dead letter keeps."""
MOST_APPENDED: Final = 4 << 20
"""Bytes of messages that are sent in one step, unless one call gives more."""
PAGE: Final = 100
_REASONS: Final[dict[str, Reason]] = {reason: reason for reason in get_args(Reason)}
_POSITION = re.compile(r"[0-9]{1,15}")
_LETTER = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class ValkeyLog:
    """See `synapse.callosum.log.contract.Log` for what it promises. It belongs to the event loop it was made in."""

    def __init__(self, server: Valkey, prefix: str, keep: int, most_dead: int, timeout_s: float) -> None:
        """For `connect`, which also checks the server."""
        self._server, self._keep, self._most_dead = server, keep, most_dead
        self._timeout_s = timeout_s
        self._steps = Steps(server, prefix, timeout_s)
        self._changes = Changes(server, self._steps, prefix, timeout_s)
        self._appends: Gathering[tuple[Argument, ...], bool] = Gathering(
            self._send, lambda part: len(part[-1]) if isinstance(part[-1], bytes) else 0, MOST_APPENDED
        )

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        prefix: str = "synapse:",
        keep: int = KEEP,
        most_dead: int = MOST_DEAD,
        timeout_s: float = 10.0,
    ) -> Self:
        """The log in this server.

        Args:
            url: as in `synapse.callosum.log.valkey.client.client`.
            prefix: what the names of all its keys begin with.
            keep: at least so many of the newest messages stay for readers, and their idempotency keys.
            most_dead: how many dead letters are kept.
            timeout_s: after so long without an answer the server counts as unavailable.

        Raises:
            InvalidInput: the URL cannot be read, or `keep` is negative.
            Unavailable: the server cannot be reached or the package `valkey` is missing; it is too old; or it does not
                keep what it is given (no `appendonly yes`, or a `maxmemory-policy` that forgets).
            Unauthorized, Forbidden: it wants another password, or its user may not do what is needed.
            Conflict: a newer version of Synapse has written to it.
        """
        if keep < 0:
            raise InvalidInput(f"a log keeps 0 or more messages, not {keep}")
        log = cls(client(url, timeout_s), prefix, keep, most_dead, timeout_s)
        try:
            await log._check()
        except BaseException:
            await log.close()
            raise
        return log

    async def _check(self) -> None:
        async with reachable(self._timeout_s):
            about = await self._server.info()
        version = str(about.get("valkey_version") or about.get("redis_version", "0"))
        if tuple(map(int, version.split(".")[:2])) < OLDEST_SERVER:
            raise Unavailable(f"the Valkey or Redis server must be 7.2 or newer, not {version}", hint="update it")
        if not about.get("aof_enabled"):
            raise Unavailable(
                "the Valkey server does not write what it is given to its disk",
                hint="start it with --appendonly yes --appendfsync always",
            )
        if about.get("maxmemory") and str(about.get("maxmemory_policy")).startswith("allkeys"):
            raise Unavailable(
                f"the Valkey server forgets when its memory is full: {about.get('maxmemory_policy')}",
                hint="start it with --maxmemory-policy noeviction",
            )
        layout = int(await self._steps.run("open", LAYOUT, durable=True))
        if layout != LAYOUT:
            raise Conflict(
                f"the log in the Valkey server has the layout {layout}, this version of Synapse knows {LAYOUT}",
                hint="update Synapse, or give the log another prefix",
            )

    async def append(self, messages: Sequence[Message]) -> list[bool]:
        """Accept messages. When it is `Unavailable`, they may have been accepted: append them again, as they are."""
        parts: list[tuple[Argument, ...]] = [(m.topic, int(m.tract), m.dedupe_key, to_wire(m)) for m in messages]
        return list(await self._appends.ask(parts)) if parts else []

    async def _send(self, parts: list[tuple[Argument, ...]]) -> list[bool]:
        flat = [argument for part in parts for argument in part]
        answer = await self._steps.run("append", self._keep, *flat, durable=True)
        for group in answer[len(parts) :].decode().splitlines():
            tell_unread(group)
        return [flag == ord("1") for flag in answer[: len(parts)]]

    async def read(self, after: Position | None, limit: int, pattern: str = "**") -> list[Entry]:
        """Messages behind a position, oldest first."""
        matcher(pattern)
        if after is not None and not _POSITION.fullmatch(after):
            raise no_position(after)
        position = 0 if after is None else int(after)
        found: list[Entry] = []
        while len(found) < limit:
            newest, reached, bell, heads, bodies = await self._steps.run("read", position, limit - len(found), pattern)
            if position > int(newest):
                raise no_position(str(position))
            position = int(reached)
            for number, tract, body, _ in rows(heads, bodies):
                found.append(Entry(str(number), read_message(body, Tract(tract))))
            self._changes.saw("read", Look(position, int(bell)))
            if reached == newest:
                break
        return found

    async def end(self) -> Position:
        """The position behind the newest message."""
        newest, _ = await self._steps.run("newest")
        return str(int(newest))

    async def join(self, group: str, pattern: str, *, start: Start = "new", lease_s: float = 30.0) -> None:
        """Make a group, or change the pattern and the lease of one."""
        checked_join(group, pattern, lease_s)
        await self._steps.run("join", group, pattern, max(1, round(lease_s * 1000)), start, durable=True)

    async def leave(self, group: str) -> None:
        """Forget a group and what it had not handled."""
        await self._steps.run("leave", group, durable=True)

    async def claim(self, group: str, consumer: str, limit: int, tract: Tract) -> list[Delivery]:
        """Up to `limit` messages of a tract for this consumer: retries that are due and expired leases first."""
        found: list[Delivery] = []
        more = int(limit > 0)
        while more and not found:
            answer = await self._steps.run("claim", group, consumer, limit, int(tract))
            if answer is None:
                raise no_group(group)
            uid = answer[0].decode()
            seen, bell, due, more = map(int, answer[1:5])
            again = math.inf if due < 0 else time.monotonic() + due / 1000
            self._changes.saw(f"{int(tract)} {group}", Look(seen, bell, again))
            for number, deliveries, body, failures in rows(*answer[5:]):
                token = f"{uid}-{int(tract)}-{number}-{deliveries}"
                delivery = Delivery(token, read_message(body, tract), failures + 1, deliveries)
                if is_unreadable(delivery.message):
                    await self.bury(group, delivery, "unreadable", "this version of Synapse cannot read the message")
                else:
                    found.append(delivery)
        return found

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """They were handled."""
        handled = sorted(delivery.token.split("-")[:3] for delivery in deliveries)
        for (uid, tract), tokens in groupby(handled, lambda token: token[:2]):
            await self._steps.run("acknowledge", self._keep, uid, group, tract, *(token[2] for token in tokens))

    async def retry(self, group: str, delivery: Delivery, after_s: float) -> None:
        """Deliver it again, in so many seconds or later."""
        await self._steps.run("retry", group, *delivery.token.split("-"), max(0, round(after_s * 1000)))

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """Deliver again what nobody has begun to handle."""
        released = sorted(delivery.token.split("-") for delivery in deliveries)
        for uid, tokens in groupby(released, lambda token: token[0]):
            await self._steps.run("release", group, uid, *(part for token in tokens for part in token[1:]))

    async def bury(self, group: str, delivery: Delivery, reason: Reason, error: str) -> None:
        """Keep it as a dead letter."""
        text = error[:MOST_ERROR].encode(errors="replace")
        await self._steps.run("bury", group, *delivery.token.split("-"), reason, text, self._most_dead)

    async def dead(self, limit: int = 100) -> list[DeadLetter]:
        """Dead letters, newest first."""
        found: list[DeadLetter] = []
        before = "+"
        while len(found) < limit:
            page = await self._steps.run("dead", before, min(PAGE, limit - len(found)))
            found += [_letter(page[at : at + 8]) for at in range(0, len(page), 8)]
            if not page:
                break
            before = f"({found[-1].id}"
        return found

    async def replay(self, ids: Sequence[str] | None = None) -> int:
        """Give dead letters back to their groups."""
        return await self._letters("replay", ids)

    async def drop(self, ids: Sequence[str] | None = None) -> int:
        """Forget dead letters."""
        return await self._letters("drop", ids)

    async def _letters(self, what: str, ids: Sequence[str] | None) -> int:
        if ids is None:
            done, start, last = 0, b"-", b"+"
            while start:
                count, start, last = await self._steps.run("all_letters", what, start, last)
                done += count
            return done
        for letter in ids:
            if not _LETTER.fullmatch(letter):
                raise no_dead_letter(letter)
        ordered = sorted(set(ids), key=lambda letter: tuple(map(int, letter.split("-"))))
        count, *missing = await self._steps.run("letters", what, *ordered)
        if len(missing) == 2:
            raise no_group(missing[1].decode())
        if missing:
            raise no_dead_letter(missing[0].decode())
        return int(count)

    async def stats(self) -> LogStats:
        """How much there is."""
        kept, accepted, duplicates, dropped, *values = await self._steps.run("stats")
        found = []
        for at in range(0, len(values), 8):
            uid, group, pattern = (value.decode() for value in values[at : at + 3])
            read_at = int(values[at + 7]) / 1000
            waiting = sum([await self._waiting(uid, group, pattern, tract) for tract in Tract])
            pending, handled, redelivered, dead = map(int, values[at + 3 : at + 7])
            found.append(GroupStats(group, pattern, waiting, pending, handled, redelivered, dead, read_at))
        return LogStats(kept, accepted, duplicates, tuple(sorted(found, key=lambda one: one.group)), dropped)

    async def _waiting(self, uid: str, group: str, pattern: str, tract: Tract) -> int:
        waiting, position = 0, b"cursor"
        while position:
            count, position = await self._steps.run("waiting", uid, group, pattern, int(tract), position)
            waiting += count
        return waiting

    async def changed(self, timeout_s: float) -> None:
        """Return when there may be something new for this task, at the latest after the timeout."""
        await self._changes.wait(timeout_s)

    async def close(self) -> None:
        """Let go of the connections."""
        await self._appends.close()
        self._steps.closed = True
        await self._server.aclose()


def _letter(values: Sequence[bytes]) -> DeadLetter:
    identity, group, reason, error, attempts, at, tract, body = values
    return DeadLetter(
        identity.decode(),
        group.decode(),
        _REASONS[reason.decode()],
        error.decode(errors="replace"),
        int(attempts),
        int(at) / 1000,
        read_message(body, Tract(int(tract))),
    )
