"""LoRA layers in an engine's memory, and their part of a linear map.

For a linear map W and the stack of a sequence: y = W x + sum_i w_i s_i B_i (A_i x), with s_i = alpha/r (alpha/sqrt(r)
for rsLoRA) and w_i the layer's weight in the stack (Hu et al., 2021, arXiv:2106.09685; Kalajdzievski, 2023,
arXiv:2312.03732). Layers are never merged into W, so sequences with different stacks share one product with W and are
grouped by layer only inside the small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.models.adapters.adapter import Adapter

Array = NDArray[np.float32]


Factors = Mapping[tuple[int, str], tuple[Array, Array]]


class Layer(Protocol):
    """A layer ready to use: factors[block, projection] = (A [r, in], s B [out, r]), float32. `id` is its sha256."""

    @property
    def id(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def factors(self) -> Factors: ...


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A `Layer` that holds its factors."""

    id: str
    factors: Factors
    bytes: int


def lora_layer(adapter: Adapter) -> LoraLayer:
    """Prepare a checked adapter: the scale s is folded into B once."""
    factors = {
        key: (f.A.astype(np.float32), f.B.astype(np.float32) * np.float32(f.scale))
        for key, f in adapter.factors.items()
    }
    return LoraLayer(adapter.sha256, factors, sum(A.nbytes + B.nbytes for A, B in factors.values()))


Stack = tuple[tuple[Layer, float], ...]


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """The rows of a step's batch that use one layer, and the layer's weight in each of them, [rows, 1]."""

    layer: Layer
    rows: NDArray[np.intp] | slice
    weights: Array


def group_by_layer(stacks: Sequence[tuple[Stack, int]]) -> list[LoraGroup]:
    """Group the rows of a batch by layer.

    Args:
        stacks: for each sequence of the batch in order, its stack and how many rows it has.
    """
    rows: dict[str, list[NDArray[np.intp]]] = {}
    weights: dict[str, list[Array]] = {}
    layers: dict[str, Layer] = {}
    total = 0
    for stack, count in stacks:
        for layer, weight in stack:
            layers[layer.id] = layer
            rows.setdefault(layer.id, []).append(np.arange(total, total + count))
            weights.setdefault(layer.id, []).append(np.full((count, 1), weight, np.float32))
        total += count
    return [
        LoraGroup(layer, _as_slice(np.concatenate(rows[key])), np.concatenate(weights[key]))
        for key, layer in layers.items()
    ]


def _as_slice(rows: NDArray[np.intp]) -> NDArray[np.intp] | slice:
    """A run of consecutive rows as a slice, which NumPy reads and writes without a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) and (np.diff(rows) == 1).all() else rows


def add_lora(y: Array, x: Array, groups: Sequence[LoraGroup], block: int, projection: str) -> None:
    """Add the layers' part to `y` [rows, out], the base model's product with `x` [rows, in], in place."""
    for group in groups:
        factors = group.layer.factors.get((block, projection))
        if factors is not None:
            A, B = factors
            y[group.rows] += ((x[group.rows] @ A.T) * group.weights) @ B.T
