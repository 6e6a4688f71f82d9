"""The native scan as a part of a process: threads, forks, kernels that misbehave, and what the self-test finds."""

from __future__ import annotations

import ctypes
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from support.pattern_kernel import kernel_build, native_scan
from synapse.config import Settings
from synapse.errors import InternalError, NotFound
from synapse.kernels.cache import FOLDER, KernelRefused, build_kernel
from synapse.vectors import kernel as pattern_native
from synapse.vectors.index import PatternIndex
from synapse.vectors.kernel import KERNEL, bind, examples, find, scan_native
from synapse.vectors.scan import Answer, agrees, scan_reference

ROWS = 20_000
"""Enough for more than one thread."""


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((ROWS, 32), np.float32)


@pytest.fixture(scope="module")
def index(vectors: NDArray[np.float32]) -> PatternIndex:
    made = PatternIndex(32, scan=native_scan())
    made.add(np.arange(ROWS), vectors)
    return made


def test_searches_on_many_threads_do_not_disturb_each_other(index: PatternIndex, vectors: NDArray[np.float32]) -> None:
    answers: dict[int, list[Answer]] = {}

    def search(first: int) -> None:
        answers[first] = [index.search(vectors[i : i + 1 + first % 2], 5 + first) for i in range(first, first + 20)]

    workers = [threading.Thread(target=search, args=(first,)) for first in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for first, got in answers.items():
        for i, answer in enumerate(got, first):
            expected = scan_reference(index._current(), vectors[i : i + 1 + first % 2], 5 + first, None)
            assert agrees(answer, expected)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_the_answer_does_not_depend_on_the_number_of_threads(
    vectors: NDArray[np.float32], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern_native, "threads", lambda: cores)
    monkeypatch.setattr(pattern_native, "ROWS_PER_THREAD", 1000)
    pattern_native._helpers.cache_clear()
    index = PatternIndex(32, "l2", scan=native_scan())
    index.add(np.arange(ROWS), vectors)
    for queries in (vectors[:1], vectors[:40]):
        assert agrees(index.search(queries, 7), scan_reference(index._current(), queries, 7, None))
    monkeypatch.undo()
    pattern_native._helpers.cache_clear()


def test_a_forked_process_can_search(index: PatternIndex, vectors: NDArray[np.float32]) -> None:
    expected = index.search(vectors[0], 5)
    child = os.fork()
    if not child:
        os._exit(0 if agrees(index.search(vectors[0], 5), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_view_can_be_sent_to_another_process(index: PatternIndex, vectors: NDArray[np.float32]) -> None:
    sent = pickle.loads(pickle.dumps(index._current()))  # noqa: S301 (our own)
    assert agrees(native_scan()(sent, vectors[:2], 3, None), index.search(vectors[:2], 3))


class Kernel:
    """A library whose scan does something else."""

    def __init__(self, status: int | Exception) -> None:
        self.status = status

    def pattern_search_prepare(self, call: Any) -> None:
        """Prepares nothing."""

    def pattern_search_scan(self, call: Any) -> int:
        if isinstance(self.status, Exception):
            raise self.status
        return self.status


def test_a_kernel_that_never_has_room_is_an_error(index: PatternIndex, vectors: NDArray[np.float32]) -> None:
    library = cast(ctypes.CDLL, Kernel(1))
    with pytest.raises(InternalError, match="more room than it can need"):
        scan_native(library, index._current(), vectors[:2], 3, None)


def test_an_error_in_any_thread_is_raised(index: PatternIndex, vectors: NDArray[np.float32]) -> None:
    library = cast(ctypes.CDLL, Kernel(OSError("the kernel is gone")))
    for _ in range(20):
        with pytest.raises(OSError, match="is gone"):
            scan_native(library, index._current(), vectors[:2], 3, None)


@pytest.mark.usefixtures("compiles_once")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("var dot = 16 * Int", "var dot = 15 * Int"),
        ("error * terms.norm + (size", "-error * terms.norm + (size"),
        ("terms.step = step", "terms.step = 1.5 * step"),
    ],
)
def test_the_self_test_refuses_a_kernel_that_is_wrong(tmp_path: Path, right: str, wrong: str) -> None:
    changes = 0
    for file in KERNEL.source.parent.glob("pattern_search*.mojo"):
        source = file.read_text()
        changes += source.count(right)
        (tmp_path / file.name).write_text(source.replace(right, wrong))
    assert changes == 1
    with pytest.raises(KernelRefused, match="fails its self-test"):
        build_kernel(replace(KERNEL, source=tmp_path / KERNEL.source.name), tmp_path)


def test_the_examples_are_answered_alike() -> None:
    assert {view.metric for view, *_ in examples()} == {"cosine", "dot", "l2"}
    for call in examples():
        assert agrees(native_scan()(*call), scan_reference(*call))


def test_a_missing_build_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound) as caught:
        find()
    assert caught.value.hint == "synapse kernels build pattern_search"
    home = tmp_path / "another"
    folder = Settings(home=home).folder(FOLDER)
    (folder / kernel_build().path.name).write_bytes(kernel_build().path.read_bytes())
    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    found = find()
    assert found.id == kernel_build().build_id
    call = examples()[0]
    assert agrees(bind(found.library)(*call), scan_reference(*call))
