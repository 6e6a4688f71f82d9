"""The keys of a JSON text while it is being written, so that no object gets one twice."""

from __future__ import annotations

import json
from typing import Self

_QUOTE, _BACKSLASH, _OPEN, _CLOSE = b'"\\{}'
_OPEN_LIST, _CLOSE_LIST, _COMMA, _COLON = b"[],:"


class Keys:
    """Where in a JSON text its end is, and which keys the objects that are open there have.

    Context-free grammars cannot forbid what was said before; this looks at the bytes beside the grammar, which has made
    sure that they are JSON. Immutable: `after` returns the next state.
    """

    __slots__ = ("_at_key", "_escaped", "_in_text", "_open", "_partial")

    def __init__(self) -> None:
        self._open: tuple[frozenset[str] | None, ...] = ()  # the keys of an object, None for a list
        self._at_key = False  # the next string, or the one that is open, is a key
        self._in_text = False
        self._escaped = False
        self._partial = b""  # the key so far, as it is spelled

    def _copy(self) -> Self:
        copy = type(self)()
        copy._open, copy._at_key, copy._in_text = self._open, self._at_key, self._in_text
        copy._escaped, copy._partial = self._escaped, self._partial
        return copy

    def after(self, text: bytes) -> Self | None:
        """The state after more of the text, or None when that gives an object a key which it has already."""
        if self._in_text and not self._at_key and not self._escaped and b'"' not in text and b"\\" not in text:
            return self
        state = self._copy()
        return state if all(state._take(byte) for byte in text) else None

    def _take(self, byte: int) -> bool:
        if self._in_text:
            return self._take_in_text(byte)
        if byte == _QUOTE:
            self._in_text, self._partial = True, b""
        elif byte in (_OPEN, _OPEN_LIST):
            self._open += (frozenset() if byte == _OPEN else None,)
            self._at_key = byte == _OPEN
        elif byte in (_CLOSE, _CLOSE_LIST):
            self._open, self._at_key = self._open[:-1], False
        elif byte == _COMMA:
            self._at_key = bool(self._open) and self._open[-1] is not None
        elif byte == _COLON:
            self._at_key = False
        return True

    def _take_in_text(self, byte: int) -> bool:
        if self._escaped:
            self._escaped = False
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self._in_text = False
            return not self._at_key or self._note(_read(self._partial))
        if self._at_key:
            self._partial += bytes((byte,))
        return True

    def _note(self, key: str) -> bool:
        keys = self._open[-1] or frozenset()
        self._open = (*self._open[:-1], keys | {key})
        return key not in keys

    def endings(self) -> list[bytes]:
        """What must not follow now: the ways in which the key that is open would end as one that is there already."""
        if not (self._in_text and self._at_key and self._open) or self._escaped:
            return []
        begun = _read(self._partial)
        taken = (key for key in self._open[-1] or () if key.startswith(begun))
        return [json.dumps(key[len(begun) :], ensure_ascii=False)[1:].encode(errors="replace") for key in taken]


def _read(spelled: bytes) -> str:
    """The key that is spelled so: two spellings of a character are one."""
    try:
        return str(json.loads(b'"' + spelled + b'"', strict=False))
    except ValueError:  # a character or an escape is not whole yet
        return spelled.decode(errors="replace")
