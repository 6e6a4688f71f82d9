"""What is written down about a model that is here: its record, beside its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, ValidationError, field_validator

from synapse.models.manifest import ModelKind

RECORD = "model.json"


class FileRecord(BaseModel):
    """One file of a model: its path in the model's folder (with `/`), its sha256 and its size in bytes."""

    name: str
    sha256: str
    size: int = Field(ge=0)

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        if any(Path(part).name != part or part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("the name of a file in the model's folder is expected")
        return name


class Record(BaseModel):
    """What `model.json` holds; see `LibraryModel`."""

    name: str
    description: str
    licence: str
    source: str
    files: list[FileRecord] = Field(min_length=1)
    kind: ModelKind = "chat"
    pre_tokenizer: str = ""


def pre_tokenizer_of(path: Path) -> str:
    """What the record beside a model file says of how text is cut into words; empty when there is none."""
    try:
        return Record.model_validate_json((path.parent / RECORD).read_bytes()).pre_tokenizer
    except (OSError, ValidationError):
        return ""


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """A model that is here, whole.

    Attributes:
        folder: where its files are; each is `folder / record.name`.
        pre_tokenizer: how its text is cut into words before merging, a name of `synapse.models.pre_tokenizers`; empty
            where nobody has said so, or the vocabulary needs none.
    """

    name: str
    description: str
    licence: str
    source: str
    folder: Path
    files: tuple[FileRecord, ...]
    kind: ModelKind = "chat"
    pre_tokenizer: str = ""

    @classmethod
    def of(cls, record: Record, folder: Path) -> Self:
        """The model whose record lies in a folder."""
        return cls(
            name=record.name,
            description=record.description,
            licence=record.licence,
            source=record.source,
            folder=folder.absolute(),
            files=tuple(record.files),
            kind=record.kind,
            pre_tokenizer=record.pre_tokenizer,
        )

    @property
    def path(self) -> Path:
        """The GGUF file of a chat model."""
        return self.folder / self.files[0].name

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)
