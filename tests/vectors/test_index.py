"""A pattern index: what it promises about answers, errors, files and threads, by the reference and by the kernel."""

from __future__ import annotations

import json
import struct
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.pattern_kernel import brute_force, kernel_build, scan_called
from synapse.errors import Conflict, Corrupt, InvalidInput, NotFound, Unavailable
from synapse.hotpath import PATHS
from synapse.vectors.file import IndexDamaged
from synapse.vectors.index import PatternIndex
from synapse.vectors.scan import Scan, agrees


@pytest.fixture(params=["reference", "native"])
def scan(request: pytest.FixtureRequest) -> Scan:
    return scan_called(request.param)


def normal(rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, dim), np.float32)


def filled(rows: int = 300, dim: int = 24, metric: Any = "cosine", scan: Scan | None = None) -> PatternIndex:
    index = PatternIndex(dim, metric, scan=scan)
    index.add(np.arange(rows), normal(rows, dim))
    return index


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 63, 64, 65, 384, 1000, 4096])
def test_it_answers_like_brute_force_in_every_dimension(metric: Any, dim: int, scan: Scan) -> None:
    vectors = normal(150, dim)
    index = PatternIndex(dim, metric, scan=scan)
    index.add(np.arange(150) * 3, vectors)
    for query in normal(4, dim, seed=1):
        ids, scores = index.search(query, 10)
        expected, exact = brute_force(metric, dict(zip(range(0, 450, 3), vectors, strict=True)), query, 10)
        assert ids.tolist() == expected
        np.testing.assert_allclose(scores, exact, rtol=2**-23)


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_the_ids_are_those_of_a_plain_float32_brute_force(metric: Any, scan: Scan) -> None:
    vectors, queries = normal(5000, 96), normal(20, 96, seed=1)
    index = PatternIndex(96, metric, scan=scan)
    index.add(np.arange(5000), vectors)
    ids, scores = index.search(queries, 10)
    plain = queries @ vectors.T
    if metric == "cosine":
        plain /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(queries, axis=1)[:, None]
    elif metric == "l2":
        plain = 2 * plain - (vectors**2).sum(axis=1) - (queries**2).sum(axis=1)[:, None]
    order = np.argsort(-plain, axis=1)[:, :10]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, np.take_along_axis(plain, order, axis=1), rtol=1e-4)


@pytest.mark.parametrize("shape", ["uniform", "clustered", "far from the origin", "few values", "one large"])
def test_many_rows_and_queries_are_answered_the_same_by_both(shape: str) -> None:
    random = np.random.default_rng(3)
    vectors = random.uniform(-1, 1, (40_000, 48)).astype(np.float32)
    if shape == "clustered":
        vectors = 0.05 * vectors + normal(50, 48)[random.integers(0, 50, len(vectors))]
    elif shape == "far from the origin":
        vectors += 1000
    elif shape == "few values":
        vectors = np.round(vectors)
    elif shape == "one large":
        vectors[17] *= 1e6
    queries = np.concatenate([vectors[:20] + np.float32(0.01), normal(20, 48, seed=4)])
    for metric in ("cosine", "dot", "l2"):
        answers = []
        for name in ("reference", "native"):
            index = PatternIndex(48, metric, scan=scan_called(name))  # type: ignore[arg-type]
            index.add(np.arange(len(vectors)), vectors)
            answers.append(index.search(queries, 10))
        assert agrees(*answers)


def test_equal_scores_are_ordered_by_id(scan: Scan) -> None:
    index = PatternIndex(3, "dot", scan=scan)
    index.add([9, 4, 7, 2], [[1.0, 0.0, 0.0]] * 4)
    assert index.search([1.0, 0.0, 0.0], 3)[0].tolist() == [2, 4, 7]


def test_thousands_of_equal_vectors_overflow_no_room(scan: Scan) -> None:
    index = PatternIndex(8, "cosine", scan=scan)
    index.add(np.arange(30_000)[::-1], np.ones((30_000, 8), np.float32))
    ids, scores = index.search(np.ones(8, np.float32), 5)
    assert ids.tolist() == [0, 1, 2, 3, 4]
    assert scores.tolist() == [1.0] * 5


