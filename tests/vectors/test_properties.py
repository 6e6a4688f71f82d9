"""Any mix of adding, removing, searching and reloading agrees with brute force."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from numpy.typing import NDArray

from support.pattern_kernel import brute_force, scan_called
from synapse.vectors.index import PatternIndex

Shape = Literal["normal", "whole numbers", "scaled", "shifted", "equal", "zero"]
SHAPES: tuple[Shape, ...] = ("normal", "whole numbers", "scaled", "shifted", "equal", "zero")


def vectors_of(shape: Shape, rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, dim))
    if shape == "whole numbers":
        vectors = np.round(vectors)
    elif shape == "scaled":
        vectors *= 10.0 ** random.uniform(-44, 13, (rows, 1))
    elif shape == "shifted":
        vectors += 1000
    elif shape == "equal":
        vectors[:] = vectors[:1]
    elif shape == "zero":
        vectors[:] = 0
    return vectors.astype(np.float32)


class Life(RuleBasedStateMachine):
    """What an index may go through, beside a dictionary that goes through the same."""

    scan_name = "reference"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.truth: dict[int, NDArray[np.float32]] = {}

    @initialize(dim=st.sampled_from([1, 2, 3, 8, 9, 17, 64, 70]), metric=st.sampled_from(["cosine", "dot", "l2"]))
    def begin(self, dim: int, metric: Any) -> None:
        self.dim, self.metric = dim, metric
        self.index = PatternIndex(dim, metric, scan=scan_called(self.scan_name))

    @rule(
        ids=st.lists(st.integers(-20, 200), unique=True, max_size=60),
        shape=st.sampled_from(SHAPES),
        seed=st.integers(0, 999),
    )
    def add(self, ids: list[int], shape: Shape, seed: int) -> None:
        vectors = vectors_of(shape, len(ids), self.dim, seed)
        self.index.add(ids, vectors)
        self.truth.update(zip(ids, vectors, strict=True))

    @rule(share=st.floats(0, 1), seed=st.integers(0, 999))
    def remove(self, share: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        gone = [identity for identity in self.truth if random.random() < share]
        self.index.remove(gone)
        for identity in gone:
            del self.truth[identity]

    @rule()
    def reload(self) -> None:
        self.index.save(self.folder / "index")
        self.index.close()
        self.index = PatternIndex.load(self.folder / "index", scan=scan_called(self.scan_name))

    @rule(
        shape=st.sampled_from(SHAPES),
        seed=st.integers(0, 999),
        k=st.integers(1, 300),
        allow=st.none() | st.sets(st.integers(-30, 210)),
        known=st.booleans(),
    )
    def search(self, shape: Shape, seed: int, k: int, allow: set[int] | None, known: bool) -> None:
        queries = vectors_of(shape, 3, self.dim, seed)
        if known and self.truth:
            queries[0] = next(iter(self.truth.values()))
        chosen = {i: v for i, v in self.truth.items() if allow is None or i in allow}
        ids, scores = self.index.search(queries, k, allow)
        for query, found, score in zip(queries, ids, scores, strict=True):
            expected, exact = brute_force(self.metric, chosen, query, k)
            assert found.tolist() == expected
            np.testing.assert_allclose(score, exact, rtol=2**-23, atol=1e-44)
        assert len(self.index) == len(self.truth)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


class NativeLife(Life):
    scan_name = "native"


@pytest.mark.parametrize("life", [Life, NativeLife])
def test_any_mix_of_changes_and_searches_agrees_with_brute_force(life: type[Life]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        life,
        settings=settings(
            max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
