"""A file that is cut short under its map, whoever mapped it: an error, where the operating system would end us."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from support.small_gguf import write_small_gguf
from synapse.engines.native.packed.file import open_packed
from synapse.errors import Unavailable
from synapse.kernels.fatal_signals import install
from synapse.kernels.mapped_file import MappedFile
from synapse.models.gguf_file import open_model_file
from synapse.models.pulling.transfer import sha256_of
from synapse.vectors.file import IndexDamaged
from synapse.vectors.index import PatternIndex

if not install():
    pytest.skip("no handler for this machine", allow_module_level=True)


def test_a_map_reads_zeros_where_its_file_was_cut_in_any_thread_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    other = tmp_path / "other"
    other.write_bytes(b"y" * 100_000)
    with path.open("rb") as opened, other.open("rb") as second:
        mapped, whole = MappedFile(opened), MappedFile(second)
    assert (mapped.memory[99_999], mapped.lost) == (ord("x"), False)
    os.truncate(path, 0)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(sum(mapped.memory[:]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, mapped.lost) == ([0] * 4, True)
    assert (whole.memory[99_999], whole.lost) == (ord("y"), False)


def test_maps_come_and_go_without_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in range(1, 3000):
        path.write_bytes(b"x" * (size % 100 + 1))
        with path.open("rb") as opened:
            assert MappedFile(opened).memory[0] == ord("x")
    with path.open("rb") as opened:
        last = MappedFile(opened)
    os.truncate(path, 0)
    assert (last.memory[0], last.lost) == (0, True)


def test_an_index_whose_file_is_cut_short_gives_no_answer_and_is_not_saved(tmp_path: Path) -> None:
    index = PatternIndex(16)
    index.add(range(1000), np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32))
    index.save(tmp_path / "index")
    opened = PatternIndex.load(tmp_path / "index")
    os.truncate(tmp_path / "index", 5000)
    with pytest.raises(IndexDamaged, match="cut short"):
        opened.search(np.ones(16, np.float32), 3)
    with pytest.raises(IndexDamaged, match="cut short"):
        opened.save(tmp_path / "again")


def test_a_packed_model_whose_file_is_cut_short_is_refused_after_the_step(tmp_path: Path) -> None:
    model = write_small_gguf(tmp_path / "small.gguf")
    packed = open_packed(open_model_file(model), sha256_of(model), tmp_path)
    packed.check()
    (file,) = tmp_path.glob("*.pack")
    os.truncate(file, 4096)
    assert packed.matrix("token_embd.weight").max() == 0
    with pytest.raises(Unavailable, match="cut short"):
        packed.check()
