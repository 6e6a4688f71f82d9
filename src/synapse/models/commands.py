"""The commands of the group `model`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from synapse.commands import IN_PROCESS, Argument, Call, Context, LocalPath, command
from synapse.models.library import open_library
from synapse.models.manifest import ModelKind, is_local
from synapse.models.record import LibraryModel


class PullModel(BaseModel):
    """What to pull."""

    source: Annotated[str, Argument(), LocalPath(is_local)] = Field(
        description="a known name, hf:ORGANISATION/REPOSITORY/FILE.gguf or the path of a GGUF file; for an encoder"
        " hf:ORGANISATION/REPOSITORY or the path of a folder"
    )
    name: str | None = Field(None, description="what to call it; by default its file name, in lower case")


class ListModels(BaseModel):
    """Nothing to choose."""


class ModelName(BaseModel):
    """Which model."""

    name: Annotated[str, Argument()] = Field(description="a name of `synapse model list`")


class ModelFileInfo(BaseModel):
    """One file of a model."""

    path: str = Field(description="where it is, absolute")
    sha256: str
    size: int = Field(description="bytes")


class ModelInfo(BaseModel):
    """A model that is here."""

    name: str
    kind: ModelKind = Field(description="`chat` answers; `encoder` makes vectors of texts")
    description: str
    licence: str
    source: str = Field(description="where it came from")
    size_bytes: int
    files: list[ModelFileInfo]


class ModelRow(BaseModel):
    """One line of the list."""

    name: str
    kind: ModelKind = Field(description="`chat` answers; `encoder` makes vectors of texts")
    status: Literal["ready", "available"] = Field(description="here, or one `synapse model pull NAME` away")
    size_bytes: int
    licence: str
    description: str


class ModelRows(BaseModel):
    """The models that are here, then those that can be pulled by name."""

    items: list[ModelRow]


class RemovedModel(BaseModel):
    """What was removed."""

    name: str
    freed_bytes: int


@command("model/pull", permission="manage")
async def pull_model(params: PullModel, context: Context, call: Call = IN_PROCESS) -> ModelInfo:
    """Fetch a model, check it and keep it; nothing happens when it is here already."""
    library = await context.get(open_library)
    return _info(await library.pull(params.source, call.progress, name=params.name))


@command("model/list", permission="read")
async def list_models(params: ListModels, context: Context) -> ModelRows:
    """List the models that are here, and those that can be pulled by name."""
    library = await context.get(open_library)
    ready = [
        ModelRow(
            name=model.name,
            kind=model.kind,
            status="ready",
            size_bytes=model.size_bytes,
            licence=model.licence,
            description=model.description,
        )
        for model in library.list()
    ]
    available = [
        ModelRow(
            name=manifest.name,
            kind=manifest.kind,
            status="available",
            size_bytes=sum(file.size for file in manifest.files),
            licence=manifest.licence,
            description=manifest.description,
        )
        for manifest in library.available()
    ]
    return ModelRows(items=ready + available)


@command("model/show", permission="read")
async def show_model(params: ModelName, context: Context) -> ModelInfo:
    """Show a model: where its files are, their sha256, its licence."""
    library = await context.get(open_library)
    return _info(library.show(params.name))


@command("model/rm", permission="manage")
async def remove_model(params: ModelName, context: Context) -> RemovedModel:
    """Delete a model's files, and what engines have made of them."""
    library = await context.get(open_library)
    removed = library.remove(params.name)
    kept = {file.sha256 for model in library.list() for file in model.files}
    gone = [file.sha256 for file in removed.files if file.sha256 not in kept]
    freed = removed.size_bytes + _remove_packed(context.settings.folder("packed"), gone)
    return RemovedModel(name=removed.name, freed_bytes=freed)


def _remove_packed(folder: Path, sources: list[str]) -> int:
    """Delete the packed forms of these files, and say how many bytes they had. A process that uses one keeps it."""
    freed = 0
    for path in [path for sha256 in sources for path in folder.glob(f"{sha256}-*.pack")]:
        with contextlib.suppress(OSError):  # on Windows, one in use cannot go
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def _info(model: LibraryModel) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        kind=model.kind,
        description=model.description,
        licence=model.licence,
        source=model.source,
        size_bytes=model.size_bytes,
        files=[
            ModelFileInfo(path=str(model.folder / file.name), sha256=file.sha256, size=file.size)
            for file in model.files
        ],
    )
