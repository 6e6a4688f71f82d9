"""Messages that nobody could handle, of subscriptions that have no log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from synapse.callosum.ids import id_text, new_id
from synapse.callosum.log.contract import DeadLetter, Reason
from synapse.callosum.message import Message
from synapse.errors import NotFound


class Owner(Protocol):
    """A subscription or group, as dead letters see it."""

    def try_put(self, message: Message) -> bool:
        """Queue a message; whether there was room. Never where it is closed."""
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    letter: DeadLetter
    owner: Owner


class DeadLetters:
    """The newest dead letters of one process.

    Attributes:
        lost: those that had to go because there were too many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[str, _Kept] = {}
        self.lost = 0

    def add(self, owner: Owner, letter: DeadLetter) -> None:
        """Keep a letter, and let the oldest go when there are too many."""
        if len(self._kept) >= self._most:
            del self._kept[next(iter(self._kept))]
            self.lost += 1
        self._kept[letter.id] = _Kept(letter, owner)

    def newest(self, limit: int) -> list[DeadLetter]:
        """The newest ones, newest first."""
        return [kept.letter for kept in reversed(self._kept.values())][:limit]

    def has(self, letter: str) -> bool:
        """Whether this dead letter is here."""
        return letter in self._kept

    def replay(self, ids: Sequence[str] | None = None) -> int:
        """Give letters back to whom they belong (None: all), as far as there is room there. Returns how many.

        Raises:
            NotFound: there is no such dead letter; none was given back.
        """
        self._check(ids)
        given = [one for one in (list(self._kept) if ids is None else ids) if self._give_back(one)]
        return len(given)

    def drop(self, ids: Sequence[str] | None = None) -> int:
        """Forget letters (None: all). Returns how many. Raises `NotFound`."""
        self._check(ids)
        found = set(self._kept if ids is None else ids)
        for one in found:
            del self._kept[one]
        return len(found)

    def _check(self, ids: Sequence[str] | None) -> None:
        for one in ids or ():
            if one not in self._kept:
                raise NotFound(f"there is no dead letter {one}", hint="list them: an old one may have been let go")

    def _give_back(self, one: str) -> bool:
        kept = self._kept.pop(one, None)
        if kept is None:  # named twice
            return False
        if kept.owner.try_put(kept.letter.message):
            return True
        self._kept[one] = kept
        return False


def letter_of(message: Message, group: str, reason: Reason, error: str, attempts: int) -> DeadLetter:
    """A new dead letter."""
    return DeadLetter(id_text(new_id()), group, reason, error, attempts, time.time(), message)
