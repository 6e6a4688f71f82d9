"""The KV cache: keys and values in fixed-size blocks, and how many sequences hold each block.

Sequences hold lists of block numbers (a block table), so memory is taken as they grow and prefixes are shared: a block
is registered with what its contents depend on (the layer stack, and every token up to its end), and a later sequence
with the same beginning takes the block instead of computing it again. The idea is that of PagedAttention (Kwon et al.,
2023, arXiv:2309.06180).
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 32
"""Tokens in a block: small enough to waste little, large enough that gathering is a few long copies."""
SIBLINGS = 64
"""How many blocks with the same tokens before them are compared when a sequence looks for a part of one."""

Digest = bytes
Number = TypeVar("Number", bound=np.floating)


def root_digest(layers: Iterable[tuple[str, float]]) -> Digest:
    """Where the digest chain of a layer stack starts: keys and values depend on the layers that computed them."""
    return hashlib.sha256(repr(sorted(layers)).encode()).digest()


def next_digest(parent: Digest, tokens: Sequence[int]) -> Digest:
    """The digest of a block that holds `tokens` and follows the block of `parent`."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int64).tobytes()).digest()


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a block holds: the tokens from its beginning, and the digest of everything before them."""

    parent: Digest
    tokens: tuple[int, ...]


class BlockPool:
    """Counts who holds each block. Knows nothing of what is inside, so every backend shares it.

    A block is *free* (nothing is known of its contents), *held* by `ref_count` sequences, or *cached*: held by nobody,
    but registered, and handed out again for its contents until the room is needed. The least recently used goes first,
    and of the blocks of one sequence the last: what many share, which stands at their beginning, goes last of all.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.evictions = 0
        """Cached blocks whose contents gave way to others."""
        self.ref_count = [0] * blocks
        self._contents: list[_Contents | None] = [None] * blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._full: dict[Digest, int] = {}
        self._followers: dict[Digest, dict[int, None]] = {}

    @property
    def available(self) -> int:
        """How many blocks `allocate` could still give."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """How many blocks sequences hold."""
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """How many blocks nobody holds, but whose contents are there for whoever asks."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None (and nothing taken) when there are not so many."""
        if count > self.available:
            return None
        allocated = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
                self.evictions += 1
            self.ref_count[block] = 1
            allocated.append(block)
        return allocated

    def free(self, block_table: Sequence[int]) -> None:
        """Give up one hold on each of a sequence's blocks. The last ones will be evicted first."""
        for block in reversed(block_table):
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                if self._contents[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, parent: Digest, tokens: Sequence[int]) -> None:
        """Say what a held block begins with; more of it may be registered when it has filled further.

        Of blocks with the same contents the first stays the one that is shared.
        """
        contents = _Contents(parent, tuple(tokens))
        known = self._contents[block]
        if known is not None and (known.parent != parent or len(known.tokens) >= len(tokens)):
            return
        if len(tokens) == BLOCK_TOKENS:
            digest = next_digest(parent, tokens)
            if digest in self._full:
                self._forget(block)
                return
            self._full[digest] = block
        elif self._closest(parent, contents.tokens, but=block)[1] == len(tokens):
            return
        self._contents[block] = contents
        self._followers.setdefault(parent, {})[block] = None

    def __contains__(self, digest: Digest) -> bool:
        """Whether there is a full block of this digest."""
        return digest in self._full

    def share(self, digest: Digest) -> int | None:
        """The full block of this digest, with one holder more, or None."""
        block = self._full.get(digest)
        if block is not None:
            self._hold(block)
        return block

    def share_part(self, parent: Digest, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Of the blocks that follow `parent` the one that begins with most of `tokens`, with one holder more.

        Returns:
            The block and how many of the tokens it begins with, at least one; None if there is no such block. What
            else it holds may differ, so it is for copying from.
        """
        block, count = self._closest(parent, tuple(tokens))
        if not count:
            return None
        self._hold(block)
        return block, count

    def part_length(self, parent: Digest, tokens: Sequence[int]) -> int:
        """How many tokens `share_part` would find."""
        return self._closest(parent, tuple(tokens))[1]

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self.ref_count[block] += 1

    def _closest(self, parent: Digest, tokens: tuple[int, ...], but: int = -1) -> tuple[int, int]:
        """The newest of the blocks that begin with the largest part of `tokens`, and how many tokens that are."""
        best = (-1, 0)
        for block in islice(reversed(self._followers.get(parent, {})), SIBLINGS):
            contents = self._contents[block]
            if contents is not None and block != but:
                count = common_length(contents.tokens, tokens)
                if count > best[1]:
                    best = (block, count)
        return best

    def _forget(self, block: int) -> None:
        contents = self._contents[block]
        if contents is None:
            return
        self._contents[block] = None
        followers = self._followers[contents.parent]
        del followers[block]
        if not followers:
            del self._followers[contents.parent]
        if len(contents.tokens) == BLOCK_TOKENS:
            del self._full[next_digest(contents.parent, contents.tokens)]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


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

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first so many tokens of a block into another."""
        self._keys[:, :, target, :tokens] = self._keys[:, :, source, :tokens]
        self._values[:, :, target, :tokens] = self._values[:, :, source, :tokens]

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

    def close(self) -> None:
        """Give the memory back. Nothing is kept any more."""
        self._keys = self._values = np.empty((0, 0, 0, 0, 0), np.float32)


def untouched_zeros(shape: tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """Zeros whose memory is taken page by page when it is first written.

    In huge pages, which `np.zeros` gets where the system gives them, the first token of a sequence would touch all of
    a pool: each head of each layer lies in another one.
    """
    mapping = mmap.mmap(-1, max(1, math.prod(shape)) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, dtype, math.prod(shape)).reshape(shape)
