"""`synapse kernels …` end to end."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.pattern_kernel import kernel_build
from synapse.commands import Context, find_command
from synapse.config import Settings
from synapse.errors import InvalidInput, NotFound
from synapse.hotpath.kernels import KernelRefused


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home")) as opened:
        yield opened


async def run(verb: str, context: Context, **params: Any) -> list[Any]:
    found = find_command(f"kernels/{verb}")
    result: Any = await found.run(found.params(**params), context)
    return list(result.items)


async def test_kernels_are_built_listed_and_verified(context: Context) -> None:
    assert [(row.name, row.status) for row in await run("list", context)] == [("pattern_search", "missing")]
    with pytest.raises(NotFound, match="is not built"):
        await run("verify", context)
    (built,) = await run("build", context)
    assert built.status == "built"
    assert built.size_bytes > 10_000
    (listed,) = await run("list", context)
    assert listed == built
    (verified,) = await run("verify", context, names=["pattern_search"])
    assert (verified.status, verified.build) == ("verified", built.build)
    (again,) = await run("build", context, names=["pattern_search"], strict=True)
    assert again == built


async def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    settings = Settings(home=tmp_path / "home")
    folder = settings.folder("kernels")
    (folder / kernel_build().path.name).write_bytes(kernel_build().path.read_bytes())
    async with Context(settings, progress=lambda label, done, total: told.append((done, total))) as context:
        await run("build", context)
    assert told == [(0, 1), (1, 1)]


async def test_a_damaged_library_fails_verification(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = context.settings.folder("prebuilt")
    content = bytearray(kernel_build().path.read_bytes())
    (prebuilt / "pattern_search.so").write_bytes(content)
    monkeypatch.setenv("SYNAPSE_KERNEL_PATH", str(prebuilt))
    assert [row.status for row in await run("list", context)] == ["prebuilt"]
    assert [row.status for row in await run("verify", context)] == ["verified"]
    (prebuilt / "pattern_search.so").unlink()  # it is loaded, and must stay as it is until this process ends
    (prebuilt / "pattern_search.so").write_bytes(content[:-1])
    with pytest.raises(KernelRefused):
        await run("verify", context)


async def test_a_program_and_a_library_for_another_cpu_go_where_they_are_told(context: Context, tmp_path: Path) -> None:
    (row,) = await run("build", context, standalone="pattern_search", output=tmp_path / "search")
    assert (row.status, row.path) == ("standalone", str(tmp_path / "search"))
    program = await asyncio.create_subprocess_exec(row.path, "100", stdout=subprocess.DEVNULL)
    assert await program.wait() == 0
    oldest = {"x86_64": "x86-64-v2", "aarch64": "generic"}[os.uname().machine]
    (row,) = await run("build", context, cpu=oldest, output=tmp_path / "libraries")
    assert (row.status, row.path) == ("prebuilt", str(tmp_path / "libraries" / "pattern_search.so"))


async def test_what_makes_no_sense_is_refused(context: Context) -> None:
    for params in ({"names": ["nothing"]}, {"standalone": "nothing"}):
        with pytest.raises(NotFound, match="no kernel 'nothing'"):
            await run("build", context, **params)
    with pytest.raises(InvalidInput, match="--output goes with"):
        await run("build", context, output="somewhere")
