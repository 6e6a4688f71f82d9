"""What the shell completes beside commands and options: names of what is in this home.

Names are read with as little as possible, and what goes wrong is silent: nobody wants an error in the middle of a line.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing

from synapse.config import Settings, load_settings
from synapse.errors import SynapseError

Source = Callable[[Settings], Iterable[str]]


def _column(table: str, column: str = "name") -> Source:
    def names(settings: Settings) -> list[str]:
        path = settings.home / "synapse.db"
        if settings.database_url or not path.exists():
            return []
        with closing(sqlite3.connect(path, timeout=0.2)) as connection:
            query = f'SELECT "{column}" FROM "{table}" WHERE "{column}" IS NOT NULL ORDER BY 1'  # noqa: S608 (ours)
            return [str(row[0]) for row in connection.execute(query)]

    return names


def _models(settings: Settings) -> list[str]:
    return sorted(path.parent.name for path in (settings.home / "models").glob("*/model.json"))


def _sources(settings: Settings) -> list[str]:
    from synapse.models.manifest import MANIFESTS

    return sorted(set(MANIFESTS) - set(_models(settings)))


def _starters(settings: Settings) -> list[str]:
    from synapse.genome.sources import STARTER, starter_names

    return [f"{STARTER}{name}" for name in starter_names()]


def _collections(settings: Settings) -> list[str]:
    from synapse.store.entity import COLLECTIONS

    return sorted(COLLECTIONS)


def _personas_and_models(settings: Settings) -> list[str]:
    return [*PERSONAS(settings), *_models(settings)]


PERSONAS, LAYERS, GENOMES = _column("personas"), _column("genome_layers"), _column("genomes")

FIELDS: dict[tuple[str, str], Source] = {
    ("persona", "name"): PERSONAS,
    ("persona", "model"): _models,
    ("persona", "genome"): GENOMES,
    ("persona", "layers"): LAYERS,
    ("conversation", "persona"): PERSONAS,
    ("conversation", "id"): _column("conversations", "id"),
    ("layer", "name"): LAYERS,
    ("layer", "source"): _starters,
    ("layer", "base_model"): _models,
    ("genome", "name"): GENOMES,
    ("genome", "layers"): LAYERS,
    ("genome", "base_model"): _models,
    ("model", "name"): _models,
    ("model", "source"): _sources,
    ("key", "name"): _column("api_keys"),
    ("data", "collection"): _collections,
    ("chat", "name"): _personas_and_models,
}
"""Where the names come from that a field of a group's commands takes."""
NEW = frozenset({"create", "add"})
"""Verbs whose `name` is a new one."""


def completer(group: str, verb: str, field: str) -> Callable[[str], list[str]] | None:
    """What completes a field of a command; None where there is nothing to know."""
    source = FIELDS.get((group, field))
    if source is None or (field == "name" and verb in NEW):
        return None

    def complete(incomplete: str) -> list[str]:
        typed, comma, last = incomplete.rpartition(",") if field == "layers" else ("", "", incomplete)
        try:
            names = list(source(load_settings()))
        except (SynapseError, OSError, sqlite3.Error):
            return []
        return [f"{typed}{comma}{name}" for name in names if name.startswith(last)]

    return complete
