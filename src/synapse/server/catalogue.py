"""What can be asked for as `model`: the personas, and the base models that are here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from synapse.commands import Context
from synapse.models.library import open_library
from synapse.personas.entities import Persona
from synapse.personas.sampling import SamplingDefaults
from synapse.server.errors import UnknownModel
from synapse.store import open_store

BARE = SamplingDefaults(temperature=1.0, top_p=1.0)
"""OpenAI's defaults, for a base model that nobody has given a character."""


@dataclass(frozen=True, slots=True)
class Served:
    """Something that answers under a name. A base model is a persona without a prompt, layers or habits."""

    name: str
    persona: Persona
    is_persona: bool

    def as_wire(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.persona.created_at.timestamp()),
            "owned_by": "persona" if self.is_persona else "base-model",
        }


async def list_served(context: Context) -> list[Served]:
    """All personas, then the base models whose names no persona has taken."""
    store = await context.get(open_store)
    personas = [Served(each.name, each, True) for each in await store.list(Persona, order_by="name")]
    taken = {each.name for each in personas}
    return [*personas, *(_base(name) for name in await _pulled(context) if name not in taken)]


async def find_served(context: Context, name: str) -> Served:
    """The persona of this name, or else the base model.

    Only names are looked up, never paths: what comes over HTTP must not choose files.

    Raises:
        UnknownModel: there is neither.
    """
    store = await context.get(open_store)
    persona = await store.find(Persona, name=name)
    if persona is not None:
        return Served(name, persona, True)
    if name in await _pulled(context):
        return _base(name)
    raise UnknownModel(f"there is no model {name[:200]!r}", hint="GET /v1/models lists them", param="model")


async def _pulled(context: Context) -> list[str]:
    library = await context.get(open_library)
    return [each.name for each in await asyncio.to_thread(library.list)]


def _base(name: str) -> Served:
    return Served(name, Persona(name="base", base_model=name, sampling=BARE), False)
