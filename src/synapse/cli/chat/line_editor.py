"""Reading what a person types: editing and history through `readline` where Python has it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from synapse.cli.text import style_of

try:
    import readline
except ImportError:  # Python can be built without it; typing then works without history
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 1000
BLOCK = '"""'
PRIVATE_FILE = 0o600


class LineEditor:
    """Asks for messages at a prompt. Three double quotes begin and end a message of several lines."""

    def __init__(self, history: Path) -> None:
        self._history = history
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if readline is not None and self._interactive:
            readline.set_history_length(HISTORY_LINES)
            # A pasted text of several lines is one message: its line ends do not send it, Enter does.
            readline.parse_and_bind("set enable-bracketed-paste on")
            with contextlib.suppress(OSError):  # none yet, or unreadable: typing works without it
                readline.read_history_file(history)

    def read(self, prompt: str) -> str:
        """One message.

        Raises:
            EOFError: Ctrl-D, or the end of the input.
            KeyboardInterrupt: Ctrl-C.
        """
        line = self._line(prompt)
        if not line.lstrip().startswith(BLOCK):
            return line
        lines = [line.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(self._line("… "))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def save(self) -> None:
        """Keep what was typed for the next time."""
        if readline is None or not self._interactive:
            return
        with contextlib.suppress(OSError):  # a full disk must not turn leaving into an error
            readline.write_history_file(self._history)
            self._history.chmod(PRIVATE_FILE)

    def _line(self, prompt: str) -> str:
        if self._interactive:
            style = style_of(sys.stdout)
            # readline counts what stands between \x01 and \x02 as having no width
            return input(f"\x01{style.bold(chr(2) + prompt + chr(1))}\x02" if style.colour else prompt)
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")
