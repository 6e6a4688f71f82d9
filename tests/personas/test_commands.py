from __future__ import annotations

import pytest
from pydantic import ValidationError

from synapse.commands import Context, load_group
from synapse.errors import Conflict, InvalidInput, NotFound
from synapse.genome.commands import CreateGenome, create_genome
from synapse.genome.entities import Genome
from synapse.personas.commands import (
    CreatePersona,
    DeletePersona,
    EditPersona,
    ListPersonas,
    PersonaName,
    SetGenome,
    create_persona,
    delete_persona,
    edit_persona,
    get_genome,
    list_personas,
    set_genome,
    show_persona,
)
from synapse.personas.conversation_commands import (
    ConversationId,
    ListConversations,
    delete_conversation,
    list_conversations,
    show_conversation,
)
from synapse.personas.conversations import new_conversation
from synapse.personas.entities import Message, Persona
from synapse.personas.talking import say
from synapse.store import Duplicate, Store


def test_the_groups_have_their_commands() -> None:
    assert [command.verb for command in load_group("persona")] == [
        *("create", "delete", "edit", "get-genome", "list", "set-genome", "show")
    ]
    assert [command.verb for command in load_group("conversation")] == ["delete", "list", "show"]


async def test_a_persona_is_made_shown_and_listed(context: Context) -> None:
    made = await create_persona(
        CreatePersona(
            name="captain", description="a sailor", system_prompt="Ahoy.", temperature=0.2, layers="first:0.5,second"
        ),
        context,
    )
    assert (made.base_model, made.layers, made.sampling.temperature) == ("tiny", "first:0.5,second", 0.2)
    assert made.sampling.top_p == 0.95
    assert await show_persona(PersonaName(name="captain"), context) == made
    [row] = (await list_personas(ListPersonas(), context)).items
    assert (row.name, row.layers, row.conversations, row.description) == ("captain", "first:0.5,second", 0, "a sailor")


async def test_a_name_is_taken_once(context: Context, persona: Persona) -> None:
    with pytest.raises(Duplicate, match="pip"):
        await create_persona(CreatePersona(name="pip"), context)


@pytest.mark.parametrize("name", ["", "Captain", "-x", "a b", "x" * 65, "a/b", "ä"])
def test_a_name_is_lower_case_and_short(name: str) -> None:
    with pytest.raises(ValidationError):
        CreatePersona(name=name)


async def test_an_unknown_persona_is_told_with_its_nearest_names(context: Context, persona: Persona) -> None:
    with pytest.raises(NotFound, match="no persona called 'pipp'") as caught:
        await show_persona(PersonaName(name="pipp"), context)
    assert caught.value.code == "persona_not_found"
    assert caught.value.hint == "did you mean pip? `synapse persona create pipp` makes it"
    with pytest.raises(NotFound) as caught:
        await show_persona(PersonaName(name="zzz"), context)
    assert caught.value.hint == "`synapse persona create zzz` makes it"


async def test_a_model_that_is_not_here_is_refused(context: Context, persona: Persona) -> None:
    with pytest.raises(NotFound, match="no model 'elsewhere'"):
        await create_persona(CreatePersona(name="x", model="elsewhere"), context)
    with pytest.raises(NotFound, match="no model 'elsewhere'"):
        await edit_persona(EditPersona(name="pip", model="elsewhere"), context)


async def test_editing_changes_what_is_given_and_nothing_else(context: Context, persona: Persona) -> None:
    edited = await edit_persona(EditPersona(name="pip", description="small", temperature=0.1, seed=None), context)
    assert (edited.description, edited.system_prompt, edited.layers) == ("small", "You are Pip.", "first:0.5")
    assert (edited.sampling.temperature, edited.sampling.max_tokens, edited.sampling.seed) == (0.1, 24, None)
    renamed = await edit_persona(EditPersona(name="pip", rename="pop", layers="second"), context)
    assert (renamed.name, renamed.layers, renamed.id) == ("pop", "second", persona.id)
    with pytest.raises(InvalidInput, match="nothing to change"):
        await edit_persona(EditPersona(name="pop"), context)


