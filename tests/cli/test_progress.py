from __future__ import annotations

import io
import threading

import pytest

from synapse.cli.progress import TerminalProgress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_at_the_start_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TerminalProgress() as progress:
        for done in range(0, 1 << 20, 1 << 16):
            progress("fetching", done, 1 << 20)
        progress("fetching", 1 << 20, 1 << 20)
        progress("fetching", 1 << 20, 1 << 20)
    assert capsys.readouterr().err == "fetching: 0 B of 1.0 MiB\nfetching: 1.0 MiB of 1.0 MiB\n"


def test_work_of_unknown_length_shows_its_count(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    progress("rows", 3, None)
    progress("bytes", 1 << 20, None)
    progress("items", 1, 3)
    assert capsys.readouterr().err == "rows: 3\nbytes: 1.0 MiB\nitems: 1 of 3\n"


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalProgress(quiet=True)("rows", 3, 3)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with TerminalProgress() as progress:
        progress("file\x1b 0", 1 << 17, None)
        thread = threading.Thread(target=progress, args=("file\x1b 1", 1 << 17, 1 << 18))
        thread.start()
        thread.join()
    written = stream.getvalue()
    assert "file 1" in written
    assert "50%" in written
    assert "128 KiB of 256 KiB" in written
    assert "\x1b[?25h" in written  # the cursor is shown again
