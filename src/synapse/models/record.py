"""What is written down about a model that is here: its record, beside its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, field_validator

RECORD = "model.json"


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

    @classmethod
    def of(cls, record: Record, folder: Path) -> Self:
        """The model whose record lies in a folder."""
        return cls(
            record.name, record.description, record.licence, record.source, folder.absolute(), tuple(record.files)
        )

    @property
    def path(self) -> Path:
        """Its GGUF file."""
        return self.folder / self.files[0].name

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)