async def test_a_genome_is_worn_by_name_or_id_and_taken_off(context: Context, persona: Persona) -> None:
    genome = await create_genome(CreateGenome(name="mix", layers="first:0.5,second:0.25"), context)
    assert (await set_genome(SetGenome(name="pip", genome="mix"), context)).genome == genome
    assert (await show_persona(PersonaName(name="pip"), context)).genome == "mix"
    assert (await get_genome(PersonaName(name="pip"), context)).genome == genome
    assert (await set_genome(SetGenome(name="pip", genome="none"), context)).genome is None
    assert (await get_genome(PersonaName(name="pip"), context)).genome is None
    assert (await edit_persona(EditPersona(name="pip", genome=genome.id), context)).layers == "first:0.5,second:0.25"
    with pytest.raises(NotFound):
        await set_genome(SetGenome(name="pip", genome="missing"), context)


async def test_a_genome_for_another_model_does_not_fit(context: Context, store: Store, persona: Persona) -> None:
    await store.create(Genome(name="foreign", base_model="another"))
    for attempt in (
        set_genome(SetGenome(name="pip", genome="foreign"), context),
        create_persona(CreatePersona(name="x", genome="foreign"), context),
        edit_persona(EditPersona(name="pip", genome="foreign"), context),
    ):
        with pytest.raises(InvalidInput, match="the genome is made for another"):
            await attempt


async def test_layers_and_genome_exclude_each_other(context: Context) -> None:
    with pytest.raises(InvalidInput, match="exclude each other"):
        await create_persona(CreatePersona(name="x", genome="a", layers="first"), context)


async def test_a_persona_that_cannot_be_made_leaves_no_genome_behind(
    context: Context, store: Store, persona: Persona
) -> None:
    before = await store.count(Genome)
    with pytest.raises(Duplicate):
        await create_persona(CreatePersona(name="pip", layers="first,second"), context)
    with pytest.raises(NotFound, match="no layer 'third'"):
        await create_persona(CreatePersona(name="x", layers="first,third"), context)
    assert await store.count(Genome) == before


async def test_deleting_takes_the_persona_and_the_genome_made_for_it(
    context: Context, store: Store, persona: Persona
) -> None:
    await create_genome(CreateGenome(name="kept", layers="first"), context)
    assert (await delete_persona(DeletePersona(name="pip"), context)).name == "pip"
    assert await store.count(Persona) == 0
    assert [genome.name for genome in await store.list(Genome)] == ["kept"]


async def test_conversations_are_only_deleted_when_asked(context: Context, store: Store, persona: Persona) -> None:
    conversation = await store.create(new_conversation(persona, "hello"))
    async for _ in say(context, persona, conversation, "hello"):
        pass
    with pytest.raises(Conflict, match="pip has had a conversation"):
        await delete_persona(DeletePersona(name="pip"), context)
    await delete_persona(DeletePersona(name="pip", with_conversations=True), context)
    assert await store.count(Message) == 0


async def test_conversations_are_listed_shown_and_deleted(context: Context, store: Store, persona: Persona) -> None:
    other = await store.create(Persona(name="other", base_model="tiny"))
    await store.create(new_conversation(other, "elsewhere"))
    conversation = await store.create(new_conversation(persona, "hello"))
    async for _ in say(context, persona, conversation, "hello"):
        pass
    rows = (await list_conversations(ListConversations(), context)).items
    assert [(row.persona, row.title, row.messages) for row in rows] == [("pip", "hello", 2), ("other", "elsewhere", 0)]
    assert [r.persona for r in (await list_conversations(ListConversations(persona="other"), context)).items] == [
        "other"
    ]
    shown = await show_conversation(ConversationId(id=conversation.id), context)
    assert [(said.role, said.finish_reason) for said in shown.said] == [("user", None), ("assistant", "length")]
    await delete_conversation(ConversationId(id=conversation.id), context)
    with pytest.raises(NotFound):
        await show_conversation(ConversationId(id=conversation.id), context)
    with pytest.raises(NotFound):
        await list_conversations(ListConversations(persona="nobody"), context)


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("Captain Hook", "captain-hook"), ("Élodie", "elodie"), ("-x-", "x"), ("a/b:c", "a-b-c"), ("X" * 80, "x" * 64)],
)
def test_a_name_that_cannot_be_is_refused_in_words_with_one_that_can(typed: str, suggested: str) -> None:
    with pytest.raises(ValidationError, match=f"how about {suggested}\\?") as refused:
        CreatePersona(name=typed)
    assert "[a-z" not in str(refused.value)
    assert CreatePersona(name=suggested).name == suggested


def test_the_base_model_may_be_called_that_too() -> None:
    assert CreatePersona.model_validate({"name": "x", "base_model": "tiny"}).model == "tiny"
