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
from support.tiny_kernel import compile_tiny
from synapse.commands import Call, Context, find_command
from synapse.config import Settings
from synapse.errors import InvalidInput, NotFound
from synapse.kernels import cache as kernels
from synapse.kernels.cache import KernelRefused
from synapse.kernels.commands import BuildKernels

pytestmark = pytest.mark.usefixtures("compiles_once")


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home")) as opened:
        yield opened


async def run(verb: str, context: Context, **params: Any) -> list[Any]:
    found = find_command(f"kernels/{verb}")
    result: Any = await found.run(found.params(**params), context)
    return list(result.items)


async def run_one(verb: str, context: Context, name: str = "pattern_search") -> Any:
    """Its row; `list` takes no names."""
    rows = await run(verb, context, **({} if verb == "list" else {"names": [name]}))
    return next(row for row in rows if row.name == name)


async def test_kernels_are_built_listed_and_verified(context: Context) -> None:
    assert (await run_one("list", context)).status == "missing"
    with pytest.raises(NotFound, match="is not built"):
        await run("verify", context)
    built = await run_one("build", context)
    assert built.status == "built"
    assert built.size_bytes > 10_000
    assert await run_one("list", context) == built
    verified = await run_one("verify", context)
    assert (verified.status, verified.build) == ("verified", built.build)
    (again,) = await run("build", context, names=["pattern_search"], strict=True)
    assert again == built


async def test_a_kernel_of_another_room_is_one_like_the_others(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = context.settings.folder("kernels")
    (folder / kernel_build().path.name).write_bytes(kernel_build().path.read_bytes())
    monkeypatch.setattr(kernels, "MODULES", ("synapse.vectors.kernel", "support.tiny_kernel"))
    assert [row.name for row in await run("list", context)] == ["pattern_search", "tiny"]
    assert [row.status for row in await run("build", context)] == ["built", "built"]
    assert [row.status for row in await run("verify", context)] == ["verified", "verified"]


async def test_a_kernel_that_crashes_when_it_is_tested_fails_the_command_and_nothing_else(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MODULES", ("support.tiny_kernel",))
    prebuilt = context.settings.folder("prebuilt")
    build = compile_tiny(prebuilt, AT_CALL="raise(SIGSEGV)")
    build.path.rename(prebuilt / "tiny.so")
    monkeypatch.setenv("SYNAPSE_KERNEL_PATH", str(prebuilt))
    with pytest.raises(KernelRefused, match="crashed with SIGSEGV in its self-test"):
        await run("verify", context)


async def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    settings = Settings(home=tmp_path / "home")
    folder = settings.folder("kernels")
    (folder / kernel_build().path.name).write_bytes(kernel_build().path.read_bytes())
    call = Call(progress=lambda label, done, total: told.append((done, total)))
    async with Context(settings) as context:
        await find_command("kernels/build").run(BuildKernels(names=["pattern_search"]), context, call)
    assert told == [(0, 1), (1, 1)]


async def test_a_damaged_library_fails_verification(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = context.settings.folder("prebuilt")
    content = bytearray(kernel_build().path.read_bytes())
    (prebuilt / "pattern_search.so").write_bytes(content)
    monkeypatch.setenv("SYNAPSE_KERNEL_PATH", str(prebuilt))
    assert (await run_one("list", context)).status == "prebuilt"
    assert (await run_one("verify", context)).status == "verified"
    (prebuilt / "pattern_search.so").unlink()  # it is loaded, and must stay as it is until this process ends
    (prebuilt / "pattern_search.so").write_bytes(content[:-100])
    with pytest.raises(KernelRefused):
        await run_one("verify", context)


async def test_a_program_and_a_library_for_another_cpu_go_where_they_are_told(context: Context, tmp_path: Path) -> None:
    (row,) = await run("build", context, standalone="pattern_search", output=tmp_path / "search")
    assert (row.status, row.path) == ("standalone", str(tmp_path / "search"))
    program = await asyncio.create_subprocess_exec(row.path, "100", stdout=subprocess.DEVNULL)
    assert await program.wait() == 0
    oldest = {"x86_64": "x86-64-v2", "aarch64": "generic"}[os.uname().machine]
    (row,) = await run("build", context, names=["pattern_search"], cpu=oldest, output=tmp_path / "libraries")
    assert (row.status, row.path) == ("prebuilt", str(tmp_path / "libraries" / "pattern_search.so"))


async def test_what_makes_no_sense_is_refused(context: Context) -> None:
    for params in ({"names": ["nothing"]}, {"standalone": "nothing"}):
        with pytest.raises(NotFound, match="no kernel 'nothing'"):
            await run("build", context, **params)
    with pytest.raises(InvalidInput, match="--output goes with"):
        await run("build", context, output="somewhere")