def test_a_zero_vector_has_the_cosine_zero(scan: Scan) -> None:
    index = PatternIndex(2, "cosine", scan=scan)
    index.add([1, 2, 3], [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    ids, scores = index.search([1.0, 0.0], 3)
    assert ids.tolist() == [2, 1, 3]
    assert scores.tolist() == [1.0, 0.0, -1.0]


def test_a_zero_query_finds_the_smallest_ids(scan: Scan) -> None:
    index = filled(scan=scan)
    ids, scores = index.search(np.zeros(24, np.float32), 4)
    assert ids.tolist() == [0, 1, 2, 3]
    assert not scores.any()


def test_l2_scores_are_negated_squared_distances(scan: Scan) -> None:
    index = PatternIndex(2, "l2", scan=scan)
    index.add([1, 2], [[3.0, 4.0], [1.0, 0.0]])
    ids, scores = index.search([0.0, 0.0], 2)
    assert ids.tolist() == [2, 1]
    assert scores.tolist() == [-1.0, -25.0]


def test_tiny_and_huge_components_are_compared_exactly(scan: Scan) -> None:
    for metric in ("cosine", "dot", "l2"):
        for magnitude in (1e-40, 1e-25, 1e14):
            vectors = normal(500, 16) * np.float32(magnitude)
            index = PatternIndex(16, metric, scan=scan)  # type: ignore[arg-type]
            index.add(np.arange(500), vectors)
            expected, _ = brute_force(metric, dict(enumerate(vectors)), vectors[3], 10)
            assert index.search(vectors[3], 10)[0].tolist() == expected


def test_k_may_exceed_the_number_of_vectors(scan: Scan) -> None:
    ids, scores = filled(5, scan=scan).search(normal(3, 24), 100)
    assert ids.shape == scores.shape == (3, 5)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3, 4]


def test_all_of_many_vectors_can_be_asked_for(scan: Scan) -> None:
    index = filled(20_000, 8, scan=scan)
    ids, scores = index.search(normal(1, 8, seed=1)[0], 20_000)
    assert sorted(ids.tolist()) == list(range(20_000))
    assert (np.diff(scores) <= 0).all()


def test_an_empty_index_answers_nothing(scan: Scan) -> None:
    index = PatternIndex(4, scan=scan)
    assert index.search(normal(2, 4), 3)[0].shape == (2, 0)
    assert index.search(normal(1, 4)[0], 3)[0].shape == (0,)
    assert len(index) == 0


def test_no_queries_get_no_answers(scan: Scan) -> None:
    assert filled(scan=scan).search(np.empty((0, 24), np.float32), 3)[0].shape == (0, 3)


def test_a_search_can_be_limited_to_some_ids(scan: Scan) -> None:
    index = filled(20_000, 24, scan=scan)
    query = normal(1, 24, seed=1)[0]
    everything = index.search(query, 20_000)[0].tolist()
    for allow in ({5, 6, 7}, set(range(0, 20_000, 3)), {19_999, 123_456}, set(), range(100)):
        expected = [i for i in everything if i in set(allow)][:10]
        assert index.search(query, 10, allow)[0].tolist() == expected
    assert index.search(query, 2, np.array([7, 8, 9]))[0].tolist() == [i for i in everything if i in (7, 8, 9)][:2]


def test_an_id_that_is_added_again_gets_the_new_vector(scan: Scan) -> None:
    index = filled(scan=scan)
    index.add([7, 1000], [[1.0] + [0.0] * 23, [0.0] * 23 + [1.0]])
    assert len(index) == 301
    ids, scores = index.search([1.0] + [0.0] * 23, 1)
    assert (ids.tolist(), scores.tolist()) == ([7], [1.0])


def test_a_removed_id_is_not_found(scan: Scan) -> None:
    index = filled(scan=scan)
    query = normal(300, 24)[42]
    assert index.search(query, 1)[0].tolist() == [42]
    index.remove([42])
    assert 42 not in index.search(query, 300)[0]
    assert len(index) == 299
    index.remove(np.delete(np.arange(300), 42))
    assert index.search(query, 3)[0].shape == (0,)


def test_vectors_unlike_all_before_are_found_exactly(scan: Scan) -> None:
    index = PatternIndex(8, "l2", scan=scan)
    near, far = normal(100, 8), normal(10, 8, seed=1) * np.float32(1e9)
    index.add(np.arange(100), near)
    index.add(np.arange(100, 110), far)
    vectors = dict(enumerate([*near, *far]))
    for query in (near[0], far[0]):
        assert index.search(query, 20)[0].tolist() == brute_force("l2", vectors, query, 20)[0]


BAD_VECTORS = {
    "not a number": [[float("nan"), 1.0]],
    "infinite": [[float("inf"), 1.0]],
    "too large for float32": [[1e300, 1.0]],
    "too large for products": [[1e16, 1.0]],
    "another dimension": [[1.0, 2.0, 3.0]],
    "one vector without a list": [1.0, 2.0],
    "integers": [[1, 2]],
    "complex numbers": [[1j, 2.0]],
    "text": [["a", "b"]],
}


@pytest.mark.parametrize("vectors", BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_vectors_that_do_not_fit_are_refused_and_change_nothing(vectors: Any) -> None:
    index = PatternIndex(2)
    index.add([1], [[1.0, 0.0]])
    with pytest.raises(InvalidInput):
        index.add([2], vectors)
    assert len(index) == 1
    assert index.search([1.0, 0.0], 5)[0].tolist() == [1]


@pytest.mark.parametrize("query", [[float("nan"), 1.0], [1.0, 2.0, 3.0], [1, 2], "text", [[[1.0, 2.0]]]])
def test_queries_that_do_not_fit_are_refused(query: Any) -> None:
    with pytest.raises(InvalidInput):
        filled(dim=2).search(query, 1)


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1]], [2**64 - 1], [1, 1], [1, 2]])
def test_ids_that_do_not_fit_are_refused(ids: Any) -> None:
    index = PatternIndex(2)
    with pytest.raises(InvalidInput):
        index.add(ids, [[1.0, 0.0]] * (2 if ids == [1, 1] else 1))
    assert len(index) == 0


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_k_must_be_a_positive_integer(k: Any) -> None:
    with pytest.raises(InvalidInput, match="k is a positive integer"):
        filled().search(normal(1, 24), k)


