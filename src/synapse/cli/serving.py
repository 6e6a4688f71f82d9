"""`synapse up` and `synapse down`: the server in this terminal or apart from it, and its end."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from synapse.callosum.publish.recording import recording
from synapse.cli.progress import TerminalProgress
from synapse.cli.text import tell
from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.daemon.calls import Caller
from synapse.daemon.door import FOLDER, find_server
from synapse.daemon.protocol import Disconnected
from synapse.errors import Conflict, TimedOut, Unavailable
from synapse.personas.base_model import ensure_base_model
from synapse.server.run import STOPPING_TIME, serve

LOG = "server.log"
LOOK_SECONDS = 0.2
START_SECONDS = 600.0
CLOSING_SECONDS = 60.0
"""What a server may take, beside its answers, to close what it has open."""
LAST_LINES = 20
UNIT = """\
[Unit]
Description=Synapse: many AI personas on one machine
After=network.target

[Service]
ExecStart={command}
Environment=SYNAPSE_HOME={home}
Restart=on-failure
TimeoutStopSec=60

[Install]
WantedBy=default.target
"""


def run_up(host: str | None, port: int | None, *, detach: bool, as_json: bool) -> None:
    """Serve with the settings, of which the address may be given anew.

    Args:
        detach: serve in a process apart from the terminal, and come back when it is ready.

    Raises:
        SynapseError: what stands in the way, see `synapse.server.run.serve`.
    """
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = load_settings().model_copy(update=given)
    asyncio.run(_fetch(settings, as_json))
    if not detach:
        serve(settings)
        return
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    print(asyncio.run(_detached(settings, options)))


def show_unit() -> None:
    """Print a unit for systemd that runs the server as this user, with these settings."""
    command = shlex.join([sys.executable, "-m", "synapse", "up"])
    print(UNIT.format(command=command, home=load_settings().home), end="")


def run_down(*, as_json: bool) -> None:
    """Stop the server of this home when the answers in progress are done.

    Raises:
        Unavailable: none is running.
        TimedOut: it did not end.
    """
    process = asyncio.run(_stopped(load_settings()))
    print(f'{{"process": {process}}}' if as_json else f"stopped (process {process})")


async def _detached(settings: Settings, options: list[str]) -> str:
    """Start a server apart from this process; returns what it tells when it is ready."""
    running = await find_server(settings)
    if running is not None:
        running.close()
        raise Conflict("a server of this home is running already", hint="`synapse down` stops it")
    path = settings.folder(FOLDER) / LOG
    with path.open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220, S603 (our own program, and it takes a millisecond)
            [sys.executable, "-P", "-m", "synapse", "up", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        server = await find_server(settings)
        if server is not None:
            with suppress(Disconnected):  # its log says why
                about: str = await server.ask("about")
                server.close()
                return f"{about}\nIts log is {path}; `synapse down` stops it."
        await asyncio.sleep(LOOK_SECONDS)
    if process.poll() is None:
        process.terminate()
    raise Unavailable(f"the server did not start:\n{_end_of(path)}", hint=f"its log is {path}")


async def _stopped(settings: Settings) -> int:
    server = await find_server(settings)
    if server is None:
        raise Unavailable("no server of this home is running", hint="`synapse up` starts one")
    process: int = await server.ask("stop")
    end = time.monotonic() + STOPPING_TIME + CLOSING_SECONDS
    while _lives(process, server):
        if time.monotonic() > end:
            raise TimedOut(f"the server, process {process}, is still running", hint=f"kill {process} ends it")
        await asyncio.sleep(LOOK_SECONDS / 4)
    return process


def _lives(process: int, server: Caller) -> bool:
    if not server.lost.done():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:  # one that has ended, and whose parent has not looked yet, is there still
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def _end_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


async def _fetch(settings: Settings, as_json: bool) -> None:
    with TerminalProgress(quiet=as_json) as progress:
        async with Context(settings) as context, recording(context):
            await ensure_base_model(context, settings.default_model, None if as_json else tell, progress)
