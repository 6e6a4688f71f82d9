"""The most likely tokens of a row of logits."""

from std.memory import pack_bits
from std.bit import count_trailing_zeros

from engine_matrix import Floats

comptime W = 8
comptime Lane = SIMD[DType.float32, W]
comptime Tokens = Pointer[Int32, MutUntrackedOrigin]


def best(logits: Floats, vocab: Int, count: Int, tokens: Tokens, values: Floats) -> Bool:
    """Writes the `count` largest logits, largest first and equal ones by token, and says whether all are finite.

    `count` is at most `vocab`.
    """
    var kept = 0
    var lowest = Float32.MIN
    var odd = Lane(0)
    var at = 0
    while at < vocab:
        var hits: Int
        if at + W <= vocab:
            var v = logits.unsafe_offset(at).unsafe_load[width=W]()
            odd += v - v
            hits = Int(pack_bits(v.gt(lowest))) if kept == count else (1 << W) - 1
        else:
            for i in range(vocab - at):
                odd[0] += logits.unsafe_offset(at + i)[] - logits.unsafe_offset(at + i)[]
            hits = (1 << (vocab - at)) - 1
        while hits != 0:
            var token = at + Int(count_trailing_zeros(hits))
            hits &= hits - 1
            var value = logits.unsafe_offset(token)[]
            if kept == count and not value > lowest:
                continue
            var place = kept if kept < count else count - 1
            while place > 0 and values.unsafe_offset(place - 1)[] < value:
                values.unsafe_offset(place)[] = values.unsafe_offset(place - 1)[]
                tokens.unsafe_offset(place)[] = tokens.unsafe_offset(place - 1)[]
                place -= 1
            values.unsafe_offset(place)[] = value
            tokens.unsafe_offset(place)[] = Int32(token)
            kept = min(kept + 1, count)
            if kept == count:
                lowest = values.unsafe_offset(count - 1)[]
        at += W
    var trouble = odd.reduce_add()
    return trouble == trouble
