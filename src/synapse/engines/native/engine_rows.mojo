"""What is done to single rows: normalisation, rotation, activation."""

from std.math import exp, fma, sqrt

from engine_matrix import Floats

comptime W = 8
comptime Lane = SIMD[DType.float32, W]


def rms_norm(x: Floats, weight: Floats, size: Int, epsilon: Float32, target: Floats, room: Int):
    """Root mean square normalisation of x [size] (Zhang and Sennrich, 2019, arXiv:1910.07467).

    What follows in target up to `room` becomes zero: in a sequence that overflowed, padding does not stay zero.
    """
    var squares = Array[Lane, 4](fill=Lane(0))
    var at = 0
    while at + 4 * W <= size:
        comptime for i in range(4):
            var v = x.unsafe_offset(at + W * i).unsafe_load[width=W]()
            squares[i] = fma(v, v, squares[i])
        at += 4 * W
    var total = ((squares[0] + squares[1]) + (squares[2] + squares[3])).reduce_add()
    while at < size:
        total += x.unsafe_offset(at)[] * x.unsafe_offset(at)[]
        at += 1
    var factor = 1 / sqrt(total / Float32(size) + epsilon)
    at = 0
    while at + W <= size:
        var v = x.unsafe_offset(at).unsafe_load[width=W]()
        target.unsafe_offset(at).unsafe_store(v * factor * weight.unsafe_offset(at).unsafe_load[width=W]())
        at += W
    while at < size:
        target.unsafe_offset(at)[] = x.unsafe_offset(at)[] * factor * weight.unsafe_offset(at)[]
        at += 1
    while at < room:
        target.unsafe_offset(at)[] = 0
        at += 1


def rotate(x: Floats, cos: Floats, sin: Floats, half: Int):
    """Rotary embedding in place: x[i] turns with x[i + half] by the angle of i (Su et al., 2021, arXiv:2104.09864)."""
    var at = 0
    while at + W <= half:
        var a = x.unsafe_offset(at).unsafe_load[width=W]()
        var b = x.unsafe_offset(half + at).unsafe_load[width=W]()
        var c = cos.unsafe_offset(at).unsafe_load[width=W]()
        var s = sin.unsafe_offset(at).unsafe_load[width=W]()
        x.unsafe_offset(at).unsafe_store(a * c - b * s)
        x.unsafe_offset(half + at).unsafe_store(b * c + a * s)
        at += W
    while at < half:
        var a, b = x.unsafe_offset(at)[], x.unsafe_offset(half + at)[]
        var c, s = cos.unsafe_offset(at)[], sin.unsafe_offset(at)[]
        x.unsafe_offset(at)[] = a * c - b * s
        x.unsafe_offset(half + at)[] = b * c + a * s
        at += 1


@always_inline
def silu(x: Lane) -> Lane:
    """x / (1 + exp(-x)). Where exp overflows, the result is the right zero."""
    return x / (1 + exp(-x))


@always_inline
def gated(gate: Floats, up: Floats, size: Int):
    """gate = silu(gate) * up, for a multiple of 8 numbers (SwiGLU: Shazeer, 2020, arXiv:2002.05202)."""
    for at in range(0, size, W):
        var g = gate.unsafe_offset(at).unsafe_load[width=W]()
        gate.unsafe_offset(at).unsafe_store(silu(g) * up.unsafe_offset(at).unsafe_load[width=W]())


@always_inline
def add(x: Floats, y: Floats, size: Int):
    """x += y, for a multiple of 8 numbers."""
    for at in range(0, size, W):
        var sum = x.unsafe_offset(at).unsafe_load[width=W]() + y.unsafe_offset(at).unsafe_load[width=W]()
        x.unsafe_offset(at).unsafe_store(sum)
