"""Keeping entities: create, get, find, list, update and delete, each in a transaction."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from synapse.errors import InvalidInput, NotFound
from synapse.store.database import SQLITE, WRITES, translated
from synapse.store.entity import Entity, all_kinds, label_of, now, spec_of
from synapse.store.errors import Contention, Duplicate, InUse
from synapse.store.tables import from_row, is_structure, table_of, to_row
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

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._active: ContextVar[tuple[asyncio.Task[Any] | None, AsyncConnection] | None] = ContextVar(
            "active", default=None
        )
        # SQLite has one writer at a time: waiting here is fair, waiting for its lock is not.
        self._writer = asyncio.Lock() if engine.dialect.name == SQLITE else None

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Everything this task does inside either happens as a whole or not at all. Nested ones join the outer one.

        Raises:
            Contention: at the end or on the way, when another process was faster. Nothing was written.
        """
        if self._connection() is not None:
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
        if self._connection() is not None:
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
            await self._execute(sa.insert(table_of(type(entity))).values(to_row(entity)))
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
        table = table_of(kind)
        name = known_field(kind, order_by.removeprefix("-"))
        if is_structure(kind, name):
            raise InvalidInput(f"{spec_of(kind).collection} cannot be ordered by {name}: it holds a structure")
        if offset < 0 or (limit is not None and limit < 0):
            raise InvalidInput("limit and offset must not be negative")
        descending = order_by.startswith("-")
        order = [column.desc() if descending else column.asc() for column in (table.c[name], table.c.id)]
        query = sa.select(table).where(*self._conditions(kind, where or {})).order_by(*order).offset(offset)

        async def work() -> list[E]:
            rows = (await self._execute(query if limit is None else query.limit(limit))).mappings().all()
            return [from_row(kind, dict(row)) for row in rows]

        return await self.atomically(work, writes=False)

    async def count(self, kind: type[Entity], where: Mapping[str, Any] | None = None) -> int:
        """How many entities have these values. Raises as `list`."""
        query = sa.select(sa.func.count()).select_from(table_of(kind)).where(*self._conditions(kind, where or {}))

        async def work() -> int:
            return int((await self._execute(query)).scalar_one())

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
            table = table_of(kind)
            row = {name: value for name, value in to_row(entity).items() if name not in ("id", "created_at")}
            await self._execute(sa.update(table).where(table.c.id == id).values(row))
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
            table = table_of(kind)
            await self._execute(sa.delete(table).where(table.c.id == id))
            return entity

        return await self.atomically(work)

    def _connection(self) -> AsyncConnection | None:
        """The connection of this task's transaction. A task started inside one does not share it."""
        active = self._active.get()
        return active[1] if active is not None and active[0] is asyncio.current_task() else None

    @asynccontextmanager
    async def _begin(self, *, writes: bool) -> AsyncIterator[None]:
        with translated(self._engine.url):
            async with self._writer if writes and self._writer else nullcontext(), self._engine.connect() as plain:
                connection = await plain.execution_options(**{WRITES: writes})
                async with connection.begin():
                    token = self._active.set((asyncio.current_task(), connection))
                    try:
                        yield
                    finally:
                        self._active.reset(token)

    async def _execute(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        connection = self._connection()
        assert connection is not None  # noqa: S101 (every caller runs inside `atomically`)
        with translated(self._engine.url):
            return await connection.execute(statement)

    def _conditions(self, kind: type[Entity], where: Mapping[str, Any]) -> Sequence[sa.ColumnElement[bool]]:
        columns = table_of(kind).c
        return [columns[known_field(kind, name)] == comparable(kind, name, value) for name, value in where.items()]

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
