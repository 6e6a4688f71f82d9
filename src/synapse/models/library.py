"""The models on this machine: pulled once, checked, and found again by name.

A chat model is one GGUF file; an encoder is a few files, as sentence-transformers writes them. Each model is a folder
with its files and `model.json`, the record of what they are. Work in progress lies in `.partial` beside them and is
renamed into place when it is complete, the record last; so what has a record is whole.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from synapse.callosum.publish.publishing import publish
from synapse.commands import Context, Progress, no_progress
from synapse.errors import Conflict, InvalidInput, NotFound, SynapseError, Unavailable
from synapse.models.errors import ModelFileCorrupt, PreTokenizerUnsaid, UnsupportedModel
from synapse.models.events import ModelPulled, ModelRemoved
from synapse.models.manifest import (
    MANIFESTS,
    Manifest,
    check_model_name,
    name_of,
    parse_source,
)
from synapse.models.pulling.transfer import Cancelled, DiskFull, Transfer, disk_errors
from synapse.models.pulling.wanted import same_model, wanted_from
from synapse.models.record import RECORD, LibraryModel, Record

SECONDS_BETWEEN_TRIES = 0.2


class ModelNotFound(NotFound):
    """There is no model of that name here."""

    code = "model_not_found"


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

    async def pull(
        self,
        source: str,
        progress: Progress | None = None,
        *,
        name: str | None = None,
        pre_tokenizer: str | None = None,
    ) -> LibraryModel:
        """Bring a model here; when it is here already, only what is said of its pre-tokenizer is noted.

        Args:
            source: a name of the manifest; ``hf:ORGANISATION/REPOSITORY/FILE.gguf`` or the path of a GGUF file; for an
                encoder, ``hf:ORGANISATION/REPOSITORY`` or the path of a folder.
            progress: told the bytes so far.
            name: what to call it; with a name of the manifest, the files must be those that the manifest describes.
            pre_tokenizer: how its text is cut into words, for a file that does not say so.

        Raises:
            ModelNotFound: `source` is none of these.
            NotFound: the source has no such file.
            Unavailable: the source cannot be reached; the hint says what to do offline.
            DiskFull: there is no room. What was written is removed.
            Conflict: another model has that name.
            ModelFileCorrupt: what arrived is not what it should be.
            UnsupportedModel: no engine here can run it, or nobody says how its text is cut into words.
            InvalidInput: the pre-tokenizer is not known, or none for this model.
        """
        manifest = replace(self._wanted(source, name), pre_tokenizer=pre_tokenizer or "")
        if manifest.pre_tokenizer and manifest.kind != "chat":
            raise InvalidInput("only chat models have a pre-tokenizer to choose", hint="leave it out")
        transfer = Transfer(manifest.name, progress or self._progress)
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
        """Delete the model of that name, and say what it was; one whose record or file is damaged goes as well.

        Raises:
            ModelNotFound: it is not here.
        """
        check_model_name(name)
        with disk_errors(self._folder), self._lock(name, None):
            try:
                model = self.show(name)
            except ModelFileCorrupt:
                model = LibraryModel(name, "", "", "", self._folder / name, ())
            removed = self._partial(name) / "removed"
            shutil.rmtree(removed.parent, ignore_errors=True)
            removed.parent.mkdir(parents=True)
            model.folder.replace(removed)  # at once, so that nobody finds half of it
            shutil.rmtree(removed.parent)
        publish("model.removed", ModelRemoved(name=model.name, freed_bytes=model.size_bytes))
        return model

    def resolve(self, name_or_path: str) -> Path:
        """The GGUF file of a chat model that is here, or the path itself when it is that of a file.

        Raises:
            ModelNotFound: it is neither.
            UnsupportedModel: the model is an encoder.
        """
        try:
            model = self.show(name_or_path)
        except SynapseError as error:
            return self._path_instead(name_or_path, error, Path.is_file)
        if model.kind != "chat":
            raise UnsupportedModel(
                f"{model.name} is an encoder: it makes vectors of texts and cannot answer",
                hint="name a chat model; `synapse model list` shows which is which",
            )
        return model.path

    def resolve_encoder(self, name_or_path: str) -> Path:
        """The folder of an encoder that is here, or the path itself when it is that of a folder.

        Raises:
            ModelNotFound: it is neither.
            UnsupportedModel: the model is a chat model.
        """
        try:
            return self.show_encoder(name_or_path).folder
        except UnsupportedModel:
            raise
        except SynapseError as error:
            return self._path_instead(name_or_path, error, Path.is_dir)

    def show_encoder(self, name: str) -> LibraryModel:
        """The encoder of that name.

        Raises:
            ModelNotFound: it is not here.
            UnsupportedModel: the model is a chat model.
        """
        model = self.show(name)
        if model.kind != "encoder":
            raise UnsupportedModel(
                f"{model.name} is a chat model: it answers, and makes no vectors of texts",
                hint="name an encoder; `synapse model list` shows which is which",
            )
        return model

    def _path_instead(self, text: str, error: SynapseError, exists: Callable[[Path], bool]) -> Path:
        """The path that was meant by what is no model's name."""
        path = Path(text).expanduser()
        if exists(path):
            return path.absolute()
        if isinstance(error, ModelFileCorrupt):
            raise error
        raise ModelNotFound(f"there is no model {text[:200]!r} here", hint=self._how_to_get(text)) from None

    def _how_to_get(self, name: str) -> str:
        if name in self._manifests:
            return f"pull it: synapse model pull {name}"
        names = ", ".join(sorted(self._manifests))
        return (
            "pull it with `synapse model pull`: the path of a GGUF file or of an encoder's folder,"
            f" hf:ORGANISATION/REPOSITORY/FILE.gguf, hf:ORGANISATION/REPOSITORY for an encoder, or {names}"
        )

    def _wanted(self, source: str, name: str | None) -> Manifest:
        """What a pull has to end with."""
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
        return wanted_from(place, name, self._manifests.get(name))

    def _pull(self, manifest: Manifest, transfer: Transfer) -> LibraryModel:
        # Reading models takes numpy and tokenizers.
        from synapse.models.pre_tokenizers import check_known  # noqa: PLC0415
        from synapse.models.pulling.installing import install, say_pre_tokenizer  # noqa: PLC0415

        check_known(manifest.pre_tokenizer)
        started = time.perf_counter()
        with disk_errors(self._folder), self._lock(manifest.name, transfer):
            try:
                present = self._find(manifest.name)
            except ModelFileCorrupt:
                present = None  # pulling mends it
            if present is not None:
                present = same_model(present, manifest)
                if manifest.pre_tokenizer in ("", present.pre_tokenizer):
                    return present
                return say_pre_tokenizer(present, manifest.pre_tokenizer, self._partial(manifest.name))
            work = self._partial(manifest.name)
            try:
                work.mkdir(parents=True, exist_ok=True)
                model = install(manifest, work, self._folder / manifest.name, transfer)
            except BaseException as error:
                # What an unreachable source, a stopped pull or an open question leaves is where the next one begins.
                if not isinstance(error, Unavailable | Cancelled | PreTokenizerUnsaid) or isinstance(error, DiskFull):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work)
            publish("model.pulled", _pulled(model, time.perf_counter() - started))
            return model

    def _find(self, name: str) -> LibraryModel | None:
        folder = self._folder / name
        hint = f"pull it again, or remove it: synapse model rm {name}"
        try:
            record = Record.model_validate_json((folder / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ModelFileCorrupt(f"the record {folder / RECORD} cannot be read: {reason}", hint=hint) from error
        for file in record.files:
            path = folder / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise ModelFileCorrupt(
                    f"{path} should have {file.size} bytes, but is missing or has changed", hint=hint
                )
        return LibraryModel.of(record, folder)

    def _partial(self, name: str) -> Path:
        return self._folder / ".partial" / name

    @contextmanager
    def _lock(self, name: str, transfer: Transfer | None) -> Iterator[None]:
        """Only one process and thread at a time changes a model; others wait."""
        from filelock import FileLock, Timeout  # noqa: PLC0415 (slow to import, and reading needs no lock)

        path = self._folder / ".locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while True:
            try:
                with lock.acquire(timeout=SECONDS_BETWEEN_TRIES):
                    yield
                    return
            except Timeout:
                if transfer is not None:
                    transfer.check()


def _pulled(model: LibraryModel, seconds: float) -> ModelPulled:
    return ModelPulled(
        name=model.name, kind=model.kind, source=model.source, size_bytes=model.size_bytes, seconds=seconds
    )


@asynccontextmanager
async def open_library(context: Context) -> AsyncIterator[ModelLibrary]:
    """The library in the home folder; its pulls report to the context's listener."""
    yield ModelLibrary(context.settings.folder("models"))
