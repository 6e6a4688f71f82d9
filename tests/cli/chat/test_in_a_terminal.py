"""`synapse chat` in a real pseudo-terminal, as a person has it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|[\x01\x02]")


class Terminal:
    """A program in a pseudo-terminal: type to it, and wait for what it shows."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        code = "import sys; from synapse.cli.main import main; sys.exit(main())"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 (the child must own the terminal for Ctrl-C to reach it)
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 50) -> str:
        """What was shown since the last call, up to and with this text."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            self._read(deadline, repr(text))
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def wait_for_more(self, characters: int, seconds: float = 50) -> None:
        """Until so much more than what was waited for has been shown."""
        deadline = time.monotonic() + seconds
        while len(self.shown) < characters:
            self._read(deadline, f"{characters} characters")

    def wait_for_sleep(self, times: int = 5) -> None:
        """Until it waits for the next key: Python's `input` misses a Ctrl-C between the prompt and that moment."""
        seen = 0
        while seen < times:
            time.sleep(0.02)
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            seen = seen + 1 if state == "S" else 0

    def ended(self, seconds: float = 30) -> int:
        return self._process.wait(seconds)

    def _read(self, deadline: float, wanted: str) -> None:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"{wanted} did not appear in {self.shown!r}")
        try:
            read = os.read(self._master, 65536)
        except OSError:  # Linux: the last program with the terminal open has ended
            read = b""
        if not read:
            raise AssertionError(f"the program ended before {wanted}: {self.shown!r}")
        self.shown += ANSI.sub("", read.decode(errors="replace"))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(persona_home: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", "pip")
    yield opened
    opened.close()


def test_a_conversation_with_ctrl_c_in_the_middle_of_an_answer(terminal: Terminal, persona_home: Path) -> None:
    terminal.wait_for("pip - a parrot")
    terminal.wait_for("you> ")
    terminal.type("hello\r")
    terminal.wait_for("24 tokens · ")
    terminal.wait_for("you> ")
    terminal.type("/set max_tokens=7000\r")
    terminal.wait_for("max_tokens = 7000 (this session)")
    terminal.wait_for("you> ")
    terminal.type("/set temperature=0\r")
    terminal.wait_for("temperature = 0.0 (this session)")
    terminal.wait_for("you> ")
    terminal.type("talk\r")
    terminal.wait_for("talk\r\n")
    terminal.wait_for_more(200)
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("you> ")
    terminal.type("\x1b[A")  # the arrow brings back the last line
    terminal.wait_for("talk")
    terminal.type("\x15/exit\r")
    assert terminal.ended() == 0
    history = persona_home / "chat_history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_gives_up_the_line_and_ctrl_d_leaves(terminal: Terminal, persona_home: Path) -> None:
    terminal.wait_for("you> ")
    terminal.wait_for_sleep()
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.wait_for_sleep()
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("you> ")
    terminal.wait_for_sleep()
    terminal.type("\x04")
    assert terminal.ended() == 0
    assert "Traceback" not in terminal.shown


def test_a_pasted_text_of_several_lines_is_one_message(terminal: Terminal, synapse) -> None:
    terminal.wait_for("you> ")
    terminal.wait_for_sleep()
    terminal.type("\x1b[200~first line\rsecond line\x1b[201~")
    terminal.wait_for("second line")
    terminal.type("\r")
    terminal.wait_for("24 tokens · ")
    terminal.wait_for("you> ")
    terminal.type("/exit\r")
    assert terminal.ended() == 0
    [row] = json.loads(synapse("conversation", "list", "--json").out)["items"]
    said = json.loads(synapse("conversation", "show", row["id"], "--json").out)["said"]
    assert [message["content"] for message in said if message["role"] == "user"] == ["first line\nsecond line"]


def test_an_answer_is_recorded_before_the_next_message_is_typed(terminal: Terminal, synapse) -> None:
    terminal.wait_for("you> ")
    terminal.type("hello\r")
    terminal.wait_for("24 tokens · ")
    terminal.wait_for("you> ")
    assert "persona.turn.finished" in synapse("events", "tail").out
    terminal.type("/exit\r")
    assert terminal.ended() == 0
