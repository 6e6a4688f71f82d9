"""The models on this machine: pulled once, checked, and found again by name.

Each model is a folder with its files and `model.json`, the record of what they are. Work in progress lies in `.partial`
beside them and is renamed into place when it is complete, the record last; so what has a record is whole.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError, field_validator

from synapse.commands import Context, Progress
from synapse.commands.context import no_progress
from synapse.errors import Conflict, NotFound, SynapseError, Unavailable
from synapse.models.errors import ModelFileCorrupt
from synapse.models.gguf_file import open_model_file
from synapse.models.manifest import (
    MANIFESTS,
    HubFile,
    LocalFile,
    Manifest,
    ManifestFile,
    Source,
    check_model_name,
    name_of,
    parse_source,
)
from synapse.models.sources import fetch
from synapse.models.transfer import Cancelled, DiskFull, Transfer, check_file, disk_errors, sha256_of

RECORD = "model.json"
SECONDS_BETWEEN_TRIES = 0.2


class ModelNotFound(NotFound):
    """There is no model of that name here."""

    code = "model_not_found"


class FileRecord(BaseModel):
    """One file of a model: its name in the model's folder, its sha256 and its size in bytes."""

    name: str
    sha256: str
    size: int = Field(ge=0)

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError("the name of a file in the model's folder is expected")
        return name


class Record(BaseModel):
    """What `model.json` holds."""

    name: str
    description: str
    licence: str
    source: str
    files: list[FileRecord] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """A model that is here, whole.

    Attributes:
        folder: where its files are; each is `folder / record.name`.
    """

    name: str
    description: str
    licence: str
    source: str
    folder: Path
    files: tuple[FileRecord, ...]

    @property
    def path(self) -> Path:
        """Its GGUF file."""
        return self.folder / self.files[0].name

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


