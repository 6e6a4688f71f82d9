"""Commands for API keys."""

from __future__ import annotations

import difflib
import shlex
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field

from synapse.callosum.publish.publishing import publish
from synapse.commands import Argument, Context, command
from synapse.errors import Conflict, NotFound
from synapse.server.events import KeyNews
from synapse.server.keys import ApiKey, KeyPermission, new_key
from synapse.store import Store, now, open_store


class CreateKey(BaseModel):
    """What a new key is for."""

    name: Annotated[str, Argument()] = Field(description="what the key is for", min_length=1, max_length=64)
    permissions: list[KeyPermission] = Field(
        default=["chat"], min_length=1, description="chat: models and completions; read, manage: commands"
    )


class NewKey(BaseModel):
    """A key that was just made: the only time its secret is shown."""

    name: str
    permissions: list[KeyPermission]
    key: str = Field(description="the secret; it cannot be shown again")


class ListKeys(BaseModel):
    """Nothing to choose."""


class KeyRow(BaseModel):
    """A key, without its secret."""

    name: str
    prefix: str
    permissions: list[KeyPermission]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class KeyList(BaseModel):
    """All keys, revoked ones included."""

    items: list[KeyRow]


class OneKey(BaseModel):
    """Which key."""

    name: Annotated[str, Argument()] = Field(description="name of the key")


class RemoveKey(OneKey):
    """Which key, and whether the server may be open to this machine without one."""

    force: bool = Field(False, description="remove the last key too: then everybody on this machine may ask")


class LastKey(Conflict):
    """Without this key the server would ask for none."""

    code = "last_key"


@command("key/create", permission="manage")
async def create_key(params: CreateKey, context: Context) -> NewKey:
    """Make an API key and show it, once.

    From the first key on the server answers only requests that carry one, and may be bound to other addresses than
    loopback.
    """
    store = await context.get(open_store)
    if await store.find(ApiKey, name=params.name) is not None:
        raise Conflict(f"there is a key called {params.name!r} already", hint="choose another name, or remove that one")
    secret, key = new_key(params.name, params.permissions)
    await store.create(key)
    publish("key.created", KeyNews(name=key.name, permissions=tuple(key.permissions)))
    return NewKey(name=key.name, permissions=key.permissions, key=secret)


@command("key/list", permission="read")
async def list_keys(params: ListKeys, context: Context) -> KeyList:
    """List the API keys, without their secrets."""
    store = await context.get(open_store)
    keys = await store.list(ApiKey, order_by="name")
    return KeyList(items=[_row(key) for key in keys])


@command("key/revoke", permission="manage")
async def revoke_key(params: OneKey, context: Context) -> KeyRow:
    """Make an API key useless, at once and for good.

    The server goes on asking for a key after the last one is revoked; `key remove` forgets one.
    """
    store = await context.get(open_store)
    key = await _find(store, params.name)
    if key.revoked_at is None:
        key = await store.update(ApiKey, key.id, {"revoked_at": now()})
        publish("key.revoked", KeyNews(name=key.name, permissions=tuple(key.permissions)))
    return _row(key)


@command("key/remove", permission="manage")
async def remove_key(params: RemoveKey, context: Context) -> KeyRow:
    """Delete an API key, as if it had never been made; its name is free again.

    Without any key, revoked ones included, the server answers whoever asks from this machine, so the last one is only
    removed with --force.
    """
    store = await context.get(open_store)

    async def work() -> ApiKey:
        found = await _find(store, params.name)
        if await store.count(ApiKey) == 1 and not params.force:
            raise LastKey(
                f"{found.name} is the last key: without any, the server lets every program on this machine in, for"
                " everything",
                hint=f"`synapse key revoke {shlex.quote(found.name)}` makes it useless and keeps the server closed;"
                " --force removes it all the same",
            )
        return await store.delete(ApiKey, found.id)

    key = await store.atomically(work)
    publish("key.removed", KeyNews(name=key.name, permissions=tuple(key.permissions)))
    return _row(key)


async def _find(store: Store, name: str) -> ApiKey:
    key = await store.find(ApiKey, name=name)
    if key is None:
        near = difflib.get_close_matches(name, [each.name for each in await store.list(ApiKey)], n=1)
        hint = f"did you mean {near[0]}?" if near else "`synapse key list` shows the keys"
        raise NotFound(f"there is no key called {name!r}", hint=hint)
    return key


def _row(key: ApiKey) -> KeyRow:
    return KeyRow(**key.model_dump(include=set(KeyRow.model_fields)))
