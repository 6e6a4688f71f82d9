"""What a log says when it stops waiting for a group that nobody reads."""

from __future__ import annotations

from synapse.callosum.log.contract import UNREAD_S
from synapse.callosum.payloads import Payload, event
from synapse.callosum.publish.publishing import log, publish

UNREAD = "callosum.group.unread"
URGENT = 7


@event(UNREAD)
class GroupUnread(Payload):
    """Nobody has read a group for long: the log no longer keeps for it what it would have forgotten otherwise."""

    group: str
    days: int


def tell_unread(group: str) -> None:
    """Say that what waited for a group is being forgotten."""
    days = int(UNREAD_S // 86400)
    hint = f"start what reads it, or drop it: `synapse events drop-group {group}`"
    log.warning("log.group_unread", group=group, message=f"nobody has read it for {days} days", hint=hint)
    publish(UNREAD, GroupUnread(group=group, days=days), priority=URGENT)
