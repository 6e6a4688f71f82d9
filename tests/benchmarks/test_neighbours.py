"""Measuring beside other programs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.neighbours import Neighbours

BUSY = [sys.executable, "-c", "while True: pass"]

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system does not say what others take")


def spin() -> float:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    return 1.0


def test_a_busy_neighbour_is_seen_and_waited_for_no_longer_than_allowed() -> None:
    other = subprocess.Popen(BUSY)
    try:
        neighbours = Neighbours(patience=1.0)
        start = time.monotonic()
        assert neighbours.measure(spin, pause=0.1) == 1.0
        assert time.monotonic() - start > 1.0
        assert neighbours.patience <= 0
        assert neighbours.worst > 0.1
    finally:
        other.kill()
        other.wait()


def test_what_we_do_ourselves_is_no_neighbour() -> None:
    ours = subprocess.Popen(BUSY)
    try:
        counted, not_counted = Neighbours([ours.pid]), Neighbours()
        counted.measure(lambda: not_counted.measure(spin, pause=0), pause=0)
        assert counted.worst < not_counted.worst
    finally:
        ours.kill()
        ours.wait()
