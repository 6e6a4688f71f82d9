"""A home that may not be written, or whose disk is full: the true cause, an exit code, and nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_bad_disk_is_said_and_nothing_is_half_written(kind: str, persona_home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a disk in a namespace of its own")
    done = subprocess.run(
        [*OWN_MOUNTS, sys.executable, Path(__file__).with_name("bad_disk_program.py"), kind, persona_home, disk],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
