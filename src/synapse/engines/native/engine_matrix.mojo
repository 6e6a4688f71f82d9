"""Products of quantised matrices with the rows of a batch.

A matrix [out, in] is stored in records of 16 outputs by 32 inputs (`packed_file.py` describes them), so that one
register holds many outputs for the same inputs and no sum has to be made across a register. Three kinds exist:

- `q4`: codes of 0 to 15 with a scale and a minimum per block of 32 inputs. Their activations are 8-bit integers with a
  scale per block: a product of both, summed over a block, fits in 16 bits.
- `q4_0`: the same without minima: they are -8 times the scale.
- `q8`: codes of -127 to 127 with a scale per block. Their activations are 16-bit integers with a scale per block, so that
  hardly anything is lost on their side.
"""

from std.math import fma
from std.memory import bitcast
from std.sys import CompilationTarget, llvm_intrinsic
from std.sys.intrinsics import prefetch

comptime Bytes = Pointer[UInt8, MutUntrackedOrigin]
comptime Floats = Pointer[Float32, MutUntrackedOrigin]
comptime Halves = Pointer[Float16, MutUntrackedOrigin]
comptime Codes8 = Pointer[Int8, MutUntrackedOrigin]
comptime Codes16 = Pointer[Int16, MutUntrackedOrigin]

comptime BLOCK = 32  # inputs of a record
comptime GROUP = 16  # outputs of a record
comptime Q4_RECORD = 320
comptime Q4_0_RECORD = 288
comptime Q8_RECORD = 544
comptime Q4 = 4
comptime Q4_0 = 5
comptime Q8 = 8
comptime AHEAD = 3072  # bytes of a matrix asked for ahead of their use
comptime SMALLEST = Float32(1e-30)  # below it, a block counts as zero

comptime HAS_AVX512 = CompilationTarget.has_avx512f() and CompilationTarget.has_vnni()
comptime HAS_AVX2 = CompilationTarget.has_avx2()
comptime LANES = 16 if HAS_AVX512 else (8 if HAS_AVX2 else 4)  # outputs of a register
comptime PARTS = GROUP // LANES
comptime TILE = 8 if HAS_AVX512 else 4  # rows that share one look at a record

comptime LINES = 4  # of a 4-bit record: 8 inputs each
comptime CODES = 256  # bytes of them, at its end
comptime PAIRWISE = HAS_AVX2 and not HAS_AVX512  # multiplies bytes two by two, and has few registers
comptime ROLLED = 4  # rows of a tile from which loops stay loops: unrolled, the compiler runs out of registers
comptime RUN = 32  # rows whose inputs lie side by side, and
comptime LEAST_RUN = 8  # how many of them a record is opened for at least: for fewer it does not pay

comptime F = SIMD[DType.float32, LANES]
comptime I = SIMD[DType.int32, LANES]
comptime Pairs = SIMD[DType.int16, 2 * LANES]
comptime Quads = SIMD[DType.uint8, 4 * LANES]


@fieldwise_init
struct Matrix(Copyable, Movable, ImplicitlyCopyable):
    """A packed matrix. `blocks` and `groups` count records across and down."""

    var records: Bytes
    var kind: Int
    var groups: Int
    var blocks: Int
    var bias: Floats  # [16 * groups], or null
    var has_bias: Int


trait Ahead:
    """What a product asks memory for on its way, since it has little to do with memory itself."""

    def next(mut self):
        """Asks for a little of it; called with every record."""
        ...


@fieldwise_init
struct Nothing(Ahead):
    """Nothing."""

    @always_inline
    def next(mut self):
        pass


@fieldwise_init
struct Inputs(Copyable, Movable, ImplicitlyCopyable):
    """The quantised rows of a batch, by 32 rows, and of these block after block: `place_of` says where.

    What goes through a matrix record by record finds the rows of its block side by side, and then those of the next."""

    var codes8: Codes8  # [rows / 32, blocks, 32 rows or those that are left, 32]
    var scale8: Floats
    var sum8: Floats  # scale times the sum of the codes
    var codes16: Codes16
    var scale16: Floats


