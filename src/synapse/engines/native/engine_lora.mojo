"""The layers' part of a linear map: y += w s B (A x), for the rows of a batch that use a layer (Hu et al., 2021, arXiv:2106.09685).

Factors are float16 or 8-bit integers, which are scaled with one number per rank, applied between the two products.
Again no sum goes across a register: A lies in strips of 8 ranks and B in groups of 16 outputs.

- float16: A is [rank/8, in, 8] and B [out/16, rank, 16]; x and A x are float32.
- integers: A is [rank/8, in/4, 8, 4] and B [out/16, rank/4, 16, 4]; x has the 8-bit form that the model's own products
  read, and A x gets one like it, with a scale for each strip.
"""

from std.math import fma
from std.memory import bitcast
from std.sys import CompilationTarget, llvm_intrinsic
from std.sys.intrinsics import prefetch

from engine_matrix import BLOCK, GROUP, HAS_AVX2, HAS_AVX512, SMALLEST, Bytes, Codes8, Floats, Inputs, place_of

comptime STRIP = 8
comptime Lane = SIMD[DType.float32, STRIP]
comptime Sums = SIMD[DType.int32, STRIP]
comptime Quads = SIMD[DType.int8, 4 * STRIP]
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
def strip_of(factors: Factors, strip: Int, width: Int) -> Bytes:
    """A strip of A."""
    return factors.A.unsafe_offset(strip * width * STRIP * factors.kind)


@always_inline
def numbers(at: Bytes) -> Lane:
    """Eight float16 numbers."""
    return bitcast[DType.float16, STRIP](at.unsafe_load[width = 2 * STRIP]()).cast[DType.float32]()


@always_inline
def quads(at: Bytes) -> Quads:
    """Four integers of each of eight ranks or outputs."""
    return bitcast[DType.int8, 4 * STRIP](at.unsafe_load[width = 4 * STRIP]())


@always_inline
def spread(codes: Codes8) -> Quads:
    """Four integers, once for every rank or output of a register."""
    return bitcast[DType.int8, 4 * STRIP](Sums(bitcast[DType.int32, 1](codes.unsafe_load[width=4]())))


@always_inline
def dot4(sums: Sums, codes: Quads, factors: Quads) -> Sums:
    """Adds the products of four integers each. None of them is -128, so two products fit in 16 bits."""
    comptime if HAS_AVX2:
        var sizes = bitcast[DType.uint8, 4 * STRIP](abs(codes))
        var signed = llvm_intrinsic["llvm.x86.avx2.psign.b", Quads](factors, codes)
        comptime if HAS_AVX512:
            return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.256", Sums](sums, sizes, signed)
        else:
            var pairs = llvm_intrinsic["llvm.x86.avx2.pmadd.ub.sw", SIMD[DType.int16, 2 * STRIP]](sizes, signed)
            return sums + llvm_intrinsic["llvm.x86.avx2.pmadd.wd", Sums](pairs, SIMD[DType.int16, 2 * STRIP](1))
    elif CompilationTarget.has_neon_int8_dotprod():
        comptime Half = SIMD[DType.int32, 4]
        comptime name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        var low = llvm_intrinsic[name, Half](sums.slice[4](), codes.slice[16](), factors.slice[16]())
        var high = llvm_intrinsic[name, Half](sums.slice[4, offset=4](), codes.slice[16, offset=16](), factors.slice[16, offset=16]())
        return low.join(high)
    else:
        var words = bitcast[DType.int32, STRIP](codes)
        var others = bitcast[DType.int32, STRIP](factors)
        var result = sums
        comptime for byte in range(4):
            comptime up = Sums(24 - 8 * byte)
            result += (words << up >> 24) * (others << up >> 24)
        return result


