"""The native scan of `pattern_search`: which rows could be among the k nearest, from 4-bit codes with proven bounds.

`codes.py` describes the codes, `kernel.py` the bounds and what is done with the answer. The threads of a
search each make one call, and the calls share the rows: each takes the next piece until none is left.

1. Sixteen rows at a time, the high halves of the codes give an upper bound of each score. A row whose bound is below the
   query's threshold is out; the others are noted.
2. Now and then the noted rows that look best are refined with the low halves of their codes (their full 8 bits). The
   k-th best *lower* bound so far is the threshold: k different rows score at least that much.
3. At the end the rest of the noted rows are refined too, and those that can still reach the threshold are the answer.

Scores here are in the units of the codes (see `Query`): only their order matters, and the caller computes the true ones.
"""

from std.bit import count_trailing_zeros
from std.atomic import Atomic
from std.memory import bitcast, pack_bits
from std.sys import CompilationTarget, llvm_intrinsic, size_of
from std.sys.intrinsics import prefetch

from pattern_search_query import Codes, Floats, Preparation, Terms, prepare

comptime ABI_VERSION = 2
comptime GROUP = 16  # rows whose high halves lie interleaved
comptime LINE = 64  # bytes of one line of a group: 8 dimensions of 16 rows
comptime SHARED = 4  # queries that share one read of the codes
comptime UNROLLED = 4  # lines whose products of pairs add up in 16 bits
comptime AHEAD = 8  # found rows between asking for a row's bytes and using them
comptime CACHE_LINE = 64
comptime FETCHED = 4096  # bytes of codes asked for ahead: the CPU itself stops at the end of a page
comptime TILE = 64  # groups scanned between two looks at the thresholds

comptime HAS_VNNI_512 = CompilationTarget.has_vnni() and CompilationTarget.has_avx512f()
comptime WIDTH = 64 if HAS_VNNI_512 else (32 if CompilationTarget.has_avx2() else 16)  # bytes of a register
comptime LANES = WIDTH // 4  # rows of a register: four products add up in each 32-bit lane
comptime PARTS = GROUP // LANES  # registers of a line

# By bit, as `FEATURES` in cpu.py: what the CPU must have for whatever the compiler makes of this file.
comptime NEEDS_AVX2 = Int(CompilationTarget.has_avx2())
comptime NEEDS_VNNI_512 = Int(HAS_VNNI_512)
comptime NEEDS_DOT_PRODUCTS = Int(CompilationTarget.has_neon_int8_dotprod())
comptime NEEDS_AVX512 = Int(CompilationTarget.has_avx512f())
comptime CPU_FEATURES = NEEDS_AVX2 | NEEDS_VNNI_512 << 1 | NEEDS_DOT_PRODUCTS << 2 | NEEDS_AVX512 << 3

comptime Bytes = Pointer[UInt8, MutUntrackedOrigin]
comptime Ints = Pointer[Int32, MutUntrackedOrigin]
comptime Sums = SIMD[DType.int32, LANES]
comptime BIAS_ERROR = Float32(2.0**-18)  # `FLOAT32_SLACK`, for what is added beside the product
comptime REFINED = Int32.MIN  # in found_dots: found_upper is of all eight bits
comptime LOWEST = Float32.MIN_FINITE


@fieldwise_init
struct Scan(Copyable, Movable):
    """One call. Every field is eight bytes, as in `kernel.ScanCall`."""

    var lines: Int  # of a group: dimensions / 8
    var rows: Int
    var piece: Int  # groups that a call takes at a time
    var queries: Int
    var k: Int
    var capacity: Int  # found rows per query there is room for
    var call: Int  # which of the calls that share this search
    var calls: Int
    var has_bias: Int
    var has_mask: Int
    var high: Bytes  # [groups, lines, 16, 4]
    var low: Bytes  # [rows, lines * 4]
    var middle: Floats  # [rows] each from here
    var scale: Floats
    var coarse_error: Floats
    var fine_error: Floats
    var size: Floats
    var bias: Floats
    var mask: Bytes
    var query_codes: Codes  # [queries, 2, lines * 4]
    var query_terms: Terms  # [queries]
    var taken: Pointer[Int64, MutUntrackedOrigin]  # [1]: groups that some call has taken
    var thresholds: Floats  # [calls, queries]: each call writes its own row and reads all
    var limits: Floats  # [queries]: the threshold this call uses now
    var heaps: Floats  # [queries, k]: the best lower bounds
    var heap_sizes: Ints  # [queries]
    var found_rows: Ints  # [queries, capacity] each from here
    var found_dots: Ints
    var found_upper: Floats
    var found_counts: Ints  # [queries]
    var settled: Ints  # [queries]: how many of the found were looked at


