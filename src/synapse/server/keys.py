"""API keys: 256 random bits that the server itself keeps only as a digest.

A key is shown once, when it is made. The store holds its SHA-256: the secret is random and 256 bits long, so there is
nothing to guess and a deliberately slow hash, which passwords need, would only slow every request down.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Literal

from pydantic import AwareDatetime, Field

from synapse.callosum.kept import Kept, open_kept
from synapse.commands import Context
from synapse.store import Entity, Store, entity, now, open_store

KeyPermission = Literal["chat", "read", "manage"]
"""`chat`: models and completions; `read`: commands that change nothing; `manage`: every command."""

KEY_MARK = "syn-"
PREFIX_LENGTH = len(KEY_MARK) + 8
"""Characters of a key that are kept in the clear, to find and to recognise it: 48 of its 256 bits."""
USE_NOTED_EVERY = timedelta(minutes=1)


@entity("ApiKey", unique=("name",), indexes=("prefix",), private=True)
class ApiKey(Entity):
    """A key of the HTTP API, without its secret."""

    name: str = Field(description="what the key is for", min_length=1, max_length=64)
    prefix: str = Field(description="the first characters of the key")
    digest: str = Field(description="SHA-256 of the key, in hexadecimal")
    permissions: list[KeyPermission] = Field(description="what the key may do")
    revoked_at: AwareDatetime | None = Field(None, description="when it stopped working")
    last_used_at: AwareDatetime | None = Field(None, description="when it was last used, to the minute")


def new_key(name: str, permissions: Sequence[KeyPermission]) -> tuple[str, ApiKey]:
    """A fresh secret and the entity that will recognise it. The entity is not stored yet."""
    secret = KEY_MARK + secrets.token_urlsafe(32)
    key = ApiKey(
        name=name, prefix=secret[:PREFIX_LENGTH], digest=digest_of(secret), permissions=list(dict.fromkeys(permissions))
    )
    return secret, key


def digest_of(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def any_key_exists(store: Store) -> bool:
    """Whether a key was ever made, revoked ones included: revoking the last key must not open the server to all."""
    return bool(await store.list(ApiKey, limit=1))


async def find_key(store: Store, secret: str) -> ApiKey | None:
    """The key of this secret, or None when it is unknown or revoked."""
    digest = digest_of(secret)
    candidates = await store.list(ApiKey, where={"prefix": secret[:PREFIX_LENGTH]})
    found = [key for key in candidates if hmac.compare_digest(key.digest, digest)]
    return found[0] if found and found[0].revoked_at is None else None


class Keys:
    """The keys as each request asks for them: read once, and again when a key was made or revoked."""

    def __init__(self, store: Store, kept: Kept) -> None:
        self._store = store
        self._kept = kept

    async def any(self) -> bool:
        """As `any_key_exists`."""
        return await self._kept.get("any key", partial(any_key_exists, self._store))

    async def find(self, secret: str) -> ApiKey | None:
        """As `find_key`. That there is no such key is not kept."""

        async def read() -> ApiKey:
            key = await find_key(self._store, secret)
            if key is None:
                raise _NoKey
            return key

        try:
            return await self._kept.get(("key", digest_of(secret)), read)
        except _NoKey:
            return None

    async def note_use(self, key: ApiKey) -> None:
        """Remember that a key was used just now, with at most one write a minute."""
        if key.last_used_at is None or now() - key.last_used_at > USE_NOTED_EVERY:
            await self._store.update(ApiKey, key.id, {"last_used_at": now()})
            self._kept.forget(("key", key.digest))


class _NoKey(Exception):
    pass


@asynccontextmanager
async def open_keys(context: Context) -> AsyncIterator[Keys]:
    """Opener of the keys, for `Context.get`."""
    yield Keys(await context.get(open_store), await context.get(open_kept))
