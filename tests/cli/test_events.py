"""`synapse events`: what the commands of the terminal change is recorded, and can be followed, counted and replayed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synapse.callosum.log.opening import LOG_FILE, connect_log
from synapse.callosum.message import Message, Tract
from synapse.callosum.payloads import Untyped
from synapse.callosum.tail import time_of
from synapse.config import load_settings
from synapse.errors import InvalidInput

SYNAPSE = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]
GROUP = "mailer"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the settings of a test put the log."""
    return tmp_path / "home"


def write(*messages: Message) -> None:
    async def append() -> None:
        log = await connect_log(load_settings())
        await log.append(messages)
        await log.close()

    asyncio.run(append())


def bury(*numbers: int) -> None:
    """Make a dead letter of each of these messages, of the group `mailer`."""

    async def work() -> None:
        log = await connect_log(load_settings())
        await log.join(GROUP, "mail.**")
        await log.append([Message("mail.sent", Untyped({"number": number})) for number in numbers])
        for delivery in await log.claim(GROUP, "one", len(numbers), Tract.INTERNAL):
            await log.bury(GROUP, delivery, "failed", "no such address")
        await log.close()

    asyncio.run(work())


def events(synapse: Any, *args: str) -> list[dict[str, Any]]:
    ran = synapse("events", "tail", "--json", *args)
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def test_what_a_command_changes_is_recorded(synapse) -> None:
    assert synapse("persona", "create", "captain").code == 0
    assert synapse("persona", "edit", "captain", "--description", "a sailor").code == 0
    assert synapse("key", "create", "laptop").code == 0
    found = events(synapse)
    assert [each["topic"] for each in found] == ["persona.created", "persona.changed", "key.created"]
    assert found[0]["payload"]["name"] == "captain"
    assert found[1]["payload"]["changed"] == ["description"]
    assert all({"id", "time", "tract", "priority", "evidence", "position"} <= each.keys() for each in found)


def test_a_command_that_changes_nothing_opens_no_log(synapse, home: Path) -> None:
    assert synapse("persona", "list").code == 0
    assert synapse("persona", "show", "nobody").code == 3
    assert not (home / LOG_FILE).exists()


