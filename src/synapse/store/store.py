"""Keeping entities: create, get, find, list, update and delete, each in a transaction."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from synapse.errors import InvalidInput, NotFound
from synapse.store.columns import from_row, is_structure, to_row
from synapse.store.entity import Entity, all_kinds, label_of, now, spec_of
from synapse.store.errors import Contention, Duplicate, InUse
from synapse.store.transaction import Database, Query, Transaction
from synapse.store.validation import changed, check_storable, comparable, known_field

E = TypeVar("E", bound=Entity)
T = TypeVar("T")

TRIES = 8
FIRST_PAUSE = 0.005
SHOWN_USERS = 5


class Store:
    """The entities of one database. Made by `connect`; safe to share between tasks.

    Every method is one transaction of its own, or part of the `transaction()` of the task that calls it. Writes that
    another process got in the way of are tried again, except inside `transaction()`, which cannot run its body twice.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._active: ContextVar[tuple[asyncio.Task[Any] | None, Transaction] | None] = ContextVar(
            "active", default=None
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._database.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Everything this task does inside either happens as a whole or not at all. Nested ones join the outer one.

        Raises:
            Contention: at the end or on the way, when another process was faster. Nothing was written.
        """
        if self._current() is not None:
            yield
            return
        async with self._begin(writes=True):
            yield

    async def atomically(self, work: Callable[[], Awaitable[T]], *, writes: bool = True) -> T:
        """Run `work` in a transaction, and again when another process was in the way.

        So `work` must have no effect other than on the store. Inside a `transaction()` it runs once, as part of that.

        Raises:
            Contention: others were in the way every time.
        """
        if self._current() is not None:
            return await work()
        pause = FIRST_PAUSE
        for tries_left in reversed(range(TRIES)):
            try:
                async with self._begin(writes=writes):
                    return await work()
            except (Contention, Duplicate) as error:
                # Two that insert the same unique value at once: the second try finds the first one's and can name it.
                again = isinstance(error, Contention) or (isinstance(error, Duplicate) and not error.details)
                if not again or not tries_left:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 (spreads the tries, guards nothing)
            pause *= 2
        raise AssertionError("the loop returns or raises")

    async def create(self, entity: E) -> E:
        """Keep a new entity.

        Raises:
            InvalidInput: it cannot be stored, or refers to something that does not exist.
            Duplicate: a unique value of it, or its id, exists already.
            and what its own `check` raises.
        """

        async def work() -> E:
            await self._check(entity, previous=None)
            await self._transaction().insert(type(entity), to_row(entity))
            return entity

        return await self.atomically(work)

    async def get(self, kind: type[E], id: str) -> E:  # noqa: A002 (what it is called everywhere)
        """The entity of this id.

        Raises:
            NotFound: there is none.
        """
        found = await self.find(kind, id=id)
        if found is None:
            collection = spec_of(kind).collection
            raise NotFound(f"there is no {collection} with the id {id!r:.70}", hint=f"synapse data list {collection}")
        return found

    async def find(self, kind: type[E], **equals: Any) -> E | None:
        """The first entity, by age, whose fields have these values; None if there is none."""
        found = await self.list(kind, equals, limit=1)
        return found[0] if found else None

    async def list(
        self,
        kind: type[E],
        where: Mapping[str, Any] | None = None,
        *,
        order_by: str = "created_at",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[E]:
        """Entities whose fields equal those of `where`, ordered by a field (``-name`` is descending), then by id.

        Raises:
            InvalidInput: a field is unknown or holds a structure, a value is of the wrong type, or a negative limit.
        """
        name = known_field(kind, order_by.removeprefix("-"))
        if is_structure(kind, name):
            raise InvalidInput(f"{spec_of(kind).collection} cannot be ordered by {name}: it holds a structure")
        if offset < 0 or (limit is not None and limit < 0):
            raise InvalidInput("limit and offset must not be negative")
        query = Query(self._conditions(kind, where or {}), name, order_by.startswith("-"), limit, offset)

        async def work() -> list[E]:
            return [from_row(kind, row) for row in await self._transaction().select(kind, query)]

        return await self.atomically(work, writes=False)

    async def count(self, kind: type[Entity], where: Mapping[str, Any] | None = None) -> int:
        """How many entities have these values. Raises as `list`."""
        conditions = self._conditions(kind, where or {})

        async def work() -> int:
            return await self._transaction().count(kind, conditions)

        return await self.atomically(work, writes=False)

    async def update(self, kind: type[E], id: str, changes: Mapping[str, Any]) -> E:  # noqa: A002
        """Change some fields; a structure is replaced as a whole. Returns the entity as it now is.

        Raises:
            NotFound: there is no such entity.
            InvalidInput, Duplicate: as `create`; also for a field that the store keeps.
        """

        async def work() -> E:
            previous = await self.get(kind, id)
            # Times never run backwards, even when the clock does.
            entity = changed(previous, changes).model_copy(update={"updated_at": max(now(), previous.updated_at)})
            await self._check(entity, previous)
            row = {name: value for name, value in to_row(entity).items() if name not in ("id", "created_at")}
            await self._transaction().update(kind, id, row)
            return entity

        return await self.atomically(work)

    async def delete(self, kind: type[E], id: str) -> E:  # noqa: A002
        """Delete an entity and what goes with it (references that cascade). Returns what it was.

        Raises:
            NotFound: there is no such entity.
            InUse: others refer to it; the message names them.
        """

        async def work() -> E:
            entity = await self.get(kind, id)
            await entity.before_delete(self)
            await self._check_unused(entity)
            await self._transaction().delete(kind, id)
            return entity

        return await self.atomically(work)

    def _current(self) -> Transaction | None:
        """This task's transaction. A task started inside one does not share it."""
        active = self._active.get()
        return active[1] if active is not None and active[0] is asyncio.current_task() else None

    def _transaction(self) -> Transaction:
        current = self._current()
        assert current is not None  # noqa: S101 (every caller runs inside `atomically`)
        return current

    @asynccontextmanager
    async def _begin(self, *, writes: bool) -> AsyncIterator[None]:
        async with self._database.begin(writes=writes) as transaction:
            token = self._active.set((asyncio.current_task(), transaction))
            try:
                yield
            finally:
                self._active.reset(token)

    def _conditions(self, kind: type[Entity], where: Mapping[str, Any]) -> dict[str, Any]:
        return {known_field(kind, name): comparable(kind, name, value) for name, value in where.items()}

    async def _check(self, entity: Entity, previous: Entity | None) -> None:
        """Everything that can be wrong with what is going to be written, in sentences a database does not have."""
        kind = type(entity)
        spec = spec_of(kind)
        for name in kind.model_fields:
            check_storable(kind, name, getattr(entity, name))
        for name, reference in spec.references.items():
            target = getattr(entity, name)
            if target is not None and (previous is None or getattr(previous, name) != target):
                other = next(k for k in all_kinds() if spec_of(k).collection == reference.collection)
                if await self.find(other, id=target) is None:
                    raise InvalidInput(
                        f"{spec.collection}.{name} must be the id of a {reference.collection}; there is no {target!r}",
                        hint=f"synapse data list {reference.collection}",
                        field=name,
                    )
        for group in (("id",), *spec.unique):
            values = {name: getattr(entity, name) for name in group}
            if None in values.values():
                continue  # SQL: NULL equals nothing
            twin = await self.find(kind, **values)
            if twin is not None and (previous is None or twin.id != entity.id):
                shown = ", ".join(f"{name} {value!r:.80}" for name, value in values.items())
                raise Duplicate(f"there is a {spec.collection} with the {shown} already", field=group[0], id=twin.id)
        await entity.check(self)

    async def _check_unused(self, entity: Entity) -> None:
        collection = spec_of(type(entity)).collection
        users: list[str] = []
        for kind in all_kinds():
            for name, reference in spec_of(kind).references.items():
                if reference.collection == collection and reference.on_delete == "restrict":
                    found = await self.list(kind, {name: entity.id}, limit=SHOWN_USERS)
                    users.extend(label_of(user) for user in found)
        if users:
            raise InUse(
                f"{label_of(entity)} is used by {', '.join(users)}",
                hint="change or delete those first",
                used_by=users,
            )
