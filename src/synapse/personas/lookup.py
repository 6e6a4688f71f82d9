"""Finding a persona by its name."""

from __future__ import annotations

import difflib

from synapse.errors import NotFound
from synapse.personas.entities import Persona
from synapse.store import Store


class PersonaNotFound(NotFound):
    """There is no persona of that name."""

    code = "persona_not_found"


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
