"""Recording: what this process publishes goes into the log of the home, for as long as a context lives.

Whoever starts a process does this, and connects at the same time the rooms below that know nothing of the callosum.
Nothing is opened before the first message, so a command that changes nothing opens no log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from synapse.callosum.message import Message
from synapse.callosum.publish.hotpath_news import follow_news
from synapse.callosum.publish.outbox import Deliver, Outbox
from synapse.callosum.publish.publishing import connect
from synapse.commands import Context


@asynccontextmanager
async def recording(context: Context, deliver: Deliver | None = None) -> AsyncIterator[Outbox]:
    """Record until the block is left; what is on its way then gets a few seconds to arrive.

    Neither this nor `publish` ever raises because of the log: while it is unavailable messages wait, up to
    `synapse.callosum.publish.outbox.CAPACITY` of them.

    Args:
        deliver: takes the messages instead of the log; a process with subscribers gives them to its bus.
    """

    async def append(messages: Sequence[Message]) -> None:
        from synapse.callosum.log.opening import open_log  # noqa: PLC0415 (most processes of a command record nothing)

        await (await context.get(open_log)).append(messages)

    outbox = Outbox(deliver or append)
    outbox.start()
    ends = [connect(outbox.put), follow_news()]
    try:
        yield outbox
    finally:
        for end in ends:
            end()
        await outbox.close()
