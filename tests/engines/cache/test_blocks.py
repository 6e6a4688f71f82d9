"""Blocks are counted exactly: none is lost, none is given twice, and shared contents are only reused when equal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool, KVCache, next_digest, root_digest

ROOT = root_digest(())


def full(number: int) -> list[int]:
    """The tokens of a full block."""
    return [number] * BLOCK_TOKENS


def test_a_full_pool_gives_nothing_rather_than_a_part() -> None:
    pool = BlockPool(4)
    assert len(pool.allocate(3) or []) == 3
    assert pool.allocate(2) is None
    assert pool.available == 1


def test_a_registered_block_is_found_again_after_its_holder_left() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.register(block, ROOT, full(1))
    pool.free([block])
    assert (pool.held, pool.cached) == (0, 1)
    assert pool.share(next_digest(ROOT, full(1))) == block
    assert pool.held == 1


def test_a_block_that_begins_alike_is_found_for_copying() -> None:
    pool = BlockPool(4)
    one, other, part = pool.allocate(3) or []
    pool.register(one, ROOT, [1, 2, 3, *range(9, 38)])
    pool.register(other, ROOT, [1, 2, 4, *range(9, 38)])
    pool.register(part, ROOT, [1, 2, 4, 5])
    assert pool.share_part(ROOT, [1, 2, 3, 4]) == (one, 3)
    assert pool.share_part(ROOT, [1, 2, 4, 5, 6]) == (part, 4)
    assert pool.share_part(ROOT, [2, 2]) is None
    assert pool.share_part(next_digest(ROOT, full(1)), [1, 2]) is None
    assert [pool.ref_count[block] for block in (one, other, part)] == [2, 1, 2]


def test_cached_blocks_make_room_least_recently_used_first_and_of_a_sequence_the_tail() -> None:
    pool = BlockPool(4)
    shared, first, second = pool.allocate(3) or []
    pool.register(shared, ROOT, full(1))
    parent = next_digest(ROOT, full(1))
    pool.register(first, parent, full(2))
    pool.register(second, parent, full(3))
    assert pool.share(parent) == shared
    pool.free([shared, first])
    pool.free([shared, second])
    assert pool.allocate(3) == [3, first, second]
    assert parent in pool
    assert pool.allocate(1) == [shared]
    assert parent not in pool
    assert pool.evictions == 3


def test_different_layers_weights_or_tokens_never_share() -> None:
    digests = {
        next_digest(root_digest(stack), tokens)
        for stack in [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),), (("a", 1.0), ("b", 1.0))]
        for tokens in [[1, 2], [2, 1]]
    }
    assert len(digests) == 10


def test_the_order_of_a_stack_does_not_matter_because_layers_add_up() -> None:
    assert root_digest((("a", 1.0), ("b", 0.5))) == root_digest((("b", 0.5), ("a", 1.0)))


@given(st.permutations(range(5)), st.integers(1, 5 * BLOCK_TOKENS))
def test_what_is_written_through_a_block_table_is_read_through_it(table: list[int], length: int) -> None:
    rng = np.random.default_rng(0)
    cache = KVCache(layers=2, kv_heads=2, head_dim=4, blocks=5)
    keys = rng.standard_normal((length, 2, 4), np.float32)
    values = rng.standard_normal((length, 2, 4), np.float32)
    positions = np.arange(length)
    slots = np.asarray(table)[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    cache.write(1, slots, keys, values)
    used = np.asarray(table)[: -(-length // BLOCK_TOKENS)]
    read_keys, read_values = cache.read(1, used, length)
    assert np.array_equal(read_keys, keys.transpose(1, 0, 2))
    assert np.array_equal(read_values, values.transpose(1, 0, 2))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_a_pool_costs_memory_only_as_far_as_it_is_filled() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = KVCache(layers=30, kv_heads=3, head_dim=64, blocks=256)
    token = np.ones((1, 3, 64), np.float32)
    for layer in range(30):
        cache.write(layer, np.array([5]), token, token)
    assert resident() - before < 20e6, "the whole pool is 377 MB"


class PoolMachine(RuleBasedStateMachine):
    """Random holders against a plain count of holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.holds: list[int] = []
        self.contents: dict[int, list[int]] = {}

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = 6 - len(set(self.holds))
        allocated = self.pool.allocate(count)
        assert (allocated is None) == (count > free)
        for block in allocated or []:
            assert block not in self.holds
            self.contents.pop(block, None)
            self.holds.append(block)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        self.holds.remove(block)
        self.pool.free([block])

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), number=st.integers(0, 7), length=st.integers(1, BLOCK_TOKENS) | st.just(BLOCK_TOKENS))
    def register(self, data: st.DataObject, number: int, length: int) -> None:
        """A block grows under the same beginning, and is registered again as it does."""
        block = data.draw(st.sampled_from(self.holds))
        known = self.contents.get(block)
        tokens = full(known[0] if known else number)[:length]
        self.pool.register(block, ROOT, tokens)
        if not known or len(known) < length:
            self.contents[block] = tokens

    @rule(number=st.integers(0, 7))
    def share(self, number: int) -> None:
        block = self.pool.share(next_digest(ROOT, full(number)))
        holders = [each for each, tokens in self.contents.items() if tokens == full(number)]
        assert (block in holders) if holders and block is not None else block is None or not holders
        if block is not None:
            self.holds.append(block)

    @rule(number=st.integers(0, 7), length=st.integers(1, BLOCK_TOKENS - 1))
    def share_part(self, number: int, length: int) -> None:
        found = self.pool.share_part(ROOT, full(number)[:length])
        if found is not None:
            block, count = found
            assert self.contents[block][:count] == full(number)[:count]
            self.holds.append(block)

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        assert self.pool.held == len(set(self.holds))
        assert self.pool.available == 6 - self.pool.held
        assert self.pool.ref_count == [self.holds.count(block) for block in range(6)]


TestPoolMachine = PoolMachine.TestCase
