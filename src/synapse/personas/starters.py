"""The three personas to start with: one for each starter layer, and a question that shows how they differ."""

from __future__ import annotations

from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from synapse.commands import Context
from synapse.genome.events import publish_genome
from synapse.genome.opening import open_layers
from synapse.personas.entities import Persona
from synapse.personas.events import publish_persona
from synapse.personas.layers import make_genome
from synapse.personas.sampling import SamplingChoices, SamplingDefaults
from synapse.store import open_store


class StarterPersona(BaseModel):
    """A persona as `genome/starters/personas.json` suggests it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    layer: str = Field(description="name of the starter layer it wears")
    description: str = ""
    system_prompt: str = ""
    sampling: SamplingChoices = Field(default_factory=SamplingChoices)


class Starters(BaseModel):
    """The contents of `genome/starters/personas.json`."""

    question: str
    personas: list[StarterPersona] = Field(min_length=1)


def load_starters() -> Starters:
    """The starter personas that come with Synapse."""
    file = resources.files("synapse.genome") / "starters" / "personas.json"
    return Starters.model_validate_json(file.read_text(encoding="utf-8"))


async def ensure_starter(context: Context, starter: StarterPersona) -> Persona:
    """The starter persona, made with its layer if there is none of its name yet."""
    store = await context.get(open_store)
    existing = await store.find(Persona, name=starter.name)
    if existing is not None:
        return existing
    persona = Persona(
        name=starter.name,
        description=starter.description,
        system_prompt=starter.system_prompt,
        base_model=context.settings.default_model,
        sampling=SamplingDefaults().with_overrides(starter.sampling.chosen_sampling()),
    )
    registry = await context.get(open_layers)
    await registry.add(f"starter:{starter.layer}", name=starter.layer, base_model=persona.base_model)
    async with store.transaction():
        genome = await make_genome(context, persona, [(starter.layer, 1.0)])
        persona = await store.create(persona.model_copy(update={"genome_id": genome.id}))
    publish_genome("genome.created", genome)
    publish_persona("persona.created", persona)
    return persona
