"""From tokens to text as it streams: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer. A token may end inside a character, and a stop string may cross token borders, so what
    could still become either is held back until the next tokens decide.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has been found. No text comes after that."""

    def push(self, data: bytes, *, last: bool = False) -> str:
        """Add the bytes of a token; with `last`, let go of everything held back.

        Returns:
            The text that is now certain, without any stop string. Bytes that are not UTF-8 become U+FFFD.
        """
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, last)
        # The stop string that is complete first counts, whatever the borders of the tokens are.
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = 0 if last else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
