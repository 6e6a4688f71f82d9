"""The kernel chooses the token that the reference chooses, or leaves the choice to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.native_engine import engine_library
from synapse.engines.choice import UNDECIDED, Choice, Edits
from synapse.engines.native.kernel import choose_native
from synapse.engines.sampling import choose

Row = NDArray[np.float32]
GRID = st.integers(-24, 24).map(lambda number: number / 4)
"""Few different logits, so that many are equal."""
ROWS = st.one_of(
    st.lists(GRID, min_size=1, max_size=300),
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=300),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    st.lists(st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38]), min_size=1, max_size=50),
    st.builds(lambda count, seed: normal(count, seed).tolist(), st.integers(1, 3000), st.integers(0, 99)),
).map(lambda row: np.array(row, np.float32))
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 5e-324, 1e-30, 1e-3, 0.7, 1.0, 3.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 40, 300, 5000]),
        "top_p": st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.01, 5e-324]),
        "min_p": st.sampled_from([0.0, 1e-9, 0.05, 0.9, 1.0]),
        "uniform": st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 1 - 2**-53])),
    }
)


def normal(count: int, seed: int, size: float = 3.0) -> Row:
    return np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(size)


def edits_for(draw: st.DataObject, vocab: int) -> Edits | None:
    tokens = draw.draw(st.lists(st.integers(0, vocab - 1), max_size=9, unique=True))
    if not tokens:
        return None
    columns = [
        draw.draw(st.lists(st.floats(*span, width=32), min_size=len(tokens), max_size=len(tokens)))
        for span in ((-40, 40), (0.5, 2), (-2, 2))
    ]
    return Edits(np.array(tokens, np.int32), *(np.array(column, np.float32) for column in columns))


def mask_for(draw: st.DataObject, vocab: int) -> NDArray[np.uint32] | None:
    """None, or one that allows a single token or about half of them."""
    kind = draw.draw(st.sampled_from(["none", "one", "half"]))
    if kind == "none":
        return None
    allowed = np.zeros(-(-vocab // 32) * 32, np.bool_)
    if kind == "half":
        allowed[:vocab] = normal(vocab, draw.draw(st.integers(0, 99))) > 0
    allowed[draw.draw(st.integers(0, vocab - 1))] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)


@settings(max_examples=400, deadline=None)
@given(row=ROWS, fields=SETTINGS, data=st.data())
def test_a_choice_of_the_kernel_is_that_of_the_reference(row: Row, fields: dict[str, Any], data: st.DataObject) -> None:
    choice = Choice(**fields, edits=edits_for(data, len(row)), mask=mask_for(data, len(row)))
    with np.errstate(over="ignore", invalid="ignore"):
        assert choose_native(engine_library(), row, choice) in (UNDECIDED, choose(row, choice))


@pytest.mark.parametrize("size", [0.1, 0.5, 2.0, 6.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 700},
    ],
    ids=str,
)
def test_hardly_any_choice_is_left_to_the_reference(fields: dict[str, Any], size: float) -> None:
    """Also for a vocabulary of ordinary size, flat or peaked."""
    uniforms = np.random.default_rng(5).random(20)
    found = []
    for n, uniform in enumerate(uniforms):
        row, choice = normal(49_152, n, size), Choice(uniform=uniform, **fields)
        found.append(choose_native(engine_library(), row, choice))
        assert found[-1] in (UNDECIDED, choose(row, choice))
    assert found.count(UNDECIDED) <= 1


def test_all_but_one_forbidden_leaves_that_one() -> None:
    mask = np.zeros(2, np.uint32)
    mask[1] = 4
    for temperature in (0.0, 1.0):
        for choice in (Choice(temperature, mask=mask, uniform=0.999), Choice(temperature, 3, 0.5, 0.1, 0.0, mask=mask)):
            row = normal(40, 0)
            assert choose_native(engine_library(), row, choice) in (34, UNDECIDED)
            assert choose(row, choice) == 34


def exact_shares(row: Row, temperature: float) -> NDArray[np.float64]:
    weights = np.exp((row.astype(np.float64) - float(row.max())) / temperature)
    return weights / weights.sum()


DISTANCES = [sign * 10.0**-power for power in range(5, 14) for sign in (-1, 1)]


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 7.0, 100.0])
def test_a_draw_close_to_a_border_is_on_the_side_where_the_reference_has_it(temperature: float) -> None:
    """Weights of float32 are not good enough for these; beyond some distance the kernel must not give up, either."""
    undecided = draws = 0
    for seed in range(12):
        row = normal(700 + 301 * seed, seed) + np.float32(4 * seed)
        shares = exact_shares(row, temperature)
        tokens = np.flatnonzero(shares > 1e-8)[:-1]
        borders = np.cumsum(shares)[tokens]
        for border in np.random.default_rng(seed).choice(borders, 6) if len(borders) else []:
            for distance in DISTANCES:
                choice = Choice(temperature, uniform=float(np.clip(border + distance, 0, 1 - 2**-53)))
                found = choose_native(engine_library(), row, choice)
                assert found in (UNDECIDED, choose(row, choice)), (seed, border, distance)
                undecided += found == UNDECIDED and abs(distance) >= 1e-10
                draws += 1
    assert undecided <= 0.05 * draws
    assert draws > 100


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 7.0])
def test_top_p_close_to_the_weight_of_a_few_tokens_keeps_what_the_reference_keeps(temperature: float) -> None:
    """The draw is the largest, which the last that is kept gets: in this row ids follow the logits."""
    undecided = kinds = 0
    for seed in range(12):
        row = np.sort(normal(700 + 301 * seed, seed) + np.float32(4 * seed))[::-1].copy()
        sums = np.cumsum(exact_shares(row, temperature))
        rng = np.random.default_rng(seed)
        found = set()
        for border in sums[np.searchsorted(sums, rng.uniform(0.3, 0.99, 6)).clip(max=len(sums) - 2)]:
            for distance in DISTANCES:
                choice = Choice(temperature, top_p=float(np.clip(border + distance, 0.01, 1 - 1e-9)), uniform=1 - 1e-9)
                token = choose_native(engine_library(), row, choice)
                assert token in (UNDECIDED, choose(row, choice)), (seed, border, distance)
                undecided += token == UNDECIDED and abs(distance) >= 1e-10
                found.add(token)
        kinds += len(found)
    assert undecided <= 12
    assert kinds > 20
