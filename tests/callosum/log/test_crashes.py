"""Whoever is killed, and whenever: what was accepted is handled at least once, and accepted once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from callosum.log.crash_programs import GROUP, LEASE_S, LINE_BYTES, consume, lines, produce
from callosum.log.log_backends import Backend
from synapse.callosum.log.contract import Log, LogStats

MESSAGES = 100_000
KILLS = 200
PRODUCERS = CONSUMERS = 2

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["callosum.log.crash_programs", "callosum.log.valkey_places"])


class Program:
    """A program that is started again when it was killed, with a new journal for each life."""

    def __init__(self, folder: Path, start: Callable[[Path, int], BaseProcess]) -> None:
        self._folder = folder
        self._start = start
        self._journals: list[Path] = []
        folder.mkdir()
        self.begin()

    def begin(self) -> None:
        journal = self._folder / str(len(self._journals))
        self._written_before = sum(self._count(one) for one in self._journals)
        self._process = self._start(journal, self._written_before)
        self._journals.append(journal)
        self._process.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        if self._process.exitcode not in (None, 0):
            raise AssertionError(f"{self._folder.name} failed with {self._process.exitcode}")
        return self._process.exitcode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.join(20)

    def written(self) -> int:
        """How many lines it has written down in all its lives."""
        return self._written_before + self._count(self._journals[-1])

    def lines(self) -> list[tuple[int, int]]:
        return [line for journal in self._journals for line in lines(journal)]

    @staticmethod
    def _count(journal: Path) -> int:
        return journal.stat().st_size // LINE_BYTES if journal.exists() else 0


@contextmanager
def running(address: str, folder: Path) -> Iterator[tuple[list[Program], list[Program]]]:
    """Producers, who share the messages among them, and consumers."""

    def producer(number: int) -> Callable[[Path, int], BaseProcess]:
        share = MESSAGES // PRODUCERS
        first, last = number * share, (number + 1) * share
        return lambda journal, written: PROCESSES.Process(
            target=produce, args=(address, journal, first + written, last)
        )

    def consumer(journal: Path, written: int) -> BaseProcess:
        return PROCESSES.Process(target=consume, args=(address, journal))

    producers = [Program(folder / f"producer {n}", producer(n)) for n in range(PRODUCERS)]
    consumers = [Program(folder / f"consumer {n}", consumer) for n in range(CONSUMERS)]
    try:
        yield producers, consumers
    finally:
        for program in (*producers, *consumers):
            program.kill()


async def kill_at_random(producers: list[Program], consumers: list[Program]) -> Counter[str]:
    """Kill one of them at as many moments of their work, and start it again at once."""
    killed: Counter[str] = Counter()
    moments = sorted(random.sample(range(MESSAGES // 50, 2 * MESSAGES - MESSAGES // 50), KILLS))
    for moment in moments:
        while sum(program.written() for program in (*producers, *consumers)) < moment:
            await asyncio.sleep(0.001)
        await asyncio.sleep(random.uniform(0, 0.01))  # noqa: S311
        working = [program for program in producers if not program.ended]
        program = random.choice(random.choice([working or consumers, consumers]))  # noqa: S311
        program.kill()
        program.begin()
        killed["producers" if program in producers else "consumers"] += 1
    return killed


async def all_handled(log: Log, producers: list[Program]) -> LogStats:
    while not all(program.ended for program in producers):
        await asyncio.sleep(0.1)
    while (stats := await log.stats()).groups[0].handled < stats.accepted:
        await asyncio.sleep(0.2)
    return stats


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_no_kill_of_a_producer_or_a_consumer_loses_or_doubles_a_message(
    durable: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server imports the programs once
    log = await durable.open()
    await log.join(GROUP, "**", lease_s=LEASE_S)
    with running(durable.address, tmp_path) as (producers, consumers):
        killed = await kill_at_random(producers, consumers)
        stats = await all_handled(log, producers)
    assert killed.total() == KILLS
    assert min(killed["producers"], killed["consumers"]) > KILLS // 10

    told = [line for program in producers for line in program.lines()]
    accepted = Counter(number for number, accepted in told if accepted)
    assert {number for number, _ in told} == set(range(MESSAGES)), "every producer has finished"
    assert max(accepted.values()) == 1, "no key was accepted twice"
    assert stats.accepted == MESSAGES, "and each was, also where its producer died before it heard of it"

    handled = Counter(number for program in consumers for number, _ in program.lines())
    assert set(handled) == set(range(MESSAGES)), "each was handled at least once"
    (group,) = stats.groups
    assert group.handled == MESSAGES
    assert await log.dead() == []
    refused, again = len(told) - len(accepted), handled.total() - MESSAGES
    assert stats.duplicates >= refused
    for name, count in {**killed, "refused": refused, "handled again": again}.items():
        record_property(name, count)
        print(name, count)
    if durable.kind == "sqlite":
        with closing(sqlite3.connect(durable.address.removeprefix("sqlite:"))) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
