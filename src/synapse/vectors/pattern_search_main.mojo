"""A command around the kernel, for a machine that has nothing else: `pattern_search [rows [dimensions]]`.

It fills an index with pseudo-random codes, scans it, compares the rows found with a plain loop, and prints how long a scan
took. The status is 0 when the ten best rows were all found, 1 when not, 2 when the arguments are wrong or memory is short.
"""

from std.ffi import external_call
from std.math import sqrt
from std.memory import bitcast

from pattern_search import GROUP, LOWEST, Scan, pattern_search_scan
from pattern_search_query import Query

comptime K = 10
comptime SCANS = 20
comptime Address = Pointer[UInt8, MutUntrackedOrigin]


def allocate(count: Int) -> Address:
    return external_call["calloc", Address](count + 64, Int(1))


def floats(count: Int, value: Float32) -> Pointer[Float32, MutUntrackedOrigin]:
    var array = allocate(count * 4).unsafe_bitcast[Float32]()
    for i in range(count):
        array.unsafe_offset(i)[] = value
    return array


def fill(array: Address, count: Int, seed: UInt64):
    """Writes the bytes of a xorshift generator (Marsaglia, 2003)."""
    var state = seed
    for i in range(count):
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        array.unsafe_offset(i)[] = UInt8(state >> 32 & 255)


def microseconds() -> Int:
    var time = Array[Int, 2](fill=0)
    _ = external_call["clock_gettime", Int32](Int32(1), Pointer(to=time))
    return time[0] * 1000000 + time[1] // 1000


def plain_score(scan: Scan, row: Int) -> Int:
    """The product of the query's codes with all eight bits of a row's."""
    var half = scan.lines * 4
    var group = scan.high.unsafe_offset(row // GROUP * scan.lines * 64 + row % GROUP * 4)
    var total = 0
    for i in range(half):
        var high = Int(group.unsafe_offset(i // 4 * 64 + i % 4)[])
        var low = Int(scan.low.unsafe_offset(row * half + i)[])
        total += ((high & 15) * 16 + (low & 15)) * Int(scan.query_codes.unsafe_offset(i)[])
        total += ((high >> 4) * 16 + (low >> 4)) * Int(scan.query_codes.unsafe_offset(half + i)[])
    return total


def found_the_best(scan: Scan) -> Bool:
    """Whether fewer than K rows that were not found are better than the worst of the best K found."""
    var found = Int(scan.found_counts[])
    var is_found = allocate(scan.rows)
    for i in range(found):
        is_found.unsafe_offset(Int(scan.found_rows.unsafe_offset(i)[]))[] = 1
    for row in range(scan.rows):
        if is_found.unsafe_offset(row)[] == 0:
            var score, better = plain_score(scan, row), 0
            for i in range(found):
                if plain_score(scan, Int(scan.found_rows.unsafe_offset(i)[])) > score:
                    better += 1
            if better < min(K, scan.rows):
                return False
    return True


@export("pattern_search_main")
def pattern_search_main(argc: Int32, argv: Pointer[Address, MutUntrackedOrigin]) abi("C") -> Int32:
    var rows, dimensions = 200000, 384
    if argc > 1:
        rows = Int(external_call["atoi", Int32](argv.unsafe_offset(1)[]))
    if argc > 2:
        dimensions = Int(external_call["atoi", Int32](argv.unsafe_offset(2)[]))
    if argc > 3 or rows < 1 or rows > 100000000 or dimensions < 1 or dimensions > 4096:
        print_line("usage: pattern_search [rows up to 100000000 [dimensions up to 4096]]\n\0", 0, 0, 0)
        return 2
    return check(rows, dimensions)


def check(rows: Int, dimensions: Int) -> Int32:
    var lines, padded = (dimensions + 7) // 8, (rows + GROUP - 1) // GROUP * GROUP
    var high, low = allocate(padded * lines * 4), allocate(padded * lines * 4)
    if Int(high) == 0 or Int(low) == 0:
        print_line("not enough memory\n\0", 0, 0, 0)
        return 2
    fill(high, padded * lines * 4, 88172645463325252)
    fill(low, padded * lines * 4, 1181783497276652981)
    var codes = allocate(lines * 8)
    fill(codes, lines * 8, 2862933555777941757)
    var squares = 0
    for i in range(lines * 8):
        var code = Int(codes.unsafe_bitcast[Int8]().unsafe_offset(i)[]) // 2
        codes.unsafe_bitcast[Int8]().unsafe_offset(i)[] = Int8(code)
        squares += code * code
    var total = 0
    for i in range(lines * 8):
        total += Int(codes.unsafe_bitcast[Int8]().unsafe_offset(i)[])
    var query = allocate(64).unsafe_bitcast[Query]()  # not a local variable: those end with their last use by name
    query[] = Query(1, Float32(total), sqrt(Float32(squares)) * 1.0001, 0, 1, 0)
    var rounding = sqrt(Float32(lines * 8)) * 7.5  # a low half is at most 7.5 from the middle
    var room = padded + 1024
    var scan = Scan(
        lines, rows, padded // GROUP, 1, min(K, rows), room, 0, 1, 0, 0, high, low,
        floats(padded, 7.5), floats(padded, 1), floats(padded, rounding), floats(padded, 0), floats(padded, 0),
        floats(1, 0), high, codes.unsafe_bitcast[Int8](), query,
        allocate(8).unsafe_bitcast[Int64](), floats(1, LOWEST), floats(1, LOWEST), floats(K, 0), integers(1), integers(room), integers(room),
        floats(room, 0), integers(1), integers(1),
    )
    var best = Int.MAX
    for _ in range(SCANS):
        scan.taken[] = 0
        scan.thresholds[] = LOWEST
        var start = microseconds()
        _ = pattern_search_scan(Pointer(to=scan).unsafe_origin_cast[MutUntrackedOrigin]())
        best = min(best, microseconds() - start)
    if not found_the_best(scan):
        print_line("wrong: one of the best rows was not found\n\0", 0, 0, 0)
        return 1
    print_line("%ld rows of %ld dimensions: the ten best are found in %ld us\n\0", rows, dimensions, best)
    return 0


def integers(count: Int) -> Pointer[Int32, MutUntrackedOrigin]:
    return allocate(count * 4).unsafe_bitcast[Int32]()


def print_line(format: StaticString, first: Int, second: Int, third: Int):
    _ = external_call["printf", Int32](format.unsafe_ptr(), first, second, third)
