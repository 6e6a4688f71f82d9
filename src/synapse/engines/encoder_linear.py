"""The linear maps of an encoder, where nearly all of its time goes: one object each, so that they can be replaced.

A map takes x, [rows, in], and gives x Wᵀ + b, [rows, out].
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.engines.native.linear import Int8Map
from synapse.errors import InvalidInput

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


def linear_maker(precision: Precision) -> LinearMaker:
    """What makes an encoder's maps: `int8` are computed by the kernel where it is there.

    Raises:
        InvalidInput: there is no such precision.
    """
    makers: dict[str, LinearMaker] = {"float32": FloatLinear, "int8": Int8Map}
    if precision not in makers:
        raise InvalidInput(f"the precision is {' or '.join(makers)}, not {precision!r:.40}")
    return makers[precision]
