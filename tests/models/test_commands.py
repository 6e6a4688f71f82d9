# ruff: noqa: ASYNC240 (the files are small, and nothing else runs on the loop)
"""The commands of the group `model`, through the registry as every surface runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.small_gguf import write_small_gguf
from synapse.commands import Call, Context, find_command, load_group
from synapse.config import Settings
from synapse.models.commands import ListModels, ModelInUse, ModelName, PullModel, RemoveModel
from synapse.models.in_use import hold, processes
from synapse.models.library import ModelNotFound
from synapse.store import open_store
from synapse.store.entity import kind_of


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home")) as opened:
        yield opened


def test_the_group_has_four_commands_and_reading_needs_no_rights_to_change() -> None:
    assert {c.name: c.permission for c in load_group("model")} == {
        "model/list": "read",
        "model/pull": "manage",
        "model/rm": "manage",
        "model/show": "read",
    }


async def test_a_model_is_pulled_listed_shown_and_removed(context: Context, tmp_path: Path) -> None:
    source = write_small_gguf(tmp_path / "source.gguf")
    pull, show = find_command("model/pull"), find_command("model/show")
    pulled = await pull.run(PullModel(source=str(source), name="mine"), context)
    shown = await show.run(ModelName(name="mine"), context)
    assert shown == pulled
    (file,) = shown.model_dump()["files"]
    assert Path(file["path"]).is_absolute()
    assert Path(file["path"]).read_bytes() == source.read_bytes()
    assert file["size"] == source.stat().st_size
    assert len(file["sha256"]) == 64

    rows = (await find_command("model/list").run(ListModels(), context)).model_dump()["items"]
    assert [(row["name"], row["kind"], row["status"]) for row in rows] == [
        ("mine", "chat", "ready"),
        ("all-minilm-l6-v2", "encoder", "available"),
        ("smollm2-135m", "chat", "available"),
    ]

    packed = context.settings.folder("packed")
    of_this, of_another = (packed / f"{sha256}-auto-v1.pack" for sha256 in (file["sha256"], "0" * 64))
    of_this.write_bytes(b"packed")
    of_another.write_bytes(b"packed")
    removed = await find_command("model/rm").run(RemoveModel(name="mine"), context)
    freed = source.stat().st_size + len(b"packed")
    assert removed.model_dump() == {"name": "mine", "freed_bytes": freed, "stopped": []}
    assert not of_this.exists()
    assert of_another.exists()
    with pytest.raises(ModelNotFound):
        await show.run(ModelName(name="mine"), context)


HOLDER = """
import sys, time
from pathlib import Path
from synapse.models.in_use import hold
release = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the model in a folder open."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder


async def test_a_model_in_use_is_not_removed_unless_forced(context: Context, tmp_path: Path) -> None:
    source = write_small_gguf(tmp_path / "source.gguf")
    for name in ("mine", "other"):
        await find_command("model/pull").run(PullModel(source=str(source), name=name), context)
    remove, folder = find_command("model/rm"), context.settings.folder("models") / "mine"
    persona = {"name": "ada", "base_model": "mine"}
    store = await context.get(open_store)
    await store.create(kind_of("Persona").model_validate(persona))
    with pytest.raises(ModelInUse, match="the personas ada answer with it"):
        await remove.run(RemoveModel(name="mine"), context)

    with another_process(folder) as holder:
        with pytest.raises(ModelInUse, match=f"process {holder.pid} has it open"):
            await remove.run(RemoveModel(name="mine"), context)
        assert processes(folder) == [holder.pid]
        assert processes(folder.with_name("other")) == []
        holder.kill()  # a lock ends with its process, however that ends
    assert processes(folder) == []

    release = hold(folder)
    assert processes(folder) == [os.getpid()]
    release()
    assert processes(folder) == []
    removed = await remove.run(RemoveModel(name="mine", force=True), context)
    assert removed.model_dump()["stopped"] == ["ada"]
    assert not folder.exists()
    await remove.run(RemoveModel(name="other"), context)


async def test_a_pull_reports_to_who_calls(tmp_path: Path) -> None:
    source, seen = write_small_gguf(tmp_path / "source.gguf"), []
    call = Call(progress=lambda label, done, total: seen.append((label, done, total)))
    context = Context(Settings(home=tmp_path / "home"))
    await find_command("model/pull").run(PullModel(source=str(source), name="mine"), context, call)
    assert seen[-1] == ("copying mine", source.stat().st_size, source.stat().st_size)


@pytest.mark.slow
def test_the_default_model_comes_by_its_name_alone(default_model: Path) -> None:
    assert default_model.stat().st_size == 98_362_432
    assert default_model.parent.name == "smollm2-135m"
