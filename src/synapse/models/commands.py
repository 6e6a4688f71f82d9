"""The commands of the group `model`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from synapse.commands import IN_PROCESS, Argument, Call, Context, LocalPath, command
from synapse.errors import Conflict
from synapse.models.in_use import processes
from synapse.models.library import open_library
from synapse.models.manifest import ModelKind, check_model_name, is_local
from synapse.models.record import LibraryModel
from synapse.store import open_store
from synapse.store.entity import kind_of

SHOWN_PERSONAS = 5


class ModelInUse(Conflict):
    """A model that personas or running processes use is to be removed."""

    code = "model_in_use"


class PullModel(BaseModel):
    """What to pull."""

    source: Annotated[str, Argument(), LocalPath(is_local)] = Field(
        description="a known name, hf:ORGANISATION/REPOSITORY/FILE.gguf or the path of a GGUF file; for an encoder"
        " hf:ORGANISATION/REPOSITORY or the path of a folder"
    )
    name: str | None = Field(None, description="what to call it; by default its file name, in lower case")
    pre_tokenizer: str | None = Field(
        None, description="how its text is cut into words, where its file does not say so: llama-bpe, qwen2, smollm, …"
    )


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
    pre_tokenizer: str | None = Field(None, description="how its text is cut into words before merging")
    warning: str | None = Field(None, description="what is wrong with it, and what to do")
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


class RemoveModel(ModelName):
    """Which model, and whether those who use it matter."""

    force: bool = Field(False, description="remove it although personas or running processes use it")


class RemovedModel(BaseModel):
    """What was removed, and which personas cannot answer until it is pulled again."""

    name: str
    freed_bytes: int
    stopped: list[str] = Field(default_factory=list, description="personas that have no model now")


@command("model/pull", permission="manage")
async def pull_model(params: PullModel, context: Context, call: Call = IN_PROCESS) -> ModelInfo:
    """Fetch a model, check it and keep it; of one that is here already, note what --pre-tokenizer says."""
    library = await context.get(open_library)
    return _info(await library.pull(params.source, call.progress, name=params.name, pre_tokenizer=params.pre_tokenizer))


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
async def remove_model(params: RemoveModel, context: Context) -> RemovedModel:
    """Delete a model's files, and what engines have made of them; refused while somebody uses it."""
    library = await context.get(open_library)
    store = await context.get(open_store)
    check_model_name(params.name)
    users_of = await store.list(kind_of("Persona"), where={"base_model": params.name}, order_by="name")
    personas = [each.model_dump()["name"] for each in users_of]
    users = processes(context.settings.folder("models") / params.name)
    if (personas or users) and not params.force:
        raise ModelInUse(
            f"the model {params.name} is in use: {'; '.join(_said(personas, users))}",
            hint=f"`synapse model rm {params.name} --force` removes it all the same: those personas cannot answer until"
            " it is pulled again, and a process that has it open goes on with it until it is stopped",
            personas=personas,
            processes=users,
        )
    removed = library.remove(params.name)
    kept = {file.sha256 for model in library.list() for file in model.files}
    gone = [file.sha256 for file in removed.files if file.sha256 not in kept]
    freed = removed.size_bytes + _remove_packed(context.settings.folder("packed"), gone)
    return RemovedModel(name=removed.name, freed_bytes=freed, stopped=personas)


def _said(personas: list[str], users: list[int]) -> list[str]:
    """Who uses a model, in words; of many, the first."""
    more = f" and {len(personas) - SHOWN_PERSONAS} more" if len(personas) > SHOWN_PERSONAS else ""
    said = [f"the personas {', '.join(personas[:SHOWN_PERSONAS])}{more} answer with it"] if personas else []
    return said + [f"process {process} has it open" for process in users]


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
    pre_tokenizer, warning = _how_words_are_cut(model)
    return ModelInfo(
        name=model.name,
        kind=model.kind,
        description=model.description,
        licence=model.licence,
        source=model.source,
        size_bytes=model.size_bytes,
        pre_tokenizer=pre_tokenizer or None,
        warning=warning,
        files=[
            ModelFileInfo(path=str(model.folder / file.name), sha256=file.sha256, size=file.size)
            for file in model.files
        ],
    )


def _how_words_are_cut(model: LibraryModel) -> tuple[str, str | None]:
    """The name of the rule, and a warning where nobody has said which. Records of old do not have it: the file may."""
    if model.pre_tokenizer or model.kind != "chat":
        return model.pre_tokenizer, None
    from synapse.models.gguf_file import open_model_file  # noqa: PLC0415 (with numpy, which few models need here)
    from synapse.models.pre_tokenizers import HOW_TO_SAY, UNSAID, pre_tokenizer_name  # noqa: PLC0415

    metadata = open_model_file(model.path).metadata
    name = pre_tokenizer_name(metadata)
    unsaid = not name and metadata.get("tokenizer.ggml.model") == "gpt2"
    return name, f"{UNSAID}; {HOW_TO_SAY}" if unsaid else None
