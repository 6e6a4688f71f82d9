"""The KV cache of the native engine: float16, in the order in which the kernel reads it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from synapse.engines.cache.blocks import BLOCK_TOKENS, untouched_zeros


class HalfCache:
    """Keys and values of every transformer block, float16, addressed by block number.

    Keys are [layers, kv_heads, blocks, head_dim, BLOCK_TOKENS]: the scores of a block's tokens are made side by side.
    Values are [layers, kv_heads, blocks, BLOCK_TOKENS, head_dim]. Memory is taken as far as they are filled. `write`
    and `read` are those of `KVCache`, so that the reference can go on with what the kernel began.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> None:
        self.blocks = blocks
        self.keys = untouched_zeros((layers, kv_heads, blocks, head_dim, BLOCK_TOKENS), np.float16)
        self.values = untouched_zeros((layers, kv_heads, blocks, BLOCK_TOKENS, head_dim), np.float16)

    def __reduce__(self) -> tuple[type[HalfCache], tuple[int, int, int, int]]:
        """An empty cache of the same shape: what the burn-in of a kernel is given."""
        layers, kv_heads, blocks, head_dim, _ = self.keys.shape
        return HalfCache, (layers, kv_heads, head_dim, blocks)

    def write(
        self, layer: int, slots: NDArray[np.intp], keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], at `slots` (block x BLOCK_TOKENS + offset)."""
        blocks, offsets = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
        with np.errstate(over="ignore"):
            self.keys[layer].transpose(1, 3, 0, 2)[blocks, offsets] = keys
            self.values[layer].transpose(1, 2, 0, 3)[blocks, offsets] = values

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first so many tokens of a block into another."""
        self.keys[:, :, target, :, :tokens] = self.keys[:, :, source, :, :tokens]
        self.values[:, :, target, :tokens] = self.values[:, :, source, :tokens]

    def keep(self, slots: NDArray[np.intp]) -> Callable[[], None]:
        """Remember what is at these slots. The function that is returned puts it back."""
        blocks, offsets = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
        keys, values = self.keys[:, :, blocks, :, offsets], self.values[:, :, blocks, offsets]

        def put_back() -> None:
            self.keys[:, :, blocks, :, offsets] = keys
            self.values[:, :, blocks, offsets] = values

        return put_back

    def read(self, layer: int, table: NDArray[np.intp], length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of the first `length` tokens of a block table, each [kv_heads, length, head_dim]."""
        kv_heads, _, head_dim = self.keys.shape[1:4]
        keys = self.keys[layer][:, table].swapaxes(2, 3).reshape(kv_heads, -1, head_dim)[:, :length]
        values = self.values[layer][:, table].reshape(kv_heads, -1, head_dim)[:, :length]
        return keys.astype(np.float32), values.astype(np.float32)

    def close(self) -> None:
        """Give the memory back. Nothing is kept any more."""
        self.keys = self.values = np.empty((0, 0, 0, 0, 0), np.float16)
