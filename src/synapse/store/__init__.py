"""Entities in SQLite or PostgreSQL: a pydantic class describes one, its table follows from its fields."""

from synapse.store.entity import Entity, Reference, Value, entity, now
from synapse.store.errors import Contention, DatabaseTooNew, Duplicate, InUse
from synapse.store.opening import connect, open_store
from synapse.store.store import Store
from synapse.store.validation import build

__all__ = [
    "Contention",
    "DatabaseTooNew",
    "Duplicate",
    "Entity",
    "InUse",
    "Reference",
    "Store",
    "Value",
    "build",
    "connect",
    "entity",
    "now",
    "open_store",
]
