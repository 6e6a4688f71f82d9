"""The flight recorder: what a process was running is known after it died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from synapse.errors import Overloaded
from synapse.hotpath.guard.flight_recorder import FILE_BYTES, NAMES, Culprit, FlightRecorder, wrecks

DIES = """
import os, sys
from pathlib import Path
from synapse.hotpath.guard.flight_recorder import FlightRecorder
recorder = FlightRecorder(Path(sys.argv[1]))
numbers = [recorder.number_of("search", "build-1"), recorder.number_of("ranks", "build-2")]
for slot in map(int, sys.argv[3:]):
    recorder.slots[slot] = numbers[slot % 2]
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
recorder.close()
"""


def process(folder: Path, end: str, *slots: int) -> None:
    subprocess.run([sys.executable, "-c", DIES, str(folder), end, *map(str, slots)], check=end != "kill")


def test_a_process_that_died_names_what_it_was_running(tmp_path: Path) -> None:
    process(tmp_path, "kill", 4, 7, 9)
    (wreck,) = wrecks(tmp_path)
    number = wreck.file.name.partition("-")[0]
    assert wreck.culprits == (Culprit("search", "build-1", number), Culprit("ranks", "build-2", number))
    wreck.remove()
    assert wrecks(tmp_path) == []


def test_a_process_that_died_between_calls_blames_nobody(tmp_path: Path) -> None:
    process(tmp_path, "kill")
    assert [wreck.culprits for wreck in wrecks(tmp_path)] == [()]


def test_a_process_that_ends_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    process(tmp_path, "end", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_lives_is_no_wreck(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    recorder.slots[0] = recorder.number_of("search", "build-1")
    assert wrecks(tmp_path) == []
    recorder.close()


@pytest.mark.parametrize("content", [b"", b"SYNFLT01", b"x" * FILE_BYTES, b"SYNFLT01" + b"\xff" * (FILE_BYTES - 8)])
def test_a_damaged_file_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1-x.flight").write_bytes(content)
    assert [wreck.culprits for wreck in wrecks(tmp_path)] == [()]


def test_a_build_keeps_its_number_and_there_is_an_end_to_them(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    assert recorder.number_of("a", "1") == recorder.number_of("a", "1") == 1
    for i in range(NAMES - 1):
        recorder.number_of("b", str(i))
    with pytest.raises(Overloaded):
        recorder.number_of("c", "1")
    recorder.close()


def test_a_forked_child_leaves_the_file_to_its_parent(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    child = os.fork()
    if child == 0:
        recorder.abandon()
        os._exit(0)
    os.waitpid(child, 0)
    assert wrecks(tmp_path) == []
    assert recorder.file.exists()
    recorder.close()