@pytest.mark.parametrize("dim", [0, 4097, -1, 2.0, True])
def test_the_dimension_must_be_in_range(dim: Any) -> None:
    with pytest.raises(InvalidInput, match="dimension"):
        PatternIndex(dim)


def test_the_metric_must_be_known() -> None:
    with pytest.raises(InvalidInput, match="cosine, dot, l2"):
        PatternIndex(3, "manhattan")  # type: ignore[arg-type]


def test_removing_an_unknown_id_removes_nothing() -> None:
    index = filled()
    with pytest.raises(NotFound, match="1000"):
        index.remove([3, 1000])
    with pytest.raises(InvalidInput, match="twice"):
        index.remove([3, 3])
    assert len(index) == 300


def test_a_closed_index_says_so() -> None:
    index = filled()
    index.close()
    for use in (
        lambda: index.search(normal(1, 24), 1),
        lambda: index.add([1], normal(1, 24)),
        lambda: index.remove([1]),
        lambda: index.save(Path("anywhere")),
        lambda: len(index),
    ):
        with pytest.raises(Conflict, match="closed"):
            use()


def test_a_saved_index_answers_the_same_and_can_be_changed(tmp_path: Path, scan: Scan) -> None:
    index = filled(scan=scan)
    index.remove([5, 6])
    index.save(tmp_path / "patterns.index")
    loaded = PatternIndex.load(tmp_path / "patterns.index", scan=scan)
    queries = normal(5, 24, seed=1)
    assert (loaded.dim, loaded.metric, len(loaded)) == (24, "cosine", 298)
    assert agrees(loaded.search(queries, 10), index.search(queries, 10))
    for changed in (index, loaded):
        changed.add([5, 900], normal(2, 24, seed=2))
        changed.remove([0])
    assert agrees(loaded.search(queries, 400), index.search(queries, 400))
    again = PatternIndex.load(tmp_path / "patterns.index", scan=scan)
    assert len(again) == 298


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    PatternIndex(3, "l2").save(tmp_path / "empty")
    loaded = PatternIndex.load(tmp_path / "empty")
    loaded.add([1], [[1.0, 2.0, 3.0]])
    assert loaded.search([1.0, 2.0, 3.0], 1)[0].tolist() == [1]


