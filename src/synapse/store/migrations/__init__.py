"""Migrations of the tables, and which there are."""

from __future__ import annotations

from synapse.store.errors import DatabaseTooNew

REVISIONS = ("0001", "0002")
"""Every migration, oldest first. Stated here so that a database which is up to date needs no Alembic to say so."""


def is_current(version: str | None) -> bool:
    """Whether a database at this version lacks no migration.

    Raises:
        DatabaseTooNew: it is none that this Synapse knows.
    """
    if version is not None and version not in REVISIONS:
        raise DatabaseTooNew(
            f"the database is at version {version}, this Synapse knows versions up to {REVISIONS[-1]}",
            hint="install the newer Synapse again, or use another database with SYNAPSE_DATABASE_URL",
        )
    return version == REVISIONS[-1]
