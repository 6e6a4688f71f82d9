"""The linear maps of an encoder, where nearly all of its time goes: one object each, so that they can be replaced.

A map takes x, [rows, in], and gives x Wᵀ + b, [rows, out].
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.engines.limits import Backend
from synapse.engines.native.linear import Int8Map
from synapse.errors import InvalidInput, Unavailable

Array = NDArray[np.float32]
Precision = Literal["float32", "int8"]


class Linear(Protocol):
    """One linear map with its bias."""

    def __call__(self, x: Array) -> Array:
        """x, float32[rows, in], becomes a fresh float32[rows, out]."""
        ...


class LinearMaker(Protocol):
    """Makes the maps of an encoder while it is loaded."""

    def __call__(self, weight: Array, bias: Array) -> Linear:
        """The map of weight, float32[out, in], and bias, float32[out]."""
        ...


class FloatLinear:
    """The map in float32."""

    def __init__(self, weight: Array, bias: Array) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self._weight.T
        y += self._bias
        return y


def int8_linear(weight: Array, bias: Array) -> FloatLinear:
    """The map that `Int8Map` has to agree with: its rounded weights, computed in float32."""
    return FloatLinear(Int8Map(weight, bias).weight, bias)


def linear_maker(precision: Precision, backend: Backend, threads: int = 0) -> LinearMaker:
    """What makes an encoder's maps. The kernel computes with so many threads; 0 means one per core.

    Raises:
        InvalidInput: there is no such precision.
        Unavailable: the kernel was asked for, but has no maps of this precision.
    """
    if precision not in ("float32", "int8"):
        raise InvalidInput(f"the precision is float32 or int8, not {precision!r:.40}")
    if precision == "int8":
        return int8_linear if backend == "reference" else partial(Int8Map, threads=threads)
    if backend == "native":
        raise Unavailable(
            "the kernel computes encoders with eight-bit weights only",
            hint='use precision="int8", or the backend auto or reference',
        )
    return FloatLinear
