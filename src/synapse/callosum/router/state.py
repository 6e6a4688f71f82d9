"""What the core of a router is: queues without anything that waits. There are two, one in Python and one in Mojo.

Lanes are numbered as in `synapse.callosum.message`: 0 to 9 are the priorities of the internal tract, 10 to 19 those of
the external one. The next message is the first of the highest lane that has any, except that, while messages of both
tracts wait, an internal one is next after every `share` external ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from synapse.callosum.message import Message


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a core calls when there is more to do than to move a message."""

    refused: Callable[[Message], NoReturn]
    """A message cannot be put; raises why."""
    nothing: Callable[[], NoReturn]
    """There is nothing to take; raises that."""
    arrived: Callable[[], object]
    """Called after a put if `waiting` was not 0; it is 0 then."""
    given: Callable[[Message], Message]
    """Called with what was taken while `chores` is not 0; what it returns is given instead."""


class Core(Protocol):
    """Queues for each lane. What is put in is taken out once.

    Attributes:
        room: messages that a lane may hold now.
        chores: counted up by a put of a message with a deadline, and else as its owner likes.
        waiting: not 0 when the next put is to be told of; it is 0 after that.
    """

    room: int
    chores: int
    waiting: int

    def put(self, message: Message, /) -> None:
        """Queue a message, or let a hook say why not."""
        ...

    def take(self) -> Message:
        """The next message, or what a hook makes of it."""
        ...

    def put_many(self, messages: list[Message], /) -> int:
        """Queue messages up to the first that is refused, and return how many. Calls no hook."""
        ...

    def take_many(self, limit: int, /) -> list[Message]:
        """The next messages, at most so many. Calls no hook."""
        ...

    def heads(self) -> list[Message]:
        """The first message of each lane that has any."""
        ...

    def depths(self) -> list[int]:
        """Messages in each of the 20 lanes."""
        ...
