"""The flight recorder: what a process was running is known after it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from synapse.errors import Overloaded
from synapse.hotpath.guard.flight_recorder import FILE_BYTES, NAMES, FlightRecorder, Running, deaths

DIES = """
import ctypes, faulthandler, os, sys, threading
from pathlib import Path
from synapse.hotpath.guard.flight_recorder import FlightRecorder
if "before" in sys.argv:
    faulthandler.enable()
recorder = FlightRecorder(Path(sys.argv[1]))
numbers = [recorder.number_of("search", "build-1"), recorder.number_of("ranks", "build-2")]
if "after" in sys.argv:
    faulthandler.enable()
for slot in map(int, filter(str.isdigit, sys.argv[3:])):
    recorder.slots[slot] = numbers[slot % 2]
if sys.argv[2].isdigit():
    os.kill(os.getpid(), int(sys.argv[2]))
if sys.argv[2] == "abort":
    threading.Thread(target=os.abort).start()
    threading.Event().wait()
if sys.argv[2] == "fault":
    ctypes.string_at(0)
recorder.close()
"""


def process(folder: Path, end: str, *slots: int, faulthandler: str = "") -> subprocess.CompletedProcess[str]:
    arguments = [str(folder), end, *map(str, slots), faulthandler]
    return subprocess.run([sys.executable, "-c", DIES, *arguments], check=False, capture_output=True, text=True)


def test_a_process_that_died_names_what_it_was_running(tmp_path: Path) -> None:
    process(tmp_path, "9", 4, 7, 9)
    (death,) = deaths(tmp_path)
    assert death.process == death.file.name.partition("-")[0]
    assert death.running == (Running("search", "build-1"), Running("ranks", "build-2"))
    death.remove()
    assert deaths(tmp_path) == []


def test_a_process_that_died_between_calls_blames_nobody(tmp_path: Path) -> None:
    process(tmp_path, "9")
    assert [death.running for death in deaths(tmp_path)] == [()]


@pytest.mark.parametrize("faulthandler", ["", "before", "after"])
def test_a_signal_that_a_process_brought_upon_itself_is_noted_and_goes_on_as_ever(
    tmp_path: Path, faulthandler: str
) -> None:
    for end, number in ("fault", signal.SIGSEGV), ("abort", signal.SIGABRT):
        done = process(tmp_path, end, 1, faulthandler=faulthandler)
        assert done.returncode == -number
        assert ("Current thread" in done.stderr) is bool(faulthandler)
        (death,) = deaths(tmp_path)
        assert death.signal == number
        death.remove()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT])
def test_a_signal_that_somebody_sent_is_no_fault_of_the_process(tmp_path: Path, number: signal.Signals) -> None:
    assert process(tmp_path, str(int(number)), 1).returncode == -number
    (death,) = deaths(tmp_path)
    assert (death.signal, death.running) == (None, (Running("ranks", "build-2"),))


def test_a_process_that_ends_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    assert process(tmp_path, "end", 1).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_short_under_the_process_does_not_end_it(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    os.truncate(recorder.path, 0)
    number = recorder.number_of("search", "build-1")
    recorder.slots[0] = recorder.slots[4095] = number
    assert (recorder.slots[0], recorder.slots[4095]) == (number, number)
    assert "cut short" in recorder.problem
    recorder.close()


def test_without_room_the_slots_are_in_memory_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", FULL_DISK, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this system lets nobody mount a disk in a namespace")
    assert (done.returncode, done.stdout) == (0, "True True []\n"), done.stderr


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
from synapse.hotpath.guard.flight_recorder import FlightRecorder
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True)
(folder / "hotpath").mkdir()
first = FlightRecorder(folder / "hotpath")
try:
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
second = FlightRecorder(folder / "hotpath")
for recorder in first, second:  # the one that was made while there was room has its room
    for slot in range(0, 4096, 64):
        recorder.slots[slot] = recorder.number_of("search", "build-1")
first.close()
print(first.problem == "", "No space" in second.problem, os.listdir(folder / "hotpath"))
"""


def test_a_process_that_lives_is_not_dead(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    recorder.slots[0] = recorder.number_of("search", "build-1")
    assert deaths(tmp_path) == []
    recorder.close()


@pytest.mark.parametrize("content", [b"", b"SYNFLT02", b"x" * FILE_BYTES, b"SYNFLT02" + b"\xff" * (FILE_BYTES - 8)])
def test_a_damaged_file_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1-x.flight").write_bytes(content)
    assert [death.running for death in deaths(tmp_path)] == [()]


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
    assert deaths(tmp_path) == []
    assert recorder.path.exists()
    recorder.close()
