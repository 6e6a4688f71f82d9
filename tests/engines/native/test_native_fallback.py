"""When the kernel fails the reference goes on, with the same weights, in the same KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from support.native_engine import (
    Logits,
    by_kernel,
    distances,
    engine_library,
    feed,
    new_cache,
    pieces,
    some_tokens,
    tiny_adapter,
    tiny_native,
)
from synapse.engines.native import steps
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.kernel import agrees
from synapse.engines.native.layers import pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.steps import Supervised
from synapse.engines.native.transformer import NativeTransformer
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.errors import Unavailable
from synapse.hotpath.call import HotPath
from synapse.hotpath.metrics.lanes import SLOTS
from synapse.hotpath.rollout.decision import BUCKETS, Decision

Closing = Callable[[NativeModel], NativeModel]
SIZES = (30, 1, 1, 20, 1, 1, 1)
STEPS = len(SIZES) + 1
"""The sizes, and what is left of the 56 tokens."""


@dataclass
class Kernel:
    """The kernel, which raises at some of its calls."""

    fails_at: frozenset[int] = frozenset()
    calls: list[int] = field(default_factory=list)

    def __call__(self, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
        self.calls.append(len(self.calls))
        if self.calls[-1] in self.fails_at:
            raise MemoryError("no room for the scratch memory")
        return model.compute(engine_library(), chunks, cache)


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Callable[..., HotPath[..., Any]]:
    """Puts a hot path that nobody supervises in the place of the engine's."""

    def tie(kernel: Kernel, *, compare: float = 0.0, good: Callable[..., bool] = agrees) -> HotPath[..., Any]:
        own = steps.PATHS["engine"]
        made = HotPath("engine", own.reference, own.native, good)
        made.decide(Decision(kernel, BUCKETS, compare, [0] * SLOTS, 1, None, "full"))
        monkeypatch.setattr(steps, "forward", made.call)
        monkeypatch.setattr(steps, "PATHS", {"engine": made})
        return made

    return tie


def through(model: NativeModel, cache: HalfCache) -> Logits:
    """The logits of a sequence with a layer, step by step, as an engine asks for them."""
    native = NativeTransformer(model, Supervised(), "float16")
    stack = ((pack_layer(tiny_adapter(model.packed.config, rank=6, size=0.3), 2), 1.0),)
    return feed(native.forward, cache, pieces(some_tokens(model.packed.config, 56), [1, 0], SIZES, stack))[0]


@pytest.mark.parametrize("fails_at", [{0}, {1, 3}, {2, 4, 5}, set(range(20))])
def test_the_reference_answers_where_the_kernel_raises_and_the_cache_goes_on(
    fails_at: set[int], path: Callable[..., HotPath[..., Any]], close: Closing
) -> None:
    model = close(tiny_native("qwen2", threads=2))
    tied = path(Kernel())
    expected = through(model, new_cache(model, 2))
    tied = path(Kernel(frozenset(fails_at)))
    found = through(model, new_cache(model, 2))
    assert 0 < distances(found, expected).max() < 0.003
    assert tied.last_error == "MemoryError: no room for the scratch memory"
    assert tied.counters.read().fallbacks == len(fails_at & set(range(STEPS)))


def test_a_step_that_is_compared_gives_the_bits_of_one_that_is_not(
    path: Callable[..., HotPath[..., Any]], close: Closing
) -> None:
    """Chance picks the steps that are compared: a request must not get other tokens for that."""
    model = close(tiny_native("qwen2", kind="q4", threads=2))
    caches = [new_cache(model, 2) for _ in range(2)]
    path(Kernel())
    expected = through(model, caches[0])
    tied = path(Kernel(), compare=1.0)
    assert np.array_equal(through(model, caches[1]), expected)
    assert tied.counters.read().native_answers == STEPS
    assert np.array_equal(caches[0].keys, caches[1].keys)
    assert np.array_equal(caches[0].values, caches[1].values)


def test_a_kernel_found_wrong_leaves_the_keys_and_values_of_the_reference(
    path: Callable[..., HotPath[..., Any]], close: Closing
) -> None:
    model = close(tiny_native("qwen2", kind="q4", threads=2))
    caches = [new_cache(model, 2) for _ in range(2)]
    path(Kernel(frozenset(range(20))))
    expected = through(model, caches[0])
    tied = path(Kernel(), compare=1.0, good=lambda answer, reference: False)
    assert np.array_equal(through(model, caches[1]), expected)
    assert tied.take_faults().wrong == "an answer did not agree with the reference's"
    assert np.array_equal(caches[0].keys, caches[1].keys)
    assert np.array_equal(caches[0].values, caches[1].values)


def test_a_step_after_closing_is_refused_whoever_would_answer(path: Callable[..., HotPath[..., Any]]) -> None:
    path(Kernel())
    model = tiny_native(threads=2)
    native, sequence = NativeTransformer(model, Supervised()), pieces(some_tokens(model.packed.config, 4), [0])
    cache = native.new_cache(1)
    feed(native.forward, cache, sequence)
    native.close()
    with pytest.raises(Unavailable, match="the engine is closed"):
        feed(native.forward, cache, sequence)
    native.close()


def test_a_layer_is_not_kept_by_the_step_that_used_it(path: Callable[..., HotPath[..., Any]], close: Closing) -> None:
    path(Kernel(), compare=1.0)
    model = close(tiny_native(threads=2))
    through(model, new_cache(model, 2))
    assert model.computed is None
    assert model.put_back is None


def test_another_build_of_the_kernel_takes_over_between_two_steps(close: Closing) -> None:
    """As after a rollback and another rollout: a model's threads are in the library they were started with."""
    import ctypes

    model = close(tiny_native(threads=3))
    tokens, cache = some_tokens(model.packed.config, 20), new_cache(model, 1)
    whole, parts = pieces(tokens, [0], (12,)), []
    (expected,) = feed(by_kernel(model), new_cache(model, 1), whole)
    first = engine_library()
    second = ctypes.CDLL(first._name)
    second.engine_step.argtypes = second.engine_stop.argtypes = [ctypes.c_int64]
    second.engine_serve.argtypes = [ctypes.c_int64, ctypes.c_int64]
    for library, part in zip((first, second), whole, strict=True):
        parts.append(model.compute(library, [part], cache).values.copy())
    assert np.array_equal(np.concatenate(parts), expected)
