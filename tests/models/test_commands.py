# ruff: noqa: ASYNC240 (the files are small, and nothing else runs on the loop)
"""The commands of the group `model`, through the registry as every surface runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.small_gguf import write_small_gguf
from synapse.commands import Call, Context, find_command, load_group
from synapse.config import Settings
from synapse.models.commands import ListModels, ModelName, PullModel
from synapse.models.library import ModelNotFound


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Settings(home=tmp_path / "home"))


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
    removed = await find_command("model/rm").run(ModelName(name="mine"), context)
    assert removed.model_dump() == {"name": "mine", "freed_bytes": source.stat().st_size + len(b"packed")}
    assert not of_this.exists()
    assert of_another.exists()
    with pytest.raises(ModelNotFound):
        await show.run(ModelName(name="mine"), context)


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
