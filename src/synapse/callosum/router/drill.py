"""A drill for cores of routers: what a core does in it can be compared, and sent from one process to another."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NoReturn, cast

from synapse.callosum.message import LANES, Message
from synapse.callosum.router.state import Core, Hooks
from synapse.errors import InternalError

Transcript = tuple[int, ...]
STEPS = 60


@dataclass(frozen=True, slots=True)
class _Number:
    """All that a core sees of a message, and how it is told apart."""

    lane: int
    number: int


def drill(core: Core) -> Transcript:
    """Put numbered messages into an empty core and take them out, until it is empty again. No hook is called."""
    random = Random(core.room)  # noqa: S311 (the same every time)
    transcript: list[int] = []
    number = 0
    for _ in range(STEPS):
        number += 1
        lane = random.randrange(LANES)
        if random.random() < 0.6:
            batch = [_Number((lane + step // 3) % LANES, number + step) for step in range(random.choice((1, 2, 5, 30)))]
            number += len(batch)
            transcript.append(core.put_many(cast("list[Message]", batch)))
        elif core.depths()[lane] < core.room:
            core.put(cast("Message", _Number(lane, number)))
        transcript += _numbers(core.take_many(random.choice((0, 1, 7, 20))))
        transcript += sorted(_numbers(core.heads()))
        transcript += core.depths()
        if any(core.depths()):
            transcript += _numbers([core.take()])
    transcript += _numbers(core.take_many(LANES * core.room))
    return (*transcript, core.chores)


def examples() -> list[tuple[int, int, Hooks]]:
    """Calls that open cores of several sizes."""
    hooks = Hooks(_refused, _nothing, _nothing, _given)
    return [(capacity, share, hooks) for capacity in (1, 2, 3, 16, 300) for share in (1, 2, 8)]


def _numbers(messages: list[Message]) -> list[int]:
    return [message.number for message in messages]


def _refused(message: Message) -> NoReturn:
    raise InternalError(f"a message of lane {message.lane} was refused in the drill")


def _nothing() -> NoReturn:
    raise InternalError("a hook was called in the drill")


def _given(message: Message) -> Message:
    raise InternalError(f"a message of lane {message.lane} came with a chore in the drill")
