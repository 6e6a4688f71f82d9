"""A persona's base model, fetched by itself when it is the default one."""

from __future__ import annotations

from collections.abc import Callable

from synapse.commands import Context, Progress, no_progress
from synapse.errors import NotFound
from synapse.models.library import open_library


async def ensure_base_model(
    context: Context, name: str, tell: Callable[[str], None] | None = None, progress: Progress = no_progress
) -> None:
    """Make sure that a base model is here. The default model is fetched, after saying so; others are not.

    Raises:
        NotFound: another model than the default one is missing; the hint says how to get it.
        Unavailable: the default model cannot be fetched.
    """
    library = await context.get(open_library)
    try:
        library.resolve(name)
    except NotFound:
        if name != context.settings.default_model:
            raise
        if tell is not None:
            tell(f"the model {name} is not here yet; fetching it once …")
        await library.pull(name, progress)