@always_inline
def shrink_floats[C: Int](
    factors: Factors, strip: Int, width: Int, x: Floats, rows: Rows, weights: Floats, target: Floats, room: Int, coming: Bytes
):
    var sums = Array[Lane, C * STEPS](fill=Lane(0))
    var A = strip_of(factors, strip, width)
    for k in range(0, width, STEPS):
        prefetch(coming.unsafe_offset(2 * k * STRIP))
        comptime for step in range(STEPS):
            var a = numbers(A.unsafe_offset(2 * (k + step) * STRIP))
            comptime for c in range(C):
                var factor = x.unsafe_offset(Int(rows.unsafe_offset(c)[]) * width + k + step)[]
                sums[c * STEPS + step] = fma(a, Lane(factor), sums[c * STEPS + step])
    var scales = factors.scales.unsafe_offset(strip * STRIP).unsafe_load[width=STRIP]()
    comptime for c in range(C):
        var sum = (sums[c * STEPS] + sums[c * STEPS + 1]) + (sums[c * STEPS + 2] + sums[c * STEPS + 3])
        target.unsafe_offset(c * room + strip * STRIP).unsafe_store(sum * scales * weights.unsafe_offset(c)[])


@always_inline
def shrink_codes[C: Int](
    factors: Factors,
    strip: Int,
    width: Int,
    inputs: Inputs,
    all_rows: Int,
    rows: Rows,
    weights: Floats,
    target: Floats,
    room: Int,
    coming: Bytes,
):
    var blocks = width // BLOCK
    var acc = Array[Lane, C](fill=Lane(0))
    var A = strip_of(factors, strip, width)
    for block in range(blocks):
        var sums = Array[Sums, C](fill=Sums(0))
        comptime for quad in range(BLOCK // 4):
            var codes = quads(A.unsafe_offset(4 * quad * STRIP))
            comptime if quad % 2 == 0:
                prefetch(coming.unsafe_offset((block * BLOCK + 4 * quad) * STRIP))
            comptime for c in range(C):
                var at = place_of(all_rows, blocks, Int(rows.unsafe_offset(c)[]), block) * BLOCK + 4 * quad
                sums[c] = dot4(sums[c], codes, spread(inputs.codes8.unsafe_offset(at)))
        comptime for c in range(C):
            var scale = inputs.scale8.unsafe_offset(place_of(all_rows, blocks, Int(rows.unsafe_offset(c)[]), block))[]
            acc[c] = fma(sums[c].cast[DType.float32](), Lane(scale), acc[c])
        A = A.unsafe_offset(BLOCK * STRIP)
    var scales = factors.scales.unsafe_offset(strip * STRIP).unsafe_load[width=STRIP]()
    comptime for c in range(C):
        store_codes(acc[c] * scales * weights.unsafe_offset(c)[], target.unsafe_offset(c * room + strip * STRIP))


@always_inline
def store_codes(values: Lane, at: Floats):
    """Puts eight numbers as 8-bit integers in the place of the first two, and their scale in that of the fifth.

    One that is not finite makes the scale so."""
    var top = abs(values).reduce_max()
    var trouble = (values - values).reduce_add()
    var known = values
    if trouble != trouble or top < SMALLEST:
        known = Lane(0)
        top = SMALLEST
    var codes = (known * (127 / top)).__round__().cast[DType.int32]().cast[DType.int8]()
    Codes8(unsafe_from_address=Int(at)).unsafe_store(codes)
    at.unsafe_offset(4)[] = top / 127 + trouble


def shrink(
    factors: Factors,
    strip: Int,
    width: Int,
    x: Floats,
    inputs: Inputs,
    all_rows: Int,
    rows: Rows,
    weights: Floats,
    count: Int,
    target: Floats,
    room: Int,
    coming: Bytes,
):
    """For `count` rows: target[i * room + rank] = weight scale (A x) of one strip of ranks, as `expand` reads it.

    `width` is a multiple of 32; x is [all_rows, width], and `inputs` has its 8-bit form. `coming` is the strip that is
    read next: it is asked for meanwhile."""
    var i = 0
    while i < count:
        var here = rows.unsafe_offset(i)
        var heavy = weights.unsafe_offset(i)
        var to = target.unsafe_offset(i * room)
        if factors.kind == FLOAT16:
            if i + 2 <= count:
                shrink_floats[2](factors, strip, width, x, here, heavy, to, room, coming)
                i += 2
            else:
                shrink_floats[1](factors, strip, width, x, here, heavy, to, room, coming)
                i += 1
        elif i + 4 <= count:
            shrink_codes[4](factors, strip, width, inputs, all_rows, here, heavy, to, room, coming)
            i += 4
        else:
            shrink_codes[1](factors, strip, width, inputs, all_rows, here, heavy, to, room, coming)
            i += 1


@always_inline
def expand_floats[C: Int, G: Int](factors: Factors, group: Int, u: Floats, room: Int, rows: Rows, y: Floats, stride: Int):
    var sums = Array[Lane, C * G * 2](fill=Lane(0))
    var B = factors.B.unsafe_offset(2 * group * factors.rank * GROUP)
    for rank in range(factors.rank):
        comptime for g in range(G):
            var at = B.unsafe_offset(2 * (g * factors.rank + rank) * GROUP)
            var low, high = numbers(at), numbers(at.unsafe_offset(2 * STRIP))
            comptime for c in range(C):
                var factor = Lane(u.unsafe_offset(c * room + rank)[])
                comptime i = 2 * (c * G + g)
                sums[i] = fma(low, factor, sums[i])
                sums[i + 1] = fma(high, factor, sums[i + 1])
    add_tile[C, G](sums, group, rows, y, stride)


@always_inline
def expand_codes[C: Int, G: Int](factors: Factors, group: Int, u: Floats, room: Int, rows: Rows, y: Floats, stride: Int):
    var acc = Array[Lane, C * G * 2](fill=Lane(0))
    var B = factors.B.unsafe_offset(group * factors.rank * GROUP)
    for strip in range(factors.rank // STRIP):
        var sums = Array[Sums, C * G * 2](fill=Sums(0))
        comptime for quad in range(2):
            comptime for g in range(G):
                var at = B.unsafe_offset(g * factors.rank * GROUP + 4 * quad * GROUP)
                var low, high = quads(at), quads(at.unsafe_offset(4 * STRIP))
                comptime for c in range(C):
                    var codes = Codes8(unsafe_from_address=Int(u.unsafe_offset(c * room + strip * STRIP)))
                    var four = spread(codes.unsafe_offset(4 * quad))
                    comptime i = 2 * (c * G + g)
                    sums[i] = dot4(sums[i], low, four)
                    sums[i + 1] = dot4(sums[i + 1], high, four)
        comptime for c in range(C):
            var scale = Lane(u.unsafe_offset(c * room + strip * STRIP + 4)[])
            comptime for i in range(2 * c * G, 2 * (c + 1) * G):
                acc[i] = fma(sums[i].cast[DType.float32](), scale, acc[i])
        B = B.unsafe_offset(STRIP * GROUP)
    add_tile[C, G](acc, group, rows, y, stride)


@always_inline
def add_tile[C: Int, G: Int](sums: Array[Lane, C * G * 2], group: Int, rows: Rows, y: Floats, stride: Int):
    comptime for c in range(C):
        var to = y.unsafe_offset(Int(rows.unsafe_offset(c)[]) * stride + group * GROUP)
        comptime for i in range(2 * G):
            var here = to.unsafe_offset(STRIP * i)
            here.unsafe_store(here.unsafe_load[width=STRIP]() + sums[2 * c * G + i])


def expand(factors: Factors, group: Int, u: Floats, room: Int, rows: Rows, count: Int, y: Floats, stride: Int):
    """For `count` rows: y[row, 32 outputs from the group on] += B u[i * room …].

    Two rows share what is read of one group; a row that is alone takes both groups at once.
    """
    var i = 0
    while i < count:
        var here = rows.unsafe_offset(i)
        var from_ = u.unsafe_offset(i * room)
        if factors.kind == FLOAT16:
            if i + 2 <= count:
                comptime for g in range(2):
                    expand_floats[2, 1](factors, group + g, from_, room, here, y, stride)
                i += 2
            else:
                expand_floats[1, 2](factors, group, from_, room, here, y, stride)
                i += 1
        elif i + 2 <= count:
            comptime for g in range(2):
                expand_codes[2, 1](factors, group + g, from_, room, here, y, stride)
            i += 2
        else:
            expand_codes[1, 2](factors, group, from_, room, here, y, stride)
            i += 1
