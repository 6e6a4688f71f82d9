"""What a pull has to end with, and whether that is here already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from synapse.errors import Conflict
from synapse.models.encoder.names import OPTIONAL_FILES, REQUIRED_FILES
from synapse.models.manifest import HubFolder, LocalFile, LocalFolder, Manifest, ManifestFile, ModelKind, Place, Source
from synapse.models.pulling.transfer import sha256_of
from synapse.models.record import FileRecord, LibraryModel


def wanted_from(place: Place, name: str, known: Manifest | None) -> Manifest:
    """The model at a place that a user names: `known`, if that is what the name stands for, or one that nobody knows.

    Of the latter each sha256 and size is left open: "" and -1.

    Raises:
        Conflict: a folder is named for a model of one file, or a file for one that is a folder.
    """
    folder = isinstance(place, LocalFolder | HubFolder)
    if known is None:
        files: tuple[ManifestFile, ...]
        if isinstance(place, LocalFolder | HubFolder):
            files = tuple(
                ManifestFile(each, "", -1, (place.file(each),), optional=each in OPTIONAL_FILES)
                for each in (*REQUIRED_FILES, *OPTIONAL_FILES)
            )
        else:
            filename = place.path.name if isinstance(place, LocalFile) else Path(place.filename).name
            files = (ManifestFile(filename, "", -1, (place,)),)
        return Manifest(name, "", "", files, "encoder" if folder else "chat")
    if folder != (known.kind == "encoder"):
        what = "a folder with several files" if known.kind == "encoder" else f"one file, {known.files[0].name}"
        raise Conflict(f"the model {name} is {what}; {place} is not", hint="choose another name with --name")
    if isinstance(place, LocalFolder | HubFolder):
        files = tuple(replace(file, sources=(place.file(file.name),)) for file in known.files)
    else:
        files = (replace(known.files[0], sources=(place,)),)
    return replace(known, files=files)


def shown_source(kind: ModelKind, sources: Mapping[str, Source]) -> str:
    """Where a model came from, for its record: of an encoder's files, by name, only the folder."""
    if kind == "chat":
        return " ".join(map(str, sources.values()))
    return " ".join(dict.fromkeys(str(source).removesuffix(f"/{name}") for name, source in sources.items()))


def same_model(present: LibraryModel, wanted: Manifest) -> LibraryModel:
    """The model that is here, if it is what a pull would bring.

    Raises:
        Conflict: it is another one.
    """
    if not _same(present, wanted):
        raise Conflict(
            f"there is another model called {present.name} here, from {present.source}",
            hint=f"choose another name with --name, or remove it first: synapse model rm {present.name}",
        )
    return present


def _same(present: LibraryModel, wanted: Manifest) -> bool:
    here = {file.name: file for file in present.files}
    if all(file.sha256 for file in wanted.files):
        return {name: file.sha256 for name, file in here.items()} == {file.name: file.sha256 for file in wanted.files}
    sources = {file.name: file.sources[0] for file in wanted.files}
    there = {name: s.path for name, s in sources.items() if isinstance(s, LocalFile) and s.path.is_file()}
    if there:
        return there.keys() == here.keys() and all(_equal(path, here[name]) for name, path in there.items())
    return present.source == shown_source(wanted.kind, sources)


def _equal(path: Path, file: FileRecord) -> bool:
    return path.stat().st_size == file.size and sha256_of(path) == file.sha256
