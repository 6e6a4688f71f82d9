"""The embedded log and the one in memory, two programs for one contract, answer alike whatever is done with them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from callosum.log.log_backends import note, said
from synapse.callosum.log.contract import DeadLetter, Delivery, Log, Position, Reason, Start
from synapse.callosum.log.memory import MemoryLog
from synapse.callosum.log.sqlite.log import SqliteLog
from synapse.callosum.message import Tract
from synapse.errors import NotFound

GROUPS = st.sampled_from(["g", "h"])
TOPICS = st.sampled_from(["a.b", "a.c", "a.b.c", "b"])
PATTERNS = st.sampled_from(["**", "a.*", "*.b.**", "b"])
TRACTS = st.sampled_from(Tract)
KEEP = 10


class Logs(RuleBasedStateMachine):
    """Both logs, with one clock, and what their consumers have got so far."""

    @initialize()
    def open(self) -> None:
        self.now = 1000.0
        self.made = 0
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.deliveries: list[tuple[str, Delivery, Delivery]] = []
        self.positions: list[tuple[Position, Position] | tuple[None, None]] = [(None, None)]
        self.memory = MemoryLog(keep=KEEP, clock=lambda: self.now)
        self.file = self.runner.run(self.open_file())

    async def open_file(self) -> SqliteLog:
        return await SqliteLog.open(Path(self.folder.name) / "events.db", keep=KEEP, clock=lambda: self.now)

    def both(self, ask: Callable[[Log, int], Awaitable[Any]]) -> tuple[Any, Any]:
        """What each answers, or NotFound."""

        async def answer(log: Log, number: int) -> Any:
            try:
                return await ask(log, number)
            except NotFound:
                return NotFound

        memory, file = self.runner.run(answer(self.memory, 0)), self.runner.run(answer(self.file, 1))
        assert (memory is NotFound) == (file is NotFound)
        return memory, file

    @rule(parts=st.lists(st.tuples(TOPICS, TRACTS, st.integers(-5, 0)), max_size=12))
    def append(self, parts: list[tuple[str, Tract, int]]) -> None:
        messages = []
        for topic, tract, back in parts:
            self.made += 1
            key = None if back == 0 else str(self.made // 4 + back)
            messages.append(note(str(self.made), topic, tract=tract, key=key))
        memory, file = self.both(lambda log, _: log.append(messages))
        assert memory == file
        self.positions.append(self.both(lambda log, _: log.end()))

    @rule(group=GROUPS, pattern=PATTERNS, start=st.sampled_from(["new", "first"]), lease_s=st.sampled_from([5, 50]))
    def join(self, group: str, pattern: str, start: Start, lease_s: float) -> None:
        self.both(lambda log, _: log.join(group, pattern, start=start, lease_s=lease_s))

    @rule(group=GROUPS, dice=st.integers(0, 3))
    def leave(self, group: str, dice: int) -> None:
        if dice == 0:
            self.both(lambda log, _: log.leave(group))

    @rule(group=GROUPS, limit=st.integers(0, 40), tract=TRACTS)
    def claim(self, group: str, limit: int, tract: Tract) -> None:
        memory, file = self.both(lambda log, _: log.claim(group, "a", limit, tract))
        if memory is not NotFound:
            assert [(said([one]), one.attempt) for one in memory] == [(said([one]), one.attempt) for one in file]
            self.deliveries += [(group, *pair) for pair in zip(memory, file, strict=True)]

    @rule(data=st.data(), what=st.sampled_from(["acknowledge", "retry", "bury"]), many=st.integers(1, 5))
    def settle(self, data: st.DataObject, what: str, many: int) -> None:
        if not self.deliveries:
            return
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.deliveries))), min_size=1, max_size=many))
        group = self.deliveries[chosen[0]][0]
        pairs = [self.deliveries[n][1:] for n in chosen if self.deliveries[n][0] == group]
        reason: Reason = "failed"
        if what == "acknowledge":
            self.both(lambda log, n: log.acknowledge(group, [pair[n] for pair in pairs]))
        elif what == "retry":
            after_s = data.draw(st.sampled_from([0, 3]))
            self.both(lambda log, n: log.retry(group, pairs[0][n], after_s))
        else:
            self.both(lambda log, n: log.bury(group, pairs[0][n], reason, "no"))

    @rule(seconds=st.sampled_from([1, 5, 60]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data(), what=st.sampled_from(["replay", "drop"]), every=st.booleans(), unknown=st.booleans())
    def answer_the_dead(self, data: st.DataObject, what: str, every: bool, unknown: bool) -> None:
        letters: tuple[list[DeadLetter], list[DeadLetter]] = self.both(lambda log, _: log.dead())
        chosen = data.draw(st.lists(st.integers(0, len(letters[0]) - 1))) if letters[0] and not every else []

        def ask(log: Log, n: int) -> Awaitable[int]:
            ids = [letters[n][index].id for index in chosen] + ["1234567"] * unknown
            return (log.replay if what == "replay" else log.drop)(None if every else ids)

        memory, file = self.both(ask)
        assert memory == file

    @rule(data=st.data(), limit=st.integers(0, 30), pattern=PATTERNS)
    def read(self, data: st.DataObject, limit: int, pattern: str) -> None:
        after = data.draw(st.sampled_from(self.positions))
        memory, file = self.both(lambda log, n: log.read(after[n], limit, pattern))
        assert said(memory) == said(file)

    @rule()
    def open_again(self) -> None:
        self.runner.run(self.file.close())
        self.file = self.runner.run(self.open_file())

    @invariant()
    def they_count_alike(self) -> None:
        if hasattr(self, "file"):
            memory, file = self.both(lambda log, _: log.stats())
            assert memory == file
            dead = self.both(lambda log, _: log.dead())
            assert [(*said([one]), one.attempts, one.at) for one in dead[0]] == [
                (*said([one]), one.attempts, one.at) for one in dead[1]
            ]

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.runner.run(self.file.close())
            self.runner.close()
            self.folder.cleanup()


pytestmark = pytest.mark.slow
TestLogs = Logs.TestCase
TestLogs.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
