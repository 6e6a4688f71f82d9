"""What is published about personas, the genomes made for them, and their turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from support.heard import Heard, listening
from synapse.callosum.message import Tract, from_wire, to_wire
from synapse.commands import Context
from synapse.engines import open_engines
from synapse.errors import InvalidInput, NotFound
from synapse.personas.chat import TextDelta, TurnOptions
from synapse.personas.commands import (
    CreatePersona,
    DeletePersona,
    EditPersona,
    SetGenome,
    create_persona,
    delete_persona,
    edit_persona,
    set_genome,
)
from synapse.personas.conversations import new_conversation
from synapse.personas.entities import Conversation, Persona
from synapse.personas.events import FinishedTurn
from synapse.personas.talking import say
from synapse.store import Duplicate, Store

LONG = TurnOptions(sampling={"max_tokens": 900})


@pytest.fixture
def heard() -> Iterator[Heard]:
    with listening() as heard:
        yield heard


@pytest.fixture
async def conversation(store: Store, persona: Persona) -> Conversation:
    return await store.create(new_conversation(persona, "first words"))


async def test_a_persona_and_the_genome_made_for_it_are_told_when_they_come_change_and_go(
    context: Context, heard: Heard
) -> None:
    await create_persona(CreatePersona(name="captain", layers="first"), context)
    await edit_persona(EditPersona(name="captain", description="a sailor", layers="second", temperature=0.3), context)
    await set_genome(SetGenome(name="captain", genome="none"), context)
    await delete_persona(DeletePersona(name="captain"), context)
    assert heard.topics == [
        *("genome.created", "persona.created", "genome.created", "persona.changed", "persona.changed"),
        *("persona.deleted", "genome.deleted", "genome.deleted"),
    ]
    assert {payload["name"] for payload in heard.about("persona.created", "persona.changed")} == {"captain"}
    assert [set(payload["changed"]) for payload in heard.about("persona.changed")] == [
        {"description", "sampling", "genome_id"},
        {"genome_id"},
    ]
    assert all(message.tract is Tract.INTERNAL for message in heard)


async def test_what_was_refused_is_not_told(context: Context, persona: Persona, heard: Heard) -> None:
    with pytest.raises(Duplicate):
        await create_persona(CreatePersona(name="pip", layers="first"), context)
    with pytest.raises(InvalidInput):
        await edit_persona(EditPersona(name="pip"), context)
    assert heard == []


async def test_a_turn_is_told_once_with_its_counts_and_without_what_was_said(
    context: Context, persona: Persona, conversation: Conversation, heard: Heard
) -> None:
    text = ""
    async for event in say(context, persona, conversation, "a secret question"):
        text += event.text if isinstance(event, TextDelta) else ""
    (message,) = [message for message in heard if message.topic.startswith("persona.turn.")]
    assert (message.topic, message.tract) == ("persona.turn.finished", Tract.EXTERNAL)
    payload = message.payload
    assert isinstance(payload, FinishedTurn)
    assert (payload.persona, payload.model, payload.conversation) == ("pip", "tiny", conversation.id)
    assert (payload.reason, payload.tokens) == ("length", 24)
    assert payload.prompt_tokens > 0
    assert payload.seconds > 0
    written = to_wire(message)
    assert b"secret" not in written
    assert text
    assert text.encode() not in written
    assert from_wire(written).payload == payload


async def test_no_message_is_published_for_a_token(
    context: Context, persona: Persona, conversation: Conversation, heard: Heard
) -> None:
    async for _ in say(context, persona, conversation, "hello"):
        pass
    assert sorted(heard.topics) == ["engine.opened", "layer.loaded", "persona.turn.finished"]
    (turn,) = [message.payload for message in heard if isinstance(message.payload, FinishedTurn)]
    assert turn.tokens == 24


async def test_a_turn_that_is_closed_or_cancelled_is_told_as_cancelled(
    context: Context, persona: Persona, conversation: Conversation, heard: Heard
) -> None:
    async with aclosing(say(context, persona, conversation, "hello", LONG)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    started = asyncio.Event()

    async def read() -> None:
        async for event in say(context, persona, conversation, "hello", LONG):
            if isinstance(event, TextDelta):
                started.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    turns = [topic for topic in heard.topics if topic.startswith("persona.turn.")]
    assert turns == ["persona.turn.cancelled"] * 2


async def test_a_turn_that_cannot_be_prepared_is_told_as_failed(
    context: Context, store: Store, persona: Persona, conversation: Conversation, heard: Heard
) -> None:
    gone = persona.model_copy(update={"base_model": "nowhere"})
    with pytest.raises(NotFound):
        async for _ in say(context, gone, conversation, "hello"):
            pass
    (failed,) = heard.about("persona.turn.failed")
    assert failed["error"] == "model_not_found"
    assert failed["persona"] == "pip"
    assert [topic for topic in heard.topics if topic.startswith("persona.turn.")] == ["persona.turn.failed"]


async def test_a_turn_whose_engine_fails_is_told_as_failed_and_so_is_the_engine(
    context: Context,
    persona: Persona,
    conversation: Conversation,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = await context.get(open_engines)
    await host.get(persona.base_model)
    (runner,) = host.loaded.values()

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(runner.engine._transformer, "forward", fail)
    with pytest.raises(Exception, match="no room"):
        async for _ in say(context, persona, conversation, "hello"):
            pass
    assert heard.about("persona.turn.failed")[0]["error"] == "internal_error"
    assert heard.about("engine.failed") == [{"error": "MemoryError", "answers": 1}]
