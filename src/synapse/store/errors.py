"""What can be wrong with an entity or its database, beyond the kinds themselves."""

from __future__ import annotations

from synapse.errors import Conflict


class Duplicate(Conflict):
    """A value that must be unique exists already."""

    code = "already_exists"


class InUse(Conflict):
    """Something else refers to what should be deleted."""

    code = "in_use"


class Contention(Conflict):
    """Another process changed the same rows at the same time; nothing was written, and trying again can work."""

    code = "write_conflict"


class DatabaseTooNew(Conflict):
    """A newer version of Synapse has migrated the database."""

    code = "database_too_new"
