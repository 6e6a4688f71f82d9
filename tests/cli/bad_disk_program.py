"""A program whose home lies on a bad disk: ``read-only`` or ``full``, the folder of a home to copy, and a folder.

It mounts a small disk over the folder, which it may do in a mount namespace of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from synapse.cli.main import main
from synapse.commands import Context
from synapse.config import load_settings
from synapse.personas.entities import Conversation, Message, Persona
from synapse.store import Entity, open_store

SIZE = 6 << 20
BLOCK = 4096
LEFT_FREE = (0, 1, 9, 17, 25, 35, 50)
"""Blocks that are free when something is tried: from none to enough."""


def run(*args: str) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(args)
    return code, said.getvalue()


def refused(*args: str, cause: str) -> None:
    code, said = run(*args)
    assert code == 5, (args, code, said)
    assert cause in said, (args, said)
    assert "hint:" in said, (args, said)
    assert not any(word in said for word in ("Traceback", "inside Synapse", "unexpected")), (args, said)


def kept(kind: type[Entity]) -> int:
    async def count() -> int:
        async with Context(load_settings()) as context:
            return await (await context.get(open_store)).count(kind)

    return asyncio.run(count())


def fill(disk: Path, free: int) -> None:
    """Leave so many blocks of the disk free."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(BLOCK))
    os.truncate(filler, filler.stat().st_size - free * BLOCK)


def read_only(disk: Path) -> None:
    before = sorted(path.relative_to(disk) for path in disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused("persona", "create", "ada", cause="mounted read-only")
    refused("persona", "list", cause="mounted read-only")
    refused("chat", "pip", "-m", "hello", cause="mounted read-only")
    refused("events", "tail", cause="mounted read-only")
    refused("model", "pull", "smollm2-135m", cause="Read-only")
    refused("up", "--port", "0", cause="mounted read-only")
    assert sorted(path.relative_to(disk) for path in disk.rglob("*")) == before


def full(disk: Path) -> None:
    personas, codes = kept(Persona), set()
    for free in LEFT_FREE:
        fill(disk, free)
        code, said = run("persona", "create", f"ada{free}")
        if code:
            refused("persona", "create", f"ada{free}", cause="the disk is full")
        talked, _ = run("chat", "pip", "-m", "hello", "--max-tokens", "3")
        if talked:
            refused("chat", "pip", "-m", "hello", "--max-tokens", "3", cause="the disk is full")
        if not free:
            refused("up", "--port", "0", cause="the disk is full")
        (disk / "filler").unlink()
        personas += not code
        codes |= {code, talked}
        assert kept(Persona) == personas, (free, said)
        assert kept(Message) >= 2 * kept(Conversation), free
    assert codes == {0, 5}


if __name__ == "__main__":
    kind, home, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    subprocess.run(["cp", "-r", f"{home}/.", str(folder)], check=True)
    os.environ["SYNAPSE_HOME"] = str(folder)
    {"read-only": read_only, "full": full}[kind](folder)
