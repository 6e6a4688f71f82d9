"""Causal grouped-query attention over blocks of cached keys and values (Ainslie et al., 2023, arXiv:2305.13245).

The cache holds float16. Within a block the keys lie by dimension, [head_dim, 32 tokens], so that the scores of 32 tokens
are made side by side and no sum goes across a register; the values lie by token, [32 tokens, head_dim].
"""

from std.math import exp, fma
from std.sys.intrinsics import prefetch

from engine_matrix import Floats, Halves

comptime TOKENS = 32  # of a block
comptime W = 8
comptime Lane = SIMD[DType.float32, W]
comptime Table = Pointer[Int32, MutUntrackedOrigin]
comptime LOWEST = Float32.MIN_FINITE
comptime MOST_QUERIES = 3  # that share one look at the cache: 12 registers of sums


@always_inline
def halves(at: Halves) -> Lane:
    return at.unsafe_load[width=W]().cast[DType.float32]()


def store_key(target: Halves, offset: Int, key: Floats, size: Int):
    """Puts the key of one token into its block."""
    for d in range(size):
        target.unsafe_offset(d * TOKENS + offset)[] = key.unsafe_offset(d)[].cast[DType.float16]()


def store_value(target: Halves, offset: Int, value: Floats, size: Int):
    """Puts the value of one token into its block."""
    for d in range(0, size, W):
        var numbers = value.unsafe_offset(d).unsafe_load[width=W]().cast[DType.float16]()
        target.unsafe_offset(offset * size + d).unsafe_store(numbers)


@fieldwise_init
struct Cache(Copyable, Movable, ImplicitlyCopyable):
    """One head's keys and values of one transformer block, and a sequence's block table."""

    var keys: Halves
    var values: Halves
    var table: Table
    var size: Int  # of a head

    @always_inline
    def key_block(self, index: Int) -> Halves:
        return self.keys.unsafe_offset(Int(self.table.unsafe_offset(index)[]) * TOKENS * self.size)

    @always_inline
    def value_block(self, index: Int) -> Halves:
        return self.values.unsafe_offset(Int(self.table.unsafe_offset(index)[]) * TOKENS * self.size)


@always_inline
def attend[Q: Int](
    cache: Cache, queries: Array[Floats, Q], lengths: Array[Int, Q], targets: Array[Floats, Q], scale: Float32, scores: Floats, room: Int
):
    """Attention of Q queries [size] of one key head, each over the first `lengths` tokens; scores is scratch [Q, room]."""
    var longest = 0
    comptime for q in range(Q):
        longest = max(longest, lengths[q])
    var blocks = (longest + TOKENS - 1) // TOKENS
    for block in range(blocks):
        var keys = cache.key_block(block)
        var coming = cache.key_block(block + 1) if block + 1 < blocks else cache.value_block(0)
        var sums = Array[Lane, Q * 4](fill=Lane(0))
        for d in range(cache.size):
            prefetch(coming.unsafe_offset(d * TOKENS))  # blocks lie anywhere, so that the CPU cannot guess the next
            var factors = Array[Lane, Q](fill=Lane(0))
            comptime for q in range(Q):
                factors[q] = Lane(queries[q].unsafe_offset(d)[])
            comptime for part in range(4):
                var key = halves(keys.unsafe_offset(d * TOKENS + W * part))
                comptime for q in range(Q):
                    sums[q * 4 + part] = fma(key, factors[q], sums[q * 4 + part])
        comptime for q in range(Q):
            comptime for part in range(4):
                scores.unsafe_offset(q * room + block * TOKENS + W * part).unsafe_store(sums[q * 4 + part] * scale)
    var weights = Array[Float32, Q](fill=0)
    comptime for q in range(Q):
        weights[q] = softmax(scores.unsafe_offset(q * room), lengths[q], blocks * TOKENS)
    var at = 0
    while at + 4 * W <= cache.size:
        mix[Q, 4](cache, at, longest, scores, room, weights, targets)
        at += 4 * W
    while at < cache.size:
        mix[Q, 1](cache, at, longest, scores, room, weights, targets)
        at += W


@always_inline
def softmax(scores: Floats, length: Int, padded: Int) -> Float32:
    """Replaces scores by exp(score - highest), and those from `length` on by zero; returns their sum."""
    var at = length
    while at < padded:
        scores.unsafe_offset(at)[] = LOWEST
        at += 1
    var peaks = Lane(LOWEST)
    for i in range(0, padded, W):
        peaks = max(peaks, scores.unsafe_offset(i).unsafe_load[width=W]())
    var highest = peaks.reduce_max()
    var total = Lane(0)
    for i in range(0, padded, W):
        var value = exp(scores.unsafe_offset(i).unsafe_load[width=W]() - highest)
        scores.unsafe_offset(i).unsafe_store(value)
        total += value
    at = length
    while at < padded:  # exp of the lowest number is zero already, unless every score is as low
        scores.unsafe_offset(at)[] = 0
        at += 1
    return total.reduce_add()


@always_inline
def mix[Q: Int, P: Int](
    cache: Cache, first: Int, longest: Int, scores: Floats, room: Int, weights: Array[Float32, Q], targets: Array[Floats, Q]
):
    """The weighted sum of the values' dimensions from `first` on, P registers of them."""
    var sums = Array[Lane, Q * P](fill=Lane(0))
    var blocks = (longest + TOKENS - 1) // TOKENS
    for block in range(blocks):
        var values = cache.value_block(block).unsafe_offset(first)
        var coming = cache.value_block(min(block + 1, blocks - 1)).unsafe_offset(first)
        var here = min(TOKENS, longest - block * TOKENS)
        for token in range(here):
            prefetch(coming.unsafe_offset(token * cache.size))
            var factors = Array[Lane, Q](fill=Lane(0))
            comptime for q in range(Q):
                factors[q] = Lane(scores.unsafe_offset(q * room + block * TOKENS + token)[])
            comptime for p in range(P):
                var value = halves(values.unsafe_offset(token * cache.size + W * p))
                comptime for q in range(Q):
                    sums[q * P + p] = fma(value, factors[q], sums[q * P + p])
    comptime for q in range(Q):
        comptime for p in range(P):
            targets[q].unsafe_offset(first + W * p).unsafe_store(sums[q * P + p] / weights[q])