class ModelLibrary:
    """The models in one folder. Any number of processes may use the same folder.

    Args:
        folder: where the models are.
        progress: told how far a pull is, unless the pull names its own listener.
        manifests: the models that can be pulled by name alone.
    """

    def __init__(
        self, folder: Path, progress: Progress = no_progress, manifests: Mapping[str, Manifest] = MANIFESTS
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._manifests = manifests

    async def pull(self, source: str, progress: Progress | None = None, *, name: str | None = None) -> LibraryModel:
        """Bring a model here; nothing happens when it is here already.

        Args:
            source: a name of the manifest, ``hf:ORGANISATION/REPOSITORY/FILE.gguf``, or the path of a GGUF file.
            progress: told the bytes so far.
            name: what to call it; with a name of the manifest, the file must be the one that the manifest describes.

        Raises:
            ModelNotFound: `source` is none of these.
            NotFound: the source has no such file.
            Unavailable: the source cannot be reached; the hint says what to do offline.
            DiskFull: there is no room. What was written is removed.
            Conflict: another model has that name.
            ModelFileCorrupt: what arrived is not what it should be.
            UnsupportedModel: no engine here can run it.
        """
        manifest = self._wanted(source, name)
        transfer = Transfer(f"pulling {manifest.name}", progress or self._progress)
        work = asyncio.get_running_loop().run_in_executor(None, self._pull, manifest, transfer)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            transfer.stop()
            await asyncio.wait([work])
            raise

    def list(self) -> tuple[LibraryModel, ...]:
        """The models that are here, by name.

        Raises:
            ModelFileCorrupt: a record cannot be read.
        """
        names = sorted(path.parent.name for path in self._folder.glob(f"*/{RECORD}"))
        return tuple(model for model in map(self._find, names) if model is not None)

    def available(self) -> tuple[Manifest, ...]:
        """The models of the manifest that are not here, by name."""
        return tuple(m for _, m in sorted(self._manifests.items()) if self._find(m.name) is None)

    def show(self, name: str) -> LibraryModel:
        """The model of that name.

        Raises:
            ModelNotFound: it is not here.
        """
        model = self._find(check_model_name(name))
        if model is None:
            raise ModelNotFound(f"there is no model {name!r} here", hint=self._how_to_get(name))
        return model

    def remove(self, name: str) -> LibraryModel:
        """Delete the model of that name, and say what it was.

        Raises:
            ModelNotFound: it is not here.
        """
        check_model_name(name)
        with self._lock(name, None):
            model = self.show(name)
            grave = self._partial(name) / "removed"
            shutil.rmtree(grave.parent, ignore_errors=True)
            with disk_errors(self._folder):
                grave.parent.mkdir(parents=True)
                (model.folder / RECORD).replace(grave.parent / RECORD)
                model.folder.replace(grave)
                shutil.rmtree(grave.parent)
        return model

    def resolve(self, name_or_path: str) -> Path:
        """The GGUF file of a model that is here, or the path itself when it is that of a file.

        Raises:
            ModelNotFound: it is neither.
        """
        try:
            return self.show(name_or_path).path
        except SynapseError as error:
            path = Path(name_or_path).expanduser()
            if path.is_file():
                return path.absolute()
            if isinstance(error, ModelFileCorrupt):
                raise
            raise ModelNotFound(
                f"there is no model {name_or_path[:200]!r} here", hint=self._how_to_get(name_or_path)
            ) from None

    def _how_to_get(self, name: str) -> str:
        if name in self._manifests:
            return f"pull it: synapse model pull {name}"
        return (
            "pull it: `synapse model pull hf:ORGANISATION/REPOSITORY/FILE.gguf` or `synapse model pull /path/to/FILE.gguf`;"
            f" by name alone there {'is' if len(self._manifests) == 1 else 'are'} {', '.join(sorted(self._manifests))}"
        )

    def _wanted(self, source: str, name: str | None) -> Manifest:
        """What a pull has to end with. Unknown sha256 and size are left open: "" and -1."""
        if name is not None:
            check_model_name(name)
        if source in self._manifests:
            if name not in (None, source):
                raise Conflict(f"the model {source} cannot be called {name}", hint="pull it without --name")
            return self._manifests[source]
        place = parse_source(source)
        if place is None:
            raise ModelNotFound(f"no model {source[:200]!r} is known", hint=self._how_to_get(source))
        name = name or check_model_name(name_of(place))
        if name in self._manifests:
            known = self._manifests[name]
            file = known.files[0]
            return Manifest(
                name, known.description, known.licence, (ManifestFile(file.name, file.sha256, file.size, (place,)),)
            )
        filename = place.path.name if isinstance(place, LocalFile) else Path(place.filename).name
        return Manifest(name, "", "", (ManifestFile(filename, "", -1, (place,)),))

    def _pull(self, manifest: Manifest, transfer: Transfer) -> LibraryModel:
        with self._lock(manifest.name, transfer):
            present = self._find(manifest.name)
            if present is not None:
                return self._same(present, manifest, transfer)
            work = self._partial(manifest.name)
            with disk_errors(self._folder):
                try:
                    work.mkdir(parents=True, exist_ok=True)
                    model = self._install(manifest, work, transfer)
                    shutil.rmtree(work)
                except OSError, DiskFull:
                    shutil.rmtree(work, ignore_errors=True)
                    raise
            return model

    def _install(self, manifest: Manifest, work: Path, transfer: Transfer) -> LibraryModel:
        target, records, source = self._folder / manifest.name, [], ""
        for file in manifest.files:
            path, place = _fetch_checked(manifest, file, work, transfer)
            source = source or str(place)
            size = path.stat().st_size
            records.append(FileRecord(name=file.name, sha256=file.sha256 or sha256_of(path, transfer), size=size))
            opened = open_model_file(path)
            description = manifest.description or opened.config.name
            licence = manifest.licence or str(opened.metadata.get("general.license", "unknown"))
            target.mkdir(exist_ok=True)
            path.replace(target / file.name)
        record = Record(
            name=manifest.name, description=description[:200], licence=licence[:100], source=source, files=records
        )
        draft = work / RECORD
        with draft.open("w", encoding="utf-8") as out:
            out.write(record.model_dump_json(indent=2))
            out.flush()
            os.fsync(out.fileno())
        draft.replace(target / RECORD)
        transfer.report(sum(r.size for r in records), sum(r.size for r in records))
        return _model(record, target)
