"""A test that runs into its time limit says so, with hypothesis too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SLOW = """
import threading
from hypothesis import given, strategies as st

never = threading.Event()
waits = [60.0]

@given(st.integers())
def test_waits_once(number):
    never.wait(waits.pop() if waits else 0)
"""


def test_a_time_limit_inside_of_hypothesis_is_reported_as_one(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "support.time_limits", "-p", "no:cacheprovider"),
            *("--timeout=1", "--rootdir", tmp_path, tmp_path / "test_slow.py"),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TookTooLong: the test took longer than its 1 seconds" in done.stdout
    assert "laky" not in done.stdout
