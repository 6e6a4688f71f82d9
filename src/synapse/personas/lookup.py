"""Finding a persona by its name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from synapse.errors import NotFound
from synapse.personas.entities import Persona
from synapse.store import Store

if TYPE_CHECKING:
    from synapse.models.library import ModelLibrary

BARE = "model"
"""The id of what is no persona of the store but a model itself."""


class PersonaNotFound(NotFound):
    """There is no persona of that name."""

    code = "persona_not_found"


async def find_persona_or_model(store: Store, library: ModelLibrary, default_model: str, name: str) -> Persona:
    """The persona called `name`, or else one that is nothing but the chat model of that name, and is not stored.

    Raises:
        PersonaNotFound: there is neither; the hint names what is nearest.
    """
    try:
        return await find_persona(store, name)
    except PersonaNotFound as error:
        models = [model.name for model in library.list() if model.kind == "chat"]
        if name == default_model or name in models:
            return bare_model(name)
        near = difflib.get_close_matches(name, models, n=1, cutoff=0.5)
        also = f"; there is a model {near[0]}" if near else ""
        raise PersonaNotFound(f"there is no persona or model called {name!r}", hint=f"{error.hint}{also}") from error


def bare_model(name: str) -> Persona:
    """A persona without a character, to talk to a model itself. It is not in the store."""
    # The name of a model can have characters that the name of a persona cannot.
    return Persona(id=BARE, name="model", base_model=name).model_copy(update={"name": name})


def is_bare_model(persona: Persona) -> bool:
    """Whether this is one of `bare_model`."""
    return persona.id == BARE


async def find_persona(store: Store, name: str) -> Persona:
    """The persona called `name`.

    Raises:
        PersonaNotFound: there is none; the hint names the nearest ones.
    """
    persona = await store.find(Persona, name=name)
    if persona is not None:
        return persona
    names = [each.name for each in await store.list(Persona, order_by="name")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    create = f"`synapse persona create {name}` makes it"
    hint = f"did you mean {' or '.join(near)}? {create}" if near else create
    raise PersonaNotFound(f"there is no persona called {name!r}", hint=hint)