@always_inline
def beside(rows: Int, row: Int) -> Int:
    """How many of all rows lie side by side with this one."""
    return min(RUN, rows - row // RUN * RUN)


@always_inline
def place_of(rows: Int, blocks: Int, row: Int, block: Int) -> Int:
    """The number of a row's block among the inputs."""
    return row // RUN * RUN * blocks + block * beside(rows, row) + row % RUN


@always_inline
def quadruple(codes: Codes8) -> SIMD[DType.int8, 4 * LANES]:
    """Four 8-bit codes, once for every output of a register."""
    return bitcast[DType.int8, 4 * LANES](I(bitcast[DType.int32, 1](codes.unsafe_load[width=4]())))


@always_inline
def pair(codes: Codes16) -> SIMD[DType.int16, 2 * LANES]:
    """Two 16-bit codes, once for every output of a register."""
    return bitcast[DType.int16, 2 * LANES](I(bitcast[DType.int32, 1](codes.unsafe_load[width=2]())))


@always_inline
def dot4(sums: I, codes: SIMD[DType.uint8, 4 * LANES], factors: SIMD[DType.int8, 4 * LANES]) -> I:
    """Adds to each output the four products of its bytes, where the CPU has an instruction for that."""
    comptime if HAS_AVX512:
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", I](
            sums, bitcast[DType.uint8, 4 * LANES](codes), bitcast[DType.int8, 4 * LANES](factors)
        )
    elif CompilationTarget.has_neon_int8_dotprod():
        return llvm_intrinsic["llvm.aarch64.neon.sdot.v4i32.v16i8", I](sums, bitcast[DType.int8, 4 * LANES](codes), factors)
    else:
        var words = bitcast[DType.int32, LANES](codes)
        var others = bitcast[DType.int32, LANES](factors)
        var result = sums
        comptime for byte in range(4):
            comptime up = I(24 - 8 * byte)
            result += (words << up >> 24) * (others << up >> 24)
        return result


@always_inline
def dot2(sums: I, codes: SIMD[DType.int16, 2 * LANES], factors: SIMD[DType.int16, 2 * LANES]) -> I:
    """Adds to each output the two products of its 16-bit numbers."""
    comptime if HAS_AVX512:
        return sums + llvm_intrinsic["llvm.x86.avx512.pmaddw.d.512", I](codes, factors)
    elif HAS_AVX2:
        return sums + llvm_intrinsic["llvm.x86.avx2.pmadd.wd", I](codes, factors)
    else:
        var words = bitcast[DType.int32, LANES](codes)
        var others = bitcast[DType.int32, LANES](factors)
        return sums + (words << 16 >> 16) * (others << 16 >> 16) + (words >> 16) * (others >> 16)


@always_inline
def halves(at: Bytes) -> F:
    """Float16 numbers as float32."""
    return Halves(unsafe_from_address=Int(at)).unsafe_load[width=LANES]().cast[DType.float32]()


@always_inline
def minima_of[kind: Int](record: Bytes, part: Int, scale: F) -> F:
    """What a code of zero stands for, of the outputs of a register."""
    comptime if kind == Q4:
        return halves(record.unsafe_offset(2 * GROUP + 2 * part * LANES))
    else:
        return -8 * scale


