from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from synapse.cli.output import cell, fitting_columns, human_bytes, show_pairs, show_result, show_table


class Tty(io.StringIO):
    """Standard output as a terminal has it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch):
    """A colour terminal of a given width; returns what was written to it."""

    def open_terminal(width: int) -> Tty:
        stream = Tty()
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return stream

    return open_terminal


ROWS: list[dict[str, Any]] = [
    {"name": "captain", "size_bytes": 1536, "note": "a long note " * 8, "extra": None},
    {"name": "clerk", "size_bytes": 144811968, "note": None, "extra": None},
]


@pytest.mark.usefixtures("sample_group")
def test_a_list_in_a_pipe_is_tab_separated_lines(synapse) -> None:
    ran = synapse("sample", "list")
    assert ran.out == "NAME\tSIZE_BYTES\nfirst\t1.5 KiB\nsecond\t138 MiB\n"


@pytest.mark.usefixtures("sample_group")
def test_an_empty_list_leaves_stdout_empty(synapse) -> None:
    ran = synapse("sample", "empty")
    assert (ran.code, ran.out, ran.err) == (0, "", "nothing here yet\n")
    assert json.loads(synapse("sample", "empty", "--json").out) == {"items": []}


@pytest.mark.usefixtures("sample_group")
def test_json_is_the_result_and_nothing_else(synapse) -> None:
    ran = synapse("sample", "work", "--json")
    assert (json.loads(ran.out), ran.err) == ({}, "")


def test_a_table_fits_a_narrow_terminal(terminal) -> None:
    stream = terminal(40)
    show_table(ROWS)
    lines = stream.getvalue().splitlines()
    plain = [line.replace("\x1b[1;36m", "").replace("\x1b[0m", "") for line in lines]
    assert max(len(line) for line in plain) <= 40
    assert "captain" in stream.getvalue()
    assert "extra" not in stream.getvalue()


def test_columns_without_room_are_named(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    stream = terminal(20)
    show_table(ROWS)
    assert "captain" in stream.getvalue()
    assert "a long note" not in stream.getvalue()
    assert "not shown for lack of room: size_bytes, note" in capsys.readouterr().err


def test_the_first_column_is_always_shown() -> None:
    assert fitting_columns(["name", "other"], [["x" * 50, "y"]], 5) == 1


def test_a_single_thing_is_a_line_for_each_field_that_has_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    class Part(BaseModel):
        weight: float

    class Thing(BaseModel):
        model_config = ConfigDict(extra="allow")
        name: str
        prompt: str
        nothing: str | None = None
        parts: list[Part] = []

    show_pairs(Thing(name="x", prompt="one\ntwo", parts=[Part(weight=0.5)], more=1))
    assert capsys.readouterr().out == "name    x\nprompt  one\n        two\nmore    1\n\nparts\nWEIGHT\n0.5\n"


def test_on_a_terminal_long_values_are_broken_between_words(terminal) -> None:
    class Thing(BaseModel):
        prompt: str

    stream = terminal(30)
    show_pairs(Thing(prompt="one two three four five six\n\nseven"))
    plain = stream.getvalue().replace("\x1b[36m", "").replace("\x1b[0m", "")
    assert plain == "prompt  one two three four\n        five six\n        \n        seven\n"


def test_no_color_is_honoured(terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(80)
    show_table(ROWS)
    assert "\x1b[1;36m" in stream.getvalue()
    stream = terminal(80)
    monkeypatch.setenv("NO_COLOR", "1")
    show_table(ROWS)
    assert "\x1b[1;36m" not in stream.getvalue()


def test_a_list_of_plain_values_is_a_column_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Names(BaseModel):
        items: list[str]

    show_result(Names(items=["a", "b"]), as_json=False)
    assert capsys.readouterr().out == "VALUE\na\nb\n"


class Shade(Enum):
    DARK = "dark"


class Point(BaseModel):
    x: int
    y: int | None = None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("x", None, ""),
        ("x", True, "yes"),
        ("x", False, "no"),
        ("x", Shade.DARK, "dark"),
        ("size_bytes", 999, "999 B"),
        ("count", 999999, "999999"),
        ("x", 0.30000000000000004, "0.3"),
        ("x", Point(x=1), "x=1"),
        ("x", ["a", 1, Path("p")], "a, 1, p"),
        ("x", [Point(x=1)], '[{"x": 1, "y": null}]'),
        ("x", {"a": Path("p")}, '{"a": "p"}'),
        ("x", "\x1b]0;title\x07text\r\n", "]0;titletext\n"),
    ],
)
def test_values_are_readable_and_harmless(name: str, value: Any, text: str) -> None:
    assert cell(name, value) == text


def test_times_are_local_and_without_seconds() -> None:
    moment = datetime(2026, 11, 21, 10, 0, 59, tzinfo=UTC)
    assert cell("created_at", moment) == moment.astimezone().strftime("%Y-%m-%d %H:%M")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10**12, "931 GiB"), (10**13, "9313 GiB")]
)
def test_bytes_in_binary_units(size: int, text: str) -> None:
    assert human_bytes(size) == text
