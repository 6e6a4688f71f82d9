"""Random numbers that are a function of a seed and a position: Philox4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counters: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10: counters [4, n] and a key [2, 1] of 32-bit words become random 32-bit words [4, n]."""
    words = counters
    for _ in range(ROUNDS):
        products = words[[0, 2]] * FACTORS
        high, low = products >> HALF, products & WORD
        words = np.stack([high[1] ^ words[1] ^ key[0], low[1], high[0] ^ words[3] ^ key[1], low[0]])
        key = key + KEY_STEPS & WORD
    return words


def uniforms(seed: int, first: int, count: int) -> NDArray[np.float64]:
    """The numbers of `count` positions from `first` on, each from [0, 1) with 53 bits; `seed` has 64."""
    counters = np.zeros((4, count), np.uint64)
    counters[0] = np.arange(first, first + count, dtype=np.uint64)
    key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint64)
    high, low = philox(counters, key)[:2]
    drawn: NDArray[np.float64] = ((high >> np.uint64(5)) * 2.0**26 + (low >> np.uint64(6))) / 2.0**53
    return drawn
