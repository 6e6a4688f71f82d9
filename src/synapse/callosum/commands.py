"""Commands for events. `GET /v1/events` streams them to a program that resumes after a lost connection."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from synapse.callosum.log.contract import UNREAD_S, DeadLetter, GroupStats, Reason
from synapse.callosum.log.opening import open_log
from synapse.callosum.log.reading import recent
from synapse.callosum.message import Tract
from synapse.callosum.observe.observers import BINS, Observer, Percentiles, TopicReport
from synapse.callosum.tail import TailedEvent, TailEvents, tail_events
from synapse.callosum.views import EventView, view_of
from synapse.commands import Argument, Context, command
from synapse.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from synapse.callosum.bus.bus import Bus
    from synapse.callosum.bus.stats import SubscriptionStats


class Nothing(BaseModel):
    """Nothing to choose."""


class TopicRow(BaseModel):
    """A topic in the last five minutes. Times are seconds; latencies are known to the process that handled them."""

    topic: str
    count: int
    per_minute: float = Field(description="over the last minute")
    per_minute_5m: float = Field(description="over the last five minutes")
    seconds_p50: float | None = Field(description="how long what it tells of took")
    seconds_p95: float | None
    seconds_p99: float | None
    latency_p50: float | None = Field(description="from when it was made to when it was handled in this process")
    latency_p95: float | None
    latency_p99: float | None


class GroupRow(BaseModel):
    """A durable group: `waiting` were never delivered, `pending` are with a consumer or to be tried again."""

    group: str
    pattern: str
    waiting: int
    pending: int
    handled: int
    redelivered: int
    dead: int


class GroupState(GroupRow):
    """A durable group, how far it is behind, and when it was last read."""

    lag: int = Field(description="messages that it has not handled: waiting and pending")
    read_at: datetime | None = Field(description="when somebody last read it, to the hour")
    unread_days: float | None = Field(description=f"since then; from {UNREAD_S / 86400:.0f} on nothing is kept for it")


class GroupList(BaseModel):
    """The durable groups, by name."""

    items: list[GroupState]


class OneGroup(BaseModel):
    """Which group."""

    group: Annotated[str, Argument()] = Field(description="its name in `synapse events groups`")


class DroppedGroup(BaseModel):
    """A group that is forgotten, and how many messages it had not handled."""

    group: str
    forgotten: int


class SubscriptionRow(BaseModel):
    """A subscription of the process that runs the command: its queue now, and what it has done."""

    name: str
    pattern: str
    waiting: int = Field(description="messages in its queue")
    running: int = Field(description="messages with its handler")
    retrying: int = Field(description="messages that wait for their next attempt")
    oldest_s: float | None = Field(description="how long ago the oldest that waits was made")
    handled: int
    failed: int
    dead: int
    breakers: list[str] = Field(description="of the external and of the internal tract")


class EventStats(BaseModel):
    """The log as a whole, and what came in the last five minutes. The tract measures are from 0 to 1."""

    kept: int = Field(description="messages in the log")
    accepted: int
    duplicates: int = Field(description="messages refused because one of their key was accepted before")
    dead: int = Field(description="dead letters")
    dead_dropped: int = Field(description="dead letters that had to go: too many, or too old")
    external: int = Field(description="messages of the last five minutes that a person waits for")
    internal: int = Field(description="the others of the last five minutes")
    balance: float
    coupling: float
    integration: float
    topics: list[TopicRow]
    groups: list[GroupRow]
    subscriptions: list[SubscriptionRow]


class ListDead(BaseModel):
    """How many."""

    limit: int = Field(100, ge=1, le=1000, description="at most so many, the newest first")


class DeadRow(BaseModel):
    """A message that a group could not handle, or that expired."""

    id: str = Field(description="of the dead letter; `replay` and `drop` take it")
    group: str
    topic: str
    reason: Reason
    error: str
    attempts: int
    at: datetime = Field(description="when it was given up")
    message: EventView


class DeadList(BaseModel):
    """Dead letters, newest first."""

    items: list[DeadRow]


class ChooseDead(BaseModel):
    """Which dead letters."""

    ids: Annotated[list[str], Argument()] = Field(default_factory=list, description="ids of `synapse events dead`")
    all: bool = Field(False, description="all of them")

    def chosen(self) -> list[str] | None:
        """The ids, or None for all.

        Raises:
            InvalidInput: neither or both were given.
        """
        if bool(self.ids) == self.all:
            raise InvalidInput("give either the ids of dead letters or --all", hint="`synapse events dead` lists them")
        return None if self.all else self.ids


class Replayed(BaseModel):
    """How many were given back to their groups."""

    replayed: int


class Dropped(BaseModel):
    """How many were forgotten."""

    dropped: int


@command("events/stats", permission="read")
async def show_stats(params: Nothing, context: Context) -> EventStats:
    """Count what is in the log and what came in the last five minutes: rates, times, queues, tract measures.

    Latencies are those of the process that runs the command: ask the server for its own.
    """
    from synapse.callosum.bus.opening import OBSERVER, open_observer  # noqa: PLC0415 - as in `_bus`

    log = await context.get(open_log)
    observer = await context.get(open_observer)
    here = {topic.topic: topic.latency for topic in observer.report().topics}
    if not observer.knows_all_bins:
        since = time.time() - BINS
        observer = Observer(since=since)
        for entry in (await recent(log, since=since)).entries:
            observer.count(entry.message)
    report = observer.report()
    stats = await log.stats()
    subscriptions = (await _bus(context)).stats().subscriptions
    return EventStats(
        kept=stats.kept,
        accepted=stats.accepted,
        duplicates=stats.duplicates,
        dead=sum(group.dead for group in stats.groups),
        dead_dropped=stats.dead_dropped,
        external=report.tracts.external,
        internal=report.tracts.internal,
        balance=report.tracts.balance,
        coupling=report.tracts.coupling,
        integration=report.tracts.integration,
        topics=[_topic_row(topic, here.get(topic.topic)) for topic in report.topics if topic.recent],
        groups=[_group_row(group) for group in stats.groups],
        subscriptions=[_subscription_row(one) for one in subscriptions if one.name != OBSERVER],
    )


@command("events/tail", permission="read")
async def tail(params: TailEvents, context: Context) -> AsyncIterator[TailedEvent]:
    """Stream the newest events of this home, whichever process they come from."""
    async with aclosing(tail_events(params, context)) as events:
        async for event in events:
            yield event


@command("events/groups", permission="read")
async def list_groups(params: Nothing, context: Context) -> GroupList:
    """List the durable groups: how far each is behind, and when it was last read."""
    now = time.time()
    stats = await (await context.get(open_log)).stats()
    return GroupList(items=[_group_state(group, now) for group in stats.groups])


@command("events/drop-group", permission="manage")
async def drop_group(params: OneGroup, context: Context) -> DroppedGroup:
    """Forget a group and what it has not handled. Its dead letters stay; one that joins again begins anew."""
    log = await context.get(open_log)
    groups = {group.group: group for group in (await log.stats()).groups}
    if params.group not in groups:
        raise NotFound(f"the log has no group {params.group[:60]!r}", hint="`synapse events groups` lists them")
    await log.leave(params.group)
    return DroppedGroup(group=params.group, forgotten=groups[params.group].waiting + groups[params.group].pending)


@command("events/dead", permission="read")
async def list_dead(params: ListDead, context: Context) -> DeadList:
    """List the dead letters: messages that could not be handled, or expired, and why."""
    bus = await _bus(context)
    return DeadList(items=[_dead_row(letter) for letter in await bus.dead(params.limit)])


@command("events/replay", permission="manage")
async def replay(params: ChooseDead, context: Context) -> Replayed:
    """Give dead letters back to their groups, which try them anew."""
    chosen = params.chosen()
    return Replayed(replayed=await (await _bus(context)).replay(chosen))


@command("events/drop", permission="manage")
async def drop(params: ChooseDead, context: Context) -> Dropped:
    """Forget dead letters for good."""
    chosen = params.chosen()
    return Dropped(dropped=await (await _bus(context)).drop(chosen))


async def _bus(context: Context) -> Bus:
    from synapse.callosum.bus.opening import open_bus  # noqa: PLC0415 - large, and `synapse events tail` needs none

    return await context.get(open_bus)


def _topic_row(topic: TopicReport, latency: Percentiles | None) -> TopicRow:
    times = {"seconds": topic.duration, "latency": latency}
    return TopicRow(
        topic=topic.topic,
        count=topic.recent,
        per_minute=topic.per_minute,
        per_minute_5m=topic.per_minute_5m,
        **{
            f"{name}_{share}": None if found is None else getattr(found, share)
            for name, found in times.items()
            for share in ("p50", "p95", "p99")
        },
    )


def _group_row(group: GroupStats) -> GroupRow:
    return GroupRow(**{name: getattr(group, name) for name in GroupRow.model_fields})


def _group_state(group: GroupStats, now: float) -> GroupState:
    return GroupState(
        **_group_row(group).model_dump(),
        lag=group.waiting + group.pending,
        read_at=datetime.fromtimestamp(group.read_at, UTC) if group.read_at else None,
        unread_days=round(max(0.0, now - group.read_at) / 86400, 2) if group.read_at else None,
    )


def _subscription_row(one: SubscriptionStats) -> SubscriptionRow:
    return SubscriptionRow(
        name=one.name,
        pattern=one.pattern,
        waiting=one.waiting,
        running=one.running,
        retrying=one.retrying,
        oldest_s=one.oldest_s,
        handled=one.tally.handled,
        failed=one.tally.failed,
        dead=one.tally.dead,
        breakers=[str(one.breakers[tract]) for tract in Tract],
    )


def _dead_row(letter: DeadLetter) -> DeadRow:
    return DeadRow(
        id=letter.id,
        at=datetime.fromtimestamp(letter.at, UTC),
        group=letter.group,
        topic=letter.message.topic,
        reason=letter.reason,
        attempts=letter.attempts,
        error=letter.error,
        message=view_of(letter.message),
    )
