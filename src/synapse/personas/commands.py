"""Commands for personas; those for their conversations are registered with them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from synapse.commands import Argument, Context, LocalPath, command, looks_like_path
from synapse.errors import Conflict, InvalidInput
from synapse.genome.entities import Genome
from synapse.genome.events import publish_genome
from synapse.genome.notation import NOTATION, parse_layers
from synapse.genome.views import GenomeInfo, find_genome, genome_info
from synapse.personas import conversation_commands, entities
from synapse.personas.entities import MAX_PROMPT_LENGTH, Conversation, Persona
from synapse.personas.events import publish_persona
from synapse.personas.layers import genome_text, make_genome
from synapse.personas.lookup import find_persona
from synapse.personas.sampling import SamplingChoices, SamplingDefaults
from synapse.store import Store, open_store

__all__ = ["conversation_commands"]

Name = Annotated[str, Argument(), Field(description="name of the persona")]


class PersonaChoices(BaseModel):
    """What can be said about a persona when it is made or edited."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    description: str | None = Field(None, max_length=500, description="who it is, in a sentence")
    system_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_LENGTH, description="what it is told before it answers"
    )
    model: Annotated[str | None, LocalPath(looks_like_path)] = Field(
        None,
        min_length=1,
        max_length=256,
        validation_alias=AliasChoices("model", "base_model"),
        description="name of the base model",
    )
    genome: str | None = Field(None, description="name or id of the genome it wears")
    layers: str | None = Field(None, description=f"its layers: {NOTATION}")


class CreatePersona(SamplingChoices, PersonaChoices):
    """A new persona."""

    name: Annotated[entities.PersonaName, Argument()] = Field(description="lower case letters, digits, . _ -")


class EditPersona(SamplingChoices, PersonaChoices):
    """What to change; what is left out stays."""

    name: Name
    rename: entities.PersonaName | None = Field(None, description="its new name")


class PersonaName(BaseModel):
    """Which persona."""

    name: Name


class DeletePersona(PersonaName):
    """Which persona, and whether what it said goes too."""

    with_conversations: bool = Field(False, description="delete its conversations as well")


class SetGenome(PersonaName):
    """Which genome a persona shall wear."""

    genome: Annotated[str, Argument()] = Field(description="name or id of the genome; `none` takes it off")


class ListPersonas(BaseModel):
    """Nothing to choose."""


class PersonaInfo(BaseModel):
    """A persona."""

    name: str
    description: str
    base_model: str
    layers: str = Field(description="its layers with their weights")
    genome: str | None = Field(description="name or id of its genome")
    system_prompt: str
    sampling: SamplingDefaults
    conversations: int
    id: str
    created_at: datetime
    updated_at: datetime


class PersonaRow(BaseModel):
    """A persona in a list."""

    name: str
    base_model: str
    layers: str
    conversations: int
    description: str


class PersonaList(BaseModel):
    """All personas, by name."""

    items: list[PersonaRow]


class PersonaGenome(BaseModel):
    """What a persona wears."""

    persona: str
    genome: GenomeInfo | None


@command("persona/create", permission="manage")
async def create_persona(params: CreatePersona, context: Context) -> PersonaInfo:
    """Make a persona.

    Without --model it uses the default model. --layers makes a genome for it; --genome takes one that exists.
    """
    store = await context.get(open_store)
    model = params.model or context.settings.default_model
    await _check_model(context, model)
    persona = Persona(
        name=params.name,
        description=params.description or "",
        system_prompt=params.system_prompt or "",
        base_model=model,
        sampling=SamplingDefaults().with_overrides(params.chosen_sampling()),
    )

    async def work() -> Persona:
        return await store.create(persona.model_copy(update=await _genome_change(context, persona, params)))

    created = await store.atomically(work)
    await _publish_own_genome(store, created, params)
    publish_persona("persona.created", created)
    return await _info(store, created)


@command("persona/list", permission="read")
async def list_personas(params: ListPersonas, context: Context) -> PersonaList:
    """List the personas."""
    store = await context.get(open_store)
    rows = []
    for persona in await store.list(Persona, order_by="name"):
        rows.append(
            PersonaRow(
                name=persona.name,
                base_model=persona.base_model,
                layers=await genome_text(store, persona.genome_id),
                conversations=await store.count(Conversation, {"persona_id": persona.id}),
                description=persona.description,
            )
        )
    return PersonaList(items=rows)


@command("persona/show", permission="read")
async def show_persona(params: PersonaName, context: Context) -> PersonaInfo:
    """Show a persona."""
    store = await context.get(open_store)
    return await _info(store, await find_persona(store, params.name))


