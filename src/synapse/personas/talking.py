"""One turn of a conversation, kept while it is said.

A message is written before the model is asked, together with an empty answer that holds the next place, and with the
conversation when it is the first one. The answer's text is written about once a second while it grows and once more at
its end, with the reason why it ended. So a process that dies loses at most the last second, and two chats in one
conversation never take the same place: the second one comes after the first.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from synapse.commands import Context
from synapse.errors import Conflict, InvalidInput, TooLarge
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas.chat import ChatEvent, TextDelta, TurnFinished, TurnOptions, prepare_turn, run_turn
from synapse.personas.conversations import messages_of
from synapse.personas.entities import MAX_MESSAGE_LENGTH, Conversation, Message, Persona
from synapse.store import Store, open_store

SECONDS_BETWEEN_SAVES = 1.0


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The model is about to answer; `left_out` older messages did not fit its context.

    The message is kept in the conversation, unless there is none.
    """

    conversation_id: str | None
    left_out: int


def as_chat(messages: Sequence[Message]) -> list[ChatMessage]:
    """Stored messages as the model takes them."""
    return [ChatMessage(message.role, message.content) for message in messages]


async def say(
    context: Context, persona: Persona, conversation: Conversation, text: str, options: TurnOptions | None = None
) -> AsyncGenerator[TurnStarted | ChatEvent]:
    """Say something in a conversation and stream the answer, keeping both.

    Closing the iterator, or cancelling the task that reads it, stops the answer; what there is of it is kept with the
    reason `cancelled`.

    Raises:
        InvalidInput, TooLarge: the text is empty, too long or does not fit the context; it is not kept.
        Conflict: other chats keep writing in the same conversation.
        what `prepare_turn` and `run_turn` raise.
    """
    _check(text)
    store = await context.get(open_store)
    places = await _take_places(store, conversation, text)
    kept = _KeptAnswer(store, places.answer)
    try:
        options = replace(options or TurnOptions(), conversation=conversation.id)
        turn = await prepare_turn(context, persona, as_chat([*places.earlier, places.question]), options)
        yield TurnStarted(conversation.id, turn.left_out)
        async with aclosing(run_turn(turn)) as events:
            async for event in events:
                if isinstance(event, TurnFinished):
                    await kept.finish(event.reason)
                else:
                    await kept.add(event)
                yield event
    except InvalidInput:
        if not kept.text:
            await kept.forget(places)
        raise
    except Exception:
        await kept.finish("error")
        raise
    finally:
        await kept.finish("cancelled")


async def say_unkept(
    context: Context, persona: Persona, said: list[ChatMessage], text: str, options: TurnOptions | None = None
) -> AsyncGenerator[TurnStarted | ChatEvent]:
    """Say something to who is not in the store, such as a bare model: only `said` remembers it, and grows by it.

    Raises:
        as `say`.
    """
    _check(text)
    question = ChatMessage("user", text)
    turn = await prepare_turn(context, persona, [*said, question], options)
    yield TurnStarted(None, turn.left_out)
    pieces: list[str] = []
    try:
        async with aclosing(run_turn(turn)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                yield event
    finally:
        if pieces:
            said += [question, ChatMessage("assistant", "".join(pieces))]


def _check(text: str) -> None:
    if not text.strip():
        raise InvalidInput("the message is empty", hint='give one with -m "…", or type it')
    if len(text) > MAX_MESSAGE_LENGTH:
        raise TooLarge(f"the message is {len(text)} characters long; the limit is {MAX_MESSAGE_LENGTH}")


@dataclass(frozen=True, slots=True)
class _Places:
    """What was said before, the message and its still empty answer; and the conversation, when they begin it."""

    earlier: list[Message]
    question: Message
    answer: Message
    begun: Conversation | None


async def _take_places(store: Store, conversation: Conversation, text: str) -> _Places:
    """Write the message and the place of its answer, and before them the conversation if it is not there yet."""

    async def work() -> _Places:
        earlier = await messages_of(store, conversation.id)
        begun = None
        if earlier or await store.find(Conversation, id=conversation.id) is not None:
            await store.update(Conversation, conversation.id, {"title": conversation.title})  # it was used just now
        else:
            begun = await store.create(conversation)
        position = earlier[-1].position + 1 if earlier else 0
        question = Message(conversation_id=conversation.id, position=position, role="user", content=text)
        answer = Message(conversation_id=conversation.id, position=position + 1, role="assistant", content="")
        return _Places(earlier, await store.create(question), await store.create(answer), begun)

    try:
        return await store.atomically(work)
    except Conflict as error:
        raise Conflict(
            "other chats keep writing in this conversation at the same moment",
            hint="try again, or start a conversation of its own by leaving out --continue and --conversation",
        ) from error


class _KeptAnswer:
    """The answer's row in the store, brought up to date now and then."""

    def __init__(self, store: Store, message: Message) -> None:
        self._store = store
        self._message = message
        self._pieces: list[str] = []
        self._saved_at = time.monotonic()
        self._finished = False

    @property
    def text(self) -> str:
        """What was said so far; a model can say NUL, which PostgreSQL cannot keep in a text."""
        return "".join(self._pieces).replace("\0", "\N{REPLACEMENT CHARACTER}")

    async def add(self, delta: TextDelta) -> None:
        self._pieces.append(delta.text)
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            await self._store.update(Message, self._message.id, {"content": self.text})
            self._saved_at = time.monotonic()

    async def finish(self, reason: str) -> None:
        """Write the whole text and the reason, the first time this is called."""
        if not self._finished:
            self._finished = True
            await self._store.update(Message, self._message.id, {"content": self.text, "finish_reason": reason})

    async def forget(self, places: _Places) -> None:
        """Delete the answer and the message it was to, which was refused, and the conversation they began."""
        self._finished = True
        async with self._store.transaction():
            await self._store.delete(Message, places.question.id)
            await self._store.delete(Message, places.answer.id)
            if places.begun is not None:
                await self._store.delete(Conversation, places.begun.id)
