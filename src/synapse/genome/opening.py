"""Opening the layers of the home folder, as a resource of a context."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from synapse.commands import Context
from synapse.models.adapters.files import LAYERS_FOLDER
from synapse.store import open_store

if TYPE_CHECKING:
    from synapse.genome.registry import LayerRegistry


@asynccontextmanager
async def open_layers(context: Context) -> AsyncIterator[LayerRegistry]:
    """Opener of the layers, for `Context.get`. What only lists them does without the registry and its imports."""
    from synapse.genome.registry import LayerRegistry  # noqa: PLC0415
    from synapse.models.library import open_library  # noqa: PLC0415

    store = await context.get(open_store)
    library = await context.get(open_library)
    yield LayerRegistry(store, library, context.settings.folder(LAYERS_FOLDER), context.settings.default_model)