@always_inline
def products[W: Int](sums: SIMD[DType.int32, W // 4], codes: SIMD[DType.uint8, W], query: SIMD[DType.int8, W]) -> SIMD[DType.int32, W // 4]:
    """Adds to each lane the four products of its bytes. Codes are below 16, so no 16-bit pair saturates."""
    comptime if HAS_VNNI_512 and W == 64:
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", SIMD[DType.int32, W // 4]](sums, codes, query)
    elif CompilationTarget.has_avx2() and W == 32:
        var pairs = llvm_intrinsic["llvm.x86.avx2.pmadd.ub.sw", SIMD[DType.int16, W // 2]](codes, query)
        return sums + llvm_intrinsic["llvm.x86.avx2.pmadd.wd", SIMD[DType.int32, W // 4]](pairs, SIMD[DType.int16, W // 2](1))
    elif CompilationTarget.has_neon_int8_dotprod() and W == 16:
        return llvm_intrinsic["llvm.aarch64.neon.sdot.v4i32.v16i8", SIMD[DType.int32, W // 4]](sums, bitcast[DType.int8, W](codes), query)
    else:
        var lanes = bitcast[DType.int32, W // 4](codes)
        var factors = bitcast[DType.int32, W // 4](query)
        var result = sums
        comptime for byte in range(4):
            comptime up = SIMD[DType.int32, W // 4](24 - 8 * byte)
            result += (lanes << up >> 24) * (factors << up >> 24)
        return result


@always_inline
def broadcast(codes: Codes) -> SIMD[DType.int8, WIDTH]:
    """Four codes of a query, once for every lane."""
    return bitcast[DType.int8, WIDTH](SIMD[DType.int32, LANES](bitcast[DType.int32, 1](codes.unsafe_load[width=4]())))


@always_inline
def pair_products[Q: Int](mut sums: Array[Sums, Q * PARTS], codes: Bytes, factors: Codes, half: Int):
    """What the AVX2 path does with four lines: eight products of pairs, each at most 2 · 15 · 127, fit in 16 bits."""
    comptime Pairs = SIMD[DType.int16, 2 * LANES]
    comptime multiply = "llvm.x86.avx2.pmadd.ub.sw"
    comptime for part in range(PARTS):
        var pairs = Array[Pairs, Q](fill=Pairs(0))
        comptime for line in range(UNROLLED):
            var both = codes.unsafe_offset(line * LINE + part * WIDTH).unsafe_load[width=WIDTH]()
            comptime if part == 0:
                prefetch(codes.unsafe_offset(line * LINE + FETCHED))
            var low, high = both & 15, both >> 4
            comptime for q in range(Q):
                var at = factors.unsafe_offset(q * 2 * half + line * 4)
                pairs[q] += llvm_intrinsic[multiply, Pairs](low, broadcast(at))
                pairs[q] += llvm_intrinsic[multiply, Pairs](high, broadcast(at.unsafe_offset(half)))
        comptime for q in range(Q):
            sums[q * PARTS + part] += llvm_intrinsic["llvm.x86.avx2.pmadd.wd", Sums](pairs[q], Pairs(1))


@always_inline
def coarse[Q: Int](scan: Scan, group: Int, query: Int):
    """Notes the rows of a group whose upper bound reaches the limit, for Q queries from `query` on."""
    var half = scan.lines * 4
    var codes = scan.high.unsafe_offset(group * scan.lines * LINE)
    var factors = scan.query_codes.unsafe_offset(query * 2 * half)
    var sums = Array[Sums, Q * PARTS](fill=Sums(0))
    var line = 0
    comptime if WIDTH == 32:
        while line + UNROLLED <= scan.lines:
            pair_products[Q](sums, codes.unsafe_offset(line * LINE), factors.unsafe_offset(line * 4), half)
            line += UNROLLED
    while line < scan.lines:
        prefetch(codes.unsafe_offset(line * LINE + FETCHED))
        comptime for part in range(PARTS):
            var both = codes.unsafe_offset(line * LINE + part * WIDTH).unsafe_load[width=WIDTH]()
            comptime for q in range(Q):
                var at = factors.unsafe_offset(q * 2 * half + line * 4)
                var sum = products[WIDTH](sums[q * PARTS + part], both & 15, broadcast(at))
                sums[q * PARTS + part] = products[WIDTH](sum, both >> 4, broadcast(at.unsafe_offset(half)))
        line += 1
    comptime for part in range(PARTS):
        var row = group * GROUP + part * LANES
        comptime for q in range(Q):
            note(scan, query + q, row, sums[q * PARTS + part])


@always_inline
def note(scan: Scan, query: Int, row: Int, sums: Sums):
    """Notes the rows from `row` on whose upper bound reaches the limit."""
    ref terms = scan.query_terms.unsafe_offset(query)[]
    var middle = scan.middle.unsafe_offset(row).unsafe_load[width=LANES]()
    var scale = scan.scale.unsafe_offset(row).unsafe_load[width=LANES]()
    var error = scan.coarse_error.unsafe_offset(row).unsafe_load[width=LANES]()
    var size = scan.size.unsafe_offset(row).unsafe_load[width=LANES]()
    var upper = middle * terms.total + (scale * (16 * terms.step)) * sums.cast[DType.float32]()
    upper += error * terms.norm + (size * terms.error + terms.slack)
    if scan.has_bias != 0:
        var bias = scan.bias.unsafe_offset(row).unsafe_load[width=LANES]() * terms.bias
        upper += bias + abs(bias) * BIAS_ERROR
    var hits = Int(pack_bits(upper.ge(scan.limits.unsafe_offset(query)[])))
    if hits == 0:
        return
    var count = Int(scan.found_counts.unsafe_offset(query)[])
    while hits != 0:
        var lane = Int(count_trailing_zeros(hits))
        hits &= hits - 1
        if row + lane >= scan.rows or (scan.has_mask != 0 and scan.mask.unsafe_offset(row + lane)[] == 0):
            continue
        var at = query * scan.capacity + count
        scan.found_rows.unsafe_offset(at)[] = Int32(row + lane)
        scan.found_dots.unsafe_offset(at)[] = sums[lane]
        scan.found_upper.unsafe_offset(at)[] = upper[lane]
        count += 1
    scan.found_counts.unsafe_offset(query)[] = Int32(count)


@always_inline
def low_product(scan: Scan, query: Int, row: Int) -> Int:
    """The product of a query's codes with the low halves of a row's codes."""
    var half = scan.lines * 4
    var codes = scan.low.unsafe_offset(row * half)
    var factors = scan.query_codes.unsafe_offset(query * 2 * half)
    var sums = Sums(0)
    var at = 0
    while at + WIDTH <= half:
        var both = codes.unsafe_offset(at).unsafe_load[width=WIDTH]()
        sums = products[WIDTH](sums, both & 15, factors.unsafe_offset(at).unsafe_load[width=WIDTH]())
        sums = products[WIDTH](sums, both >> 4, factors.unsafe_offset(half + at).unsafe_load[width=WIDTH]())
        at += WIDTH
    var rest = 0
    while at < half:
        var both = Int(codes.unsafe_offset(at)[])
        rest += (both & 15) * Int(factors.unsafe_offset(at)[]) + (both >> 4) * Int(factors.unsafe_offset(half + at)[])
        at += 1
    return Int(sums.reduce_add()) + rest


@always_inline
def refine(scan: Scan, query: Int, at: Int):
    """Replaces the upper bound of a found row by that of all eight bits, and takes its lower bound into account."""
    ref terms = scan.query_terms.unsafe_offset(query)[]
    var row = Int(scan.found_rows.unsafe_offset(at)[])
    var dot = 16 * Int(scan.found_dots.unsafe_offset(at)[]) + low_product(scan, query, row)
    var scale = scan.scale.unsafe_offset(row)[]
    var lowest = scan.middle.unsafe_offset(row)[] - Float32(7.5) * scale
    var score = lowest * terms.total + (scale * terms.step) * Float32(dot)
    var error = scan.fine_error.unsafe_offset(row)[] * terms.norm
    error += scan.size.unsafe_offset(row)[] * terms.error + terms.slack
    if scan.has_bias != 0:
        var bias = scan.bias.unsafe_offset(row)[] * terms.bias
        score += bias
        error += abs(bias) * BIAS_ERROR
    scan.found_upper.unsafe_offset(at)[] = score + error
    scan.found_dots.unsafe_offset(at)[] = REFINED
    push(scan, query, score - error)


def push(scan: Scan, query: Int, lower: Float32):
    """Keeps the k best lower bounds of a query in a heap, the least of them on top."""
    var heap = scan.heaps.unsafe_offset(query * scan.k)
    var count = Int(scan.heap_sizes.unsafe_offset(query)[])
    var at = count
    if count < scan.k:
        while at > 0 and heap.unsafe_offset((at - 1) // 2)[] > lower:
            heap.unsafe_offset(at)[] = heap.unsafe_offset((at - 1) // 2)[]
            at = (at - 1) // 2
        heap.unsafe_offset(at)[] = lower
        count += 1
        scan.heap_sizes.unsafe_offset(query)[] = Int32(count)
    elif lower > heap[]:
        at = 0
        while 2 * at + 1 < count:
            var child = 2 * at + 1
            if child + 1 < count and heap.unsafe_offset(child + 1)[] < heap.unsafe_offset(child)[]:
                child += 1
            if heap.unsafe_offset(child)[] >= lower:
                break
            heap.unsafe_offset(at)[] = heap.unsafe_offset(child)[]
            at = child
        heap.unsafe_offset(at)[] = lower
    if count == scan.k:
        raise_limit(scan, query, heap[])


@always_inline
def raise_limit(scan: Scan, query: Int, limit: Float32):
    if limit > scan.limits.unsafe_offset(query)[]:
        scan.limits.unsafe_offset(query)[] = limit


def settle(scan: Scan, query: Int):
    """Refines the newly found rows that probably raise the threshold, and shares the threshold with the other calls."""
    var count = Int(scan.found_counts.unsafe_offset(query)[])
    ref terms = scan.query_terms.unsafe_offset(query)[]
    for i in range(Int(scan.settled.unsafe_offset(query)[]), count):
        var at = query * scan.capacity + i
        var row = Int(scan.found_rows.unsafe_offset(at)[])
        var error = scan.coarse_error.unsafe_offset(row)[] * terms.norm
        if scan.found_upper.unsafe_offset(at)[] - error >= scan.limits.unsafe_offset(query)[]:
            refine(scan, query, at)
    scan.settled.unsafe_offset(query)[] = Int32(count)
    scan.thresholds.unsafe_offset(scan.call * scan.queries + query)[] = scan.limits.unsafe_offset(query)[]
    for other in range(scan.calls):
        raise_limit(scan, query, scan.thresholds.unsafe_offset(other * scan.queries + query)[])


@always_inline
def pending(scan: Scan, query: Int, at: Int) -> Bool:
    """Whether a found row still has to be refined."""
    if scan.found_dots.unsafe_offset(at)[] == REFINED:
        return False
    return scan.found_upper.unsafe_offset(at)[] >= scan.limits.unsafe_offset(query)[]


@always_inline
def fetch(scan: Scan, query: Int, at: Int):
    """Asks for what `refine` will read of a row, which lies anywhere in memory."""
    if pending(scan, query, at):
        var row = Int(scan.found_rows.unsafe_offset(at)[])
        prefetch(scan.fine_error.unsafe_offset(row))
        for byte in range(0, scan.lines * 4, CACHE_LINE):
            prefetch(scan.low.unsafe_offset(row * scan.lines * 4 + byte))


def sift(scan: Scan, query: Int):
    """Refines what is left, and keeps only the rows that reach the threshold."""
    var base = query * scan.capacity
    var count = Int(scan.found_counts.unsafe_offset(query)[])
    for i in range(min(AHEAD, count)):
        fetch(scan, query, base + i)
    for i in range(count):
        var at = base + i
        if i + AHEAD < count:
            fetch(scan, query, at + AHEAD)
        if pending(scan, query, at):
            refine(scan, query, at)
    var kept = 0
    for i in range(count):
        var upper = scan.found_upper.unsafe_offset(base + i)[]
        if upper >= scan.limits.unsafe_offset(query)[]:
            scan.found_rows.unsafe_offset(base + kept)[] = scan.found_rows.unsafe_offset(base + i)[]
            scan.found_dots.unsafe_offset(base + kept)[] = REFINED
            scan.found_upper.unsafe_offset(base + kept)[] = upper
            kept += 1
    scan.found_counts.unsafe_offset(query)[] = Int32(kept)
    scan.settled.unsafe_offset(query)[] = Int32(kept)


@always_inline
def has_room(scan: Scan, query: Int, rows: Int) -> Bool:
    """Whether so many more rows can be noted, after clearing out if need be."""
    if Int(scan.found_counts.unsafe_offset(query)[]) + rows > scan.capacity:
        sift(scan, query)
    return Int(scan.found_counts.unsafe_offset(query)[]) + rows <= scan.capacity


@export("pattern_search_prepare")
def pattern_search_prepare(call: Pointer[Preparation, MutUntrackedOrigin]) abi("C"):
    """Writes the codes and the terms of each query. Codes of dimensions that do not exist are left as they are."""
    for query in range(call[].queries):
        prepare(call[], query)


@export("pattern_search_abi_version")
def pattern_search_abi_version() abi("C") -> Int:
    return ABI_VERSION


@export("pattern_search_struct_size")
def pattern_search_struct_size(number: Int) abi("C") -> Int:
    """The size of each structure, in the order of `KERNEL.structs`."""
    if number == 0:
        return size_of[Scan]()
    return size_of[Preparation]() if number == 1 else 0


@export("pattern_search_cpu_features")
def pattern_search_cpu_features() abi("C") -> Int:
    return CPU_FEATURES


@export("pattern_search_scan")
def pattern_search_scan(call: Pointer[Scan, MutUntrackedOrigin]) abi("C") -> Int:
    """Fills found_rows, found_upper and found_counts; 1 when there was not room enough. Before the first of the calls that
    share a search, `taken` must be 0 and all thresholds LOWEST."""
    ref scan = call[]
    for query in range(scan.queries):
        scan.limits.unsafe_offset(query)[] = LOWEST
        scan.heap_sizes.unsafe_offset(query)[] = 0
        scan.found_counts.unsafe_offset(query)[] = 0
        scan.settled.unsafe_offset(query)[] = 0
    var groups = (scan.rows + GROUP - 1) // GROUP
    var tile = 4
    while True:
        var group = Int(Atomic[Int64].fetch_add(scan.taken, Int64(scan.piece)))
        var last = min(group + scan.piece, groups)
        if group >= groups:
            break
        while group < last:
            var end = min(group + tile, last)
            for query in range(scan.queries):
                if not has_room(scan, query, (end - group) * GROUP):
                    return 1
            while group < end:
                var query = 0
                while query + SHARED <= scan.queries:
                    coarse[SHARED](scan, group, query)
                    query += SHARED
                while query < scan.queries:
                    coarse[1](scan, group, query)
                    query += 1
                group += 1
            for query in range(scan.queries):
                settle(scan, query)
            tile = min(2 * tile, TILE)
    for query in range(scan.queries):
        sift(scan, query)
    return 0