def test_a_loaded_index_is_not_copied_into_memory(tmp_path: Path) -> None:
    filled().save(tmp_path / "index")
    view = PatternIndex.load(tmp_path / "index")._current()
    assert not view.vectors.flags.writeable
    assert not view.vectors.flags.owndata


def test_every_cut_of_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled(20, 4).save(path)
    content = path.read_bytes()
    for length in {0, 1, 8, 15, 16, 100, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(IndexDamaged):
            PatternIndex.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(Corrupt, match="more in it"):
        PatternIndex.load(path)


def test_every_altered_byte_of_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = PatternIndex(64, "dot")
    index.add(np.arange(32), normal(32, 64))  # whole lines: no padding between the arrays, whose bytes mean nothing
    index.save(path)
    content = bytearray(path.read_bytes())
    header = 16 + int.from_bytes(content[8:16], "little") + 32
    for position in [*range(0, header, 7), *range(header + -header % 64, len(content), 997)]:
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(IndexDamaged):
            PatternIndex.load(path)
        content[position] ^= 1


def rewritten(path: Path, **changes: Any) -> None:
    """Change the header as somebody would who also mends its checksum."""
    content = path.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    header = json.dumps(json.loads(content[16 : 16 + length]) | changes).encode()
    start = content[:8] + struct.pack("<Q", len(header)) + header
    path.write_bytes(start + sha256(start).digest() + content[16 + length + 32 :])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version is 2"),
        ({"dim": 5}, "cut short|not as they were|more in it"),
        ({"dim": 10**9}, "another form"),
        ({"count": -1}, "another form"),
        ({"count": 10**6}, "cut short|not as they were"),
        ({"metric": "other"}, "another form"),
        ({"unit": 0.0}, "another form"),
        ({"sha256": []}, "not complete"),
        ({"more": 1}, "another form"),
    ],
)
def test_a_header_with_other_numbers_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "index"
    filled(20, 4).save(path)
    rewritten(path, **changes)
    with pytest.raises(IndexDamaged, match=reason):
        PatternIndex.load(path)


def test_a_file_that_is_not_there_or_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        PatternIndex.load(tmp_path / "nothing")
    with pytest.raises(Unavailable):
        PatternIndex.load(tmp_path)
    with pytest.raises(Unavailable):
        filled().save(tmp_path / "no such folder" / "index")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    filled(10).save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        filled(20).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_searches_during_changes_see_one_moment(scan: Scan) -> None:
    """A writer moves the set of ids back and forth between two; a search must see one of them, never a mixture."""
    index = PatternIndex(16, "dot", scan=scan)
    old, new = set(range(200)), set(range(1000, 1200))
    vectors = normal(200, 16)
    index.add(sorted(old), vectors)
    seen: list[set[int]] = []
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(set(index.search(vectors[0], 1000)[0].tolist()))
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(15):
        index.add(sorted(new), vectors)
        index.remove(sorted(new))
    done.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert all(ids in (old, old | new) for ids in seen)
    assert seen


def test_a_search_is_a_call_of_the_hot_path_which_the_reference_answers_when_python_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    counters = PATHS["pattern_search"].counters
    before = counters.read()
    assert filled().search(normal(1, 24), 3)[0].shape == (1, 3)
    assert counters.read().reference_answers == before.reference_answers + 1


def test_the_kernel_of_the_hot_path_agrees_with_its_reference() -> None:
    path = PATHS["pattern_search"]
    assert path.burn_in is not None
    native = path.native.bind(kernel_build().path)
    assert all(path.agrees(native(*call), path.reference(*call)) for call in path.burn_in())
