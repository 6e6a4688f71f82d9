"""What is published while a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from synapse.callosum.message import Message
from synapse.callosum.publish.publishing import connect


class Heard(list[Message]):
    """The messages, in the order they were published."""

    def about(self, *topics: str) -> list[dict[str, Any]]:
        """The payloads of these topics."""
        return [message.payload.model_dump() for message in self if message.topic in topics]

    @property
    def topics(self) -> list[str]:
        return [message.topic for message in self]


@contextmanager
def listening() -> Iterator[Heard]:
    """Hear what this process publishes, in any thread."""
    heard = Heard()
    disconnect = connect(heard.append)
    try:
        yield heard
    finally:
        disconnect()
