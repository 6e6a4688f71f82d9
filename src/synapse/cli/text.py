"""Text made safe and readable for a terminal: control characters out, colour only where it is wanted."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from synapse.errors import InvalidInput

if TYPE_CHECKING:
    from synapse.engines import Answering


class NotText(InvalidInput):
    """Bytes that are no UTF-8 where text is taken."""

    code = "not_text"


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text without control characters (newline and tab stay).

    A model's answer, a file's metadata or a server's reply must not move the cursor, rename the window or hide
    text on somebody's screen, so no escape sequence ever gets through.
    """
    return CONTROL.sub("", text)


def wants_colour(stream: TextIO) -> bool:
    """Colour only on a terminal that can show it, and never when `NO_COLOR` is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True, slots=True)
class Style:
    """Wraps text in ANSI colours, or leaves it alone."""

    colour: bool

    def red(self, text: str) -> str:
        return self._wrap("1;31", text)

    def dim(self, text: str) -> str:
        return self._wrap("2", text)

    def bold(self, text: str) -> str:
        return self._wrap("1", text)

    def cyan(self, text: str) -> str:
        return self._wrap("36", text)

    def _wrap(self, codes: str, text: str) -> str:
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colour else text


def style_of(stream: TextIO) -> Style:
    """The style that fits this stream."""
    return Style(wants_colour(stream))


def tell(sentence: str) -> None:
    """Say something beside the answer: dimmed, on stderr."""
    print(style_of(sys.stderr).dim(printable(sentence)), file=sys.stderr, flush=True)


def tell_engine(answering: Answering, asked_for: str) -> None:
    """Say which engine answers and what helps, when it is not the native one and nobody asked for the reference."""
    if answering.backend != "native" and asked_for != "reference":
        tell(f"{answering}" + (f" ({answering.hint})" if answering.hint else ""))


def write_answer(text: str) -> None:
    """Write a piece of an answer on stdout, at once. A terminal never gets a control character from it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin(limit: int = -1) -> str:
    """The text on standard input, at most so many bytes of it.

    Raises:
        NotText: it is not UTF-8.
    """
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # a program that has put something else in its place
        return sys.stdin.read(limit)
    data: bytes = stream.read(limit)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        if limit >= 0 and len(data) >= limit and error.end >= len(data):  # cut in the middle of a character
            return data[: error.start].decode("utf-8")
        raise NotText(
            f"standard input is not UTF-8 text: byte {error.start + 1} is 0x{data[error.start]:02x}",
            hint="if it is text, convert it first: iconv -f LATIN1 -t UTF-8",
        ) from error


def left_out_notice(messages: int) -> str:
    """What a person is told when the start of a conversation no longer reaches the model."""
    noun = "message is" if messages == 1 else f"{messages} messages are"
    return f"the oldest {noun} left out: the conversation no longer fits the model's context"
