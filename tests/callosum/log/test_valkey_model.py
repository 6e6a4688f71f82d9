"""The log in Valkey and the one in memory, two programs for one contract, answer alike whatever is done with them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from callosum.log.log_backends import note, said
from callosum.log.test_model import GROUPS, TRACTS, Logs
from support.valkey import new_prefix, shared_server
from synapse.callosum.log.contract import Delivery, Start
from synapse.callosum.log.memory import MemoryLog
from synapse.callosum.log.valkey.log import ValkeyLog
from synapse.callosum.message import Tract
from synapse.callosum.topics import matcher
from synapse.errors import NotFound

ALL = 1000


class Unhurried(ValkeyLog):
    """A log whose seconds are long, as the clock of the server cannot be set: nothing is due during a test."""

    async def join(self, group: str, pattern: str, *, start: Start = "new", lease_s: float = 30.0) -> None:
        await super().join(group, pattern, start=start, lease_s=1000 * lease_s)

    async def retry(self, group: str, delivery: Delivery, after_s: float) -> None:
        await super().retry(group, delivery, 1000 * after_s)


class ValkeyLogs(Logs):
    """As `Logs`, but claims take everything: which retries go first is not promised, and differs."""

    pass_time = None  # type: ignore[assignment]

    @initialize()
    def open(self) -> None:
        self.made = 0
        self.prefix = new_prefix()
        self.runner = asyncio.Runner()
        self.deliveries: list[tuple[str, Delivery, Delivery]] = []
        self.positions = [(None, None)]
        self.memory = MemoryLog(clock=lambda: 1000.0)
        self.file: Any = self.runner.run(self.open_file())

    async def open_file(self) -> Any:
        return await Unhurried.connect(shared_server().url, prefix=self.prefix)

    @rule(group=GROUPS, limit=st.just(ALL), tract=TRACTS)
    def claim(self, group: str, limit: int, tract: Tract) -> None:
        memory, file = self.both(lambda log, _: log.claim(group, "a", limit, tract))
        if memory is not NotFound:
            for found in (memory, file):
                found.sort(key=lambda one: int(said([one])[0]))
            assert [(said([one]), one.attempt) for one in memory] == [(said([one]), one.attempt) for one in file]
            self.deliveries += [(group, *pair) for pair in zip(memory, file, strict=True)]

    @invariant()
    def they_count_alike(self) -> None:
        if hasattr(self, "file"):
            memory, file = self.both(lambda log, _: log.stats())
            assert memory == file
            dead = self.both(lambda log, _: log.dead())
            assert [(said([one]), one.attempts) for one in dead[0]] == [(said([one]), one.attempts) for one in dead[1]]

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.runner.run(self.file.close())
            self.runner.close()


TestValkeyLogs = pytest.mark.slow(ValkeyLogs.TestCase)
TestValkeyLogs.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)

WORDS = st.sampled_from(["a", "b", "a-b", "a_", "0"])
TOPICS = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.builds(
    lambda words, rest: ".".join([*words, *rest]),
    st.lists(WORDS | st.just("*"), min_size=1, max_size=4),
    st.sampled_from([(), ("**",)]),
) | st.just("**")


@given(topics=st.lists(TOPICS, min_size=1, max_size=20), patterns=st.lists(PATTERNS, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_server_matches_topics_as_the_rest_of_synapse_does(topics: list[str], patterns: list[str]) -> None:
    async def check() -> None:
        log = await ValkeyLog.connect(shared_server().url, prefix=new_prefix())
        await log.append([note(topic, topic) for topic in topics])
        for pattern in patterns:
            assert said(await log.read(None, 100, pattern)) == [topic for topic in topics if matcher(pattern)(topic)]
        await log.close()

    asyncio.run(check())
