from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from synapse.commands import Context
from synapse.engines import ContextOverflow
from synapse.errors import InvalidInput, NotFound, TooLarge
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas import talking
from synapse.personas.chat import TextDelta, TurnFinished, TurnOptions, prepare_turn
from synapse.personas.conversations import conversation_of, latest_conversation, messages_of, new_conversation
from synapse.personas.entities import MAX_MESSAGE_LENGTH, Conversation, Message, Persona
from synapse.personas.talking import TurnStarted, say
from synapse.store import Store


@pytest.fixture
async def conversation(store: Store, persona: Persona) -> Conversation:
    return await store.create(new_conversation(persona, "first words"))


def spoken(messages: list[Message]) -> list[tuple[int, str, str | None]]:
    return [(message.position, message.role, message.finish_reason) for message in messages]


async def test_what_is_said_and_answered_is_kept(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    events = [event async for event in say(context, persona, conversation, "hello")]
    assert events[0] == TurnStarted(conversation.id, 0)
    assert isinstance(events[-1], TurnFinished)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    kept = await messages_of(store, conversation.id)
    assert spoken(kept) == [(0, "user", None), (1, "assistant", "length")]
    assert [message.content for message in kept] == ["hello", text]


async def test_the_next_turn_sees_the_earlier_ones(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    ends = []
    for text in ("hello", "hello again"):
        events = [event async for event in say(context, persona, conversation, text)]
        ends.append(events[-1])
    assert ends[1].prompt_tokens > ends[0].prompt_tokens + ends[0].completion_tokens
    assert [message.position for message in await messages_of(store, conversation.id)] == [0, 1, 2, 3]


async def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    events = say(context, persona, conversation, "hello", TurnOptions(sampling={"max_tokens": 900}))
    text = ""
    async for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            if len(text) > 10:
                break
    await events.aclose()
    kept = await messages_of(store, conversation.id)
    assert spoken(kept) == [(0, "user", None), (1, "assistant", "cancelled")]
    assert kept[1].content == text


async def test_a_cancelled_task_keeps_its_answer_too(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for event in say(context, persona, conversation, "hello", TurnOptions(sampling={"max_tokens": 900})):
            if isinstance(event, TextDelta):
                started.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await messages_of(store, conversation.id))[1].finish_reason == "cancelled"


async def test_an_answer_is_written_while_it_grows(
    context: Context,
    store: Store,
    persona: Persona,
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(talking, "SECONDS_BETWEEN_SAVES", 0.0)
    text = ""
    async for event in say(context, persona, conversation, "hello"):
        if isinstance(event, TurnStarted):
            assert spoken(await messages_of(store, conversation.id)) == [(0, "user", None), (1, "assistant", None)]
        elif isinstance(event, TextDelta):
            text += event.text
            assert (await messages_of(store, conversation.id))[1].content == text


DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from synapse.commands import Context
from synapse.config import load_settings
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas import talking
from synapse.personas.chat import TextDelta
from synapse.personas.entities import Conversation, Persona
from synapse.personas.talking import TurnStarted, say
from synapse.store import open_store

async def main():
    talking.SECONDS_BETWEEN_SAVES = 0.0
    async with Context(load_settings()) as context:
        store = await context.get(open_store)
        conversation = await store.get(Conversation, sys.argv[1])
        persona = await store.get(Persona, conversation.persona_id)
        said = 0
        async for event in talking.say(context, persona, conversation, "my last words"):
            said += isinstance(event, TextDelta)
            if said == 2:
                os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_process_that_is_killed_in_the_middle_of_an_answer_loses_nothing(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    home = context.settings.home
    env = {**os.environ, "SYNAPSE_HOME": str(home), "SYNAPSE_DEFAULT_MODEL": "tiny"}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", DIE, conversation.id], env=env, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    kept = await messages_of(store, conversation.id)
    assert spoken(kept) == [(0, "user", None), (1, "assistant", None)]
    assert kept[0].content == "my last words"
    assert kept[1].content
    events = [event async for event in say(context, persona, conversation, "are you there?")]
    assert isinstance(events[-1], TurnFinished)
    assert [message.position for message in await messages_of(store, conversation.id)] == [0, 1, 2, 3]


async def test_two_chats_in_one_conversation_take_turns(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    async def speak(text: str) -> None:
        async for _ in say(context, persona, conversation, text):
            pass

    await asyncio.gather(*(speak(f"message {number}") for number in range(4)))
    kept = await messages_of(store, conversation.id)
    assert [message.position for message in kept] == list(range(8))
    assert [message.role for message in kept] == ["user", "assistant"] * 4
    assert {message.content for message in kept[::2]} == {f"message {number}" for number in range(4)}
    assert all(message.finish_reason == "length" for message in kept[1::2])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InvalidInput),
        (" \n", InvalidInput),
        ("x" * (MAX_MESSAGE_LENGTH + 1), TooLarge),
        ("x" * 5000, ContextOverflow),
    ],
)
async def test_a_message_that_is_refused_is_not_kept_nor_the_conversation_it_would_have_begun(
    context: Context, store: Store, persona: Persona, text: str, error: type[Exception]
) -> None:
    conversation = new_conversation(persona, "first words")
    with pytest.raises(error):
        async for _ in say(context, persona, conversation, text):
            pass
    assert (await store.list(Message), await store.list(Conversation)) == ([], [])
    async for _ in say(context, persona, conversation, "hello"):
        pass
    with pytest.raises(error):
        async for _ in say(context, persona, conversation, text):
            pass
    assert len(await messages_of(store, conversation.id)) == 2


async def test_a_message_whose_answer_fails_stays(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    broken = persona.model_copy(update={"base_model": "elsewhere"})
    with pytest.raises(NotFound):
        async for _ in say(context, broken, conversation, "hello"):
            pass
    assert spoken(await messages_of(store, conversation.id)) == [(0, "user", None), (1, "assistant", "error")]


async def test_an_answer_may_hold_a_nul_character(
    context: Context, store: Store, persona: Persona, conversation: Conversation
) -> None:
    turn = await prepare_turn(context, persona, [ChatMessage("user", "hello")])
    [nul] = turn.client.front.tokenizer.encode("\0")
    async for _ in say(context, persona, conversation, "hello", TurnOptions(logit_bias={nul: 1000.0})):
        pass
    assert (await messages_of(store, conversation.id))[1].content == "\N{REPLACEMENT CHARACTER}" * 24


async def test_a_conversation_is_named_after_its_first_words(store: Store, persona: Persona) -> None:
    assert (await store.create(new_conversation(persona, "  one\n two "))).title == "one two"
    title = (await store.create(new_conversation(persona, "word " * 100))).title
    assert (len(title), title[-1]) == (60, "…")


async def test_the_latest_conversation_is_the_one_that_was_used_last(
    context: Context, store: Store, persona: Persona
) -> None:
    with pytest.raises(NotFound, match="no conversation yet"):
        await latest_conversation(store, persona)
    first = await store.create(new_conversation(persona, "first"))
    second = await store.create(new_conversation(persona, "second"))
    assert (await latest_conversation(store, persona)).id == second.id
    async for _ in say(context, persona, first, "again"):
        pass
    assert (await latest_conversation(store, persona)).id == first.id


async def test_a_conversation_belongs_to_its_persona(
    store: Store, persona: Persona, conversation: Conversation
) -> None:
    assert (await conversation_of(store, persona, conversation.id)).id == conversation.id
    other = await store.create(Persona(name="other", base_model="tiny"))
    with pytest.raises(NotFound, match="not one of other's"):
        await conversation_of(store, other, conversation.id)
    with pytest.raises(NotFound):
        await conversation_of(store, persona, "no-such-id")


def test_the_place_of_a_message_is_unique(tmp_path: Path) -> None:
    from synapse.store.entity import spec_of

    assert spec_of(Message).unique == (("conversation_id", "position"),)
