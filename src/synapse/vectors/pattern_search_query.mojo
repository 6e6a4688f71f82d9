"""What the scan of `pattern_search` needs of a query: its own eight-bit codes, and the terms of its scores and bounds.

`kernel.py` says why these bound a score.
"""

from std.math import sqrt

comptime SCORE_SLACK = 2.0**-22  # as in codes.py, for this and the next
comptime SCORE_UNDERFLOW = 2.0**-148
comptime UNDERFLOW = 1e-30  # more than float32 arithmetic on codes loses at its lower end
comptime MARGIN = 1 + 2.0**-20  # more than rounding to float32 takes away
comptime FLOAT64_SLACK = 2.0**-40  # more than float64 loses of a length where w and step·ŵ cancel, per unit of |w|

comptime Codes = Pointer[Int8, MutUntrackedOrigin]
comptime Floats = Pointer[Float32, MutUntrackedOrigin]
comptime Doubles = Pointer[Float64, MutUntrackedOrigin]
comptime Terms = Pointer[Query, MutUntrackedOrigin]


@fieldwise_init
struct Query(Copyable, Movable):
    """What a query contributes to a score and to its bounds."""

    var step: Float32  # of its own codes
    var total: Float32  # step times the sum of its codes
    var norm: Float32  # multiplies a row's error
    var error: Float32  # multiplies a row's size
    var slack: Float32  # is added to every bound
    var bias: Float32  # multiplies a row's bias


@fieldwise_init
struct Preparation(Copyable, Movable):
    """One call of `prepare`. Every field is eight bytes, as in `kernel.PrepareCall`."""

    var queries: Int
    var dimensions: Int
    var lines: Int
    var is_l2: Int
    var is_dot: Int
    var unit: Float64
    var vectors: Floats  # [queries, dimensions]
    var centre: Doubles  # [dimensions]
    var codes: Codes  # [queries, 2, lines * 4]
    var terms: Terms  # [queries]


def prepare(call: Preparation, query: Int):
    """In float64: w is the query in the frame of the codes, step·ŵ what its own codes make of it."""
    var q = call.vectors.unsafe_offset(query * call.dimensions)
    var scale: Float64  # from the query, moved to the frame's origin, to w
    var slack = Float64(UNDERFLOW)
    var bias = Float64(1)
    if call.is_l2 != 0:
        var length = distance(call, q, 0, 0) / call.unit
        bias = 1 / max(1.0, length)
        scale = bias / call.unit
        slack += SCORE_SLACK * length * length * bias + SCORE_UNDERFLOW * bias / (call.unit * call.unit)
    else:
        var length = distance(call, q, 0, 0)
        scale = 1 / length if length > 0 else 1.0
        slack += SCORE_UNDERFLOW / call.unit / (max(length, 1e-300) if call.is_dot != 0 else 1.0)
    var largest = Float64(0)
    for i in range(call.dimensions):
        largest = max(largest, abs(component(call, q, i)) * scale)
    var step = max(largest / 127, 1e-30).cast[DType.float32]()
    var codes = call.codes.unsafe_offset(query * call.lines * 8)
    var half = call.lines * 4
    var total = 0
    for i in range(call.dimensions):
        var level = Int(round(component(call, q, i) * scale / step.cast[DType.float64]()).clamp(-127, 127))
        codes.unsafe_offset(i % 8 // 4 * half + i // 8 * 4 + i % 4)[] = Int8(level)
        total += level
    ref terms = call.terms.unsafe_offset(query)[]
    terms.step = step
    terms.total = step * Float32(total)
    var norm = distance(call, q, 0, 0) * scale
    var error = distance(call, q, query, step.cast[DType.float64]() / scale) * scale + norm * FLOAT64_SLACK
    terms.norm = (norm * MARGIN).cast[DType.float32]()
    terms.error = (error * MARGIN).cast[DType.float32]()
    terms.slack = (min(slack, 1e30) * MARGIN).cast[DType.float32]()
    terms.bias = bias.cast[DType.float32]()


@always_inline
def component(call: Preparation, q: Floats, i: Int) -> Float64:
    """Of a query, moved to the frame's origin for l2; for a product that would add the same to every score."""
    var value = q.unsafe_offset(i)[].cast[DType.float64]()
    return value - call.centre.unsafe_offset(i)[] if call.is_l2 != 0 else value


def distance(call: Preparation, q: Floats, query: Int, step: Float64) -> Float64:
    """The length of a query less `step` times its codes, which are not looked at for a step of 0."""
    var codes = call.codes.unsafe_offset(query * call.lines * 8)
    var half = call.lines * 4
    var squares = Float64(0)
    for i in range(call.dimensions):
        var rest = component(call, q, i)
        if step != 0:
            rest -= step * codes.unsafe_offset(i % 8 // 4 * half + i // 8 * 4 + i % 4)[].cast[DType.float64]()
        squares += rest * rest
    return sqrt(squares)
