"""The layers of this home: their files by content, their descriptions in the store.

Files lie in ``layers/<sha256>/``, where the sha256 is `synapse.models.adapters.adapter.content_address`. A folder
appears there whole or not at all, and never changes. Two layers of the same content share one folder.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from synapse.commands import Progress, no_progress
from synapse.config import PRIVATE_FOLDER
from synapse.errors import Conflict, Corrupt, InvalidInput, NotFound, Overloaded, Unavailable
from synapse.genome.cards import CARD_FILE
from synapse.genome.entities import GenomeLayer, SharePermission, TraitType
from synapse.genome.events import publish_layer
from synapse.genome.sources import DOWNLOADING, LayerFiles, read_source
from synapse.models.adapters.files import (
    CONFIG_FILE,
    LAYER_FILES,
    LAYERS_FOLDER,
    WEIGHTS_FILE,
    content_address,
    read_layer_files,
)
from synapse.models.library import ModelLibrary
from synapse.store import Duplicate, Store, build

if TYPE_CHECKING:
    from synapse.models.adapters.adapter import Adapter

UNFINISHED = ".adding-"
LOCK_SECONDS = 120
ABANDONED_SECONDS = 24 * 3600
PRIVATE_FILE = 0o600
MEGABYTE = 10**6


class LayerRegistry:
    """Adds, finds, checks and removes layers. Opened by `synapse.genome.opening.open_layers`."""

    def __init__(self, store: Store, library: ModelLibrary, folder: Path, default_model: str) -> None:
        self._store = store
        self._library = library
        self._folder = folder
        self._default_model = default_model
        self._verified: dict[str, tuple[int, ...]] = {}

    async def add(
        self,
        source: str,
        *,
        name: str | None = None,
        base_model: str | None = None,
        trait_type: TraitType = TraitType.domain_expertise,
        description: str | None = None,
        tags: Iterable[str] = (),
        progress: Progress = no_progress,
    ) -> GenomeLayer:
        """Check a layer, keep its files, and describe it in the store. Adding the same again changes nothing.

        Args:
            source: a folder, ``hf:ORG/REPO[@REVISION]`` or ``starter:NAME``.
            name: by default the last part of the source.
            base_model: a model of the library; by default the settings' `default_model`.

        Raises:
            LayerRefused: the layer cannot be used, or not with this base model.
            InvalidInput: a name or tag that no layer can have.
            NotFound: there is no such source, or the base model is not pulled.
            Duplicate: another layer has the name.
            Forbidden: the hub does not give it.
            Unavailable: the hub does not answer, or there is no room on the disk.
        """
        base = base_model or self._default_model
        model_path = self._library.resolve(base)
        found = await read_source(source, self._folder, progress)
        adapter = await asyncio.to_thread(_check, found, model_path, base)
        card = found.card
        layer = build(
            GenomeLayer,
            {
                "name": suggested_name(found.name) if name is None else name,
                "trait_type": trait_type,
                "model_path": f"{LAYERS_FOLDER}/{adapter.sha256}",
                "size_mb": adapter.size_bytes / MEGABYTE,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "rslora": adapter.rslora,
                "targets": adapter.targets,
                "base_model": base,
                "sha256": adapter.sha256,
                "tags": list(tags),
                "creator": found.creator,
                "description": card.summary if description is None else description,
                "training_metrics": found.metrics,
                "share_permission": SharePermission(license=card.license),
            },
        )
        async with self._locked():
            present = await self._store.find(GenomeLayer, name=layer.name)
            if present is not None and (present.sha256, present.base_model) != (layer.sha256, layer.base_model):
                raise Duplicate(
                    f"there is another layer called {layer.name}", hint="choose another name with --name", id=present.id
                )
            await asyncio.to_thread(self._keep, adapter.sha256, found)
            if present is not None:
                return present
            await self._store.create(layer)
        publish_layer("layer.added", layer)
        return layer

    async def list(self) -> list[GenomeLayer]:
        """Every layer, by name."""
        return await self._store.list(GenomeLayer, order_by="name")

    async def find(self, name: str) -> GenomeLayer:
        """The layer of this name or id.

        Raises:
            NotFound: there is none.
        """
        found = await self._store.find(GenomeLayer, name=name) or await self._store.find(GenomeLayer, id=name)
        if found is None:
            raise NotFound(f"there is no layer {name!r:.70}", hint="`synapse layer list` shows those there are")
        return found

    def path(self, layer: GenomeLayer) -> Path:
        """The folder of a layer's files, after a look at their sizes.

        Raises:
            InvalidInput: the layer is only described in the store.
            Corrupt: files are missing or have another size than when they were added.
        """
        if layer.sha256 is None:
            raise InvalidInput(
                f"the layer {layer.name} has no files: it is only described", hint="add one with `synapse layer add`"
            )
        folder = self._folder / layer.sha256
        try:
            size = sum((folder / name).stat().st_size for name in LAYER_FILES)
        except FileNotFoundError as error:
            raise _damaged(layer, f"{error.filename} is missing") from error
        if size != round(layer.size_mb * MEGABYTE):
            raise _damaged(layer, f"its files have {size} bytes instead of {round(layer.size_mb * MEGABYTE)}")
        return folder

    async def verified_path(self, layer: GenomeLayer) -> Path:
        """As `path`, after hashing the files; again only when they were touched since.

        Raises:
            InvalidInput, Corrupt: as `path`; also when the content is not what was added.
        """
        folder = self.path(layer)
        await asyncio.to_thread(self._verify, layer, folder)
        return folder

    async def export(self, layer: GenomeLayer, target: Path) -> Path:
        """Write the layer as PEFT saved it, byte for byte, into a folder that does not exist yet or is empty.

        Raises:
            Conflict: the folder is not empty.
            Unavailable: it cannot be written.
            InvalidInput, Corrupt: as `verified_path`.
        """
        folder = await self.verified_path(layer)
        await asyncio.to_thread(_export, folder, target)
        return target

    async def remove(self, layer: GenomeLayer) -> None:
        """Forget a layer, and delete its files unless another layer has the same.

        Raises:
            InUse: genomes have it; the message names them.
        """
        async with self._locked():
            await self._store.delete(GenomeLayer, layer.id)
            if layer.sha256 is not None and await self._store.find(GenomeLayer, sha256=layer.sha256) is None:
                await asyncio.to_thread(self._discard, layer.sha256)
        publish_layer("layer.removed", layer)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """One process at a time changes the folder; what a killed one left unfinished is cleared away."""
        from filelock import AsyncFileLock, Timeout  # noqa: PLC0415 (slow to import, and reading needs no lock)

        lock = AsyncFileLock(self._folder / ".lock", timeout=LOCK_SECONDS, mode=PRIVATE_FILE)
        try:
            await lock.acquire()
        except Timeout as error:
            raise Overloaded("another program has been changing the layers for too long", hint="try again") from error
        try:
            await asyncio.to_thread(self._clear_away)
            yield
        finally:
            await lock.release()

    def _clear_away(self) -> None:
        for left in self._folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left)
        for left in self._folder.glob(f"{DOWNLOADING}*"):  # without the lock, so another process may be at it
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left)

    def _keep(self, sha256: str, found: LayerFiles) -> None:
        """Write the files beside their place, and move the folder there in one step when they are safe on disk."""
        place = self._folder / sha256
        if place.exists():
            if _address(place) == sha256:
                return
            self._discard(sha256)  # damaged since it was added: these are the right bytes
        unfinished = self._folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        files = {CONFIG_FILE: found.config, WEIGHTS_FILE: found.weights, CARD_FILE: found.readme}
        try:
            unfinished.mkdir(mode=PRIVATE_FOLDER)
            for name, data in files.items():
                if data is not None:
                    _write(unfinished / name, data)
            _sync(unfinished)
            unfinished.rename(place)
            _sync(self._folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise Unavailable(
                f"the layer cannot be written to {self._folder}: {error.strerror}",
                hint="make room there, or set SYNAPSE_HOME to another place",
            ) from error

    def _discard(self, sha256: str) -> None:
        """Delete a folder; one step takes it out of its place, so that nobody finds half of it."""
        place = self._folder / sha256
        if place.exists():
            unfinished = self._folder / f"{UNFINISHED}{secrets.token_hex(8)}"
            place.rename(unfinished)
            shutil.rmtree(unfinished)
        self._verified.pop(sha256, None)

    def _verify(self, layer: GenomeLayer, folder: Path) -> None:
        stats = [(folder / name).stat() for name in LAYER_FILES]
        state = tuple(number for stat in stats for number in (stat.st_ino, stat.st_size, stat.st_mtime_ns))
        if self._verified.get(str(layer.sha256)) != state:
            if _address(folder) != layer.sha256:
                raise _damaged(layer, "its files are not the ones that were added")
            self._verified[str(layer.sha256)] = state


def suggested_name(text: str) -> str:
    """A name a layer can have, made of the last part of its source."""
    return re.sub(r"[\s:,/\\]+", "-", text).strip("-")[:100] or "layer"


def _check(found: LayerFiles, model_path: Path, base: str) -> Adapter:
    """The checked layer. Nothing else here looks into model files, so only this loads what reads them."""
    from synapse.models.adapters.adapter import check_adapter  # noqa: PLC0415
    from synapse.models.gguf_file import open_model_file  # noqa: PLC0415

    return check_adapter(found.config, found.weights, open_model_file(model_path).config, names=[base])


def _address(folder: Path) -> str:
    return content_address(*read_layer_files(folder))


def _damaged(layer: GenomeLayer, fault: str) -> Corrupt:
    return Corrupt(f"the layer {layer.name} is damaged: {fault}", hint="remove it and add it again")


def _export(folder: Path, target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise Conflict(f"the folder {target} is not empty", hint="export into a new folder")
        for name in (*LAYER_FILES, CARD_FILE):
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)
    except OSError as error:
        raise Unavailable(f"the layer cannot be written to {target}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
