"""Numbers that overflow in one sequence show there and nowhere else, neither at once nor later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.native_engine import by_kernel, new_cache, some_tokens, tiny_adapter, tiny_native
from synapse.engines.choice import Choice
from synapse.engines.native.layers import Precision, pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.packing import Kind
from synapse.engines.reference.lora import Stack
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.models.adapters.adapter import Adapter, LoraFactors
from synapse.models.config import PROJECTIONS, ModelConfig

Closing = Callable[[NativeModel], NativeModel]
WIDTHS = {"a multiple of 32": {"hidden": 64, "intermediate": 96}, "no multiple": {"hidden": 72, "intermediate": 104}}


def overflowing(config: ModelConfig, projection: str) -> Adapter:
    """A layer of finite factors whose product with anything is not."""
    adapter = tiny_adapter(config, rank=8, targets=[(0, projection)])
    factors = {
        key: LoraFactors(f.A * np.float32(1e30), f.B * np.float32(1e30), f.scale) for key, f in adapter.factors.items()
    }
    return replace(adapter, sha256="overflowing", factors=factors)


def chunk(model: NativeModel, block: int, count: int, wanted: int = 1, stack: Stack = ()) -> Chunk:
    tokens, choices = some_tokens(model.packed.config, count, block), (Choice(),) * wanted
    return Chunk(tokens, 0, np.array([block]), stack, wanted, choices)


def rows(answer: StepLogits) -> list[tuple[NDArray[np.float32], int]]:
    return [(values.copy(), int(token)) for values, token in zip(answer.values, answer.chosen, strict=True)]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_layer_that_overflows_spoils_its_own_sequence_only(
    projection: str, width: str, kind: Kind, precision: Precision, close: Closing
) -> None:
    model = close(tiny_native(kind=kind, threads=2, **WIDTHS[width]))
    config = model.packed.config
    with np.errstate(over="ignore"):
        bad: Stack = ((pack_layer(overflowing(config, projection), config.blocks, precision), 1.0),)
    good: Stack = ((pack_layer(tiny_adapter(config, rank=5), config.blocks, precision), 0.5),)
    compute, cache = by_kernel(model), new_cache(model, 8)
    healthy = [chunk(model, 0, 1), chunk(model, 1, 9, 4, good), chunk(model, 2, 1, 1, good)]
    expected = rows(compute(healthy, cache))
    for place in range(4):
        for wanted in (0, 1, 3):
            ill = chunk(model, 4, 3, wanted, (*bad, *good))
            answer = compute([*healthy[:place], ill, *healthy[place:]], cache)
            first = sum(c.wanted for c in healthy[:place])
            mask = np.ones(6 + wanted, bool)
            mask[first : first + wanted] = False
            assert np.array_equal(answer.finite, mask)
            found = rows(answer)
            assert all(map(same, found[:first] + found[first + wanted :], expected))
            assert all(map(same, rows(compute(healthy, cache)), expected)), "and nothing of it is left"


def test_numbers_beyond_float16_in_the_cache_are_noticed_as_the_reference_notices_them(close: Closing) -> None:
    model = close(tiny_native(threads=2))
    config = model.packed.config
    for projection in ("k_proj", "v_proj"):
        layer = pack_layer(tiny_adapter(config, rank=8, size=1e6, targets=[(1, projection)]), config.blocks)
        chunks = [chunk(model, 0, 5, 5), chunk(model, 1, 5, 5, ((layer, 1.0),))]
        answer = by_kernel(model)(chunks, new_cache(model, 2))
        with np.errstate(all="ignore"):
            expected = model.reference.forward(chunks, new_cache(model, 2))
        assert np.array_equal(answer.finite, expected.finite)
        assert answer.finite[:5].all()


def test_a_sequence_whose_cache_holds_no_numbers_does_not_reach_the_others(close: Closing) -> None:
    model = close(tiny_native("qwen3", threads=2))
    compute, cache = by_kernel(model), new_cache(model, 4)
    tokens = some_tokens(model.packed.config, 40)
    for table in ([0, 1], [2, 3]):
        compute([Chunk(tokens[:39], 0, np.array(table), (), 0)], cache)
    last = [Chunk(tokens[39:], 39, np.array(table), (), 1) for table in ([0, 1], [2, 3])]
    (expected,) = rows(compute(last[:1], cache))
    cache.values[:, :, 3] = np.nan
    answer = compute(last, cache)
    assert answer.finite.tolist() == [True, False]
    assert same(rows(answer)[0], expected)