def test_a_log_that_cannot_be_written_fails_no_command_and_is_said(
    synapse, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / LOG_FILE).mkdir(parents=True)
    ran = synapse("persona", "create", "captain", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["name"] == "captain"
    assert "events.db cannot be opened" in caplog.text
    assert "events.lost" in caplog.text
    assert synapse("events", "tail").code == 5


def test_tail_prints_a_readable_line_for_each_event(synapse) -> None:
    assert synapse("persona", "create", "captain").code == 0
    ran = synapse("events", "tail")
    (line,) = ran.out.splitlines()
    assert " internal  persona.created  " in line
    assert "name=captain" in line
    assert ran.err == ""


def test_tail_says_that_there_is_nothing_and_leaves_standard_output_to_the_events(synapse) -> None:
    ran = synapse("events", "tail")
    assert (ran.code, ran.out, ran.err) == (0, "", "nothing here yet\n")
    write(Message("mail.sent", Untyped({})))
    ran = synapse("events", "tail", "--pattern", "other.*")
    assert (ran.out, ran.err) == ("", "nothing like that here yet\n")
    ran = synapse("events", "tail", "--pattern", "other.*", "--json")
    assert (ran.out, ran.err) == ("", "")


def test_what_an_event_says_can_neither_move_the_cursor_nor_begin_a_line(synapse) -> None:
    write(Message("odd.one", Untyped({"said": "a\x1b[2J\r\nfake 2026 line", "n": 0.123456789, "no": None})))
    (line,) = synapse("events", "tail").out.splitlines()
    assert "\x1b" not in line
    assert line.endswith("n=0.1235")
    assert "fake 2026 line" in line


def test_tail_takes_a_pattern_a_number_of_lines_and_a_time(synapse) -> None:
    old = Message("mail.sent", Untyped({"number": 0}), number=(1_600_000_000_000 << 80) | 7 << 76 | 2 << 62)
    write(old, *(Message("mail.sent", Untyped({"number": number})) for number in range(1, 31)))
    write(Message("other.thing", Untyped({})))
    assert [each["payload"].get("number") for each in events(synapse)] == [*range(12, 31), None]
    assert [each["topic"] for each in events(synapse, "--pattern", "other.*")] == ["other.thing"]
    assert [each["payload"]["number"] for each in events(synapse, "-p", "mail.**", "-n", "2")] == [29, 30]
    assert len(events(synapse, "--since", "10m")) == 31
    assert len(events(synapse, "--since", "2020-01-01")) == 32
    assert len(events(synapse, "--since", "10m", "--lines", "5")) == 5
    assert events(synapse, "-n", "0") == []


@pytest.mark.parametrize("args", [("--pattern", "a..b"), ("--since", "yesterday"), ("--lines", "-1")])
def test_what_makes_no_sense_is_refused(synapse, args: tuple[str, ...]) -> None:
    ran = synapse("events", "tail", *args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")


def test_with_events_in_memory_there_is_nothing_to_follow_and_the_hint_says_what_there_is(
    synapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_EVENTS", "memory")
    assert synapse("persona", "create", "captain").code == 0
    ran = synapse("events", "tail")
    assert ran.code == 2
    assert "/v1/events" in ran.err


def test_a_setting_of_events_that_is_none_is_named(synapse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_EVENTS", "kafka://me:secret@localhost")
    ran = synapse("persona", "list")
    assert ran.code == 2
    assert "kafka://***@localhost" in ran.err
    assert "embedded (a file in the home folder), memory, or a valkey:// URL; mend SYNAPSE_EVENTS" in ran.err
    assert "secret" not in ran.err


def test_following_goes_on_with_what_other_processes_do_until_it_is_interrupted(synapse) -> None:
    assert synapse("persona", "create", "captain").code == 0
    with subprocess.Popen(
        [*SYNAPSE, "events", "tail", "--follow", "--pattern", "persona.*", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        try:
            assert json.loads(tail.stdout.readline())["payload"]["name"] == "captain"
            assert synapse("persona", "create", "clerk").code == 0
            assert json.loads(tail.stdout.readline())["payload"]["name"] == "clerk"
            tail.send_signal(signal.SIGINT)
            assert tail.wait(20) == 130
        except BaseException:
            tail.kill()  # leaving the block waits for it
            raise
        assert "Traceback" not in tail.stderr.read()


def test_a_reader_that_has_had_enough_is_no_error(synapse) -> None:
    write(*(Message("mail.sent", Untyped({"number": number, "text": "x" * 1000})) for number in range(300)))
    with subprocess.Popen(
        [*SYNAPSE, "events", "tail", "--since", "10m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert "number=0" in tail.stdout.readline()
        tail.stdout.close()
        assert (tail.wait(20), tail.stderr.read()) == (0, "")


def test_stats_count_what_came_lately(synapse) -> None:
    for name in ("captain", "clerk"):
        assert synapse("persona", "create", name).code == 0
    stats = json.loads(synapse("events", "stats", "--json").out)
    assert (stats["kept"], stats["accepted"], stats["duplicates"], stats["dead"]) == (2, 2, 0, 0)
    (row,) = stats["topics"]
    assert (row["topic"], row["count"], row["latency_p50"]) == ("persona.created", 2, None)
    assert row["per_minute_5m"] > 0
    assert (stats["external"], stats["internal"], stats["balance"], stats["integration"]) == (0, 2, 0.0, 0.0)
    shown = synapse("events", "stats")
    assert "persona.created" in shown.out
    assert shown.err == ""


def test_dead_letters_are_listed_replayed_and_dropped(synapse) -> None:
    bury(1, 2, 3)
    rows = json.loads(synapse("events", "dead", "--json").out)["items"]
    assert [(row["message"]["payload"]["number"], row["group"], row["reason"]) for row in rows] == [
        (3, GROUP, "failed"),
        (2, GROUP, "failed"),
        (1, GROUP, "failed"),
    ]
    assert (rows[0]["topic"], rows[0]["error"], rows[0]["attempts"]) == ("mail.sent", "no such address", 1)
    header, *_ = synapse("events", "dead").out.splitlines()
    assert header.split()[:5] == ["ID", "GROUP", "TOPIC", "REASON", "ERROR"], "why goes before when: it has to fit"
    assert "no such address" in synapse("events", "dead").out
    assert json.loads(synapse("events", "replay", rows[0]["id"], "--json").out) == {"replayed": 1}
    assert json.loads(synapse("events", "drop", rows[1]["id"], "--json").out) == {"dropped": 1}
    assert json.loads(synapse("events", "replay", "--all", "--json").out) == {"replayed": 1}
    assert json.loads(synapse("events", "dead", "--json").out) == {"items": []}
    (group,) = json.loads(synapse("events", "stats", "--json").out)["groups"]
    assert (group["group"], group["waiting"] + group["pending"], group["dead"]) == (GROUP, 2, 0)


@pytest.mark.parametrize("verb", ["replay", "drop"])
def test_dead_letters_are_named_or_all_are_meant_and_unknown_ones_are_told(synapse, verb: str) -> None:
    assert synapse("events", verb).code == 2
    assert synapse("events", verb, "x", "--all").code == 2
    assert synapse("events", verb, "00000000-0000-7000-8000-000000000000").code == 3


def test_the_help_of_the_group_has_the_program_among_the_commands(synapse) -> None:
    out = synapse("events", "--help").out
    for verb in ("tail", "stats", "dead", "replay", "drop"):
        assert f"\n  {verb} " in out
    assert "--follow" in synapse("events", "tail", "--help").out


@pytest.mark.parametrize(("text", "expected"), [("10m", 400.0), ("3s", 997.0), ("1970-01-01T00:00+00:00", 0.0)])
def test_a_time_is_an_age_or_a_date(text: str, expected: float) -> None:
    assert time_of(text, 1000.0) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "1w", "2026-13-01", "9999999999d"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--since takes"):
        time_of(text, 1000.0)


@pytest.mark.usefixtures("persona_home")
def test_an_answer_is_recorded_without_what_was_said(synapse) -> None:
    ran = synapse("chat", "pip", "-m", "a secret question")
    assert ran.code == 0
    assert ran.out.strip()
    shown = synapse("events", "tail", "--pattern", "persona.turn.*")
    assert " external  persona.turn.finished  " in shown.out
    assert "tokens=24" in shown.out
    assert "secret" not in shown.out
