"""Identifiers that sort by time: UUID version 7 (RFC 9562, section 5.7)."""

from __future__ import annotations

import os
import secrets
import time
from itertools import count
from uuid import UUID

from synapse.errors import InvalidInput

_FIXED = 7 << 76 | 2 << 62
"""The version and variant bits."""
_LOW = (1 << 62) - 1
_BIT_STEPS = 1 << 48


_numbers = count()
_until = 0
"""When, in nanoseconds since 1970, the numbers get a new time."""


def _restart(now: int) -> None:
    global _numbers, _until  # noqa: PLW0603 - one clock for the process
    millisecond = now // 1_000_000
    tail = secrets.randbits(73)  # and one zero: counting within a millisecond never reaches the fixed bits
    first = (millisecond % _BIT_STEPS) << 80 | _FIXED | (tail >> 61) << 64 | tail & _LOW >> 1
    _numbers = count(first)
    _until = (millisecond + 1) * 1_000_000


def _after_fork() -> None:
    global _until  # noqa: PLW0603 - a child must not go on with its parent's numbers
    _until = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def new_id() -> int:
    """A new identifier of 128 bits: 48 of milliseconds since 1970, 6 fixed ones, 74 that begin at random and count up.

    Those of one process sort by the millisecond they were made in, and mostly within it.
    """
    now = time.time_ns()
    if now >= _until:
        _restart(now)
    return next(_numbers)


def id_text(number: int) -> str:
    """The usual 36 characters of an identifier."""
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def id_number(text: str) -> int:
    """The number of an identifier written as 36 characters.

    Raises:
        InvalidInput: it is not a UUID.
    """
    try:
        number = UUID(text).int
    except (ValueError, AttributeError, TypeError):
        number = 0
    if not number:
        raise InvalidInput(f"an id is a UUID like {id_text(new_id())}, not {str(text)[:60]!r}")
    return number
