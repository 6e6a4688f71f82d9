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


def test_a_full_pool_gives_nothing_rather_than_a_part() -> None:
    pool = BlockPool(4)
    assert len(pool.take(3) or []) == 3
    assert pool.take(2) is None
    assert pool.available == 1


def test_a_published_block_is_found_again_after_its_holder_left() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1) or []
    digest = next_digest(root_digest(()), [1, 2, 3])
    pool.publish(block, digest)
    pool.release([block])
    assert pool.share(digest) == block
    assert pool.held == 1


def test_kept_blocks_make_room_least_recently_used_first() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2) or []
    a, b = next_digest(b"", [1]), next_digest(b"", [2])
    pool.publish(first, a)
    pool.publish(second, b)
    pool.release([first])
    pool.release([second])
    assert pool.take(1) == [first]
    assert pool.share(a) is None
    assert pool.share(b) == second


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
        self.contents: dict[int, bytes] = {}
        self.digests = [bytes([n]) * 32 for n in range(8)]

    @rule(count=st.integers(0, 7))
    def take(self, count: int) -> None:
        free = 6 - len(set(self.holds))
        taken = self.pool.take(count)
        assert (taken is None) == (count > free)
        for block in taken or []:
            assert block not in self.holds
            self.contents.pop(block, None)
            self.holds.append(block)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        self.holds.remove(block)
        self.pool.release([block])

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        digest = data.draw(st.sampled_from(self.digests))
        if block not in self.contents and digest not in self.contents.values():
            self.contents[block] = digest
        self.pool.publish(block, digest)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.digests))
        block = self.pool.share(digest)
        if block is not None:
            assert self.contents[block] == digest
            self.holds.append(block)
        else:
            assert digest not in self.contents.values()

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        assert self.pool.held == len(set(self.holds))
        assert self.pool.available == 6 - self.pool.held


TestPoolMachine = PoolMachine.TestCase
