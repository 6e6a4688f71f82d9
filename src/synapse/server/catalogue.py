"""What can be asked for as `model`: the personas, the base models that are here, and for vectors the encoders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from synapse.callosum.kept import open_kept
from synapse.commands import Context
from synapse.daemon.host import open_models
from synapse.models.library import open_library
from synapse.models.manifest import ModelKind
from synapse.personas.entities import Persona
from synapse.personas.sampling import SamplingDefaults
from synapse.server.http.errors import UnknownModel
from synapse.store import open_store

BARE = SamplingDefaults(temperature=1.0, top_p=1.0)
"""OpenAI's defaults, for a base model that nobody has given a character."""


@dataclass(frozen=True, slots=True)
class Served:
    """Something that answers under a name. A base model is a persona without a prompt, layers or habits."""

    name: str
    persona: Persona
    is_persona: bool

    def as_wire(self, backends: Mapping[str, str]) -> dict[str, Any]:
        """OpenAI's model object, with which engine answers, `native` or `reference`: None while it is not open."""
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.persona.created_at.timestamp()),
            "owned_by": "persona" if self.is_persona else "base-model",
            "backend": backends.get(self.persona.base_model),
        }


async def list_served(context: Context) -> list[Served]:
    """All personas, then the base models whose names no persona has taken."""
    store = await context.get(open_store)
    personas = [Served(each.name, each, True) for each in await store.list(Persona, order_by="name")]
    taken = {each.name for each in personas}
    return [*personas, *(_base(name) for name in await _pulled(context, "chat") if name not in taken)]


async def list_encoders(context: Context) -> list[str]:
    """The names of the encoders that are here."""
    return await _pulled(context, "encoder")


async def list_as_wire(context: Context) -> list[dict[str, Any]]:
    """OpenAI's model objects of all that is served."""
    encoders = [encoder_as_wire(name) for name in await list_encoders(context)]
    backends = await _backends(context)
    return [*(each.as_wire(backends) for each in await list_served(context)), *encoders]


async def show_as_wire(context: Context, name: str) -> dict[str, Any]:
    """OpenAI's model object of a persona, a base model or an encoder.

    Raises:
        UnknownModel: there is none of this name.
    """
    try:
        return (await find_served(context, name)).as_wire(await _backends(context))
    except UnknownModel:
        if name in await list_encoders(context):
            return encoder_as_wire(name)
        raise


def encoder_as_wire(name: str) -> dict[str, Any]:
    """OpenAI's model object of an encoder."""
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "encoder"}


async def find_served(context: Context, name: str) -> Served:
    """The persona of this name, or else the base model.

    Only names are looked up, never paths: what comes over HTTP must not choose files.

    Raises:
        UnknownModel: there is neither.
    """

    async def read() -> Served:
        persona = await (await context.get(open_store)).find(Persona, name=name)
        if persona is not None:
            return Served(name, persona, True)
        if name in await _pulled(context, "chat"):
            return _base(name)
        raise UnknownModel(f"there is no model {name[:200]!r}", hint="GET /v1/models lists them", param="model")

    return await (await context.get(open_kept)).get(("served", name), read)


async def _backends(context: Context) -> dict[str, str]:
    """Which engine answers for each model that is open."""
    clients = (await context.get(open_models)).clients()
    return {client.front.name: (await client.stats()).answering.backend for client in clients}


async def _pulled(context: Context, kind: ModelKind) -> list[str]:
    library = await context.get(open_library)
    return [each.name for each in await asyncio.to_thread(library.list) if each.kind == kind]


def _base(name: str) -> Served:
    return Served(name, Persona(name="base", base_model=name, sampling=BARE), False)