@always_inline
def q4_tile[
    C: Int, kind: Int, A: Ahead
](matrix: Matrix, group: Int, inputs: Inputs, rows: Int, row: Int, target: Floats, stride: Int, mut ahead: A):
    """Outputs of one group for C rows from `row` on, of `rows` in all."""
    comptime size = Q4_RECORD if kind == Q4 else Q4_0_RECORD
    var blocks = matrix.blocks
    var record = matrix.records.unsafe_offset(group * blocks * size)
    var acc = Array[F, C * PARTS](fill=F(0))
    for block in range(blocks):
        comptime for line in range((size + 63) // 64):
            prefetch(record.unsafe_offset(AHEAD + 64 * line))
        ahead.next()
        var place = place_of(rows, blocks, row, block)
        var sums = q4_sums[C](record.unsafe_offset(size - CODES), inputs.codes8.unsafe_offset(place * BLOCK))
        comptime for part in range(PARTS):
            var scale = halves(record.unsafe_offset(2 * part * LANES))
            var minimum = minima_of[kind](record, part, scale)
            comptime for c in range(C):
                comptime i = c * PARTS + part
                acc[i] = fma(sums[i].cast[DType.float32](), scale * inputs.scale8.unsafe_offset(place + c)[], acc[i])
                acc[i] = fma(minimum, F(inputs.sum8.unsafe_offset(place + c)[]), acc[i])
        record = record.unsafe_offset(size)
    store_tile[C](acc, target.unsafe_offset(row * stride + group * GROUP), stride)


@always_inline
def q4_sums[C: Int](codes: Bytes, factors: Codes8) -> Array[I, C * PARTS]:
    """The sums of products of one record with C rows."""
    var sums = Array[I, C * PARTS](fill=I(0))
    comptime if PAIRWISE:
        var pairs = Array[Pairs, C * PARTS](fill=Pairs(0))
        comptime if C < ROLLED:
            comptime for line in range(LINES):
                add_line[C](pairs, codes.unsafe_offset(64 * line), factors.unsafe_offset(8 * line))
        else:
            for line in range(LINES):
                add_line[C](pairs, codes.unsafe_offset(64 * line), factors.unsafe_offset(8 * line))
        comptime for i in range(C * PARTS):
            sums[i] = llvm_intrinsic["llvm.x86.avx2.pmadd.wd", I](pairs[i], Pairs(1))
    else:
        comptime for line in range(LINES):
            var opened = open_line(codes.unsafe_offset(64 * line))
            comptime for half in range(2):
                comptime for c in range(C):
                    var four = quadruple(factors.unsafe_offset(c * BLOCK + 8 * line + 4 * half))
                    comptime for part in range(PARTS):
                        sums[c * PARTS + part] = dot4(sums[c * PARTS + part], opened[half * PARTS + part], four)
    return sums^


@always_inline
def add_line[C: Int](mut pairs: Array[Pairs, C * PARTS], codes: Bytes, factors: Codes8):
    """Adds the products of eight inputs with C rows."""
    var opened = open_line(codes)
    comptime for half in range(2):
        comptime for c in range(C):
            var four = quadruple(factors.unsafe_offset(c * BLOCK + 4 * half))
            comptime for part in range(PARTS):
                pairs[c * PARTS + part] += pair_products(opened[half * PARTS + part], four)


@always_inline
def open_line(codes: Bytes) -> Array[Quads, 2 * PARTS]:
    """Eight inputs of 16 outputs: the first four of them, then the others."""
    var opened = Array[Quads, 2 * PARTS](fill=Quads(0))
    comptime for part in range(PARTS):
        var both = codes.unsafe_offset(4 * LANES * part).unsafe_load[width = 4 * LANES]()
        opened[part], opened[PARTS + part] = both & 15, both >> 4
    return opened^


@always_inline
def pair_products(codes: Quads, factors: SIMD[DType.int8, 4 * LANES]) -> Pairs:
    """The products of two inputs, added up. A record has eight such sums, and theirs is at most 8 · 2 · 15 · 127."""
    return llvm_intrinsic["llvm.x86.avx2.pmadd.ub.sw", Pairs](codes, factors)


@always_inline
def q8_tile[
    C: Int, A: Ahead
](matrix: Matrix, group: Int, inputs: Inputs, rows: Int, row: Int, target: Floats, stride: Int, mut ahead: A):
    """As `q4_tile`."""
    var blocks = matrix.blocks
    var record = matrix.records.unsafe_offset(group * blocks * Q8_RECORD)
    var acc = Array[F, C * PARTS](fill=F(0))
    for block in range(blocks):
        comptime for line in range(Q8_RECORD // 64 + 1):
            prefetch(record.unsafe_offset(AHEAD + 64 * line))
        ahead.next()
        var place = place_of(rows, blocks, row, block)
        var factors = inputs.codes16.unsafe_offset(place * BLOCK)
        var sums = Array[I, C * PARTS](fill=I(0))
        var codes = record.unsafe_offset(2 * GROUP)
        comptime if C < ROLLED:
            comptime for p in range(BLOCK // 2):
                add_words[C](sums, codes.unsafe_offset(2 * GROUP * p), factors.unsafe_offset(2 * p))
        else:
            for p in range(BLOCK // 2):
                add_words[C](sums, codes.unsafe_offset(2 * GROUP * p), factors.unsafe_offset(2 * p))
        comptime for part in range(PARTS):
            var scale = halves(record.unsafe_offset(2 * part * LANES))
            comptime for c in range(C):
                comptime i = c * PARTS + part
                acc[i] = fma(sums[i].cast[DType.float32](), scale * inputs.scale16.unsafe_offset(place + c)[], acc[i])
        record = record.unsafe_offset(Q8_RECORD)
    store_tile[C](acc, target.unsafe_offset(row * stride + group * GROUP), stride)


@always_inline
def add_words[C: Int](mut sums: Array[I, C * PARTS], codes: Bytes, factors: Codes16):
    """Adds the products of two inputs with C rows."""
    var words = Array[Pairs, PARTS](fill=Pairs(0))
    comptime for part in range(PARTS):
        var both = codes.unsafe_offset(2 * LANES * part).unsafe_load[width = 2 * LANES]()
        words[part] = bitcast[DType.int8, 2 * LANES](both).cast[DType.int16]()
    comptime for c in range(C):
        var both = pair(factors.unsafe_offset(c * BLOCK))
        comptime for part in range(PARTS):
            sums[c * PARTS + part] = dot2(sums[c * PARTS + part], words[part], both)


@always_inline
def store_tile[C: Int](acc: Array[F, C * PARTS], target: Floats, stride: Int):
    comptime for c in range(C):
        comptime for part in range(PARTS):
            target.unsafe_offset(c * stride + part * LANES).unsafe_store(acc[c * PARTS + part])


@always_inline
def tile[
    C: Int, A: Ahead
](matrix: Matrix, group: Int, inputs: Inputs, rows: Int, row: Int, target: Floats, stride: Int, mut ahead: A):
    if matrix.kind == Q4:
        q4_tile[C, Q4](matrix, group, inputs, rows, row, target, stride, ahead)
    elif matrix.kind == Q4_0:
        q4_tile[C, Q4_0](matrix, group, inputs, rows, row, target, stride, ahead)
    else:
        q8_tile[C](matrix, group, inputs, rows, row, target, stride, ahead)


def q4_run[
    kind: Int, A: Ahead
](matrix: Matrix, group: Int, inputs: Inputs, rows: Int, first: Int, count: Int, target: Floats, stride: Int, mut ahead: A):
    """As `q4_tile` for `count` rows from `first` on, at most `RUN`: what has to be done to a record is done once for all."""
    comptime size = Q4_RECORD if kind == Q4 else Q4_0_RECORD
    var record = matrix.records.unsafe_offset(group * matrix.blocks * size)
    var opened = Array[Quads, 2 * LINES * PARTS](fill=Quads(0))
    var scales = Array[F, PARTS](fill=F(0))
    var minima = Array[F, PARTS](fill=F(0))
    var acc = Array[F, RUN * PARTS](fill=F(0))
    for block in range(matrix.blocks):
        comptime for line in range((size + 63) // 64):
            prefetch(record.unsafe_offset(AHEAD + 64 * line))
        ahead.next()
        comptime for line in range(LINES):
            var quads = open_line(record.unsafe_offset(size - CODES + 64 * line))
            comptime for i in range(2 * PARTS):
                opened[line * 2 * PARTS + i] = quads[i]
        comptime for part in range(PARTS):
            scales[part] = halves(record.unsafe_offset(2 * part * LANES))
            minima[part] = minima_of[kind](record, part, scales[part])
        var place = place_of(rows, matrix.blocks, first, block)
        var row = 0
        while row + 4 <= count:
            q4_step[4](opened, scales, minima, inputs, place + row, row, acc)
            row += 4
        if row + 2 <= count:
            q4_step[2](opened, scales, minima, inputs, place + row, row, acc)
            row += 2
        if row < count:
            q4_step[1](opened, scales, minima, inputs, place + row, row, acc)
        record = record.unsafe_offset(size)
    store_run(acc, count, target.unsafe_offset(first * stride + group * GROUP), stride)


@always_inline
def q4_step[C: Int](
    opened: Array[Quads, 2 * LINES * PARTS],
    scales: Array[F, PARTS],
    minima: Array[F, PARTS],
    inputs: Inputs,
    place: Int,
    row: Int,
    mut acc: Array[F, RUN * PARTS],
):
    """Adds the products of one record with C rows from `row` on, whose inputs are those from `place` on."""
    var pairs = Array[Pairs, C * PARTS](fill=Pairs(0))
    var factors = inputs.codes8.unsafe_offset(place * BLOCK)
    for quad in range(2 * LINES):
        comptime for c in range(C):
            var four = quadruple(factors.unsafe_offset(c * BLOCK + 4 * quad))
            comptime for part in range(PARTS):
                pairs[c * PARTS + part] += pair_products(opened[quad * PARTS + part], four)
    comptime for c in range(C):
        var factor, sum = inputs.scale8.unsafe_offset(place + c)[], F(inputs.sum8.unsafe_offset(place + c)[])
        comptime for part in range(PARTS):
            var products = llvm_intrinsic["llvm.x86.avx2.pmadd.wd", I](pairs[c * PARTS + part], Pairs(1))
            var at = (row + c) * PARTS + part
            acc[at] = fma(minima[part], sum, fma(products.cast[DType.float32](), scales[part] * factor, acc[at]))


@always_inline
def store_run(acc: Array[F, RUN * PARTS], count: Int, target: Floats, stride: Int):
    for row in range(count):
        comptime for part in range(PARTS):
            target.unsafe_offset(row * stride + part * LANES).unsafe_store(acc[row * PARTS + part])


def multiply[A: Ahead](matrix: Matrix, group: Int, inputs: Inputs, rows: Int, target: Floats, stride: Int, mut ahead: A):
    """Sets the 16 outputs of a group for `rows` rows: target[row * stride + 16 * group …], bias included.

    A row's result does not depend on how many rows there are: its sums are made in the same order in every tile.
    """
    var row = 0
    comptime if PAIRWISE:
        while matrix.kind != Q8 and row + LEAST_RUN <= rows:
            var count = min(RUN, rows - row)
            if matrix.kind == Q4:
                q4_run[Q4](matrix, group, inputs, rows, row, count, target, stride, ahead)
            else:
                q4_run[Q4_0](matrix, group, inputs, rows, row, count, target, stride, ahead)
            row += count
    while row + TILE <= rows:
        tile[TILE](matrix, group, inputs, rows, row, target, stride, ahead)
        row += TILE
    comptime if TILE > 4:
        if row + 4 <= rows:
            tile[4](matrix, group, inputs, rows, row, target, stride, ahead)
            row += 4
    if row + 2 <= rows:
        tile[2](matrix, group, inputs, rows, row, target, stride, ahead)
        row += 2
    if row < rows:
        tile[1](matrix, group, inputs, rows, row, target, stride, ahead)
    if matrix.has_bias != 0:
        for r in range(rows):
            comptime for part in range(PARTS):
                var at = target.unsafe_offset(r * stride + group * GROUP + part * LANES)
                var bias = matrix.bias.unsafe_offset(group * GROUP + part * LANES).unsafe_load[width=LANES]()
                at.unsafe_store(at.unsafe_load[width=LANES]() + bias)


def element(matrix: Matrix, output: Int, target: Floats):
    """Sets target [32 * blocks] to one row of the matrix: an embedding."""
    var group, o = output // GROUP, output % GROUP
    for block in range(matrix.blocks):
        var at = target.unsafe_offset(block * BLOCK)
        if matrix.kind != Q8:
            var size = Q4_RECORD if matrix.kind == Q4 else Q4_0_RECORD
            var record = matrix.records.unsafe_offset((group * matrix.blocks + block) * size)
            var scale = half(record.unsafe_offset(2 * o))
            var minimum = half(record.unsafe_offset(32 + 2 * o)) if matrix.kind == Q4 else -8 * scale
            for line in range(4):
                for i in range(4):
                    var both = record.unsafe_offset(size - CODES + 64 * line + 4 * o + i)[]
                    at.unsafe_offset(8 * line + i)[] = fma(scale, Float32(both & 15), minimum)
                    at.unsafe_offset(8 * line + 4 + i)[] = fma(scale, Float32(both >> 4), minimum)
        else:
            var record = matrix.records.unsafe_offset((group * matrix.blocks + block) * Q8_RECORD)
            var scale = half(record.unsafe_offset(2 * o))
            for p in range(BLOCK // 2):
                for i in range(2):
                    var code = bitcast[DType.int8, 1](record.unsafe_offset(32 + 32 * p + 2 * o + i)[])
                    at.unsafe_offset(2 * p + i)[] = scale * Float32(code)


@always_inline
def half(at: Bytes) -> Float32:
    """One float16 number."""
    return Halves(unsafe_from_address=Int(at))[].cast[DType.float32]()


@always_inline
def quantise_block(at: Floats, place: Int, inputs: Inputs, want8: Bool, want16: Bool):
    """Quantises 32 numbers as block `place`. One that is not finite makes the block's scale so, and all it reaches."""
    comptime Lane = SIMD[DType.float32, 8]
    var values = Array[Lane, 4](fill=Lane(0))
    var peak, odd = Lane(0), Lane(0)
    comptime for i in range(4):
        values[i] = at.unsafe_offset(8 * i).unsafe_load[width=8]()
        peak = max(peak, abs(values[i]))
        odd += values[i] - values[i]
    var top = peak.reduce_max()
    var trouble = odd.reduce_add()  # zero, or not a number
    if trouble != trouble or top < SMALLEST:
        comptime for i in range(4):
            values[i] = Lane(0)
        top = SMALLEST
    if want8:
        var factor = 127 / top
        var total = SIMD[DType.int32, 8](0)
        comptime for i in range(4):
            var codes = (values[i] * factor).__round__().cast[DType.int32]()
            total += codes
            inputs.codes8.unsafe_offset(place * BLOCK + 8 * i).unsafe_store(codes.cast[DType.int8]())
        var scale = top / 127 + trouble
        inputs.scale8.unsafe_offset(place)[] = scale
        inputs.sum8.unsafe_offset(place)[] = scale * Float32(total.reduce_add())
    if want16:
        var factor = 32767 / top
        comptime for i in range(4):
            var codes = (values[i] * factor).__round__().cast[DType.int32]()
            inputs.codes16.unsafe_offset(place * BLOCK + 8 * i).unsafe_store(codes.cast[DType.int16]())
        inputs.scale16.unsafe_offset(place)[] = top / 32767 + trouble


def quantise(x: Floats, rows: Int, row: Int, blocks: Int, inputs: Inputs, want8: Bool, want16: Bool):
    """Quantises one row [32 * blocks], of `rows` in all."""
    for block in range(blocks):
        quantise_block(x.unsafe_offset(block * BLOCK), place_of(rows, blocks, row, block), inputs, want8, want16)
