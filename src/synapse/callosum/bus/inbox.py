"""Where the answers to a bus's requests arrive."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from pydantic import BaseModel

from synapse.callosum.ids import new_id
from synapse.callosum.message import Message
from synapse.errors import Unavailable
from synapse.evidence import Evidence


class Inbox:
    """Requests that wait for their answers, under a topic of their own.

    Attributes:
        topic: where answers go; no other bus has it.
    """

    def __init__(self) -> None:
        self.topic = f"callosum.reply.{new_id():032x}"
        self._waiting: dict[str, asyncio.Future[Message]] = {}

    def asked(self, message: Message, timeout_s: float) -> tuple[Message, asyncio.Future[Message]]:
        """The message as a request that nobody wants any more after the timeout, and its answer to come."""
        deadline = time.time() + timeout_s
        if message.deadline is not None:
            deadline = min(deadline, message.deadline)
        request = replace(message, reply_to=self.topic, deadline=deadline)
        answer = self._waiting[answer_key(request)] = asyncio.get_running_loop().create_future()
        return request, answer

    def forget(self, request: Message) -> None:
        """Nobody waits for this answer any more."""
        self._waiting.pop(answer_key(request), None)

    def take(self, answer: Message) -> None:
        """An answer has come. A second one to the same request, or one that is too late, is passed over."""
        future = self._waiting.pop(answer.dedupe_key, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def close(self) -> None:
        """No more answers will come."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the bus was closed before the answer came"))
        self._waiting.clear()


def reply_to(request: Message, payload: BaseModel, evidence: Evidence) -> Message | None:
    """The answer to a request, None where nobody asked for one."""
    if request.reply_to is None:
        return None
    return Message(
        request.reply_to,
        payload,
        request.tract,
        request.priority,
        evidence,
        request.deadline,
        request.trace,
        key=answer_key(request),
    )


def answer_key(request: Message) -> str:
    """What an answer is known by: a log accepts one of each request."""
    return f"answer:{request.id}"
