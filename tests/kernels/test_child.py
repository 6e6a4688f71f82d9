"""The process in which a new build answers first: its crashes are real and cost nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from support.hotpath_kernels import CRASH, HANG, RAISE, bind_dies, bind_refuses, bind_total, values
from synapse.hotpath import NativeSide
from synapse.kernels import child as sacrifice
from synapse.kernels.child import Crashed, Lost, NotSent, Raised, TrialProcess, Unusable
from synapse.kernels.shared_arguments import SharedBlock


@pytest.fixture
def child(kernel: Callable[..., NativeSide]) -> Iterator[TrialProcess]:
    started = TrialProcess(bind_total, kernel().find().library, call_seconds=1)
    started.start()
    yield started
    started.close()


def test_a_call_goes_to_another_process_and_comes_back(child: TrialProcess) -> None:
    answer, nanoseconds = child.call((values(1, 2, 3),), {})
    assert answer == 6
    assert 0 < nanoseconds < 1e9


def test_large_arrays_and_small_ones_take_turns(child: TrialProcess) -> None:
    for count in (1, 3_000_000, 5, 6_000_000, 0):
        numbers = np.arange(count, dtype=np.int64)
        assert child.call((), {"numbers": numbers})[0] == numbers.sum()


def test_a_segmentation_fault_kills_only_the_child(child: TrialProcess) -> None:
    with pytest.raises(Crashed, match="SIGSEGV"):
        child.call((values(CRASH),), {})
    assert not child.running
    child.start()
    assert child.call((values(1),), {})[0] == 1


def test_a_kernel_that_does_not_come_back_is_killed(child: TrialProcess) -> None:
    start = time.monotonic()
    with pytest.raises(Crashed, match="did not answer in 1 seconds"):
        child.call((values(HANG),), {})
    assert time.monotonic() - start < 5
    assert not child.running


def test_what_the_kernel_raises_is_passed_on_and_the_child_lives(child: TrialProcess) -> None:
    with pytest.raises(Raised, match="RuntimeError: the kernel failed"):
        child.call((values(RAISE),), {})
    assert child.call((values(2),), {})[0] == 2


ORPHAN = """
import sys
from pathlib import Path
from support.hotpath_kernels import HANG, bind_total, values
from synapse.kernels import child as sacrifice

sacrifice.GRACE_SECONDS = 1.0
child = sacrifice.TrialProcess(bind_total, Path(sys.argv[1]), call_seconds=1.0)
child.start()
print(child._process.pid, flush=True)
child.call((values(HANG),), {})
"""


def test_a_child_that_hangs_ends_itself_when_its_parent_is_gone(kernel: Callable[..., NativeSide]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ORPHAN, str(kernel().find().library)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


def runs(process: int) -> bool:
    """Whether a process is there and not a zombie that nobody has asked about."""
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_killed_from_outside_blames_nobody(child: TrialProcess) -> None:
    assert child._process is not None
    os.kill(child._process.pid, signal.SIGKILL)
    with pytest.raises(Lost):
        child.call((values(1),), {})
    child.start()
    assert child.call((values(1),), {})[0] == 1


def test_a_second_thread_does_not_wait(child: TrialProcess) -> None:
    def hangs() -> None:
        with pytest.raises(Crashed):
            child.call((values(HANG),), {})

    first = threading.Thread(target=hangs)
    first.start()
    while not child._lock.locked():
        time.sleep(0.001)
    with pytest.raises(NotSent, match="another thread"):
        child.call((values(1),), {})
    first.join()


def test_arguments_that_cannot_be_sent_are_not(child: TrialProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotSent, match="cannot be sent"):
        child.call((threading.Lock(),), {})
    monkeypatch.setattr(sacrifice, "LARGEST_CALL", 1000)
    with pytest.raises(NotSent, match="more than 1000"):
        child.call((np.zeros(1000),), {})
    assert child.call((values(3),), {})[0] == 3


def test_a_child_that_is_not_running_is_not_called(kernel: Callable[..., NativeSide]) -> None:
    with pytest.raises(NotSent, match="not running"):
        TrialProcess(bind_total, kernel().find().library).call((values(1),), {})


def test_a_build_that_crashes_when_it_is_opened_is_found(tmp_path: Path) -> None:
    with pytest.raises(Crashed, match="SIGSEGV"):
        TrialProcess(bind_dies, tmp_path).start()


def test_a_build_that_cannot_be_opened_is_unusable_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="undefined symbol: total"):
        TrialProcess(bind_refuses, tmp_path).start()


def test_a_build_whose_opener_cannot_be_imported_is_unusable_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bind_refuses, "__qualname__", "only_here")
    monkeypatch.setattr("support.hotpath_kernels.only_here", bind_refuses, raising=False)
    with pytest.raises(Unusable, match="only_here"):
        TrialProcess(bind_refuses, tmp_path).start()


ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
)


@given(st.lists(st.lists(ARRAYS | st.binary() | st.text(), max_size=4), max_size=4))
def test_whatever_is_packed_comes_out_the_same(parcels: list[list[object]]) -> None:
    writer = SharedBlock()
    reader = SharedBlock(os.dup(writer.descriptor))
    for parcel in parcels:
        found = reader.unpack(writer.pack(parcel, 2**20))
        assert len(found) == len(parcel)
        for one, other in zip(parcel, found, strict=True):
            if isinstance(one, np.ndarray):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert one.tobytes() == other.tobytes()
            else:
                assert one == other
    os.close(reader.descriptor)
    writer.close()


def test_a_block_refuses_more_than_the_limit() -> None:
    block = SharedBlock()
    with pytest.raises(ValueError, match="more than"):
        block.pack(np.zeros(2000), 8000)
    block.close()
