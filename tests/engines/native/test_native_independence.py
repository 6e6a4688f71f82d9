"""A sequence's logits are the same to the bit whatever shares its steps, however many threads compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.native_engine import (
    Logits,
    by_kernel,
    feed,
    new_cache,
    pieces,
    some_tokens,
    tiny_adapter,
    tiny_native,
)
from synapse.engines.cache.blocks import BLOCK_TOKENS
from synapse.engines.native.layers import Precision, pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.packing import Kind
from synapse.engines.reference.lora import Stack
from synapse.engines.reference.transformer import Chunk

Closing = Callable[[NativeModel], NativeModel]
MINE = (40, 1, 1, 1)
"""Steps of the sequence that is watched: a prompt, then one token at a time."""


@pytest.fixture(scope="module")
def model() -> Iterator[NativeModel]:
    made = tiny_native("qwen2", kind="q4", threads=2, vocab=120)
    yield made
    made.close()


def stacks_of(model: NativeModel) -> list[Stack]:
    """Stacks that share layers, in either order."""
    config = model.packed.config
    kinds: list[tuple[int, Precision]] = [(3, "float16"), (16, "int8"), (24, "float16")]
    a, b, c = (pack_layer(tiny_adapter(config, rank=rank, seed=rank), config.blocks, kind) for rank, kind in kinds)
    return [(), ((a, 1.0),), ((a, 0.5), (b, -1.5)), ((b, 1.0), (a, 1.0)), ((c, 0.0),), ((c, 1.0), (a, 2.0), (b, 1.0))]


def sequence(model: NativeModel, seed: int, first_block: int, sizes: tuple[int, ...], stack: Stack) -> list[Chunk]:
    """Random tokens in chunks of these sizes, in blocks that lie in descending order."""
    tokens = some_tokens(model.packed.config, sum(sizes), seed)
    needed = -(-len(tokens) // BLOCK_TOKENS)
    return pieces(tokens, range(first_block + needed - 1, first_block - 1, -1), sizes[:-1], stack)


def watched(model: NativeModel, stack: Stack, *strangers: list[Chunk], place: int = 0) -> Logits:
    """The logits of the sequence that is watched, with strangers before and after it."""
    mine = sequence(model, 99, 0, MINE, stack)
    together = [*strangers[:place], mine, *strangers[place:]]
    blocks = 1 + max(int(chunks[0].table.max()) for chunks in together)
    return feed(by_kernel(model), new_cache(model, blocks), *together)[place]


def company(model: NativeModel, number: int, stacks: list[Stack]) -> list[list[Chunk]]:
    """So many strangers: some decode, some are in their prompt, some do either."""
    shapes = ((1, 1, 1, 1), (5, 1, 1, 1), (33,), (1, 9, 1), (2, 2, 2, 2), (17, 1))
    blocks = count(4, 2)
    return [sequence(model, n, next(blocks), shapes[n % 6], stacks[n % len(stacks)]) for n in range(number)]


@pytest.mark.parametrize("strangers", [1, 2, 3, 4, 6, 7, 8, 14, 15, 16, 31, 32])
def test_strangers_change_no_bit(model: NativeModel, strangers: int) -> None:
    stacks = stacks_of(model)
    for stack in stacks:
        alone = watched(model, stack)
        for theirs, place in ((stacks[:1], 0), (stacks, strangers // 2), (stacks, strangers)):
            beside = company(model, strangers, theirs)
            assert np.array_equal(watched(model, stack, *beside, place=place), alone)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whoever_comes_and_goes_changes_no_bit(model: NativeModel, data: st.DataObject) -> None:
    stacks = stacks_of(model)
    sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)
    drawn = data.draw(st.lists(st.tuples(sizes, st.sampled_from(range(6)), st.integers(0, 99)), max_size=9))
    beside = [sequence(model, seed, 4 + 3 * n, shape, stacks[stack]) for n, (shape, stack, seed) in enumerate(drawn)]
    stack, place = stacks[data.draw(st.integers(0, 5))], data.draw(st.integers(0, len(beside)))
    assert np.array_equal(watched(model, stack, *beside, place=place), watched(model, stack))


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
def test_the_number_of_threads_changes_no_bit(kind: Kind, close: Closing) -> None:
    found = []
    for threads in (1, 2, 3, 4, 9):
        model = close(tiny_native("qwen3", kind=kind, threads=threads, vocab=120))
        stacks = stacks_of(model)
        together = company(model, 13, stacks)
        found.append(np.concatenate(feed(by_kernel(model), new_cache(model, 40), *together)))
        found.append(np.concatenate([watched(model, stack) for stack in stacks]))
    for one, other in zip(found, found[2:], strict=False):
        assert np.array_equal(one, other)


def test_where_in_the_cache_a_sequence_lies_changes_no_bit(model: NativeModel) -> None:
    tokens = some_tokens(model.packed.config, 100)
    (one,) = feed(by_kernel(model), new_cache(model, 4), pieces(tokens, [0, 1, 2, 3], (64,)))
    (other,) = feed(by_kernel(model), new_cache(model, 30), pieces(tokens, [29, 3, 17, 4], (64,)))
    assert np.array_equal(one, other)


def test_what_was_in_a_block_before_changes_no_bit(model: NativeModel) -> None:
    tokens, used = some_tokens(model.packed.config, 50), new_cache(model, 2)
    (expected,) = feed(by_kernel(model), new_cache(model, 2), pieces(tokens, [1, 0]))
    used.keys[:] = used.values[:] = np.nan
    (found,) = feed(by_kernel(model), used, pieces(tokens, [1, 0]))
    assert np.array_equal(found, expected)


def test_the_same_layer_in_two_objects_and_in_one_is_the_same(model: NativeModel) -> None:
    """A layer that was evicted and read again has the same id, and may be in a batch beside its older copy."""
    config = model.packed.config
    one, other = (pack_layer(tiny_adapter(config, rank=6), config.blocks) for _ in range(2))
    alone = watched(model, ((one, 1.0),))
    beside = sequence(model, 5, 10, (3, 1), ((other, 0.25),))
    assert np.array_equal(watched(model, ((one, 1.0),), beside, place=1), alone)


def test_a_shared_prefix_gives_the_bits_of_ones_own(model: NativeModel) -> None:
    cache, tokens = new_cache(model, 4), some_tokens(model.packed.config, 96)
    (own,) = feed(by_kernel(model), cache, pieces(tokens, [2, 0, 3]))
    later = Chunk(tokens[64:], 64, np.array([2, 0, 1]), (), 32)
    answer = by_kernel(model)([later], cache)
    assert np.array_equal(answer.values, own[64:])