@command("persona/edit", permission="manage")
async def edit_persona(params: EditPersona, context: Context) -> PersonaInfo:
    """Change a persona; what is left out stays as it is."""
    store = await context.get(open_store)
    if params.model is not None:
        await _check_model(context, params.model)

    async def work() -> tuple[Persona, tuple[str, ...]]:
        persona = await find_persona(store, params.name)
        changes: dict[str, Any] = {
            "name": params.rename,
            "description": params.description,
            "system_prompt": params.system_prompt,
            "base_model": params.model,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        sampling = params.chosen_sampling()
        if sampling:
            changes["sampling"] = persona.sampling.with_overrides(sampling)
        changes |= await _genome_change(context, persona.model_copy(update=changes), params)
        if not changes:
            raise InvalidInput("nothing to change was given", hint="`synapse persona edit --help` lists what can be")
        await _check_fits(store, persona.model_copy(update=changes))
        return await store.update(Persona, persona.id, changes), tuple(changes)

    edited, changes = await store.atomically(work)
    await _publish_own_genome(store, edited, params)
    publish_persona("persona.changed", edited, changes)
    return await _info(store, edited)


@command("persona/delete", permission="manage")
async def delete_persona(params: DeletePersona, context: Context) -> PersonaInfo:
    """Delete a persona and the genome that was made for it alone; its layers stay."""
    store = await context.get(open_store)

    async def work() -> tuple[Persona, PersonaInfo, list[Genome]]:
        persona = await find_persona(store, params.name)
        info = await _info(store, persona)
        if info.conversations and not params.with_conversations:
            noun = "a conversation" if info.conversations == 1 else f"{info.conversations} conversations"
            raise Conflict(f"{persona.name} has had {noun}", hint="--with-conversations deletes them as well")
        await store.delete(Persona, persona.id)
        return persona, info, await _delete_own_genomes(store, persona)

    deleted, info, genomes = await store.atomically(work)
    publish_persona("persona.deleted", deleted)
    for genome in genomes:
        publish_genome("genome.deleted", genome)
    return info


@command("persona/set-genome", permission="manage")
async def set_genome(params: SetGenome, context: Context) -> PersonaGenome:
    """Give a persona another genome, or none."""
    store = await context.get(open_store)

    async def work() -> Persona:
        persona = await find_persona(store, params.name)
        genome = None if params.genome == "none" else await find_genome(store, params.genome)
        changes = {"genome_id": genome.id if genome else None}
        await _check_fits(store, persona.model_copy(update=changes))
        return await store.update(Persona, persona.id, changes)

    changed = await store.atomically(work)
    publish_persona("persona.changed", changed, ("genome_id",))
    return await _wears(context, changed)


@command("persona/get-genome", permission="read")
async def get_genome(params: PersonaName, context: Context) -> PersonaGenome:
    """Show the genome that a persona wears."""
    store = await context.get(open_store)
    persona = await find_persona(store, params.name)
    return await _wears(context, persona)


async def _wears(context: Context, persona: Persona) -> PersonaGenome:
    genome = None
    if persona.genome_id:
        store = await context.get(open_store)
        genome = await genome_info(store, await find_genome(store, persona.genome_id))
    return PersonaGenome(persona=persona.name, genome=genome)


async def _check_model(context: Context, name: str) -> None:
    """A persona's model must be one that is here, except the default one, which the first chat fetches."""
    if name != context.settings.default_model:
        from synapse.models.library import open_library  # noqa: PLC0415 (a list of personas needs none)

        (await context.get(open_library)).resolve(name)


async def _genome_change(context: Context, persona: Persona, params: PersonaChoices) -> dict[str, str]:
    """The change of `genome_id` that --genome or --layers asks for; a genome is made for --layers."""
    store = await context.get(open_store)
    if params.genome is not None and params.layers is not None:
        raise InvalidInput("--genome and --layers exclude each other", hint="give one of them")
    if params.genome is not None:
        genome = await find_genome(store, params.genome)
        await _check_fits(store, persona.model_copy(update={"genome_id": genome.id}))
        return {"genome_id": genome.id}
    if params.layers is not None:
        return {"genome_id": (await make_genome(context, persona, parse_layers(params.layers))).id}
    return {}


async def _check_fits(store: Store, persona: Persona) -> None:
    if persona.genome_id is None:
        return
    genome = await store.get(Genome, persona.genome_id)
    if genome.base_model != persona.base_model:
        raise InvalidInput(
            f"the genome is made for {genome.base_model}, and {persona.name} uses {persona.base_model}",
            hint="choose another genome, or set --model and --layers together",
        )


async def _publish_own_genome(store: Store, persona: Persona, params: PersonaChoices) -> None:
    """Publish the genome that was made for --layers."""
    if params.layers is not None and persona.genome_id is not None:
        publish_genome("genome.created", await store.get(Genome, persona.genome_id))


async def _delete_own_genomes(store: Store, persona: Persona) -> list[Genome]:
    """Delete the nameless genomes that were made for a persona and that nobody else wears; returns them."""
    deleted = []
    for genome in await store.list(Genome, {"persona_id": persona.id}):
        if genome.name is None and await store.find(Persona, genome_id=genome.id) is None:
            deleted.append(await store.delete(Genome, genome.id))
    return deleted


async def _info(store: Store, persona: Persona) -> PersonaInfo:
    genome = await store.get(Genome, persona.genome_id) if persona.genome_id else None
    return PersonaInfo(
        name=persona.name,
        description=persona.description,
        base_model=persona.base_model,
        layers=await genome_text(store, persona.genome_id),
        genome=(genome.name or genome.id) if genome else None,
        system_prompt=persona.system_prompt,
        sampling=persona.sampling,
        conversations=await store.count(Conversation, {"persona_id": persona.id}),
        id=persona.id,
        created_at=persona.created_at,
        updated_at=persona.updated_at,
    )
