"""The layers' part of a linear map: y += w s B (A x), for the rows of a batch that use a layer (Hu et al., 2021, arXiv:2106.09685).

Factors are float16 or 8-bit integers. A [rank, in] lies in strips of 8 ranks, [rank/8, in, 8], and B [out, rank] in
groups of 16 outputs, [out/16, rank, 16]: again no sum goes across a register. What they are scaled with is one number
per rank, applied between the two products.
"""

from std.math import fma
from std.memory import bitcast
from std.sys.intrinsics import prefetch

from engine_matrix import GROUP, Bytes, Floats

comptime STRIP = 8
comptime Lane = SIMD[DType.float32, STRIP]
comptime STEPS = 4  # inputs whose products are summed apart, to hide how long a sum takes
comptime Rows = Pointer[Int32, MutUntrackedOrigin]
comptime FLOAT16 = 2


@fieldwise_init
struct Factors(Copyable, Movable, ImplicitlyCopyable):
    """A layer's factors for one linear map. A rank of 0 means it has none."""

    var A: Bytes
    var B: Bytes
    var scales: Floats  # [rank]
    var rank: Int  # padded to a multiple of 8
    var kind: Int  # bytes of a number: 2 float16, 1 integers


@always_inline
def numbers[S: Int](at: Bytes) -> Lane:
    """Eight numbers of a factor, stored in S bytes each."""
    comptime if S == FLOAT16:
        return bitcast[DType.float16, STRIP](at.unsafe_load[width = 2 * STRIP]()).cast[DType.float32]()
    else:
        return bitcast[DType.int8, STRIP](at.unsafe_load[width=STRIP]()).cast[DType.float32]()


@always_inline
def shrink_tile[S: Int, C: Int](
    factors: Factors, strip: Int, width: Int, x: Floats, stride: Int, rows: Rows, weights: Floats, target: Floats, room: Int
):
    var sums = Array[Lane, C * STEPS](fill=Lane(0))
    var A = factors.A.unsafe_offset(strip * width * STRIP * S)
    for k in range(0, width, STEPS):
        prefetch(A.unsafe_offset(k * STRIP * S + 2048))
        comptime for step in range(STEPS):
            var a = numbers[S](A.unsafe_offset((k + step) * STRIP * S))
            comptime for c in range(C):
                var factor = x.unsafe_offset(Int(rows.unsafe_offset(c)[]) * stride + k + step)[]
                sums[c * STEPS + step] = fma(a, Lane(factor), sums[c * STEPS + step])
    var scales = factors.scales.unsafe_offset(strip * STRIP).unsafe_load[width=STRIP]()
    comptime for c in range(C):
        var sum = (sums[c * STEPS] + sums[c * STEPS + 1]) + (sums[c * STEPS + 2] + sums[c * STEPS + 3])
        target.unsafe_offset(c * room + strip * STRIP).unsafe_store(sum * scales * weights.unsafe_offset(c)[])


def shrink(
    factors: Factors, strip: Int, width: Int, x: Floats, stride: Int, rows: Rows, weights: Floats, count: Int, target: Floats, room: Int
):
    """For `count` rows: target[i * room + rank] = weight scale (A x) of one strip of ranks. `width` is a multiple of 32."""
    var i = 0
    while i < count:
        var here = rows.unsafe_offset(i)
        var to = target.unsafe_offset(i * room)
        if i + 2 <= count:
            if factors.kind == FLOAT16:
                shrink_tile[2, 2](factors, strip, width, x, stride, here, weights.unsafe_offset(i), to, room)
            else:
                shrink_tile[1, 2](factors, strip, width, x, stride, here, weights.unsafe_offset(i), to, room)
            i += 2
        else:
            if factors.kind == FLOAT16:
                shrink_tile[2, 1](factors, strip, width, x, stride, here, weights.unsafe_offset(i), to, room)
            else:
                shrink_tile[1, 1](factors, strip, width, x, stride, here, weights.unsafe_offset(i), to, room)
            i += 1


@always_inline
def expand_tile[S: Int, C: Int](factors: Factors, group: Int, u: Floats, room: Int, rows: Rows, y: Floats, stride: Int):
    var sums = Array[Lane, C * 2](fill=Lane(0))
    var B = factors.B.unsafe_offset(group * factors.rank * GROUP * S)
    for rank in range(factors.rank):
        var at = B.unsafe_offset(rank * GROUP * S)
        var low, high = numbers[S](at), numbers[S](at.unsafe_offset(STRIP * S))
        comptime for c in range(C):
            var factor = Lane(u.unsafe_offset(c * room + rank)[])
            sums[2 * c] = fma(low, factor, sums[2 * c])
            sums[2 * c + 1] = fma(high, factor, sums[2 * c + 1])
    comptime for c in range(C):
        var to = y.unsafe_offset(Int(rows.unsafe_offset(c)[]) * stride + group * GROUP)
        to.unsafe_store(to.unsafe_load[width=STRIP]() + sums[2 * c])
        to = to.unsafe_offset(STRIP)
        to.unsafe_store(to.unsafe_load[width=STRIP]() + sums[2 * c + 1])


def expand(factors: Factors, group: Int, u: Floats, room: Int, rows: Rows, count: Int, y: Floats, stride: Int):
    """For `count` rows: y[row, 16 outputs of the group] += B u[i * room …]."""
    var i = 0
    while i < count:
        var here = rows.unsafe_offset(i)
        var from_ = u.unsafe_offset(i * room)
        if i + 2 <= count:
            if factors.kind == FLOAT16:
                expand_tile[2, 2](factors, group, from_, room, here, y, stride)
            else:
                expand_tile[1, 2](factors, group, from_, room, here, y, stride)
            i += 2
        else:
            if factors.kind == FLOAT16:
                expand_tile[2, 1](factors, group, from_, room, here, y, stride)
            else:
                expand_tile[1, 1](factors, group, from_, room, here, y, stride)
            i += 1
