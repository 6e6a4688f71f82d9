"""The KV cache: keys and values in fixed-size blocks, and who holds which block.

Sequences hold lists of block numbers (a block table), so memory is taken as they grow and prefixes are shared: a full
block is published under a digest of everything its contents depend on (the layer stack, and every token up to its
end), and a later sequence with the same beginning takes the block instead of computing it again. The idea is that of
PagedAttention (Kwon et al., 2023, arXiv:2309.06180).
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 32
"""Tokens in a block: small enough to waste little, large enough that gathering is a few long copies."""

Digest = bytes
Number = TypeVar("Number", bound=np.floating)


def root_digest(layers: Iterable[tuple[str, float]]) -> Digest:
    """Where the digest chain of a layer stack starts: keys and values depend on the layers that computed them."""
    return hashlib.sha256(repr(sorted(layers)).encode()).digest()


def next_digest(parent: Digest, tokens: Sequence[int]) -> Digest:
    """The digest of a block that holds `tokens` and follows the block of `parent`."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int64).tobytes()).digest()


class BlockPool:
    """Counts who holds each block. Knows nothing of what is inside, so every backend shares it.

    A block is *free* (never published, or forgotten), *held* by one or more sequences, or *kept*: held by nobody, but
    published, and handed out again for its contents until the room is needed (least recently used goes first).
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._holders = [0] * blocks
        self._digest: list[Digest | None] = [None] * blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._published: dict[Digest, int] = {}

    @property
    def available(self) -> int:
        """How many blocks `take` could still give."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """How many blocks sequences hold."""
        return self.blocks - self.available

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None (and nothing taken) when there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, digest: Digest) -> int | None:
        """The block published under this digest, with one holder more, or None."""
        block = self._published.get(digest)
        if block is None:
            return None
        self._kept.pop(block, None)
        self._holders[block] += 1
        return block

    def publish(self, block: int, digest: Digest) -> None:
        """Say what a full block holds. The first block of a digest stays the one that is shared."""
        if digest not in self._published and self._digest[block] is None:
            self._published[digest] = block
            self._digest[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each of these blocks."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._digest[block] is None:
                    self._free.append(block)
                else:
                    self._kept[block] = None

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._published[digest]
            self._digest[block] = None


class KVCache:
    """Keys and values of every transformer block, float32, addressed by block number.

    The arrays are [layers, kv_heads, blocks, BLOCK_TOKENS, head_dim], and cost memory only as far as they are filled.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> None:
        shape = (layers, kv_heads, blocks, BLOCK_TOKENS, head_dim)
        self._keys = untouched_zeros(shape, np.float32)
        self._values = untouched_zeros(shape, np.float32)
        self._rows = (kv_heads, blocks * BLOCK_TOKENS, head_dim)

    def write(
        self, layer: int, slots: NDArray[np.intp], keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], at `slots` (block x BLOCK_TOKENS + offset)."""
        self._keys[layer].reshape(self._rows)[:, slots] = keys.transpose(1, 0, 2)
        self._values[layer].reshape(self._rows)[:, slots] = values.transpose(1, 0, 2)

    def read(self, layer: int, table: NDArray[np.intp], length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of the first `length` tokens of a block table, each [kv_heads, length, head_dim].

        A table of consecutive blocks (a sequence that grew alone) is read in place, any other one is copied.
        """
        first, count = int(table[0]), len(table)
        index = slice(first, first + count) if np.array_equal(table, np.arange(first, first + count)) else table
        kv_heads, _, head_dim = self._rows
        shape = (kv_heads, count * BLOCK_TOKENS, head_dim)
        keys = self._keys[layer][:, index].reshape(shape)
        values = self._values[layer][:, index].reshape(shape)
        return keys[:, :length], values[:, :length]


def untouched_zeros(shape: tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """Zeros whose memory is taken page by page when it is first written.

    In huge pages, which `np.zeros` gets where the system gives them, the first token of a sequence would touch all of
    a pool: each head of each layer lies in another one.
    """
    mapping = mmap.mmap(-1, max(1, math.prod(shape)) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, dtype, math.prod(shape)).reshape(shape)
