"""Which messages of a log this process gives to its subscriptions itself: who reads the log passes over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from synapse.callosum.message import Message


class Ours:
    """What this process writes: some messages are given to its subscriptions at once, others when they are accepted.

    Whether those of the second kind were accepted is not known until the log has answered. What is read of them before
    that is passed over too, and comes back from `wrote` where nobody else has given it to anybody.

    Attributes:
        read: whether somebody reads the log: from then on it is remembered what was written.
    """

    def __init__(self) -> None:
        self.read = False
        self._given: set[int] = set()
        """Given at once, and not yet written."""
        self._writing: Counter[int] = Counter()
        self._passed: dict[int, Message] = {}
        """What was read while it was being written."""
        self._done: dict[int, int] = {}
        """Written and given: the look in which that came about, ascending."""
        self._look = 0

    def gave(self, message: Message) -> None:
        """It has been given here, and is to be written."""
        self._given.add(message.number)

    def wrote_given(self, messages: Iterable[Message]) -> None:
        """These, which were given here, are written, or were refused for good."""
        for message in messages:
            self._given.discard(message.number)
            self._remember(message.number)

    def writing(self, messages: Iterable[Message]) -> None:
        """These are being written; `wrote` follows, whatever happens."""
        self._writing.update(message.number for message in messages)

    def wrote(self, messages: Sequence[Message], accepted: Sequence[bool]) -> list[Message]:
        """What was accepted is given here now. Returns what is left to be given: it is in the log after all."""
        left: list[Message] = []
        for message, new in zip(messages, accepted, strict=True):
            number = message.number
            self._writing[number] -= 1
            if not self._writing[number]:
                del self._writing[number]
            passed = self._passed.pop(number, None)
            if new and passed is None:
                self._remember(number)
            elif passed is not None and not new:
                left.append(passed)
        return left

    def _remember(self, number: int) -> None:
        if self.read:
            self._done[number] = self._look

    def look(self) -> None:
        """Somebody is about to read on from where he was."""
        self._look += 1

    def passes(self, message: Message) -> bool:
        """Whether what was read is to be passed over."""
        number = message.number
        if number in self._given:
            return True
        if self._done.pop(number, None) is not None:
            return True
        if number in self._writing:
            self._passed[number] = message
            return True
        return False

    def looked(self) -> None:
        """There was nothing more to read: what was written before the look will not be read any more."""
        while self._done and self._done[first := next(iter(self._done))] < self._look:
            del self._done[first]
